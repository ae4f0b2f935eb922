//! A node of the lab: a guest with virtual GPUs, an API server and a kubelet stand-in beside it, and the agents on it.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use lab_devices::{DeviceStatus, TraceEvent};
use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule};
use lab_vm::{Command, Guest, Output, Process};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::boot::Boot;

/// Name of the node object.
pub const NODE: &str = "lab-node";

/// Label of the wanted mode.
pub const CC_MODE: &str = "nvidia.com/cc.mode";

/// Label of the mode last applied.
pub const CC_MODE_STATE: &str = "nvidia.com/cc.mode.state";

/// Label that opens and closes the node for GPU pods.
pub const CC_READY_STATE: &str = "nvidia.com/cc.ready.state";

/// Namespace of the agents, and of the components that they pause.
pub const NAMESPACE: &str = "ccnode-system";

/// The host as the guest reaches it through QEMU's user network.
const HOST: &str = "10.0.2.2";

/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Time for a program of the guest that only looks at something.
const LOOK: Duration = Duration::from_secs(30);

/// A running node.
pub struct Node {
    /// The guest. Its devices are [`Guest::fleet`].
    pub guest: Guest,
    /// The API server.
    pub api: ApiServer,
    agents: Vec<Agent>,
    api_port: u16,
    /// Tokens of cc-manager and of the kubelet.
    tokens: [String; 2],
    started: Instant,
}

/// An agent that was started on the node.
pub struct Agent {
    /// Its program.
    pub name: String,
    /// Its process.
    pub process: Process,
    started: Instant,
    lines: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Agent {
    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The lines of its log so far, with the time of their arrival.
    pub fn log(&self) -> Vec<(Instant, String)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The lines of its log that are JSON objects with this `event`.
    pub fn events(&self, event: &str) -> Vec<(Instant, Value)> {
        let parsed =
            self.log().into_iter().filter_map(|(at, line)| Some((at, serde_json::from_str::<Value>(&line).ok()?)));
        parsed.filter(|(_, line)| field(line, "event") == Some(event)).collect()
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.process.status().is_none()
    }
}

/// A field of a line of JSON log, whether the log puts fields at the top or below `fields`.
pub fn field<'a>(line: &'a Value, name: &str) -> Option<&'a str> {
    line["fields"][name].as_str().or_else(|| line[name].as_str())
}

impl Node {
    /// Boots `boot` with an API server that has one node object with these labels, and the node's identities.
    pub fn start(boot: Boot, labels: &[(&str, &str)]) -> anyhow::Result<Self> {
        let api = ApiServer::start(ApiServerConfig::default()).context("The API server stand-in cannot be started")?;
        let token = api.add_identity(
            &format!("system:serviceaccount:{NAMESPACE}:nvidia-cc-manager"),
            &["system:serviceaccounts"],
            Rule::operator_cc_manager(NAMESPACE),
        );
        let kubelet = api.add_identity(&format!("system:node:{NODE}"), &["system:nodes"], Rule::kubelet(NODE));
        let started = Instant::now();
        let guest = boot.guest()?;
        api.add_node(NODE, labels)?;
        let api_port = api.address().port();
        let node = Self { guest, api, agents: Vec::new(), api_port, tokens: [token, kubelet], started };
        node.put_identities()?;
        Ok(node)
    }

    /// Lets cc-manager write events, as our own chart does and the operator does not.
    pub fn allow_events(&self) {
        let mut rules = Rule::operator_cc_manager(NAMESPACE);
        rules.push(Rule::new("events.k8s.io", &["events"], &["create"]));
        self.api.set_rules(&self.tokens[0], rules);
    }

    fn put_identities(&self) -> anyhow::Result<()> {
        let [cc_manager, kubelet] = &self.tokens;
        let files = self.api.service_account_files(cc_manager, NAMESPACE);
        for (name, content) in [("ca.crt", files.ca_crt), ("token", files.token), ("namespace", files.namespace)] {
            self.guest.put_file(content.as_bytes(), &format!("{SERVICE_ACCOUNT}/{name}"), 0o600)?;
        }
        let kubeconfig = self.api.kubeconfig(kubelet, HOST);
        self.guest.put_file(kubeconfig.as_bytes(), "/etc/lab/kubelet.conf", 0o600)?;
        Ok(())
    }

    /// Takes the power away from whatever is going on, and boots again. The devices keep their knobs and the API server what
    /// it has; files and agents are gone.
    pub fn power_cycle(&mut self) -> anyhow::Result<()> {
        self.guest.power_cut();
        self.agents.clear();
        self.guest.reboot()?;
        self.put_identities()
    }

    /// When the boot of the guest began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Starts an agent with the environment of its pod.
    pub fn start_agent(&mut self, argv: &[&str], env: &[(&str, &str)]) -> anyhow::Result<()> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let mut rest = String::new();
        let sink = Arc::clone(&lines);
        let mut command = Command::new(argv.iter().copied())
            .env("NODE_NAME", NODE)
            .env("LOG_FORMAT", "json")
            // Scenarios ask for one mode after the other.
            .env("CCNODE_HOLD_DOWN", "1ms")
            .env("CCNODE_RELEASE_POLL", "1s")
            .env("KUBERNETES_SERVICE_HOST", HOST)
            .env("KUBERNETES_SERVICE_PORT", self.api_port.to_string())
            .on_output(move |chunk| {
                rest.push_str(&String::from_utf8_lossy(&chunk.data));
                while let Some(end) = rest.find('\n') {
                    let line = rest.drain(..=end).collect::<String>().trim_end().to_owned();
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push((chunk.at, line));
                }
            });
        for (name, value) in env {
            command = command.env(*name, *value);
        }
        let started = Instant::now();
        let process = self.guest.spawn(command)?;
        let name = argv.first().copied().unwrap_or_default().to_owned();
        self.agents.push(Agent { name, process, started, lines });
        Ok(())
    }

    /// Starts the kubelet stand-in, and waits until it answers.
    pub fn start_kubelet(&mut self) -> anyhow::Result<()> {
        let argv =
            ["lab-kubelet", "run", "--kubeconfig", "/etc/lab/kubelet.conf", "--node-status-update-frequency", "1"];
        self.start_agent(&argv, &[("RUST_LOG", "info")])?;
        let deadline = Instant::now() + LOOK;
        while let Err(error) = self.kubelet() {
            if Instant::now() > deadline {
                return Err(error.context(self.logs()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Starts vfio-manager's daemon.
    pub fn start_vfio_manager(&mut self) -> anyhow::Result<()> {
        self.start_agent(&["vfio-manager", "run"], &[])
    }

    /// Starts cc-manager as the operator does: no arguments, all by the environment. Retries and looks at the devices come
    /// quickly, so that a scenario need not wait for them.
    pub fn start_cc_manager(&mut self) -> anyhow::Result<()> {
        let quick = [
            ("CCNODE_RETRY_MIN", "500ms"),
            ("CCNODE_RETRY_MAX", "2s"),
            ("CCNODE_RELEASE_POLL", "1s"),
            ("CCNODE_RESYNC", "10s"),
        ];
        self.start_agent(&["cc-manager"], &quick)
    }

    /// Starts device-plugin with the gate of our own chart.
    pub fn start_device_plugin(&mut self) -> anyhow::Result<()> {
        self.start_agent(&["device-plugin", "--cc-gate=require"], &[("POLL_INTERVAL", "1s")])
    }

    /// Starts the kubelet and the three agents.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        self.start_kubelet()?;
        self.start_vfio_manager()?;
        self.start_cc_manager()?;
        self.start_device_plugin()
    }

    /// The agent last started under this name.
    pub fn agent(&self, name: &str) -> anyhow::Result<&Agent> {
        self.agents.iter().rev().find(|agent| agent.name == name).with_context(|| format!("{name} was not started"))
    }

    /// All that were started.
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// Stops an agent and waits for its end. One that is asked to end, with SIGTERM, must end with exit code 0.
    pub fn stop_agent(&self, name: &str, signal: Signal) -> anyhow::Result<()> {
        let agent = self.agent(name)?;
        agent.process.signal(signal)?;
        let status = agent.process.wait(LOOK)?;
        if signal == Signal::SIGTERM && !status.success() {
            bail!("{name} ended with {status} when it was asked to end\n{}", self.logs());
        }
        Ok(())
    }

    /// Runs a program in the guest that must succeed.
    pub fn look(&self, argv: &[&str]) -> anyhow::Result<Output> {
        let output = self.guest.run(argv, LOOK)?;
        if !output.success() {
            bail!("{} failed: {}{}", argv.join(" "), output.text(), output.error_text());
        }
        Ok(output)
    }

    /// The same for a program that prints JSON.
    pub fn look_json(&self, argv: &[&str]) -> anyhow::Result<Value> {
        let output = self.look(argv)?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{} printed no JSON", argv.join(" ")))
    }

    /// Everything the kubelet stand-in knows.
    pub fn kubelet(&self) -> anyhow::Result<Value> {
        self.look_json(&["lab-kubelet", "ctl", "dump"])
    }

    /// Sets the label of the wanted mode, as a person does.
    pub fn ask_for(&self, mode: &str) -> anyhow::Result<()> {
        Ok(self.api.set_label(NODE, CC_MODE, Some(mode))?)
    }

    /// Waits until both state labels have these values.
    pub fn await_state(&self, mode_state: &str, ready_state: &str, timeout: Duration) -> anyhow::Result<()> {
        let reached = self.api.wait_for(timeout, |view| {
            let is = |key, value| view.label(NODE, key) == Some(value);
            (is(CC_MODE_STATE, mode_state) && is(CC_READY_STATE, ready_state)).then_some(())
        });
        reached.with_context(|| {
            format!(
                "{CC_MODE_STATE}={mode_state:?} and {CC_READY_STATE}={ready_state:?} were not reached in {} s; labels: {:?}\n{}",
                timeout.as_secs(),
                self.api.labels(NODE),
                self.logs()
            )
        })
    }

    /// Waits until the kubelet has exactly `count` units of `resource` to give, and the node object says so too.
    ///
    /// The two differ for up to the kubelet's status interval, on a real node as here: a pod that is created in between
    /// is refused at admission.
    pub fn await_allocatable(&self, resource: &str, count: usize, timeout: Duration) -> anyhow::Result<()> {
        let (wanted, seconds) = (count.to_string(), timeout.as_secs().to_string());
        let argv = ["lab-kubelet", "ctl", "wait-allocatable", resource, &wanted, "--timeout", &seconds];
        let output = self.guest.run(&argv, timeout + LOOK)?;
        let in_time = |reached: Option<()>| {
            reached.with_context(|| format!("{count} of {resource} did not become allocatable\n{}", self.logs()))
        };
        in_time(output.success().then_some(()))?;
        in_time(self.api.wait_for(timeout, |view| {
            let node = view.get("nodes", "", NODE)?;
            let found = node["status"]["allocatable"][resource].as_str().unwrap_or("0");
            (found == wanted).then_some(())
        }))
    }

    /// Asks for a pod with `count` units of `resource` on this node.
    pub fn create_pod(&self, name: &str, resource: &str, count: usize) -> anyhow::Result<()> {
        let pod = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "nodeName": NODE,
                "runtimeClassName": "kata-qemu-nvidia-gpu-snp",
                "containers": [{
                    "name": "model",
                    "image": "example/model",
                    "resources": {"limits": {resource: count.to_string()}},
                }],
            },
        });
        self.api.create("pods", pod).map(|_| ()).with_context(|| format!("Pod {name} cannot be created"))
    }

    /// Waits until the pod is in `phase`; the pod as it then is.
    pub fn await_pod(&self, name: &str, phase: &str, timeout: Duration) -> anyhow::Result<Value> {
        let reached = self.api.wait_for(timeout, |view| {
            let pod = view.get("pods", "default", name)?;
            (pod["status"]["phase"] == phase).then(|| pod.clone())
        });
        reached.with_context(|| {
            let status = self.api.get("pods", "default", name).map(|pod| pod["status"].to_string());
            format!("Pod {name} is not {phase} but {}\n{}", status.unwrap_or_else(|| "gone".into()), self.logs())
        })
    }

    /// What a virtual device is doing.
    pub fn device(&self, name: &str) -> anyhow::Result<DeviceStatus> {
        Ok(self.guest.fleet().status(name)?)
    }

    /// The names of the virtual GPUs.
    pub fn gpus(&self) -> Vec<String> {
        let names = self.guest.fleet().names().into_iter().map(ToOwned::to_owned);
        names.filter(|name| name.starts_with("gpu")).collect()
    }

    /// Every access to every virtual device so far.
    pub fn trace(&self) -> Vec<TraceEvent> {
        self.guest.fleet().trace()
    }

    /// The logs of all agents, for a message about something that went wrong.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for agent in &self.agents {
            let state = if agent.is_running() { "running" } else { "ended" };
            // Writing to a string does not fail.
            let _ = writeln!(text, "--- {} ({state})", agent.name);
            for (_, line) in agent.log() {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}
