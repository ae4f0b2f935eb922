//! The command line (operator-contract section 5.3, and what is ours).

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_core::health::HealthArgs;
use agent_core::logs::LogArgs;
use agent_core::state::STATE_DIR;
use agent_core::text::{duration, path};
use agent_core::work::Work;
use anyhow::Context;
use gpu_firmware::Mode;

/// Puts all GPUs of this node into the confidential-computing mode that the node's label nvidia.com/cc.mode asks for.
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "cc-manager", version, about, max_term_width = 120)]
pub struct Args {
    /// Mode when the node has no label nvidia.com/cc.mode: on, off, devtools or ppcie; empty does nothing then. On a
    /// host without TEE (SEV-SNP, TDX) it counts as off
    #[arg(short = 'm', long, env = "DEFAULT_CC_MODE", value_name = "MODE", default_value = "on")]
    pub default_cc_mode: String,

    /// Name of the node that this agent runs on (required)
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// Kubeconfig file, for runs outside a pod; a pod's service account comes first
    #[arg(long, env = "KUBECONFIG", value_name = "PATH", value_parser = path)]
    pub kubeconfig: Option<PathBuf>,

    /// File that is created after the first attempt to apply a mode, even a failed one; empty creates none
    #[arg(long, env = "CC_READINESS_FILE", value_name = "PATH", value_parser = path, default_value_os_t = crate::default_readiness_file())]
    pub readiness_file: PathBuf,

    /// Namespace of the operator's components; by default that of this pod's service account, else gpu-operator
    #[arg(long, env = "OPERATOR_NAMESPACE", value_name = "NAME")]
    pub operator_namespace: Option<String>,

    /// Whether to pause the operator's components during a change; any text but true (in whatever case) pauses none
    #[arg(long, env = "EVICT_OPERATOR_COMPONENTS", value_name = "true|false", default_value = "true")]
    pub evict_operator_components: String,

    /// The modes that may be asked for, separated by commas
    #[arg(long, env = "CCNODE_ALLOWED_MODES", value_name = "MODES", default_value = "off,on,devtools,ppcie")]
    pub allowed_modes: String,

    /// Whether to work, or only to publish in the annotation ccnode.dev/cc-status what is and what would be done
    #[arg(long, env = "CCNODE_MODE", value_name = "enforce|observe", default_value = "enforce")]
    pub mode: Work,

    /// What to do with a node that was ready for confidential pods and whose host has no TEE any more: leave it as it is, as
    /// a failure, or go by the default, which is then off
    #[arg(long, env = "CCNODE_TEE_MISSING", value_name = "hold|off", default_value = "off")]
    pub tee_missing: TeeMissing,

    /// Least time between a change that reset GPUs and the next change to another mode
    #[arg(long, env = "CCNODE_HOLD_DOWN", value_name = "TIME", default_value = "1m", value_parser = duration)]
    pub hold_down: Duration,

    /// How often to look, while a GPU is in use, whether it has been let go; it is then verified again
    #[arg(long, env = "CCNODE_RELEASE_POLL", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub release_poll: Duration,

    /// Socket of the kubelet's pod-resources service, which tells the pods that have GPUs; empty, or where it is not there (under
    /// the operator), pods are not looked at
    #[arg(long, env = "CCNODE_POD_RESOURCES", value_name = "PATH", value_parser = path, default_value = kubelet_api::POD_RESOURCES_SOCKET)]
    pub pod_resources: PathBuf,

    /// How long to wait for paused components to end before a change is given up and everything put back
    #[arg(long, env = "CCNODE_PAUSE_TIMEOUT", value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub pause_timeout: Duration,

    /// Resources of the kubelet that are not waited for when components are paused, though their names begin with nvidia.com/:
    /// network cards of the Network Operator, for example, that are not called so; separated by commas
    #[arg(long, env = "CCNODE_OTHER_RESOURCES", value_name = "NAMES", value_delimiter = ',')]
    pub other_resources: Vec<String>,

    /// What to do while a GPU is in use: leave the node as it is and try again later, or withdraw it and wait
    #[arg(long, env = "CCNODE_ON_BUSY", value_name = "refuse|wait", default_value = "refuse")]
    pub on_busy: OnBusy,

    /// With --on-busy wait: how long, before everything is put back
    #[arg(long, env = "CCNODE_BUSY_TIMEOUT", value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub busy_timeout: Duration,

    /// Directory of devices.json, which tells the other agents what has been verified
    #[arg(long, env = "CCNODE_STATE_DIR", value_name = "PATH", default_value = STATE_DIR)]
    pub state_dir: PathBuf,

    /// How often to look at the node and its devices when nothing has happened
    #[arg(long, env = "CCNODE_RESYNC", value_name = "TIME", default_value = "1m", value_parser = duration)]
    pub resync: Duration,

    /// First delay before a failed change is tried again; it doubles each time
    #[arg(long, env = "CCNODE_RETRY_MIN", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub retry_min: Duration,

    /// Longest delay before a failed change is tried again
    #[arg(long, env = "CCNODE_RETRY_MAX", value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub retry_max: Duration,

    /// How long a change that is under way may go on after SIGTERM
    #[arg(long, env = "CCNODE_GRACE", value_name = "TIME", default_value = "25s", value_parser = duration)]
    pub grace: Duration,

    /// Health and metrics.
    #[command(flatten)]
    pub health: HealthArgs,

    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What to do while a GPU is in use.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBusy {
    /// Leave the node as it is, and try again later.
    Refuse,
    /// Withdraw the node and wait.
    Wait,
}

/// What to do with a node that lost its TEE.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum TeeMissing {
    /// Leave it as it is, as a failure.
    Hold,
    /// Go by the default, which is then off.
    Off,
}

/// Where a pod finds the namespace it is in.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// The namespace given, else that of the service account, else the reference's default.
pub(crate) fn namespace(given: Option<&str>, file: &Path) -> String {
    let given = given.filter(|name| !name.is_empty()).map(ToOwned::to_owned);
    let found =
        || std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned()).filter(|name| !name.is_empty());
    given.or_else(found).unwrap_or_else(|| "gpu-operator".to_owned())
}

impl Args {
    /// How the operator's components are paused; none when they are not.
    pub(crate) fn pausing(&self) -> Option<crate::Pausing> {
        let evicts = self.evict_operator_components.eq_ignore_ascii_case("true");
        let namespace = || namespace(self.operator_namespace.as_deref(), Path::new(NAMESPACE_FILE));
        let others = || self.other_resources.iter().map(|name| name.trim().to_owned()).collect();
        evicts.then(|| crate::Pausing { namespace: namespace(), patience: self.pause_timeout, others: others() })
    }

    /// The modes that may be asked for.
    pub(crate) fn allowed(&self) -> anyhow::Result<Vec<Mode>> {
        let modes = self.allowed_modes.split(',').map(|text| text.trim().parse::<Mode>());
        modes.collect::<Result<_, _>>().context("--allowed-modes (CCNODE_ALLOWED_MODES) is not a list of modes")
    }

    /// How long devices in use are waited for.
    pub(crate) fn busy_wait(&self) -> Duration {
        if self.on_busy == OnBusy::Wait { self.busy_timeout } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_references_command_line_is_accepted() {
        let args = Args::try_parse_from([
            "cc-manager",
            "-m",
            "devtools",
            "--node-name",
            "n1",
            "--kubeconfig",
            "/k",
            "--debug",
        ])
        .unwrap();
        assert_eq!((args.default_cc_mode.as_str(), args.node_name.as_deref()), ("devtools", Some("n1")));
        assert_eq!(args.kubeconfig.as_deref(), Some(Path::new("/k")));
        assert!(args.log.debug);
        let args = Args::try_parse_from(["cc-manager", "--default-cc-mode=off"]).unwrap();
        assert_eq!(args.readiness_file, Path::new("/run/nvidia/validations/.cc-manager-ctr-ready"));
        assert_eq!(args.pausing().unwrap().patience, Duration::from_mins(5));
        for (text, pauses) in [("true", true), ("TRUE", true), ("false", false), ("1", false), ("", false)] {
            let args = Args::try_parse_from(["cc-manager", &format!("--evict-operator-components={text}")]).unwrap();
            assert_eq!(args.pausing().is_some(), pauses, "{text:?}");
        }
        assert_eq!(args.busy_wait(), Duration::ZERO);
        assert_eq!(args.allowed().unwrap(), Mode::ALL);
        for (text, allowed) in
            [("on", Some(vec![Mode::On])), ("on, off", Some(vec![Mode::On, Mode::Off])), ("on,", None), ("", None)]
        {
            let args = Args::try_parse_from(["cc-manager", &format!("--allowed-modes={text}")]).unwrap();
            assert_eq!(args.allowed().ok(), allowed, "{text:?}");
        }
        let args = Args::try_parse_from(["cc-manager", "--on-busy", "wait", "--busy-timeout", "90s"]).unwrap();
        assert_eq!(args.busy_wait(), Duration::from_secs(90));
        assert!(Args::try_parse_from(["cc-manager", "--on-busy", "evict"]).is_err());
    }

    #[test]
    fn an_empty_path_is_none() {
        let args =
            Args::try_parse_from(["cc-manager", "--readiness-file=", "--pod-resources=", "--kubeconfig="]).unwrap();
        for path in [&args.readiness_file, &args.pod_resources, &args.kubeconfig.unwrap()] {
            assert!(path.as_os_str().is_empty(), "{path:?}");
        }
    }

    #[test]
    fn the_namespace_is_read_and_not_assumed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |given, text: &str| {
            std::fs::write(file.path(), text).unwrap();
            namespace(given, file.path())
        };
        assert_eq!(of(Some("given"), "mounted"), "given");
        assert_eq!((of(None, "mounted\n"), of(Some(""), "mounted")), ("mounted".to_owned(), "mounted".to_owned()));
        assert_eq!(
            (of(None, ""), namespace(None, Path::new("/nonexistent"))),
            ("gpu-operator".to_owned(), "gpu-operator".to_owned())
        );
    }

    #[test]
    fn every_flag_has_a_variable() {
        let command = Args::command();
        command.clone().debug_assert();
        for argument in command.get_arguments() {
            let name = argument.get_id().as_str();
            assert!(argument.get_env().is_some() || ["help", "version"].contains(&name), "{name} has none");
        }
        let variable = |flag: &str| {
            let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag)).unwrap();
            argument.get_env().unwrap().to_str().unwrap().to_owned()
        };
        for (flag, name) in [
            ("default-cc-mode", "DEFAULT_CC_MODE"),
            ("node-name", "NODE_NAME"),
            ("kubeconfig", "KUBECONFIG"),
            ("operator-namespace", "OPERATOR_NAMESPACE"),
            ("evict-operator-components", "EVICT_OPERATOR_COMPONENTS"),
            ("readiness-file", "CC_READINESS_FILE"),
        ] {
            assert_eq!(variable(flag), name);
        }
    }
}
