//! The command line of `lab-kubelet`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::control::{self, Command};
use super::{Config, Container, Kubelet, Pod, Resolved, sandbox};

/// Where the control socket is unless said otherwise.
const CONTROL: &str = "/run/lab-kubelet.sock";

/// Stand-in of the kubelet: device plugins, pod resources, and pods with devices.
#[derive(Debug, Parser)]
#[command(name = "lab-kubelet", version)]
pub struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Be a kubelet until SIGTERM or SIGINT.
    Run(Box<Run>),
    /// Ask something of a running stand-in.
    Ctl {
        /// Its control socket.
        #[arg(long, env = "LAB_KUBELET_CONTROL", default_value = CONTROL)]
        control: PathBuf,
        #[command(subcommand)]
        command: Ctl,
    },
    /// Do what Kata's shim does for a pod's devices, and print what it would plug in.
    Resolve(Resolve),
    /// Be a pod's sandbox: take its devices as a virtual machine does, print each refusal and try again, and keep them until
    /// SIGTERM or SIGINT.
    Sandbox(Sandbox),
}

#[derive(Debug, Args)]
struct Run {
    /// Name of the node.
    #[arg(long, env = "NODE_NAME", default_value = "lab-node")]
    node_name: String,
    /// Folder of the plugins' sockets.
    #[arg(long, default_value = kubelet_api::PLUGIN_DIR)]
    plugin_dir: PathBuf,
    /// Socket of the pod-resources service.
    #[arg(long, default_value = kubelet_api::POD_RESOURCES_SOCKET)]
    pod_resources: PathBuf,
    /// Answer pod-resources Get as a kubelet without the feature gate KubeletPodResourcesGet.
    #[arg(long)]
    no_pod_resources_get: bool,
    /// Control socket.
    #[arg(long, env = "LAB_KUBELET_CONTROL", default_value = CONTROL)]
    control: PathBuf,
    #[command(flatten)]
    api: ApiServer,
    /// Leave a missing node object missing.
    #[arg(long)]
    no_register_node: bool,
    /// Seconds between two looks at the node's status (real: 10).
    #[arg(long, default_value = "10", value_parser = seconds)]
    node_status_update_frequency: Duration,
    /// Seconds that a resource outlives its plugin with zero allocatable (real: 300).
    #[arg(long, default_value = "300", value_parser = seconds)]
    stop_grace: Duration,
    /// Seconds for which a registering plugin is dialled (real: 10).
    #[arg(long, default_value = "10", value_parser = seconds)]
    dial_timeout: Duration,
    /// Decides the arbitrary order in which devices are handed out.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Fault: seconds to wait before looking at a registration.
    #[arg(long, default_value = "0", value_parser = seconds)]
    register_delay: Duration,
    /// Fault: seconds between a pod's deletion and its end.
    #[arg(long, default_value = "0", value_parser = seconds)]
    stop_delay: Duration,
}

/// Where pods come from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ApiServer {
    /// API server and credentials from this file.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// API server and credentials as a pod finds them.
    #[arg(long)]
    in_cluster: bool,
    /// No API server: pods come over the control socket.
    #[arg(long)]
    standalone: bool,
}

#[derive(Debug, Subcommand)]
enum Ctl {
    /// Print everything it knows, as JSON.
    Dump,
    /// Restart it: sockets wiped, kubelet.sock anew, allocations kept.
    Restart {
        /// Seconds to stay away.
        #[arg(long, default_value = "0", value_parser = seconds)]
        down: Duration,
    },
    /// Stop it, as a killed process stops.
    Stop,
    /// Start it after a stop.
    Start,
    /// Wait until exactly COUNT devices of RESOURCE are allocatable.
    WaitAllocatable {
        /// Resource name.
        resource: String,
        /// Devices.
        count: usize,
        /// Seconds.
        #[arg(long, default_value = "30", value_parser = seconds)]
        timeout: Duration,
    },
    /// Admit a pod with one container. Fails if the pod is rejected or does not start.
    Admit {
        /// NAMESPACE/NAME.
        pod: String,
        /// RESOURCE=COUNT, may be repeated.
        #[arg(long = "limit", value_parser = limit)]
        limits: Vec<(String, usize)>,
        /// Name of the container.
        #[arg(long, default_value = "main")]
        container: String,
    },
    /// End a pod.
    Remove {
        /// NAMESPACE/NAME.
        pod: String,
    },
    /// Fault: end the ListAndWatch streams of a resource.
    DropStream {
        /// Resource name.
        resource: String,
    },
    /// Fault: set delays.
    Delays {
        /// Seconds before a registration is looked at.
        #[arg(long, value_parser = seconds)]
        register: Option<Duration>,
        /// Seconds between a pod's deletion and its end.
        #[arg(long, value_parser = seconds)]
        stop: Option<Duration>,
    },
}

#[derive(Debug, Args)]
struct Resolve {
    /// NAMESPACE/NAME.
    pod: String,
    /// Socket of the pod-resources service.
    #[arg(long, default_value = kubelet_api::POD_RESOURCES_SOCKET)]
    pod_resources: PathBuf,
    /// Tree with etc/cdi, var/run/cdi, dev and sys.
    #[arg(long, default_value = "/")]
    root: PathBuf,
}

#[derive(Debug, Args)]
struct Sandbox {
    #[command(flatten)]
    of: Resolve,
    /// Seconds until a sandbox that was refused is tried again; twice as long after each refusal (real: 1).
    #[arg(long, default_value = "0.1", value_parser = seconds)]
    retry_min: Duration,
    /// The longest of these pauses (real: 300).
    #[arg(long, default_value = "1", value_parser = seconds)]
    retry_max: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>().ok().and_then(|s| Duration::try_from_secs_f64(s).ok()).ok_or_else(|| "not seconds".to_owned())
}

fn limit(text: &str) -> Result<(String, usize), String> {
    let (resource, count) = text.split_once('=').ok_or("not RESOURCE=COUNT")?;
    Ok((resource.to_owned(), count.parse().map_err(|_| "not RESOURCE=COUNT")?))
}

impl Cli {
    /// Does what the command line says.
    pub async fn run(self) -> Result<()> {
        match self.action {
            Action::Run(run) => run.run().await,
            Action::Ctl { control, command } => command.run(&control).await,
            Action::Resolve(Resolve { pod, pod_resources, root }) => {
                let resolved: Resolved = super::resolve(&pod_resources, &root, &pod).await?;
                println!("{}", serde_json::to_string_pretty(&resolved)?);
                Ok(())
            }
            Action::Sandbox(sandbox) => sandbox.run().await,
        }
    }
}

impl Sandbox {
    async fn run(self) -> Result<()> {
        let Self { of: Resolve { pod, pod_resources, root }, retry_min, retry_max } = self;
        let mut terminate = signal(SignalKind::terminate()).context("Cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("Cannot wait for SIGINT")?;
        let tell = |refused: &sandbox::Refused| println!("refused: {}", super::chain(refused));
        let live = async {
            let _devices = sandbox::start(&pod_resources, &root, &pod, (retry_min, retry_max), tell).await;
            println!("started");
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = live => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    }
}

impl Run {
    async fn run(self: Box<Self>) -> Result<()> {
        let Self {
            node_name,
            plugin_dir,
            pod_resources,
            no_pod_resources_get,
            control,
            api,
            no_register_node,
            node_status_update_frequency,
            stop_grace,
            dial_timeout,
            seed,
            register_delay,
            stop_delay,
        } = *self;
        let mut terminate = signal(SignalKind::terminate()).context("Cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("Cannot wait for SIGINT")?;
        let config = Config {
            pod_resources_get: !no_pod_resources_get,
            dial_deadline: dial_timeout,
            stop_grace,
            node_status_frequency: node_status_update_frequency,
            register_node: !no_register_node,
            seed,
            register_delay,
            stop_delay,
            ..Config::new(node_name, plugin_dir, pod_resources)
        };
        let client = api.client().await?;
        let kubelet = Kubelet::start(config, client).await.context("Cannot start")?;
        if let Some(folder) = control.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("Cannot prepare {}", folder.display()))?;
        }
        let listener = kubelet_api::socket::listen(&control).context("Cannot serve the control socket")?;
        tokio::select! {
            () = control::serve(kubelet.clone(), listener) => bail!("The control socket ended"),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // It may have been stopped over the control socket.
        match kubelet.stop().await {
            Ok(()) | Err(super::Error::Stopped) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl ApiServer {
    async fn client(self) -> Result<Option<kube::Client>> {
        let Self { kubeconfig, in_cluster, standalone } = self;
        let config = match kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(&path).with_context(|| format!("Cannot read {}", path.display()))?;
                kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .with_context(|| format!("Cannot use {}", path.display()))?
            }
            None if in_cluster => kube::Config::incluster().context("This is not a pod")?,
            None if standalone => return Ok(None),
            None => bail!("No API server named"),
        };
        Ok(Some(kube::Client::try_from(config).context("Cannot make an API client")?))
    }
}

impl Ctl {
    async fn run(self, socket: &Path) -> Result<()> {
        let admits = matches!(self, Self::Admit { .. });
        let command = self.command()?;
        let answer = control::ask(socket, &command).await.map_err(|error| anyhow!(error))?;
        if answer.as_object().is_some_and(|answer| !answer.is_empty()) {
            println!("{}", serde_json::to_string_pretty(&answer)?);
        }
        if admits && answer["phase"] != "Running" {
            bail!("Pod is {}: {}", text(&answer["phase"]), text(&answer["message"]));
        }
        Ok(())
    }

    fn command(self) -> Result<Command> {
        Ok(match self {
            Self::Dump => Command::Dump,
            Self::Restart { down } => Command::Restart { down_ms: millis(down) },
            Self::Stop => Command::Stop,
            Self::Start => Command::Start,
            Self::WaitAllocatable { resource, count, timeout } => {
                Command::WaitAllocatable { resource, count, timeout_ms: millis(timeout) }
            }
            Self::Admit { pod, limits, container } => {
                let (namespace, name) = split(&pod)?;
                let container = Container { name: container, limits: limits.into_iter().collect(), restartable: false };
                let pod = Pod {
                    uid: String::new(),
                    namespace,
                    name,
                    runtime_class: String::new(),
                    init_containers: Vec::new(),
                    containers: vec![container],
                };
                Command::Admit { pod }
            }
            Self::Remove { pod } => {
                let (namespace, name) = split(&pod)?;
                Command::Remove { namespace, name }
            }
            Self::DropStream { resource } => Command::DropStream { resource },
            Self::Delays { register, stop } => {
                Command::Delays { register_ms: register.map(millis), stop_ms: stop.map(millis) }
            }
        })
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn split(pod: &str) -> Result<(String, String)> {
    let (namespace, name) = pod.split_once('/').with_context(|| format!("{pod:?} is not NAMESPACE/NAME"))?;
    Ok((namespace.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        assert!(Cli::try_parse_from(["lab-kubelet", "run"]).is_err(), "pods must come from somewhere");
        assert!(Cli::try_parse_from(["lab-kubelet", "run", "--standalone", "--in-cluster"]).is_err());
        Cli::try_parse_from(["lab-kubelet", "run", "--standalone", "--register-delay", "0.5"]).unwrap();
        Cli::try_parse_from(["lab-kubelet", "ctl", "admit", "n/p", "--limit", "nvidia.com/pgpu=1"]).unwrap();
        Cli::try_parse_from(["lab-kubelet", "sandbox", "n/p", "--retry-max", "5"]).unwrap();
        Cli::try_parse_from(["lab-kubelet", "ctl", "wait-allocatable", "nvidia.com/pgpu", "2"]).unwrap();
    }
}
