//! The small HTTP endpoint of an agent: `/healthz`, `/readyz`, `/metrics`, and, for those on the same machine, `/state`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::metrics::Metrics;
use crate::readiness::Registry;
use crate::shutdown::Shutdown;

/// More connections than this wait in the kernel's queue: the endpoint is for one kubelet and one or two scrapers.
const MAX_CONNECTIONS: usize = 32;
/// A request must be there within this time, and a connection lives no longer than [`CONNECTION`].
const HEADERS: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_mins(5);

/// Why the endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot listen on {addr} for health and metrics")]
pub struct BindError {
    /// The address.
    pub addr: SocketAddr,
    source: std::io::Error,
}

/// What an agent knows and is about to do, as JSON for people who look for the reason of something. It names devices, pods and
/// processes, and so is shown on the loopback interface alone. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct StateDump(Arc<Mutex<Option<String>>>);

impl StateDump {
    /// Replaces what is shown.
    pub fn show(&self, json: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(json);
    }

    fn text(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the endpoint tells of.
#[derive(Clone, Debug)]
struct Sources {
    readiness: Registry,
    metrics: Metrics,
    state: StateDump,
}

/// An open endpoint that nobody serves yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    sources: Sources,
}

/// Opens the endpoint, so that a taken port is an error at start.
pub async fn bind(addr: SocketAddr, readiness: Registry, metrics: Metrics) -> Result<Server, BindError> {
    let listener = TcpListener::bind(addr).await.map_err(|source| BindError { addr, source })?;
    Ok(Server { listener, sources: Sources { readiness, metrics, state: StateDump::default() } })
}

/// Opens the endpoint and serves it until shutdown.
pub async fn serve(
    addr: SocketAddr,
    readiness: Registry,
    metrics: Metrics,
    shutdown: Shutdown,
) -> Result<(), BindError> {
    bind(addr, readiness, metrics).await?.serve(shutdown).await;
    Ok(())
}

impl Server {
    /// Also shows `state`, at `/state`.
    #[must_use]
    pub fn with_state(mut self, state: StateDump) -> Self {
        self.sources.state = state;
        self
    }

    /// The address that was bound (with the kernel's choice of port where 0 was asked for).
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until shutdown; open connections are then dropped.
    pub async fn serve(self, shutdown: Shutdown) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.wait() => return,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, peer)) => {
                        connections.spawn(connection(stream, peer, self.sources.clone()));
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: accepting again at once would spin.
                        tracing::warn!(%error, "Health endpoint cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                },
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, sources: Sources) {
    let is_local = peer.ip().to_canonical().is_loopback();
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &sources, is_local);
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION, serving).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(%error, "Health endpoint dropped a connection"),
    }
}

fn answer(method: &Method, path: &str, sources: &Sources, is_local: bool) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let Sources { readiness, metrics, state } = sources;
    if method != Method::GET && method != Method::HEAD {
        let mut response = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "Only GET and HEAD\n".to_owned());
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" => response(StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/readyz" => match readiness.pending() {
            pending if pending.is_empty() => response(StatusCode::OK, TEXT, "ok\n".to_owned()),
            pending => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready: {}\n", pending.join(", "))),
        },
        "/metrics" => match metrics.encode() {
            Ok(text) => response(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text),
            Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        },
        "/state" if !is_local => response(
            StatusCode::FORBIDDEN,
            TEXT,
            "Only from this machine (in a pod: kubectl port-forward)\n".to_owned(),
        ),
        "/state" => match state.text() {
            Some(json) => response(StatusCode::OK, "application/json", json),
            None => response(StatusCode::NOT_FOUND, TEXT, "Nothing is known yet\n".to_owned()),
        },
        _ => response(StatusCode::NOT_FOUND, TEXT, "/healthz /readyz /metrics /state\n".to_owned()),
    }
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(addr: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut reply = Vec::new();
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut reply)).await.unwrap().unwrap();
        String::from_utf8_lossy(&reply).into_owned()
    }

    #[tokio::test]
    async fn answers_and_survives_nonsense() {
        let readiness = Registry::default();
        let guard = readiness.register("watch");
        let shutdown = Shutdown::manual();
        let state = StateDump::default();
        let server = bind("127.0.0.1:0".parse().unwrap(), readiness, Metrics::new()).await.unwrap();
        let server = server.with_state(state.clone());
        let addr = server.local_addr().unwrap();
        let serving = tokio::spawn(server.serve(shutdown.clone()));

        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes();
        assert!(ask(addr, &get("/healthz")).await.starts_with("HTTP/1.1 200 "));
        let reply = ask(addr, &get("/readyz")).await;
        assert!(reply.starts_with("HTTP/1.1 503 ") && reply.ends_with("not ready: watch\n"), "{reply}");
        guard.ready();
        assert!(ask(addr, &get("/readyz")).await.starts_with("HTTP/1.1 200 "));
        assert!(ask(addr, &get("/metrics")).await.ends_with("# EOF\n"));
        assert!(ask(addr, &get("/else")).await.starts_with("HTTP/1.1 404 "));
        assert!(ask(addr, &get("/state")).await.starts_with("HTTP/1.1 404 "));
        state.show("{\"label\":\"on\"}".to_owned());
        assert!(ask(addr, &get("/state")).await.ends_with("\r\n\r\n{\"label\":\"on\"}"));
        let reply =
            ask(addr, b"POST /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
        assert!(reply.starts_with("HTTP/1.1 405 ") && reply.contains("allow: GET, HEAD"), "{reply}");

        for nonsense in [&b"\x16\x03\x01\x02\x00\x01\xff\xff\r\n\r\n"[..], b"GET\r\n\r\n", &vec![0xff; 64 * 1024]] {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            let _ = stream.write_all(nonsense).await;
            let mut reply = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut reply)).await.unwrap();
            assert!(!reply.starts_with(b"HTTP/1.1 200"));
        }
        assert!(ask(addr, &get("/healthz")).await.starts_with("HTTP/1.1 200 "));

        shutdown.trigger();
        tokio::time::timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
        let error = bind("192.0.2.1:1".parse().unwrap(), Registry::default(), Metrics::new()).await.unwrap_err();
        assert!(error.to_string().contains("192.0.2.1:1"));
    }

    #[test]
    fn the_state_is_for_those_on_the_same_machine() {
        let state = StateDump::default();
        state.show("{}".to_owned());
        let sources = Sources { readiness: Registry::default(), metrics: Metrics::new(), state };
        let status = |is_local| answer(&Method::GET, "/state", &sources, is_local).status().as_u16();
        assert_eq!((status(true), status(false)), (200, 403));
    }
}
