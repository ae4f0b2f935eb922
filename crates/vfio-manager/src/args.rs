//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use agent_core::health::HealthArgs;
use agent_core::logs::LogArgs;
use clap::{Args, Parser, Subcommand};
use hw_probe::Bdf;

/// Binds GPUs, and what shares their IOMMU groups, to VFIO and keeps them bound
///
/// A device that is right is not touched, and one that a virtual machine holds is never taken away from it.
#[derive(Debug, Parser)]
#[command(name = "vfio-manager", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Logs.
    #[command(flatten)]
    pub logs: LogArgs,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bind devices to VFIO once.
    Bind(BindArgs),
    /// Give idle devices back the drivers that they had; held devices are left bound.
    Unbind(UnbindArgs),
    /// Bind devices to VFIO, stay, and keep them bound.
    Run(RunArgs),
}

/// Where the node's files are.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// Where the host's root file system is mounted, for its modprobe; /host is tried when it is not there.
    #[arg(long, env = "HOST_ROOT", value_name = "DIR")]
    pub host_root: Option<PathBuf>,
    /// Directory of the files and locks that the agents exchange.
    #[arg(long, env = "CCNODE_STATE_DIR", default_value = agent_core::state::STATE_DIR, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Longest wait for another agent that works on a device, for its lock: 2m for bind, 5s for unbind, 1s a look for run.
    #[arg(long, env = "VFIO_LOCK_TIMEOUT", value_parser = agent_core::text::duration, value_name = "TIME")]
    pub lock_timeout: Option<Duration>,
    /// Longest wait for one write to a driver's bind or unbind file.
    #[arg(long, env = "VFIO_WRITE_TIMEOUT", default_value = "20s", value_parser = agent_core::text::duration, value_name = "TIME")]
    pub write_timeout: Duration,
}

/// By which file the daemon is known.
#[derive(Clone, Debug, Args)]
pub struct LockArgs {
    /// File that `run` keeps locked in its own container, so that `unbind --all` there is known to be its pod's hook.
    #[arg(long, env = "VFIO_MANAGER_LOCK", default_value = "/run/vfio-manager.lock", value_name = "FILE")]
    pub daemon_lock: PathBuf,
}

/// Exactly one of all devices and one device.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// All GPUs of the node.
    #[arg(long, short)]
    pub all: bool,
    /// The device at this PCI address.
    #[arg(long, short, value_name = "BDF")]
    pub device_id: Option<Bdf>,
}

/// `bind`
#[derive(Clone, Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct BindArgs {
    /// Which devices.
    #[command(flatten)]
    pub which: Which,
    /// Bind NVSwitches too, for virtual machines that get the whole baseboard.
    #[arg(long, env = "BIND_NVSWITCHES", value_parser = lenient_bool, default_value = "false", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub bind_nvswitches: bool,
    /// Take GPUs away from a driver such as nvidia or nouveau; without it they are refused.
    #[arg(long, env = "VFIO_TAKE_FROM_DRIVER")]
    pub take_from_driver: bool,
    /// Exit with 1 when any device is not as wanted; without it `bind --all` exits with 0 as the contract fixes.
    #[arg(long, env = "VFIO_MANAGE_STRICT")]
    pub strict: bool,
    /// Show what would be done, and do nothing.
    #[arg(long, env = "VFIO_DRY_RUN")]
    pub dry_run: bool,
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
}

/// `unbind`
#[derive(Clone, Debug, Args)]
pub struct UnbindArgs {
    /// Which devices.
    #[command(flatten)]
    pub which: Which,
    /// Give back NVSwitches too.
    #[arg(long, env = "BIND_NVSWITCHES", value_parser = lenient_bool, default_value = "false", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub unbind_nvswitches: bool,
    /// Exit with 1 when any device is not as wanted.
    #[arg(long, env = "VFIO_MANAGE_STRICT")]
    pub strict: bool,
    /// Show what would be done, and do nothing.
    #[arg(long, env = "VFIO_DRY_RUN")]
    pub dry_run: bool,
    /// The daemon's lock.
    #[command(flatten)]
    pub lock: LockArgs,
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
}

/// `run`
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Bind NVSwitches too, for virtual machines that get the whole baseboard.
    #[arg(long, env = "BIND_NVSWITCHES", value_parser = lenient_bool, default_value = "false", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub bind_nvswitches: bool,
    /// Take GPUs away from a driver such as nvidia or nouveau; without it they are refused.
    #[arg(long, env = "VFIO_TAKE_FROM_DRIVER")]
    pub take_from_driver: bool,
    /// Bind once and exit, with 1 when any device is not as wanted.
    #[arg(long, env = "VFIO_ONCE")]
    pub once: bool,
    /// Time between looks at the node when the kernel reports no change.
    #[arg(long, env = "VFIO_POLL_INTERVAL", default_value = "60s", value_parser = agent_core::text::duration, value_name = "TIME")]
    pub poll_interval: Duration,
    /// Health and metrics endpoint.
    #[command(flatten)]
    pub health: HealthArgs,
    /// The daemon's lock.
    #[command(flatten)]
    pub lock: LockArgs,
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
}

/// The forms that the reference's flag library takes as a boolean.
fn lenient_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("vfio-manage").chain(words.split_whitespace()))
    }

    #[test]
    fn the_references_command_lines_are_understood() {
        for words in [
            "bind --all",
            "bind -a",
            "bind -d 0000:41:00.0 --host-root /host",
            "unbind --all",
            "bind --all --bind-nvswitches",
        ] {
            assert!(parse(words).is_ok(), "{words}");
        }
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        let cli = Cli::command();
        cli.clone().debug_assert();
        // What a one-shot command is to act on has none in the contract either (operator-contract section 6.4).
        let exempt = ["help", "version", "all", "device_id"];
        for command in std::iter::once(&cli).chain(cli.get_subcommands()) {
            for arg in command.get_arguments().filter(|arg| !exempt.contains(&arg.get_id().as_str())) {
                assert!(arg.get_env().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn bad_usage_is_an_error() {
        for words in [
            "bind",
            "unbind",
            "bind --all -d 0000:41:00.0",
            "bind -d 41:00.0",
            "bind --all --write-timeout 0s",
            "frob",
            "",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
