//! The command line.

use std::path::PathBuf;
use std::time::Duration;

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
    /// from its ids; whether a device is in CC mode now is asked with --registers only, and of NVML where the NVIDIA driver has the
    /// GPU and this build can. Ends with 0 also when there is no GPU.
    Probe(ProbeArgs),
    /// Tell what keeps this node from running confidential GPU pods, with the cure of each.
    ///
    /// Reads only, as `probe` does; besides, the kubelet is asked for a pod that does not exist. Ends with 0 when no check failed,
    /// with 1 when one did, with 2 when the checks could not run.
    Doctor(DoctorArgs),
    /// Tell in one line whether this node is what it is wanted to be, and what to do if not; then a table of its devices.
    ///
    /// Reads only: host files, processes and the node object; no device is opened, woken or reset. Ends with 0 when every device
    /// is verified in the wanted mode and the labels say so, with 1 when not or not yet, with 2 when it cannot be told.
    ///
    /// The host is outside the trusted base: that a node is ready is a hint for the scheduler, and only attestation inside the
    /// virtual machine is proof.
    Status(crate::status::StatusArgs),
    /// Show every node with NVIDIA GPUs in one line: what it is, what it is wanted to be, and why it is not.
    ///
    /// For any machine with a kubeconfig, by the node objects alone and with its user's rights (list nodes). Ends with 0 when every node is
    /// ready, with 1 when one is not, with 2 when they could not be listed.
    Fleet(crate::status::fleet::FleetArgs),
    /// Show, plan and change the confidential-computing mode of GPUs and NVSwitches, without Kubernetes.
    Mode {
        /// What to do.
        #[command(subcommand)]
        command: crate::mode::args::ModeCommand,
    },
    /// Pack everything that `probe` and `doctor` look at into one archive, without secrets and names, for somebody else to look at.
    ///
    /// Reads only, as they do. `probe --root` and `doctor --root` replay the archive, and `cargo lab run --topology` builds a virtual node
    /// like it. docs/bundle.md says what is in it and what is taken out; look through it before you send it.
    Bundle(BundleArgs),
    /// Take away what the agents have left on this node once they are gone for good: annotations, files, paused labels.
    ///
    /// Changes no mode and no binding, and keeps the label of the wanted mode. It is refused while an agent runs here or a device is
    /// being changed. Ends with 0 when all is clean, with 1 when something could not be removed, with 2 when nothing was done.
    Cleanup(crate::cleanup::CleanupArgs),
    /// List the pods that have GPUs of a node and, with --yes, evict them, as far as their disruption budgets allow.
    ///
    /// For any machine with a kubeconfig: pods are seen and evicted with its user's rights. Ends with 0 when none is left or none was to
    /// be evicted, with 1 when one could not be, with 2 when they could not be listed.
    DrainHolders(crate::drain::DrainArgs),
    /// Print the completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff.
    Man,
}

/// Flags of `ccnode probe`.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct ProbeArgs {
    /// Print JSON (schema 1, see docs/probe-json.md) instead of a table.
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Print the same as YAML, whatever else is asked for.
    #[arg(long, conflicts_with_all = ["watch", "nfd"])]
    pub yaml: bool,
    /// After that, print each change as it happens, until interrupted; with --json one object on a line.
    #[arg(long, conflicts_with = "nfd")]
    pub watch: bool,
    /// With --watch: how often to look even if the kernel tells of no event (such as 500ms, 10s, 1m).
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = agent_core::text::duration)]
    pub poll: Duration,
    /// Also read three registers of each device that is idle and awake, by BAR0: which silicon, whether it has booted, in which mode.
    #[arg(long, conflicts_with_all = ["watch", "nfd"])]
    pub registers: bool,
    /// Write the facts as a feature file of Node Feature Discovery instead of printing them.
    #[arg(long)]
    pub nfd: bool,
    /// With --nfd: the folder that Node Feature Discovery reads.
    #[arg(long, value_name = "DIR", default_value = crate::nfd::FOLDER)]
    pub nfd_dir: PathBuf,
    /// Read sys, proc and dev below this directory: a recorded tree, or a host's root mounted into a container; or replay this bundle.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

/// Flags of `ccnode doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print JSON (schema 1, see docs/doctor.md) instead of a table.
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Print what this check is about, instead of running any.
    #[arg(long, value_name = "CHECK")]
    pub explain: Option<String>,
    /// Read sys, proc, dev, etc and var below this directory: a recorded tree, or a host's root mounted into a container; or replay this
    /// bundle.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

/// Flags of `ccnode bundle`.
#[derive(Debug, clap::Args)]
pub struct BundleArgs {
    /// The archive to write; one that is there is replaced. Only its owner can read it.
    #[arg(long, value_name = "FILE", default_value = "ccnode-bundle.tar.gz")]
    pub output: PathBuf,
    /// Read sys, proc, dev, etc and var below this directory: a recorded tree, or a host's root mounted into a container.
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
        let Args { command: Command::Probe(probe) } = Args::try_parse_from(["ccnode", "probe"]).unwrap() else {
            panic!("another command");
        };
        assert_eq!((probe.json, probe.yaml, probe.watch, probe.nfd), (false, false, false, false));
        assert_eq!((probe.root, probe.poll), (PathBuf::from("/"), Duration::from_secs(10)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            &["ccnode"][..],
            &["ccnode", "probe", "--jsn"],
            &["ccnode", "probe", "--nfd", "--yaml"],
            &["ccnode", "probe", "--yaml", "--watch"],
            &["ccnode", "probe", "--nfd", "--watch"],
            &["ccnode", "probe", "--registers", "--watch"],
            &["ccnode", "bundle", "--json"],
            &["ccnode", "probe", "--poll", "soon"],
            &["ccnode", "completions", "cmd.exe"],
        ] {
            assert!(Args::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
