//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// What a node with NVIDIA GPUs is, and why it is not ready for confidential containers.
#[derive(Debug, Parser)]
#[command(name = "ccnode", version, arg_required_else_help = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the host and every NVIDIA device: driver, IOMMU group, VFIO node, power, what the model can do.
    ///
    /// Reads only: no device is opened, woken or reset, so this is safe while virtual machines run. What a model can do comes
    /// from its ids; whether a device is in CC mode now is not asked. Ends with 0 also when there is no GPU.
    Probe(ProbeArgs),
}

/// Flags of `ccnode probe`.
#[derive(Debug, clap::Args)]
pub struct ProbeArgs {
    /// Print JSON (schema 1, see docs/probe-json.md) instead of a table.
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Read sys, proc and dev below this directory: a recorded tree, or a host's root mounted into a container.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_host_is_probed_by_default() {
        let Args { command: Command::Probe(probe) } = Args::try_parse_from(["ccnode", "probe"]).unwrap();
        assert_eq!((probe.json, probe.root), (false, PathBuf::from("/")));
        assert!(Args::try_parse_from(["ccnode"]).is_err());
        assert!(Args::try_parse_from(["ccnode", "probe", "--jsn"]).is_err());
    }
}
