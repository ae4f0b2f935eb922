//! Agent: the node's label becomes the confidential-computing mode of its GPUs.
//!
//! It watches `nvidia.com/cc.mode` of its own node, compares it with what it has verified of each GPU in this boot, and
//! closes the difference: withdraw (`cc.ready.state=""`), own every device, change all in parallel, verify, publish. It
//! does so at start, on every change of the label, after failures with growing delays, and on a slow poll.
//!
//! At every moment the gate is the narrower of two: `cc.ready.state` on the node object, which the scheduler goes by, and
//! `devices.json` on the host, which the device plugin goes by. When a change begins the label is withdrawn first; when it
//! has ended well the file is written first. The plugin then needs a moment (about 0.2 s) until the kubelet has heard of
//! it, and nothing that this agent can see tells when: a pod that is bound to the node in that moment is refused by the
//! kubelet once (`UnexpectedAdmissionError`) and made anew by its controller. It never gets a GPU in another mode.
//!
//! `plan` decides and does no I/O; `executor` drives the GPUs; `controller` is the loop between them and the node object.

#![forbid(unsafe_code)]

mod allocations;
mod args;
mod audit;
mod controller;
mod executor;
mod metrics;
mod plan;
mod publish;
mod releases;

use std::ffi::OsString;
use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use agent_core::http::StateDump;
use agent_core::metrics::Metrics;
use agent_core::readiness;
use agent_core::shutdown::Shutdown;
use agent_core::work::Work;
use anyhow::{Context, bail};
use clap::Parser as _;
use hw_probe::SysRoot;
use node_object::{Events, NodeClient};

pub use args::Args;
pub use controller::{Controller, Pausing, Settings};
pub use executor::{DeviceFault, DeviceResult, Firmware, GpuFirmware, Verified};

/// The program, with the words of its command line.
pub fn start(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = Args::try_parse_from(words).unwrap_or_else(|error| error.exit());
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {}", agent_core::text::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Runs the agent until SIGTERM or SIGINT. Fails only where going on makes no sense: unusable flags, no way to reach any
/// API server.
pub fn run(args: Args) -> anyhow::Result<()> {
    agent_core::logs::init(&args.log)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("Cannot start the async runtime")?;
    let result = runtime.block_on(serve(args));
    // Firmware work that outlasted the grace must not hold up the end: what the devices say is the journal.
    runtime.shutdown_background();
    result
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let (pausing, busy_wait, allowed) = (args.pausing(), args.busy_wait(), args.allowed()?);
    let Args {
        default_cc_mode,
        node_name,
        kubeconfig,
        readiness_file,
        operator_namespace: _,
        evict_operator_components: _,
        pause_timeout: _,
        other_resources: _,
        on_busy: _,
        busy_timeout: _,
        allowed_modes: _,
        mode,
        tee_missing,
        hold_down,
        release_poll,
        pod_resources,
        state_dir,
        resync,
        retry_min,
        retry_max,
        grace,
        health,
        log: _,
    } = args;
    let Some(node_name) = node_name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()) else {
        bail!("--node-name (NODE_NAME) is missing: it must name the node that this agent runs on");
    };
    tracing::info!(
        event = "started",
        version = env!("CARGO_PKG_VERSION"),
        node = node_name,
        default_cc_mode,
        "cc-manager started"
    );
    let namespace = pausing.as_ref().map(|pausing| pausing.namespace.as_str());
    tracing::debug!(namespace, "Namespace of the operator's components that are paused during a change, if any are");

    let shutdown = Shutdown::on_signals().context("Cannot listen for signals")?;
    let readiness = readiness::Registry::default();
    let metrics = Metrics::new();
    let server = match health.addr()? {
        Some(addr) => Some(agent_core::http::bind(addr, readiness.clone(), metrics.clone()).await?),
        None => None,
    };
    let dump = StateDump::default();
    let server = server.map(|server| server.with_state(dump.clone()));
    let client = tokio::select! {
        client = node_object::connect(kubeconfig.as_deref()) => client?,
        () = shutdown.wait() => return Ok(()),
    };
    let node = NodeClient::new(client, node_name, "ccnode-cc-manager");
    node.counts().register(&metrics);
    let settings = Settings {
        default_mode: default_cc_mode,
        readiness_file,
        state_dir,
        resync,
        retry_min,
        retry_max,
        grace,
        allowed,
        hold_without_tee: tee_missing == args::TeeMissing::Hold,
        only_observe: mode == Work::Observe,
        hold_down,
        release_poll,
        pod_resources,
        patch_pause: PATCH_PAUSE,
        pausing,
        busy_wait,
    };
    let (firmware, root) = (Arc::new(GpuFirmware::host()), SysRoot::host());
    let (events, sender) = Events::new(node.clone(), "cc-manager");
    let controller =
        Controller::new(settings, node.clone(), firmware, root, events, &readiness, &metrics).with_dump(dump);

    // One task drives everything but the firmware, which has threads of its own: nothing can fail unseen.
    let health = async {
        match server {
            Some(server) => server.serve(shutdown.clone()).await,
            None => shutdown.wait().await,
        }
        // Shutdown ends the controller, and that ends the agent.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        never = node.watch() => match never {},
        // Ends with the controller, which tells the events.
        () = sender.run() => {}
        () = health => {}
        () = controller.run(shutdown.clone()) => {}
    }
    tracing::info!(event = "stopped", "cc-manager ended");
    Ok(())
}

/// Least time between two patches of the node that tell of one failure that goes on.
const PATCH_PAUSE: Duration = Duration::from_mins(5);

/// Where the readiness file is by default.
fn default_readiness_file() -> PathBuf {
    PathBuf::from("/run/nvidia/validations/.cc-manager-ctr-ready")
}

/// Waits for `work` for as long as nobody asks for the end, and then at most `grace` longer.
async fn within_grace<T>(work: impl Future<Output = T>, shutdown: &Shutdown, grace: Duration) -> Option<T> {
    tokio::select! {
        result = work => Some(result),
        () = async {
            shutdown.wait().await;
            tokio::time::sleep(grace).await;
        } => None,
    }
}
