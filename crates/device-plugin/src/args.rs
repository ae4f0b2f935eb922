//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_core::health::HealthArgs;
use agent_core::logs::LogArgs;
use agent_core::shutdown::Shutdown;
use agent_core::work::Work;
use agent_core::{http, logs, metrics, readiness};
use anyhow::Context;
use clap::Parser;
use hw_probe::SysRoot;

use crate::controller::{self, Config, Looks};
use crate::features::FeatureFile;
use crate::health::FlapRule;
use crate::names::Naming;
use crate::observe::Places;
use crate::quarantine::SETTLED;
use crate::server::{Manner, PpciePolicy, Role};
use crate::units::{BackendChoice, CcGate, IdScheme, Policy};

/// Offers VFIO-bound NVIDIA GPUs and NVSwitches to the kubelet, with CDI files by which Kata finds them
#[derive(Debug, Parser)]
#[command(name = "device-plugin", version)]
pub struct Args {
    /// Resource name of all GPUs, without nvidia.com/; set but empty: one resource a model
    #[arg(long, env = "P_GPU_ALIAS", value_name = "NAME", default_value = "pgpu", value_parser = naming, hide_env_values = true)]
    pub gpu_alias: Naming,

    /// Resource name of all NVSwitches, without nvidia.com/; set but empty: one resource a model
    #[arg(long, env = "NVSWITCH_ALIAS", value_name = "NAME", default_value = "nvswitch", value_parser = naming, hide_env_values = true)]
    pub nvswitch_alias: Naming,

    /// What a device is called, towards the kubelet and in CDI: its PCI address, or, as the reference does, the number of
    /// its VFIO node or IOMMU group. By itself the agent takes addresses, and numbers for as long as a pod has a device under
    /// one. With the two others a device that a pod has under another ID is offered twice
    #[arg(long, env = "DEVICE_ID_SCHEME", value_enum, default_value_t = SchemeChoice::Auto)]
    pub device_id_scheme: SchemeChoice,

    /// VFIO interface by which devices are handed over
    #[arg(long, env = "VFIO_BACKEND", value_enum, default_value_t = BackendChoice::Auto)]
    pub vfio_backend: BackendChoice,

    /// Whether a device must be verified by cc-manager before it is healthy; what cc-manager does say counts either way
    #[arg(long, env = "CC_GATE", value_enum, default_value_t = CcGate::Off)]
    pub cc_gate: CcGate,

    /// Whose plugin to be: Kata's; or KubeVirt's, with one resource a model, PCI addresses as IDs and no CDI files [default:
    /// kubevirt for a program of the name nvidia-kubevirt-gpu-device-plugin, else kata]
    #[arg(long, env = "DEVICE_PLUGIN_ROLE", value_enum)]
    pub role: Option<Role>,

    /// Name CDI devices in answers to Allocate, too: container runtimes then inject the nodes by CDI. Kata does not need it
    #[arg(long, env = "CDI_IN_ALLOCATE")]
    pub cdi_in_allocate: bool,

    /// What to do when a container asks for a part of the GPUs or switches of a node in protected PCIe. To enforce refuses
    /// pods, too, whose containers have all of them between them: the kubelet asks for one container at a time
    #[arg(long, env = "PPCIE_POLICY", value_enum, default_value_t = PpciePolicy::Warn)]
    pub ppcie_policy: PpciePolicy,

    /// Folder of the CDI files
    #[arg(long, env = "CDI_DIR", value_name = "DIR", default_value = "/var/run/cdi")]
    pub cdi_dir: PathBuf,

    /// The other folder that CDI libraries read: a file there may define devices of ours, too
    #[arg(long, env = "CDI_STATIC_DIR", value_name = "DIR", default_value = "/etc/cdi")]
    pub cdi_static_dir: PathBuf,

    /// The kubelet's device plugin folder
    #[arg(long, env = "KUBELET_PLUGIN_DIR", value_name = "DIR", default_value = "/var/lib/kubelet/device-plugins")]
    pub kubelet_plugin_dir: PathBuf,

    /// Folder of devices.json, by which cc-manager tells what it verified
    #[arg(long, env = "CCNODE_STATE_DIR", value_name = "DIR", default_value = agent_core::state::STATE_DIR)]
    pub state_dir: PathBuf,

    /// Longest time between two looks at the node; the kernel's events shorten it
    #[arg(long, env = "POLL_INTERVAL", value_name = "TIME", default_value = "5s", value_parser = agent_core::text::duration)]
    pub poll_interval: Duration,

    /// Read sys, proc and dev below this folder instead of /
    #[arg(long, env = "CCNODE_ROOT", value_name = "DIR", default_value = "/")]
    pub root: PathBuf,

    /// Name of this node, for the log
    #[arg(long, env = "NODE_NAME", value_name = "NAME", default_value = "")]
    pub node_name: String,

    /// Accepted for the reference's sake, without effect: GPU Feature Discovery would boot a VM on every node to learn
    /// what sysfs tells
    #[arg(long, env = "ENABLE_GFD", value_name = "BOOL", default_value = "")]
    pub enable_gfd: String,

    /// How often a unit may fall ill within --flap-window before it is held back until it has been quiet for as long; 0: as
    /// often as it does
    #[arg(long, env = "FLAP_LIMIT", value_name = "NUMBER", default_value_t = FlapRule::default().limit)]
    pub flap_limit: usize,

    /// See --flap-limit
    #[arg(long, env = "FLAP_WINDOW", value_name = "TIME", default_value = "10m", value_parser = agent_core::text::duration)]
    pub flap_window: Duration,

    /// Socket of the kubelet's pod-resources service, which tells the pods that have devices; empty, or where it is not there
    /// (under the operator), the kubelet's checkpoint is read instead
    #[arg(long, env = "CCNODE_POD_RESOURCES", value_name = "PATH", default_value = kubelet_api::POD_RESOURCES_SOCKET, value_parser = agent_core::text::path)]
    pub pod_resources: PathBuf,

    /// Feature file for Node Feature Discovery to keep, usually /etc/kubernetes/node-feature-discovery/features.d/ccnode: the
    /// node's GPUs as labels under ccnode.dev/; empty: none
    #[arg(long, env = "FEATURES_FILE", value_name = "PATH", default_value = "", value_parser = agent_core::text::path)]
    pub features_file: PathBuf,

    /// Offer the devices, or only say what would be offered: by log, metrics and units.json
    #[arg(long, env = "CCNODE_MODE", value_enum, default_value_t = Work::Enforce)]
    pub mode: Work,

    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,

    /// Health endpoint.
    #[command(flatten)]
    pub health: HealthArgs,
}

/// What units are called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SchemeChoice {
    /// As the kubelet's book asks for.
    Auto,
    /// PCI addresses.
    Pci,
    /// The reference's numbers.
    Iommu,
}

impl SchemeChoice {
    /// The kind of ID before anything is known.
    fn first(self) -> IdScheme {
        match self {
            Self::Auto | Self::Pci => IdScheme::Pci,
            Self::Iommu => IdScheme::Iommu,
        }
    }
}

fn naming(text: &str) -> Result<Naming, String> {
    text.parse().map_err(|error: crate::names::NameError| error.to_string())
}

/// The operator names no command, and so runs what the image is made to run: the reference's programs, by their names.
fn role_of(program: impl AsRef<Path>) -> Role {
    let name = program.as_ref().file_name();
    if name.is_some_and(|name| name == "nvidia-kubevirt-gpu-device-plugin") { Role::Kubevirt } else { Role::Kata }
}

/// Go's notion of a true flag, which is what the reference reads `ENABLE_GFD` by.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "TRUE" | "true" | "True")
}

impl Args {
    /// Runs the agent until SIGTERM or SIGINT.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self {
            gpu_alias,
            nvswitch_alias,
            device_id_scheme,
            vfio_backend,
            cc_gate,
            role,
            cdi_in_allocate,
            ppcie_policy,
            cdi_dir,
            cdi_static_dir,
            kubelet_plugin_dir,
            state_dir,
            poll_interval,
            root,
            node_name,
            enable_gfd,
            flap_limit,
            flap_window,
            pod_resources,
            features_file,
            mode,
            log,
            health,
        } = self;
        let role = role.unwrap_or_else(|| role_of(std::env::args_os().next().unwrap_or_default()));
        let (gpu_alias, nvswitch_alias, device_id_scheme) = match role {
            Role::Kata => (gpu_alias, nvswitch_alias, device_id_scheme),
            // KubeVirt's users name models in their virtual machines, and its launcher takes IDs for PCI addresses.
            Role::Kubevirt => (Naming::PerModel, Naming::PerModel, SchemeChoice::Pci),
        };
        logs::init(&log)?;
        let shutdown = Shutdown::on_signals().context("Signals cannot be handled")?;
        let readiness = readiness::Registry::default();
        let metrics = metrics::Metrics::new();
        let state = http::StateDump::default();
        let endpoint = match health.addr()? {
            Some(addr) => Some(http::bind(addr, readiness.clone(), metrics.clone()).await?.with_state(state.clone())),
            None => None,
        };
        tracing::info!(
            event = "started", version = env!("CARGO_PKG_VERSION"), node = node_name, gpus = %gpu_alias,
            nvswitches = %nvswitch_alias, ids = ?device_id_scheme, ?role, backend = ?vfio_backend, cc_gate = ?cc_gate, ?mode,
            cdi_dir = %cdi_dir.display(), kubelet_plugin_dir = %kubelet_plugin_dir.display(), "Device plugin started"
        );
        if is_true(&enable_gfd) {
            tracing::warn!(
                "ENABLE_GFD is set and has no effect: this agent starts no GPU Feature Discovery pod, which would boot a \
                 virtual machine and hold a GPU to learn what the node's PCI bus tells anyway"
            );
        }
        let config = Config {
            places: Places { root: SysRoot::at(root), state_dir },
            policy: Policy {
                gpu: gpu_alias,
                nvswitch: nvswitch_alias,
                scheme: device_id_scheme.first(),
                backend: vfio_backend,
                gate: cc_gate,
            },
            manner: Manner { role, cdi_in_allocate, ppcie: ppcie_policy, backend: vfio_backend },
            cdi_dir,
            cdi_static_dir,
            plugin_dir: kubelet_plugin_dir,
            poll: poll_interval,
            looks: Looks {
                ids_by_book: device_id_scheme == SchemeChoice::Auto,
                flaps: FlapRule { limit: flap_limit, window: flap_window },
                settled: SETTLED,
                pod_resources,
                features_file: FeatureFile::new(features_file),
                only_observe: mode == Work::Observe,
                state,
            },
        };
        let served = async {
            if let Some(endpoint) = endpoint {
                endpoint.serve(shutdown.clone()).await;
            }
        };
        // The controller triggers the shutdown when it ends, so that both end.
        let (ended, ()) = tokio::join!(controller::run(config, shutdown.clone(), readiness, &metrics), served);
        ended?;
        tracing::info!(event = "stopped", "Device plugin ended");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["plugin"], args].concat())
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        Args::command().debug_assert();
        for arg in Args::command().get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
            assert!(arg.get_env().is_some(), "{}", arg.get_id());
        }
    }

    #[test]
    fn aliases_are_checked_and_empty_is_a_value() {
        let args = parse(&[]).unwrap();
        assert_eq!(args.gpu_alias, "pgpu".parse().unwrap());
        assert_eq!(args.nvswitch_alias, "nvswitch".parse().unwrap());
        assert_eq!(parse(&["--gpu-alias", ""]).unwrap().gpu_alias, Naming::PerModel);
        let error = parse(&["--gpu-alias", "nvidia.com/pgpu"]).unwrap_err().to_string();
        assert!(error.contains("--gpu-alias") && error.contains("has a dot"), "{error}");
    }

    #[test]
    fn the_role_is_told_by_the_programs_name_or_by_word() {
        assert_eq!(role_of("/usr/bin/nvidia-kubevirt-gpu-device-plugin"), Role::Kubevirt);
        for name in ["nvidia-sandbox-device-plugin", "/usr/bin/device-plugin", ""] {
            assert_eq!(role_of(name), Role::Kata, "{name}");
        }
        assert_eq!(parse(&[]).unwrap().role, None);
        assert_eq!(parse(&["--role", "kubevirt"]).unwrap().role, Some(Role::Kubevirt));
    }

    #[test]
    fn ids_follow_the_kubelets_book_unless_told_otherwise_and_paths_may_be_empty() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.device_id_scheme, args.features_file), (SchemeChoice::Auto, PathBuf::new()));
        let args =
            parse(&["--device-id-scheme", "iommu", "--pod-resources", "", "--features-file", "/f/ccnode"]).unwrap();
        assert_eq!(args.device_id_scheme.first(), IdScheme::Iommu);
        assert_eq!((args.pod_resources, args.features_file), (PathBuf::new(), PathBuf::from("/f/ccnode")));
        assert!(parse(&["--device-id-scheme", "bdf"]).is_err());
    }

    #[test]
    fn gfd_is_read_as_go_reads_it() {
        assert!(is_true("1") && is_true("True") && is_true("t"));
        assert!(!is_true("") && !is_true("yes") && !is_true("0"));
    }
}
