//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_core::health::HealthArgs;
use agent_core::logs::LogArgs;
use agent_core::work::Work;
use clap::{Args, Parser, Subcommand};
use hw_probe::Bdf;

use crate::binding::{Policy, Switches};
use crate::selection::Selection;

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
    /// Show what `bind --all` would do and why, and do nothing.
    Plan(PlanArgs),
    /// What the operator runs before vfio-manager: NVIDIA's and nouveau's modules out of the kernel; no binding is touched.
    ///
    /// A program that is called by this name needs no such word.
    DriverManager(DriverManagerArgs),
}

/// `driver-manager`
#[derive(Clone, Debug, Args)]
pub struct DriverManagerArgs {
    /// What to do.
    #[arg(value_enum)]
    pub command: DriverCommand,
    /// Where the host's root file system is mounted, for its nvidia-smi; /host where it is not given.
    #[arg(long, env = "HOST_ROOT", value_name = "DIR", value_parser = agent_core::text::path)]
    pub host_root: Option<PathBuf>,
    /// Name of this node, whose pauses left by another driver-manager are lifted; none are where it is not given.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Kubeconfig where there is no service account.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE", value_parser = agent_core::text::path)]
    pub kubeconfig: Option<PathBuf>,
}

/// What `driver-manager` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum DriverCommand {
    /// Take NVIDIA's and nouveau's modules out of the kernel, and clear away what a driver container left.
    UninstallDriver,
    /// Tell what uninstall_driver would do, and whether it could.
    PreflightCheck,
}

impl Cli {
    /// The command line of a program that may be called `driver-manager`, its subcommand.
    pub fn from_words(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut words: Vec<OsString> = words.into_iter().collect();
        let is_driver_manager =
            words.first().is_some_and(|name| Path::new(name).file_name().is_some_and(|name| name == "driver-manager"));
        // Of the program itself.
        let of_all = |word: &OsString| word == "--version" || word == "-V";
        if is_driver_manager && !words.get(1).is_some_and(of_all) {
            words.insert(1, "driver-manager".into());
        }
        Self::try_parse_from(words)
    }
}

/// Which devices are wanted on VFIO.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Bind NVSwitches too, for virtual machines that get the whole baseboard: true, false, or auto (where the node is in protected PCIe, or is to be, and all its GPUs and switches can).
    #[arg(long, env = "BIND_NVSWITCHES", value_parser = switches, default_value = "auto", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub bind_nvswitches: Switches,
    /// Take GPUs away from a driver such as nvidia or nouveau; without it they are refused.
    #[arg(long, env = "VFIO_TAKE_FROM_DRIVER")]
    pub take_from_driver: bool,
    /// Only GPUs with one of these addresses, models and NUMA nodes: bdf=0000:41:00.0, model=H100 (or model=10de:2330), numa=0, several with commas.
    #[arg(long, env = "VFIO_SELECT", default_value = "", hide_default_value = true, value_name = "SELECTION")]
    pub select: Selection,
    /// Whether the GPU Operator's validator looks at the GPUs afterwards; auto: where HOST_ROOT is set and no status files are written.
    #[arg(long, env = "VFIO_OPERATOR", value_enum, default_value_t = UnderOperator::Auto, value_name = "WHETHER")]
    pub operator: UnderOperator,
    /// File with the wanted confidential-computing mode in its first line, where something writes the node's label to one; it goes before what cc-manager's devices.json says.
    #[arg(long, env = "VFIO_CC_MODE_FILE", value_name = "FILE")]
    pub cc_mode_file: Option<PathBuf>,
}

impl PolicyArgs {
    /// The policy for all devices.
    pub fn policy(&self, host: &HostArgs, writes_status_files: bool) -> Policy {
        let Self { bind_nvswitches, take_from_driver, select, operator, cc_mode_file: _ } = self;
        let has_host_root = host.host_root.as_ref().is_some_and(|path| !path.as_os_str().is_empty());
        Policy {
            nvswitches: *bind_nvswitches,
            take_from_driver: *take_from_driver,
            only: None,
            selection: select.clone(),
            under_operator: match operator {
                UnderOperator::Yes => true,
                UnderOperator::No => false,
                // The operator's pod sets it (operator-contract section 6.1), and its validator writes the files.
                UnderOperator::Auto => has_host_root && !writes_status_files,
            },
        }
    }
}

/// Whether the GPU Operator runs this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UnderOperator {
    /// By what the pod looks like.
    Auto,
    /// Yes.
    Yes,
    /// No.
    No,
}

/// `plan`
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// Print JSON.
    #[arg(long, env = "VFIO_PLAN_JSON")]
    pub json: bool,
    /// The policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
}

/// Where the node's files are.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// Where the host's root file system is mounted, for its modprobe; /host is tried when it is not there.
    #[arg(long, env = "HOST_ROOT", value_name = "DIR", value_parser = agent_core::text::path)]
    pub host_root: Option<PathBuf>,
    /// Directory of the files and locks that the agents exchange.
    #[arg(long, env = "CCNODE_STATE_DIR", default_value = agent_core::state::STATE_DIR, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Directory of the validator's status files, run/nvidia/validations on the host where it is not given.
    #[arg(long, env = "VFIO_VALIDATIONS_DIR", value_name = "DIR")]
    pub validations_dir: Option<PathBuf>,
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
pub struct BindArgs {
    /// Which devices.
    #[command(flatten)]
    pub which: Which,
    /// The policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
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
    /// Give back NVSwitches too: true, false, or auto (those that were bound by vfio-manager).
    #[arg(long, env = "BIND_NVSWITCHES", value_parser = switches, default_value = "auto", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub unbind_nvswitches: Switches,
    /// Exit with 1 when any device is not as wanted.
    #[arg(long, env = "VFIO_MANAGE_STRICT")]
    pub strict: bool,
    /// Longest time for all devices together: as a hook it must be well within the 30 s that its pod has to end.
    #[arg(long, env = "VFIO_UNBIND_DEADLINE", default_value = "20s", value_parser = agent_core::text::duration, value_name = "TIME")]
    pub deadline: Duration,
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
    /// The policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Bind, or only say what is and what would be done.
    #[arg(long, env = "CCNODE_MODE", value_enum, default_value_t = Work::Enforce)]
    pub mode: Work,
    /// Bind once and exit, with 1 when any device is not as wanted.
    #[arg(long, env = "VFIO_ONCE")]
    pub once: bool,
    /// Write the status files of the operator's validator (workload-type, vfio-pci-ready) in its place: only where it does not run.
    #[arg(long, env = "VFIO_STATUS_FILES")]
    pub status_files: bool,
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

/// The forms that the reference's flag library takes as a boolean, and `auto`. Its default is false; an empty variable is none.
fn switches(text: &str) -> Result<Switches, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Switches::Yes),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Switches::No),
        "" | "auto" => Ok(Switches::Auto),
        _ => Err(format!("{text:?} is none of true, false and auto")),
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
            "bind --all --host-root=",
            "plan --json --select bdf=0000:41:00.0,numa=1",
        ] {
            assert!(parse(words).is_ok(), "{words}");
        }
    }

    #[test]
    fn switches_are_a_boolean_as_the_reference_takes_it_or_auto() {
        for (words, wanted) in [
            ("bind --all", Switches::Auto),
            ("bind --all --bind-nvswitches", Switches::Yes),
            ("bind --all --bind-nvswitches=T", Switches::Yes),
            ("bind --all --bind-nvswitches=0", Switches::No),
            ("bind --all --bind-nvswitches=auto", Switches::Auto),
            ("bind --all --bind-nvswitches=", Switches::Auto),
        ] {
            let Command::Bind(args) = parse(words).unwrap().command else { unreachable!("{words}") };
            assert_eq!(args.policy.bind_nvswitches, wanted, "{words}");
        }
    }

    #[test]
    fn the_init_containers_command_line_is_known_by_the_programs_name() {
        let command = |words: &str| {
            let cli = Cli::from_words(words.split_whitespace().map(Into::into)).ok()?;
            let Command::DriverManager(args) = cli.command else { return None };
            Some(args.command)
        };
        for (words, wanted) in [
            ("driver-manager uninstall_driver", Some(DriverCommand::UninstallDriver)),
            ("/usr/bin/driver-manager preflight_check", Some(DriverCommand::PreflightCheck)),
            ("vfio-manager driver-manager uninstall_driver", Some(DriverCommand::UninstallDriver)),
            ("driver-manager --node-name n uninstall_driver", Some(DriverCommand::UninstallDriver)),
            ("driver-manager bind --all", None),
            ("vfio-manage bind --all", None),
        ] {
            assert_eq!(command(words), wanted, "{words}");
        }
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        let cli = Cli::command();
        cli.clone().debug_assert();
        // What a one-shot command is to act on has none in the contract either (operator-contract section 6.4).
        let exempt = ["help", "version", "all", "device_id", "command"];
        for command in std::iter::once(&cli).chain(cli.get_subcommands()) {
            for arg in command.get_arguments().filter(|arg| !exempt.contains(&arg.get_id().as_str())) {
                assert!(arg.get_env().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn the_operator_is_known_by_the_host_root_that_it_sets() {
        for (words, writes_status_files, under_operator) in [
            ("bind --all", false, false),
            ("bind --all --host-root /host", false, true),
            ("bind --all --host-root /host", true, false),
            ("bind --all --host-root /host --operator no", false, false),
            ("bind --all --operator yes", true, true),
        ] {
            let Command::Bind(args) = parse(words).unwrap().command else { unreachable!("{words}") };
            let policy = args.policy.policy(&args.host, writes_status_files);
            assert_eq!(policy.under_operator, under_operator, "{words}");
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
            "bind --all --bind-nvswitches=perhaps",
            "plan --select 41:00.0",
            "frob",
            "",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
