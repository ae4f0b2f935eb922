//! A proxy in front of the API server, and the faults that it makes of what passes.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use http::{Request, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::real_kube::{Cluster, PATIENCE};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection is cut before the server hears of it.
    CutBefore,
    /// The connection is cut after the server has done it.
    CutAfter,
    /// The server does not hear of it, and this is the answer.
    Status {
        code: u16,
        /// The `Retry-After` header in seconds.
        retry_after: Option<u32>,
    },
    /// It is never answered, and the server has not heard of it.
    NoAnswerBefore,
    /// It is never answered, though the server has done it.
    NoAnswerAfter,
    /// The answer comes in pieces of so many bytes with a pause before each.
    SlowBody(usize, Duration),
    /// The answer ends after so many bytes.
    CutBody(usize),
    /// It waits, and the server has not heard of it, until the test lets it go on. If its connection ends before that, the server
    /// never does.
    Held,
    /// A watch begins, and tells that its version is too old.
    WatchGone,
    /// A watch is cut in the middle of a line after so many events.
    WatchCut(usize),
    /// A watch is cut in the middle of its first event.
    WatchTorn,
    /// Whatever a watch tells is so late.
    WatchLate(Duration),
    /// After so many events a watch gets a bookmark of an older version than it was told, and ends in order.
    StaleBookmark(usize, Stale),
}

/// Of which version a bookmark is that is too old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stale {
    /// That from which earlier changes are told again: [`Proxy::arm`] says which.
    BeforeTheChange,
    /// The one before the last that was told.
    OneBefore,
}

/// Which requests meet a fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    pub(crate) fault: Fault,
    /// The first of them, from 0 on.
    pub(crate) first: usize,
    pub(crate) times: usize,
    /// Whether watches alone are counted.
    pub(crate) of_watches: bool,
}

/// What has passed, and what is to happen.
#[derive(Default)]
struct Plan {
    seen: usize,
    watches: usize,
    strike: Option<Strike>,
    struck: usize,
    /// The version of a stale bookmark.
    stale: u64,
}

impl Plan {
    /// What is to happen to the next request.
    fn next(&mut self, is_watch: bool) -> Option<Fault> {
        let (number, watch) = (self.seen, self.watches);
        self.seen += 1;
        self.watches += usize::from(is_watch);
        let Strike { fault, first, times, of_watches } = self.strike?;
        let number = match (of_watches, is_watch) {
            (true, false) => return None,
            (true, true) => watch,
            (false, _) => number,
        };
        (first..first + times).contains(&number).then(|| {
            self.struck += 1;
            fault
        })
    }
}

/// What the connections share.
struct Shared {
    server: kube::Client,
    plan: Mutex<Plan>,
    /// Watches from before this version get 410.
    compacted: watch::Sender<u64>,
    /// Whenever one of these changes, every connection is cut, every watch ends in order, every held request goes on.
    cutting: watch::Sender<()>,
    closing: watch::Sender<()>,
    releasing: watch::Sender<()>,
    /// Changes when the server has begun to tell of pods.
    pods_watched: watch::Sender<()>,
    /// How many requests are held.
    held: watch::Sender<usize>,
    /// Refuse new connections.
    is_down: watch::Sender<bool>,
}

impl Shared {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the requests that are held, as long as it is.
struct Hold<'a>(&'a watch::Sender<usize>);

impl<'a> Hold<'a> {
    fn begin(held: &'a watch::Sender<usize>) -> Self {
        held.send_modify(|held| *held += 1);
        Self(held)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

/// Passes requests on, with whatever token they carry.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    pub(crate) async fn start(cluster: &Cluster) -> Result<Self> {
        let shared = Arc::new(Shared {
            server: cluster.anonymous().await?.client(),
            plan: Mutex::default(),
            compacted: watch::Sender::new(0),
            cutting: watch::Sender::new(()),
            closing: watch::Sender::new(()),
            releasing: watch::Sender::new(()),
            pods_watched: watch::Sender::new(()),
            held: watch::Sender::new(0),
            is_down: watch::Sender::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let served = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if !*served.is_down.borrow() {
                    tokio::spawn(connection(Arc::clone(&served), stream));
                }
            }
        });
        Ok(Self { shared, address })
    }

    /// Counts from here, and lets this happen; `stale` is the version of a stale bookmark.
    pub(crate) fn arm(&self, strike: Option<Strike>, stale: u64) {
        *self.shared.plan() = Plan { strike, stale, ..Plan::default() };
    }

    /// How many requests there were since it was armed, and how many of them were watches.
    pub(crate) fn seen(&self) -> [usize; 2] {
        let plan = self.shared.plan();
        [plan.seen, plan.watches]
    }

    /// How many of them met the fault.
    pub(crate) fn struck(&self) -> usize {
        self.shared.plan().struck
    }

    /// Waits until a request is held.
    pub(crate) async fn until_held(&self) {
        let mut held = self.shared.held.subscribe();
        // Its sender is here.
        let _ = held.wait_for(|held| *held > 0).await;
    }

    /// Waits until none is held any more, because its sender has given it up.
    pub(crate) async fn until_given_up(&self) -> Result<()> {
        let mut held = self.shared.held.subscribe();
        let given_up = tokio::time::timeout(PATIENCE, held.wait_for(|held| *held == 0)).await;
        given_up.context("it waits for ever")?.map(drop).map_err(Into::into)
    }

    /// Changes whenever somebody begins to watch pods.
    pub(crate) fn pods_watched(&self) -> watch::Receiver<()> {
        self.shared.pods_watched.subscribe()
    }

    /// Lets every held request go on.
    pub(crate) fn release(&self) {
        self.shared.releasing.send_replace(());
    }

    /// Cuts every connection.
    pub(crate) fn cut_connections(&self) {
        self.shared.cutting.send_replace(());
    }

    /// Ends every watch in order.
    pub(crate) fn close_watches(&self) {
        self.shared.closing.send_replace(());
    }

    /// Goes away, with every connection, or comes back.
    pub(crate) fn set_down(&self, is_down: bool) {
        self.shared.is_down.send_replace(is_down);
        if is_down {
            self.cut_connections();
        }
    }

    /// From now on watches from before a version are told that it is too old, and every running one is cut. That is what comes of
    /// a compaction where nothing has been kept: of a real one of etcd the API server's watches do not hear, as long as the events
    /// are in its own cache.
    pub(crate) fn compact(&self, version: u64) {
        self.shared.compacted.send_replace(version);
        self.cut_connections();
    }

    /// The kubeconfig of whoever is to go through it.
    pub(crate) fn kubeconfig(&self, of: &str) -> Result<String> {
        let mut file: Value = serde_json::from_str(of)?;
        file["clusters"][0]["cluster"] = json!({"server": format!("http://{}", self.address)});
        Ok(file.to_string())
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream) {
    // Watches are many small writes.
    let _ = stream.set_nodelay(true);
    let mut cutting = shared.cutting.subscribe();
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move {
            let fault = shared.plan().next(asked(&request, "watch") == Some("true"));
            pass(&shared, request, fault).await
        }
    });
    tokio::select! {
        // It ends as its client wants it, or as a fault does.
        _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service) => {}
        _ = cutting.changed() => {}
    }
}

/// A parameter of a request.
fn asked<'a, T>(request: &'a Request<T>, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Pieces = BoxStream<'static, Result<Bytes, io::Error>>;

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "Cut by the test")
}

/// How long a body waits before it is cut, so that what was sent before leaves the buffers.
const FLUSH: Duration = Duration::from_millis(20);

/// The end of a body that is cut.
fn cut_off() -> Pieces {
    let end = async {
        tokio::time::sleep(FLUSH).await;
        Err(cut())
    };
    stream::once(end).boxed()
}

fn body_of(pieces: Pieces) -> Body {
    StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync()
}

/// The body of an answer, piece by piece.
fn pieces(body: kube::client::Body) -> Pieces {
    let data = body.into_data_stream().map(|piece| piece.map_err(io::Error::other));
    data.boxed()
}

/// The same line by line, as watches are told. What is left at the end is a line, too.
fn lines(pieces: Pieces) -> Pieces {
    let next = |(mut pieces, mut read): (Pieces, Vec<u8>)| async move {
        loop {
            if let Some(end) = read.iter().position(|byte| *byte == b'\n') {
                let line = read.drain(..=end).collect::<Vec<u8>>();
                return Some((Ok(Bytes::from(line)), (pieces, read)));
            }
            match pieces.next().await {
                Some(Ok(piece)) => read.extend_from_slice(&piece),
                Some(Err(error)) => return Some((Err(error), (pieces, read))),
                None if read.is_empty() => return None,
                None => {
                    let rest = std::mem::take(&mut read);
                    return Some((Ok(Bytes::from(rest)), (pieces, read)));
                }
            }
        }
    };
    stream::unfold((pieces, Vec::new()), next).boxed()
}

/// The `Status` of a refusal, as a server writes it.
fn status(code: u16) -> Value {
    let reason = match code {
        409 => "Conflict",
        410 => "Expired",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => "",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "message": "Made by the test", "reason": reason,
    })
}

/// A whole answer of our own.
fn answer(code: u16, retry_after: Option<u32>, kind: &str, text: String) -> Result<Response<Body>, io::Error> {
    let mut answer = Response::builder().status(code).header(header::CONTENT_TYPE, kind);
    if let Some(seconds) = retry_after {
        answer = answer.header(header::RETRY_AFTER, seconds);
    }
    let body = Full::from(text).map_err(|never| match never {}).boxed_unsync();
    answer.body(body).map_err(io::Error::other)
}

fn refusal(code: u16, retry_after: Option<u32>) -> Result<Response<Body>, io::Error> {
    match code {
        // Whoever is asked too much says so in plain text.
        429 => answer(
            code,
            retry_after,
            "text/plain; charset=utf-8",
            "Too many requests, please try again later.\n".into(),
        ),
        _ => answer(code, retry_after, "application/json", status(code).to_string()),
    }
}

fn gone() -> Result<Response<Body>, io::Error> {
    let event = json!({"type": "ERROR", "object": status(410)});
    answer(200, None, "application/json", format!("{event}\n"))
}

async fn pass(shared: &Shared, request: Request<Incoming>, fault: Option<Fault>) -> Result<Response<Body>, io::Error> {
    match fault {
        Some(Fault::CutBefore) => return Err(cut()),
        Some(Fault::NoAnswerBefore) => {
            let _held = Hold::begin(&shared.held);
            std::future::pending::<()>().await;
        }
        Some(Fault::Status { code, retry_after }) => return refusal(code, retry_after),
        Some(Fault::WatchGone) => return gone(),
        Some(Fault::Held) => {
            let mut releasing = shared.releasing.subscribe();
            let _held = Hold::begin(&shared.held);
            releasing.changed().await.map_err(io::Error::other)?;
        }
        _ => {}
    }
    let watch = (asked(&request, "watch") == Some("true")).then(|| Watched::of(&request));
    if watch.as_ref().is_some_and(|watch| (1..*shared.compacted.borrow()).contains(&watch.from)) {
        return gone();
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
    // From here on, so that none is missed that comes while the server answers.
    let closing = shared.closing.subscribe();
    let answer = shared.server.send(passed).await.map_err(io::Error::other)?;
    if watch.as_ref().is_some_and(|watch| watch.is_of_pods) {
        shared.pods_watched.send_replace(());
    }
    match fault {
        Some(Fault::CutAfter) => return Err(cut()),
        Some(Fault::NoAnswerAfter) => {
            let _held = Hold::begin(&shared.held);
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    let (parts, body) = answer.into_parts();
    let mut response = Response::builder().status(parts.status);
    for name in [header::CONTENT_TYPE, header::RETRY_AFTER] {
        if let Some(value) = parts.headers.get(&name) {
            response = response.header(name, value);
        }
    }
    let mut body = pieces(body);
    let is_watch = watch.is_some();
    if let Some(watch) = watch {
        body = watch.told(body, fault, shared.plan().stale);
    }
    body = match fault {
        Some(Fault::CutBody(length)) => beginning(body, length).chain(cut_off()).boxed(),
        Some(Fault::SlowBody(size, pause)) => {
            let slow = body.flat_map(move |piece| {
                let small: Vec<_> = match piece {
                    Ok(bytes) => bytes.chunks(size).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect(),
                    Err(error) => vec![Err(error)],
                };
                stream::iter(small)
            });
            late(slow.boxed(), pause)
        }
        Some(Fault::WatchLate(by)) => late(body, by),
        _ => body,
    };
    if is_watch {
        // It does not wait for what is late.
        body = body.take_until(ended(closing)).boxed();
    }
    response.body(body_of(body)).map_err(io::Error::other)
}

/// Waits until watches are to end.
async fn ended(mut closing: watch::Receiver<()>) {
    if closing.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// The first bytes of a body.
fn beginning(pieces: Pieces, length: usize) -> Pieces {
    let next = |(mut pieces, left): (Pieces, usize)| async move {
        if left == 0 {
            return None;
        }
        let piece = pieces.next().await?.map(|piece| piece.slice(..piece.len().min(left)));
        let left = left - piece.as_ref().map_or(0, Bytes::len);
        Some((piece, (pieces, left)))
    };
    stream::unfold((pieces, length), next).boxed()
}

fn late(pieces: Pieces, by: Duration) -> Pieces {
    let late = pieces.then(move |piece| async move {
        tokio::time::sleep(by).await;
        piece
    });
    late.boxed()
}

/// A watch as it was asked for.
struct Watched {
    /// The version from which it begins, or 0.
    from: u64,
    has_bookmarks: bool,
    is_of_pods: bool,
    /// What a bookmark is an object of.
    bookmarked: [&'static str; 2],
}

impl Watched {
    fn of<T>(request: &Request<T>) -> Self {
        let accepts = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_of_pods = request.uri().path().ends_with("/pods");
        Self {
            from: asked(request, "resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0),
            is_of_pods,
            has_bookmarks: asked(request, "allowWatchBookmarks") == Some("true"),
            bookmarked: match () {
                () if accepts.contains("as=PartialObjectMetadata") => ["PartialObjectMetadata", "meta.k8s.io/v1"],
                () if is_of_pods => ["Pod", "v1"],
                () => ["Node", "v1"],
            },
        }
    }

    /// What it tells, with the faults that only a watch can have.
    fn told(self, body: Pieces, fault: Option<Fault>, stale: u64) -> Pieces {
        let body = lines(body);
        match fault {
            Some(Fault::WatchCut(events)) => {
                let half = stream::iter([Ok(Bytes::from_static(b"{\"type\":\"MODIFIED\","))]);
                body.take(events).chain(half).chain(cut_off()).boxed()
            }
            Some(Fault::WatchTorn) => {
                let half = body.take(1).map(|line| line.map(|line| line.slice(..line.len() / 2)));
                half.chain(cut_off()).boxed()
            }
            Some(Fault::StaleBookmark(events, version)) => {
                let last = Arc::new(Mutex::new(self.from));
                let sees = Arc::clone(&last);
                let first = body.take(events).inspect(move |line| {
                    let version = line.as_ref().ok().and_then(|line| version_of(line));
                    let mut last = sees.lock().unwrap_or_else(PoisonError::into_inner);
                    *last = version.unwrap_or_default().max(*last);
                });
                let bookmark = stream::once(async move {
                    let version = match version {
                        Stale::BeforeTheChange => stale,
                        Stale::OneBefore => last.lock().unwrap_or_else(PoisonError::into_inner).saturating_sub(1),
                    };
                    let [kind, group] = self.bookmarked;
                    let metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
                    let object = json!({"kind": kind, "apiVersion": group, "metadata": metadata});
                    Ok(Bytes::from(format!("{}\n", json!({"type": "BOOKMARK", "object": object}))))
                });
                // Who has asked for none just gets to the end.
                if self.has_bookmarks { first.chain(bookmark).boxed() } else { first.boxed() }
            }
            _ => body,
        }
    }
}

/// The version of the object that an event is about.
fn version_of(line: &[u8]) -> Option<u64> {
    let event: Value = serde_json::from_slice(line).ok()?;
    event["object"]["metadata"]["resourceVersion"].as_str()?.parse().ok()
}
