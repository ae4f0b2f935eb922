//! Faults between cc-manager and a real API server, at every request of a change: the node gets where it is to be once the fault
//! is over. A proxy in front of the real server makes them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
mod real_kube;
#[path = "../../crates/gpu-firmware/tests/common/mod.rs"]
mod virtual_gpu;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent::{Hardware, Start};
use anyhow::{Context, Result, ensure};
use gpu_firmware::Mode;
use http::{Request, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use lab_kube::api_server::Rule;
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use real_kube::{Api, Cluster, MERGE, PATIENCE, run, script};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The connection is cut before the server hears of it.
    CutBefore,
    /// The connection is cut after the server has done it.
    CutAfter,
    /// The server does not hear of it, and this is the answer.
    Status(u16),
    /// It is never answered, and the server has not heard of it.
    NoAnswerBefore,
    /// It is never answered, though the server has done it.
    NoAnswerAfter,
    /// The answer ends after so many bytes.
    CutBody(usize),
    /// This many requests from here on are cut.
    Away(usize),
}

const FAULTS: [Fault; 11] = [
    Fault::CutBefore,
    Fault::CutAfter,
    Fault::Status(409),
    Fault::Status(410),
    Fault::Status(429),
    Fault::Status(500),
    Fault::Status(503),
    Fault::NoAnswerBefore,
    Fault::NoAnswerAfter,
    Fault::CutBody(100),
    Fault::Away(5),
];

/// What the proxy has seen and is to do.
#[derive(Default)]
struct Plan {
    seen: usize,
    fault: Option<(usize, Fault)>,
    struck: usize,
}

impl Plan {
    /// What is to happen to the next request.
    fn next(&mut self) -> Option<Fault> {
        let number = self.seen;
        self.seen += 1;
        let (first, fault) = self.fault?;
        let last = if let Fault::Away(count) = fault { first + count } else { first + 1 };
        (first..last).contains(&number).then(|| {
            self.struck += 1;
            fault
        })
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "Cut by the test")
}

/// Passes requests on, with whatever token they carry.
struct Proxy {
    plan: Arc<Mutex<Plan>>,
    address: SocketAddr,
}

impl Proxy {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let server = cluster.anonymous().await?.client();
        let plan: Arc<Mutex<Plan>> = Arc::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let planned = Arc::clone(&plan);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (server, plan) = (server.clone(), Arc::clone(&planned));
                let service = service_fn(move |request| {
                    let fault = plan.lock().unwrap_or_else(PoisonError::into_inner).next();
                    pass(server.clone(), request, fault)
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { plan, address })
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts from here, and lets this happen.
    fn arm(&self, fault: Option<(usize, Fault)>) {
        *self.plan() = Plan { fault, ..Plan::default() };
    }

    /// The kubeconfig of whoever is to go through it.
    fn kubeconfig(&self, of: &str) -> Result<String> {
        let mut file: Value = serde_json::from_str(of)?;
        file["clusters"][0]["cluster"] = json!({"server": format!("http://{}", self.address)});
        Ok(file.to_string())
    }
}

async fn pass(
    server: kube::Client,
    request: Request<Incoming>,
    fault: Option<Fault>,
) -> Result<Response<Body>, io::Error> {
    match fault {
        Some(Fault::CutBefore | Fault::Away(_)) => return Err(cut()),
        Some(Fault::NoAnswerBefore) => std::future::pending().await,
        Some(Fault::Status(code)) => {
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
                "message": "Made by the test", "reason": "",
            });
            let body = Full::from(status.to_string()).map_err(|never| match never {}).boxed_unsync();
            let answer = Response::builder().status(code).header(header::CONTENT_TYPE, "application/json");
            return answer.body(body).map_err(io::Error::other);
        }
        _ => {}
    }
    let (parts, body) = request.into_parts();
    let bytes = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let mut passed = Request::builder().method(parts.method).uri(parts.uri);
    for name in [header::AUTHORIZATION, header::ACCEPT, header::CONTENT_TYPE, header::USER_AGENT] {
        if let Some(value) = parts.headers.get(&name) {
            passed = passed.header(name, value);
        }
    }
    let passed = passed.body(kube::client::Body::from(bytes.to_vec())).map_err(io::Error::other)?;
    let answer = server.send(passed).await.map_err(io::Error::other)?;
    match fault {
        Some(Fault::CutAfter) => return Err(cut()),
        Some(Fault::NoAnswerAfter) => std::future::pending().await,
        _ => {}
    }
    let (parts, body) = answer.into_parts();
    let mut response = Response::builder().status(parts.status);
    if let Some(kind) = parts.headers.get(header::CONTENT_TYPE) {
        response = response.header(header::CONTENT_TYPE, kind);
    }
    let body = body.map_err(io::Error::other).boxed_unsync();
    let body = match fault {
        Some(Fault::CutBody(length)) => {
            let first = body_start(body, length).await?;
            let parts = futures::stream::iter([Ok(hyper::body::Frame::data(first)), Err(cut())]);
            http_body_util::StreamBody::new(parts).boxed_unsync()
        }
        _ => body,
    };
    response.body(body).map_err(io::Error::other)
}

/// The first bytes of a body, as far as its first piece has them.
async fn body_start(mut body: Body, length: usize) -> Result<Bytes, io::Error> {
    let frame = body.frame().await.transpose()?.and_then(|frame| frame.into_data().ok()).unwrap_or_default();
    Ok(frame.slice(..frame.len().min(length)))
}

/// How long an answer is waited for that never comes.
const NO_ANSWER: Duration = Duration::from_secs(2);

struct World {
    cluster: Cluster,
    proxy: Proxy,
    hardware: Hardware,
    kubeconfig: String,
    namespace: String,
    node: String,
    path: String,
}

impl World {
    async fn new() -> Result<Self> {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        // Nobody deploys anything on this node: there is nothing to wait for.
        let (path, node) = cluster.node(&[(CC_MODE, "off")]).await?;
        let account = cluster.account(&namespace, &Rule::operator_cc_manager(&namespace)).await?;
        let proxy = Proxy::start(&cluster).await?;
        let kubeconfig = proxy.kubeconfig(&account.kubeconfig)?;
        Ok(Self { cluster, proxy, hardware: Hardware::new()?, kubeconfig, namespace, node, path })
    }

    fn start(&self) -> Result<agent::Agent> {
        self.hardware.start(Start {
            kubeconfig: &self.kubeconfig,
            node: &self.node,
            namespace: &self.namespace,
            answer: NO_ANSWER,
            look: Arc::new(|| Ok(())),
        })
    }

    async fn want(&self, mode: Mode) -> Result<()> {
        let labels = json!({"metadata": {"labels": {CC_MODE: mode.as_str()}}});
        self.cluster.admin.patch(&self.path, MERGE, &labels).await?.is(200).map(drop)
    }

    async fn until_settled(&self, mode: Mode) -> Result<()> {
        let ready = if mode == Mode::On { "true" } else { "false" };
        let is_so = |node: &Value| {
            let metadata = &node["metadata"];
            let status: Value = metadata["annotations"][annotations::CC_STATUS]
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default();
            metadata["labels"][CC_MODE_STATE] == mode.as_str()
                && metadata["labels"][CC_READY_STATE] == ready
                && metadata["annotations"][annotations::TRANSITION].is_null()
                && (&status["wanted"], &status["result"]) == (&mode.as_str().into(), &"applied".into())
        };
        self.cluster.admin.until(&self.path, |answer| is_so(&answer.body).then_some(())).await?;
        self.hardware.is_in(mode)
    }

    /// Makes a change by an agent that is started for it; what its requests meet is in the plan.
    async fn change(&self, mode: Mode) -> Result<()> {
        self.want(mode).await?;
        let agent = self.start()?;
        self.until_settled(mode).await?;
        // The thread ends its runtime, for which this one is not needed.
        tokio::task::spawn_blocking(move || agent.end()).await?
    }

    async fn label_never_lies(&self, api: &Api) -> Result<()> {
        let node = api.get(&self.path).await?.is(200)?;
        let labels = &node["metadata"]["labels"];
        ensure!(labels[CC_READY_STATE] != "true" || labels[CC_MODE_STATE] == "on", "{labels:#}");
        Ok(())
    }
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn whatever_comes_between_it_and_a_real_server_the_node_gets_there() -> Result<()> {
    run(async {
        let world = World::new().await?;
        let modes = [Mode::On, Mode::Off];
        let mut requests = Vec::new();
        // Once from nothing, and then each change in peace, to count what there is to strike.
        world.change(Mode::Off).await.context("at the start")?;
        for mode in modes {
            world.proxy.arm(None);
            world.change(mode).await.with_context(|| format!("{mode} in peace"))?;
            requests.push(world.proxy.plan().seen);
        }
        println!("requests of each change: {requests:?}");
        let (mut struck, mut failures) = (0, Vec::new());
        for fault in FAULTS {
            for number in 0..requests.iter().copied().max().unwrap_or_default() {
                for mode in modes {
                    world.proxy.arm(Some((number, fault)));
                    let made = world.change(mode).await;
                    struck += usize::from(world.proxy.plan().struck > 0);
                    if let Err(error) = made {
                        failures.push(format!("{mode}, {fault:?} at {number}: {error:#}"));
                        ensure!(failures.len() < 5, "{failures:#?}");
                        world.proxy.arm(None);
                        world.change(mode).await.context("in peace, after a failure")?;
                    }
                    world.label_never_lies(&world.cluster.admin).await?;
                }
            }
        }
        println!("faults: {struck} struck, {} failures", failures.len());
        let least = requests.iter().sum::<usize>() * FAULTS.len();
        ensure!(struck * 10 >= least * 8, "{struck} struck of {least}: the plan is not the changes'");
        ensure!(failures.is_empty(), "{failures:#?}");
        Ok(())
    })
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn a_change_asked_for_while_the_server_restarts_is_made_after_it() -> Result<()> {
    run(async {
        let world = World::new().await?;
        world.change(Mode::Off).await?;
        let agent = world.start()?;
        world.until_settled(Mode::Off).await?;
        world.want(Mode::On).await?;
        tokio::task::spawn_blocking(|| script(&["stop", "apiserver", "KILL"])).await??;
        tokio::time::sleep(Duration::from_secs(1)).await;
        tokio::task::spawn_blocking(|| script(&["start", "apiserver"])).await??;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !world.cluster.admin.get("/readyz").await.is_ok_and(|answer| answer.code == 200) {
            ensure!(tokio::time::Instant::now() < deadline, "the API server does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        world.until_settled(Mode::On).await?;
        // It still follows: the watch was made anew.
        world.want(Mode::Off).await?;
        world.until_settled(Mode::Off).await?;
        tokio::task::spawn_blocking(move || agent.end()).await?
    })
}
