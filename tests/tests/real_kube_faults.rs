//! Faults between cc-manager and a real API server, at every request of a change and in every watch: the node gets where it is to
//! be once the fault is over. A proxy in front of the real server makes them. The components that a change pauses are there:
//! DaemonSets, whose pods the real controller deletes and makes anew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
#[path = "real_kube/operator.rs"]
mod operator;
mod real_kube;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent::{Hardware, Start};
use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use gpu_firmware::Mode;
use http::{Request, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use lab_kube::api_server::Rule;
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use operator::Components;
use real_kube::{Cluster, MERGE, run, script};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

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
    /// This many watches are cut before their first event, or after the first piece of one.
    WatchesCut(usize, usize),
    /// This many watches are refused with this code.
    WatchesRefused(usize, u16),
    /// This many watches begin, and tell that their version is too old.
    WatchesGone(usize),
    /// Whatever this many watches tell is late.
    WatchesSlow(usize),
}

impl Fault {
    /// Whether it is for watches alone.
    fn is_of_watches(self) -> bool {
        matches!(self, Self::WatchesCut(..) | Self::WatchesRefused(..) | Self::WatchesGone(_) | Self::WatchesSlow(_))
    }

    /// How many requests in a row it concerns.
    fn length(self) -> usize {
        match self {
            Self::Away(count)
            | Self::WatchesCut(count, _)
            | Self::WatchesRefused(count, _)
            | Self::WatchesGone(count)
            | Self::WatchesSlow(count) => count,
            _ => 1,
        }
    }
}

/// How late a slow watch is.
const LATE: Duration = Duration::from_millis(500);

const FAULTS_OF_WATCHES: [Fault; 7] = [
    Fault::WatchesCut(3, 0),
    Fault::WatchesCut(3, 40),
    Fault::WatchesRefused(3, 410),
    Fault::WatchesRefused(3, 429),
    Fault::WatchesRefused(3, 500),
    Fault::WatchesGone(3),
    Fault::WatchesSlow(10),
];

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
    watches: usize,
    fault: Option<(usize, Fault)>,
    struck: usize,
}

impl Plan {
    /// What is to happen to the next request.
    fn next(&mut self, is_watch: bool) -> Option<Fault> {
        let (number, watch) = (self.seen, self.watches);
        self.seen += 1;
        self.watches += usize::from(is_watch);
        let (first, fault) = self.fault?;
        let number = match (fault.is_of_watches(), is_watch) {
            (true, false) => return None,
            (true, true) => watch,
            (false, _) => number,
        };
        (first..first + fault.length()).contains(&number).then(|| {
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
    /// Every watch that is open when this changes is cut.
    cut: watch::Sender<()>,
}

impl Proxy {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let server = cluster.anonymous().await?.client();
        let plan: Arc<Mutex<Plan>> = Arc::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (planned, cut) = (Arc::clone(&plan), watch::Sender::new(()));
        let cuts = cut.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (server, plan, cuts) = (server.clone(), Arc::clone(&planned), cuts.clone());
                let service = service_fn(move |request| {
                    let is_watch = is_watch(&request);
                    let fault = plan.lock().unwrap_or_else(PoisonError::into_inner).next(is_watch);
                    pass(server.clone(), request, fault, is_watch.then(|| cuts.subscribe()))
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(Self { plan, address, cut })
    }

    /// Cuts every watch that is open.
    fn cut_watches(&self) {
        self.cut.send_replace(());
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

fn is_watch<T>(request: &Request<T>) -> bool {
    request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"))
}

/// The answer of a server that has forgotten a version, or wants nobody at the moment.
fn status(code: u16) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "message": "Made by the test", "reason": if code == 410 { "Expired" } else { "" },
    })
}

/// A whole answer of our own.
fn answer(code: u16, content: &Value) -> Result<Response<Body>, io::Error> {
    let body = Full::from(format!("{content}\n")).map_err(|never| match never {}).boxed_unsync();
    Response::builder()
        .status(code)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(io::Error::other)
}

async fn pass(
    server: kube::Client,
    request: Request<Incoming>,
    fault: Option<Fault>,
    cuts: Option<watch::Receiver<()>>,
) -> Result<Response<Body>, io::Error> {
    match fault {
        Some(Fault::CutBefore | Fault::Away(_)) => return Err(cut()),
        Some(Fault::NoAnswerBefore) => std::future::pending().await,
        Some(Fault::Status(code) | Fault::WatchesRefused(_, code)) => return answer(code, &status(code)),
        Some(Fault::WatchesGone(_)) => return answer(200, &json!({"type": "ERROR", "object": status(410)})),
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
    let body = match (fault, cuts) {
        (Some(Fault::CutBody(length)), _) => cut_after(body_start(body, length).await?),
        // Nothing comes of a watch before there is an event: it is cut at once.
        (Some(Fault::WatchesCut(_, 0)), _) => cut_after(Bytes::new()),
        (Some(Fault::WatchesCut(_, length)), _) => {
            let first = async move { Ok(Frame::data(body_start(body, length).await?)) };
            let parts = futures::stream::once(first).chain(futures::stream::once(async { Err(cut()) }));
            StreamBody::new(parts).boxed_unsync()
        }
        (fault, Some(cuts)) => watched(body, cuts, matches!(fault, Some(Fault::WatchesSlow(_)))),
        _ => body,
    };
    response.body(body).map_err(io::Error::other)
}

/// A body that begins so and is cut.
fn cut_after(first: Bytes) -> Body {
    StreamBody::new(futures::stream::iter([Ok(Frame::data(first)), Err(cut())])).boxed_unsync()
}

/// The body of a watch, until the test cuts it.
fn watched(body: Body, cuts: watch::Receiver<()>, is_slow: bool) -> Body {
    let stream = futures::stream::unfold((body, cuts), move |(mut body, mut cuts)| async move {
        let next = async {
            let frame = body.frame().await;
            if is_slow {
                tokio::time::sleep(LATE).await;
            }
            frame
        };
        // A cut is never late.
        let frame = tokio::select! {
            biased;
            Ok(()) = cuts.changed() => Err(cut()),
            frame = next => frame?,
        };
        Some((frame, (body, cuts)))
    });
    StreamBody::new(stream).boxed_unsync()
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
    components: Components,
}

impl World {
    async fn new() -> Result<Self> {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        let (path, node) = cluster.node(&[(CC_MODE, "off")]).await?;
        let account = cluster.account(&namespace, &Rule::operator_cc_manager(&namespace)).await?;
        let components = Components::on_a_bare_node(&cluster, &node, &namespace).await?;
        components.until_running(true).await?;
        let proxy = Proxy::start(&cluster).await?;
        let kubeconfig = proxy.kubeconfig(&account.kubeconfig)?;
        Ok(Self { cluster, proxy, hardware: Hardware::new()?, kubeconfig, namespace, node, path, components })
    }

    fn start(&self) -> Result<agent::Agent> {
        self.hardware.start(Start {
            kubeconfig: &self.kubeconfig,
            node: &self.node,
            namespace: &self.namespace,
            answer: NO_ANSWER,
            look: self.components.look(),
        })
    }

    async fn want(&self, mode: Mode) -> Result<()> {
        let labels = json!({"metadata": {"labels": {CC_MODE: mode.as_str()}}});
        self.cluster.admin.patch(&self.path, MERGE, &labels).await?.is(200).map(drop)
    }

    async fn until_settled(&self, mode: Mode) -> Result<()> {
        self.components.until_settled(mode).await?;
        let is_so = |node: &Value| {
            let status: Value = node["metadata"]["annotations"][annotations::CC_STATUS]
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default();
            (&status["wanted"], &status["result"]) == (&mode.as_str().into(), &"applied".into())
        };
        self.cluster.admin.until(&self.path, |answer| is_so(&answer.body).then_some(())).await?;
        self.hardware.is_in(mode)
    }

    /// Makes a change by an agent that is started for it; what its requests meet is in the plan.
    async fn change(&self, mode: Mode) -> Result<()> {
        self.want(mode).await?;
        let agent = self.start()?;
        let settled = self.until_settled(mode).await;
        let log = agent.log();
        agent.end().await?;
        settled.with_context(|| log)
    }

    async fn label_never_lies(&self) -> Result<()> {
        let node = self.cluster.admin.get(&self.path).await?.is(200)?;
        let labels = &node["metadata"]["labels"];
        ensure!(labels[CC_READY_STATE] != "true" || labels[CC_MODE_STATE] == "on", "{labels:#}");
        Ok(())
    }

    async fn end(self) -> Result<()> {
        self.components.remove().await?;
        self.cluster.admin.delete(&self.path).await?.is(200).map(drop)
    }
}

/// Every fault at every request of a kind, in each of two changes. Most of it is waiting: one half is done beside the other, on a
/// node of its own.
async fn matrix(faults: &[Fault], count: impl Fn(&Plan) -> usize) -> Result<()> {
    // Neighbours in the list take as long.
    let half = |first| faults.iter().copied().skip(first).step_by(2).collect::<Vec<_>>();
    let (even, odd) = (half(0), half(1));
    futures::try_join!(part(&even, &count), part(&odd, &count)).map(drop)
}

async fn part(faults: &[Fault], count: impl Fn(&Plan) -> usize) -> Result<()> {
    let world = World::new().await?;
    let modes = [Mode::On, Mode::Off];
    let mut requests = Vec::new();
    // Once from nothing, and then each change in peace, to count what there is to strike.
    world.change(Mode::Off).await.context("at the start")?;
    for mode in modes {
        world.proxy.arm(None);
        world.change(mode).await.with_context(|| format!("{mode} in peace"))?;
        requests.push(count(&world.proxy.plan()));
    }
    println!("requests of each change: {requests:?}");
    let (mut struck, mut failures) = (0, Vec::new());
    for fault in faults.iter().copied() {
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
                world.label_never_lies().await?;
            }
        }
    }
    println!("faults: {struck} struck, {} failures", failures.len());
    let least = requests.iter().sum::<usize>() * faults.len();
    ensure!(struck * 10 >= least * 8, "{struck} struck of {least}: the plan is not the changes'");
    ensure!(failures.is_empty(), "{failures:#?}");
    world.end().await
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn whatever_comes_between_it_and_a_real_server_the_node_gets_there() -> Result<()> {
    run(matrix(&FAULTS, |plan| plan.seen))
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn whatever_becomes_of_the_watches_of_a_change_the_node_gets_there() -> Result<()> {
    run(matrix(&FAULTS_OF_WATCHES, |plan| plan.watches))
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn an_agent_whose_watch_is_cut_and_cut_again_still_follows_its_node() -> Result<()> {
    run(async {
        let world = World::new().await?;
        let agent = world.start()?;
        world.until_settled(Mode::Off).await?;
        for fault in FAULTS_OF_WATCHES {
            for mode in [Mode::On, Mode::Off] {
                let told = || format!("{mode}, {fault:?}");
                world.proxy.arm(Some((0, fault)));
                world.proxy.cut_watches();
                world.want(mode).await?;
                world.until_settled(mode).await.with_context(told)?;
                let struck = world.proxy.plan().struck;
                ensure!(struck > 0, "{}: nothing was struck", told());
                world.label_never_lies().await?;
            }
        }
        agent.end().await?;
        world.end().await
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
        world.cluster.until_ready().await?;
        world.until_settled(Mode::On).await?;
        // It still follows: the watch was made anew.
        world.want(Mode::Off).await?;
        world.until_settled(Mode::Off).await?;
        agent.end().await?;
        world.end().await
    })
}
