//! Faults between cc-manager and a real API server, at every request of a change and in every watch: the node gets where it is to
//! be once the fault is over, and no label is ever false. A proxy in front of the real server makes them. The components that a
//! change pauses are there: DaemonSets, whose pods the real controller deletes and makes anew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
#[path = "real_kube/operator.rs"]
mod operator;
#[path = "real_kube/proxy.rs"]
mod proxy;
mod real_kube;
#[path = "real_kube/truth.rs"]
mod truth;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent::parts::{Change, Kept, ROUND_TRIP, ready_state};
use agent::{Agent, Hardware, Start};
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use gpu_firmware::Mode;
use http::Method;
use lab_kube::api_server::Rule;
use node_object::annotations;
use node_object::labels::{CC_MODE, CC_MODE_STATE, CC_READY_STATE};
use operator::{Components, want};
use proxy::{Fault, Proxy, Stale, Strike};
use real_kube::{Cluster, MERGE, PATIENCE, run, script};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use truth::Truth;

/// What happens to a request, or while it waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// This happens to so many requests from this one on.
    Fault(Fault, usize),
    /// Every running watch ends in order.
    WatchesClosed,
    /// Every connection is cut.
    ConnectionsCut,
    /// The server goes away and comes back.
    Away,
    /// Watches from before this moment get 410, and every running one is cut.
    Compacted,
    /// The node is deleted, and made again under another UID by its kubelet, with these of its labels.
    Recreated(Kept),
}

const fn once(fault: Fault) -> Kind {
    Kind::Fault(fault, 1)
}

const fn status(code: u16) -> Fault {
    Fault::Status { code, retry_after: None }
}

/// Those of any request.
const KINDS: [Kind; 19] = [
    once(Fault::CutBefore),
    once(Fault::CutAfter),
    once(status(409)),
    once(status(410)),
    once(status(429)),
    once(status(500)),
    once(status(503)),
    Kind::Fault(status(503), 7),
    Kind::Fault(Fault::CutBefore, 5),
    once(Fault::SlowBody(200, Duration::from_millis(1))),
    once(Fault::CutBody(100)),
    once(Fault::NoAnswerBefore),
    once(Fault::NoAnswerAfter),
    Kind::WatchesClosed,
    Kind::ConnectionsCut,
    Kind::Away,
    Kind::Compacted,
    Kind::Recreated(Kept::Mode),
    Kind::Recreated(Kept::All),
];

/// Those of watches alone.
const KINDS_OF_WATCHES: [Kind; 12] = [
    Kind::Fault(Fault::WatchCut(0), 3),
    Kind::Fault(Fault::WatchCut(1), 3),
    Kind::Fault(Fault::WatchTorn, 3),
    Kind::Fault(Fault::WatchGone, 3),
    Kind::Fault(status(410), 3),
    Kind::Fault(Fault::Status { code: 429, retry_after: Some(1) }, 1),
    Kind::Fault(status(429), 3),
    Kind::Fault(status(500), 3),
    Kind::Fault(Fault::WatchLate(Duration::from_millis(500)), 10),
    once(Fault::StaleBookmark(0, Stale::BeforeTheChange)),
    once(Fault::StaleBookmark(1, Stale::BeforeTheChange)),
    once(Fault::StaleBookmark(1, Stale::OneBefore)),
];

/// How long an answer is waited for that never comes.
const NO_ANSWER: Duration = Duration::from_secs(1);

/// How long the server is away, in which an agent tries it again.
const AWAY: Duration = Duration::from_millis(100);

/// Time for what comes after the result: events.
const AFTERWARDS: Duration = Duration::from_millis(300);

/// What happens at the request of this number, counted among watches if `of_watches`.
#[derive(Clone, Copy, Debug)]
struct Point {
    kind: Kind,
    number: usize,
    of_watches: bool,
}

impl Point {
    /// What the proxy is to do for it.
    fn strike(self) -> Strike {
        let Self { kind, number: first, of_watches } = self;
        let (fault, times) = match kind {
            Kind::Fault(fault, times) => (fault, times),
            _ => (Fault::Held, 1),
        };
        Strike { fault, first, times, of_watches }
    }

    /// How long the agent waits for an answer.
    fn answer(self) -> Duration {
        match self.kind {
            Kind::Fault(Fault::NoAnswerBefore | Fault::NoAnswerAfter, _) => NO_ANSWER,
            _ => PATIENCE,
        }
    }
}

struct World {
    cluster: Cluster,
    proxy: Proxy,
    hardware: Hardware,
    kubeconfig: String,
    namespace: String,
    node: String,
    path: String,
    components: Components,
    truth: Truth,
    boot: RefCell<String>,
    /// The version at which the last change was asked for.
    before: Cell<u64>,
    /// The node was made again while it changed: the components may be back already.
    is_made_again: Arc<AtomicBool>,
    /// Ends the pod of a component once somebody watches for it, so that every change waits in the same requests.
    ends_pods: JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.ends_pods.abort();
    }
}

fn version_of(object: &Value) -> Result<u64> {
    object["metadata"]["resourceVersion"].as_str().context("no version")?.parse().context("the version")
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
        let hardware = Hardware::new()?;
        let boot = hardware.boot()?;
        let truth = Truth::watch(&cluster.admin, &node, &boot).await?;
        let (api, pod, mut watched) = (cluster.admin.clone(), components.lingering(), proxy.pods_watched());
        let ends_pods = tokio::spawn(async move {
            while watched.changed().await.is_ok() {
                // Were the server away, whoever waits for the node to settle deletes it.
                let _ = api.delete_now(&pod).await;
            }
        });
        let world = Self {
            cluster,
            proxy,
            hardware,
            kubeconfig,
            namespace,
            node,
            path,
            components,
            truth,
            boot: RefCell::new(boot),
            before: Cell::new(1),
            is_made_again: Arc::default(),
            ends_pods,
        };
        Ok(world)
    }

    /// The same, once an agent has found it so.
    async fn settled() -> Result<Self> {
        let world = Self::new().await?;
        world.change(Change { to: Mode::Off, is_new_boot: false }, None).await.context("at the start")?;
        Ok(world)
    }

    /// Starts an agent that waits this long for an answer.
    fn start(&self, answer: Duration) -> Result<Agent> {
        let (runtime, api, quiet) = (Handle::current(), self.cluster.admin.clone(), self.components.quiet());
        let (witness, is_made_again) = (self.truth.witness(), Arc::clone(&self.is_made_again));
        let look = move || {
            runtime.block_on(async {
                witness.begin().await?;
                if is_made_again.load(Ordering::SeqCst) { Ok(()) } else { quiet.is_so(&api).await }
            })
        };
        let (runtime, witness) = (Handle::current(), self.truth.witness());
        self.hardware.start(Start {
            kubeconfig: &self.kubeconfig,
            node: &self.node,
            namespace: &self.namespace,
            answer,
            look: Arc::new(look),
            ended: Arc::new(move |mode| runtime.block_on(witness.end(mode))),
        })
    }

    /// Asks for a change; the version from which on the node says so.
    async fn prepare(&self, Change { to, is_new_boot }: Change) -> Result<u64> {
        self.is_made_again.store(false, Ordering::SeqCst);
        self.components.linger().await?;
        if is_new_boot {
            let boot = self.hardware.boot()?;
            self.truth.witness().booted(&boot).await?;
            self.boot.replace(boot);
        }
        self.want(to).await
    }

    async fn want(&self, mode: Mode) -> Result<u64> {
        want(&self.cluster.admin, &self.node, Some(mode)).await?;
        version_of(&self.cluster.admin.get(&self.path).await?.is(200)?)
    }

    /// Waits until the node is in a mode and says so, after a version, with its components at work.
    async fn until_settled(&self, mode: Mode, version: u64) -> Result<()> {
        let boot = self.boot.borrow().clone();
        let is_so = |node: &Value| {
            let (labels, noted) = (&node["metadata"]["labels"], &node["metadata"]["annotations"]);
            let status: Value = noted[annotations::CC_STATUS]
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default();
            labels[CC_MODE_STATE] == mode.as_str()
                && labels[CC_READY_STATE] == ready_state(mode)
                && self.components.are_wanted(node)
                && noted[annotations::TRANSITION].is_null()
                && (&status["wanted"], &status["result"]) == (&mode.as_str().into(), &"applied".into())
                && status["nodeUid"] == node["metadata"]["uid"]
                && status["bootId"] == *boot
        };
        let node = self.truth.until(version, is_so).await.with_context(|| format!("not in mode {mode}"))?;
        // Nobody has waited for it where its label was gone with the node.
        self.cluster.admin.delete_now(&self.components.lingering()).await?;
        self.components.until_running(true).await.context("the components do not come back")?;
        self.hardware.is_in(mode)?;
        self.hardware.is_noted_in(mode, node["metadata"]["uid"].as_str())
    }

    /// The agent that has settled the node still follows it: it puts back what somebody takes away.
    async fn is_still_followed(&self, mode: Mode) -> Result<()> {
        let patch = json!({"metadata": {"annotations": {annotations::CC_STATUS: null}}});
        let node = self.cluster.admin.patch(&self.path, MERGE, &patch).await?.is(200)?;
        self.until_settled(mode, version_of(&node)?).await.context("nobody puts the status back")
    }

    /// Makes a change by an agent that is started for it. Tells how many requests and watches it took, in peace, or met the fault.
    async fn change(&self, change: Change, point: Option<Point>) -> Result<[usize; 2]> {
        let stale = self.before.replace(self.truth.version());
        self.proxy.arm(point.map(Point::strike), stale);
        let version = self.prepare(change).await?;
        let agent = self.start(point.map_or(PATIENCE, Point::answer))?;
        let made = self.made(change.to, point, version).await;
        self.proxy.arm(None, 0);
        self.proxy.set_down(false);
        self.proxy.release();
        let log = agent.log();
        agent.end().await?;
        let (made, verdict) = (made.with_context(|| log), self.truth.verdict().await);
        let made = made?;
        verdict.map(|()| made)
    }

    async fn made(&self, mode: Mode, point: Option<Point>, version: u64) -> Result<[usize; 2]> {
        let mut version = version;
        match point.map(|point| point.kind) {
            None => {
                self.until_settled(mode, version).await?;
                tokio::time::sleep(AFTERWARDS).await;
                return Ok(self.proxy.seen());
            }
            Some(Kind::Fault(..)) => {}
            Some(kind) => {
                let is_held = tokio::select! {
                    biased;
                    () = self.proxy.until_held() => true,
                    settled = self.until_settled(mode, version) => {
                        settled?;
                        tokio::time::timeout(AFTERWARDS, self.proxy.until_held()).await.is_ok()
                    }
                };
                if is_held {
                    version = self.act(kind, mode, version).await?;
                } else {
                    // What comes next is not of the change.
                    self.proxy.arm(None, 0);
                }
            }
        }
        self.until_settled(mode, version).await?;
        self.is_still_followed(mode).await?;
        // Whoever waits for ever does not see what comes next.
        self.proxy.until_given_up().await?;
        Ok([self.proxy.struck(); 2])
    }

    /// Lets something happen while a request is held, and lets that go on. Returns the version from which on the node has settled.
    async fn act(&self, kind: Kind, mode: Mode, version: u64) -> Result<u64> {
        let version = match kind {
            Kind::Fault(..) => version,
            Kind::WatchesClosed => {
                self.proxy.close_watches();
                version
            }
            Kind::ConnectionsCut => {
                self.proxy.cut_connections();
                version
            }
            Kind::Away => {
                self.proxy.set_down(true);
                tokio::time::sleep(AWAY).await;
                self.proxy.set_down(false);
                version
            }
            Kind::Compacted => {
                let list =
                    self.cluster.admin.get("/api/v1/nodes?fieldSelector=metadata.name%3Dnobody").await?.is(200)?;
                self.proxy.compact(version_of(&list)?);
                version
            }
            Kind::Recreated(kept) => self.make_again(kept, mode).await?,
        };
        self.proxy.release();
        if let Kind::Recreated(_) = kind {
            self.components.label_where_absent().await?;
        }
        Ok(version)
    }

    /// Deletes the node, and makes it again as its kubelet would.
    async fn make_again(&self, kept: Kept, mode: Mode) -> Result<u64> {
        self.is_made_again.store(true, Ordering::SeqCst);
        let admin = &self.cluster.admin;
        let labels = loop {
            let node = admin.get(&self.path).await?.is(200)?;
            let metadata = &node["metadata"];
            // What it has said last, and nothing older, is kept.
            let options = json!({"preconditions": {"resourceVersion": metadata["resourceVersion"]}});
            let headers = [("content-type", "application/json")];
            let answer = admin.ask(Method::DELETE, &self.path, &headers, options.to_string().into_bytes()).await?;
            if answer.code != 409 {
                answer.is(200)?;
                break metadata["labels"].clone();
            }
        };
        let labels = match kept {
            Kept::All => labels,
            Kept::Mode => {
                json!(self.components.place().into_iter().chain([(CC_MODE, mode.as_str())]).collect::<BTreeMap<_, _>>())
            }
        };
        let node = json!({"metadata": {"name": self.node, "labels": labels}, "status": Components::room()});
        version_of(&admin.post("/api/v1/nodes", &node).await?.is(201)?)
    }

    async fn end(&self) -> Result<()> {
        self.components.remove().await?;
        self.cluster.admin.delete(&self.path).await?.is(200).map(drop)
    }
}

/// What has come of all.
#[derive(Default)]
struct Counts {
    struck: usize,
    looks: usize,
    failures: Vec<String>,
    /// How long each kind took.
    took: BTreeMap<String, Vec<Duration>>,
}

impl Counts {
    /// Notes a failure; so many are enough.
    fn failed(&mut self, failure: String) -> Result<()> {
        self.failures.push(failure);
        ensure!(self.failures.len() < 5, "{:#?}", self.failures);
        Ok(())
    }
}

/// How many nodes change side by side: most of it is waiting.
const NODES: usize = 8;

/// Every kind at every request of each change, in turns that lead back to where they began.
async fn matrix() -> Result<()> {
    let worlds = try_join_all((0..NODES).map(|_| World::settled())).await?;
    let mut extents = Vec::new();
    for change in ROUND_TRIP {
        extents.push(worlds[0].change(change, None).await.with_context(|| format!("{change:?} in peace"))?);
    }
    println!("requests and watches of each change: {extents:?}");
    // Without watches, or with the patches alone, the counting is broken.
    ensure!(extents.iter().all(|[requests, watches]| *requests >= 6 && *watches >= 2), "{extents:?}");
    let most = |of_watches: usize| extents.iter().map(|extent| extent[of_watches]).max().unwrap_or_default();
    let points = |kinds: &'static [Kind], of_watches: bool| {
        let numbers = 0..most(usize::from(of_watches));
        numbers.flat_map(move |number| kinds.iter().map(move |kind| Point { kind: *kind, number, of_watches }))
    };
    let todo: VecDeque<Point> = points(&KINDS, false).chain(points(&KINDS_OF_WATCHES, true)).collect();
    let (todo, counts) = (RefCell::new(todo), RefCell::new(Counts::default()));
    try_join_all(worlds.iter().map(|world| part(world, &extents, &todo, &counts))).await?;
    let Counts { struck, looks, failures, took } = counts.into_inner();
    let changes: usize = took.values().map(Vec::len).sum();
    for (kind, took) in took {
        let whole: Duration = took.iter().sum();
        println!("{:6.1} s for {:3} changes: {kind}", whole.as_secs_f64(), took.len());
    }
    println!(
        "faults: {} kinds at every request and {} in every watch of {} changes = {changes}, {struck} struck, {} failures; \
         labels and devices compared {looks} times",
        KINDS.len(),
        KINDS_OF_WATCHES.len(),
        ROUND_TRIP.len(),
        failures.len(),
    );
    ensure!(struck * 100 >= changes * 98, "{struck} struck of {changes}: the plan is not the changes'");
    ensure!(failures.is_empty(), "{failures:#?}");
    ensure!(looks > changes, "{looks} looks at {changes} changes");
    try_join_all(worlds.iter().map(World::end)).await.map(drop)
}

/// Whatever is left to do, as long as there is something.
async fn part(
    world: &World,
    extents: &[[usize; 2]],
    todo: &RefCell<VecDeque<Point>>,
    counts: &RefCell<Counts>,
) -> Result<()> {
    loop {
        let Some(point) = todo.borrow_mut().pop_front() else { break };
        for (change, extent) in ROUND_TRIP.into_iter().zip(extents) {
            let is_there = point.number < extent[usize::from(point.of_watches)];
            let begun = Instant::now();
            let made = world.change(change, Some(point).filter(|_| is_there)).await;
            if is_there {
                counts.borrow_mut().took.entry(format!("{:?}", point.kind)).or_default().push(begun.elapsed());
            }
            match made {
                Ok([struck, _]) => counts.borrow_mut().struck += usize::from(is_there && struck > 0),
                Err(error) => {
                    counts.borrow_mut().failed(format!("{change:?}, {point:?}: {error:#}"))?;
                    let again = Change { is_new_boot: false, ..change };
                    world.change(again, None).await.context("in peace, after a failure")?;
                }
            }
        }
    }
    counts.borrow_mut().looks += world.truth.looks();
    Ok(())
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn whatever_comes_between_it_and_a_real_server_the_node_gets_there_and_never_lies() -> Result<()> {
    run(matrix())
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn an_agent_whose_watch_is_cut_and_cut_again_still_follows_its_node() -> Result<()> {
    run(async {
        let world = World::new().await?;
        let agent = world.start(PATIENCE)?;
        world.until_settled(Mode::Off, 0).await?;
        for kind in KINDS_OF_WATCHES {
            for mode in [Mode::On, Mode::Off] {
                let told = || format!("{mode}, {kind:?}");
                let point = Point { kind, number: 0, of_watches: true };
                let stale = world.before.replace(world.truth.version());
                world.proxy.arm(Some(point.strike()), stale);
                world.proxy.cut_connections();
                let version = world.want(mode).await?;
                world.until_settled(mode, version).await.with_context(told)?;
                let struck = world.proxy.struck();
                ensure!(struck > 0, "{}: nothing was struck", told());
                world.truth.verdict().await.with_context(told)?;
            }
        }
        println!("labels and devices compared {} times", world.truth.looks());
        agent.end().await?;
        world.end().await
    })
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn a_change_asked_for_while_the_server_restarts_is_made_after_it() -> Result<()> {
    run(async {
        let world = World::settled().await?;
        let agent = world.start(PATIENCE)?;
        world.until_settled(Mode::Off, 0).await?;
        let version = world.want(Mode::On).await?;
        tokio::task::spawn_blocking(|| script(&["stop", "apiserver", "KILL"])).await??;
        tokio::time::sleep(Duration::from_secs(1)).await;
        tokio::task::spawn_blocking(|| script(&["start", "apiserver"])).await??;
        world.cluster.until_ready().await?;
        world.until_settled(Mode::On, version).await?;
        // It still follows: the watch was made anew.
        let version = world.want(Mode::Off).await?;
        world.until_settled(Mode::Off, version).await?;
        agent.end().await?;
        world.truth.verdict().await?;
        world.end().await
    })
}
