//! A stand-in of the Kubernetes API server: nodes, pods, pod eviction, events and namespaces over HTTPS with bearer
//! tokens, RBAC, watches, every patch format, and fault injection.
//!
//! It follows the rules of the real server strictly; where it is narrower (no YAML, no protobuf, no tables) it refuses
//! as a server would that does not offer the format.
//!
//! ```no_run
//! use std::time::Duration;
//! use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = ApiServer::start(ApiServerConfig::default())?;
//! server.add_node("gpu-1", &[("nvidia.com/cc.mode", "on")])?;
//! let token = server.add_identity(
//!     "system:serviceaccount:gpu-operator:nvidia-cc-manager",
//!     &["system:serviceaccounts"],
//!     Rule::operator_cc_manager("gpu-operator"),
//! );
//! std::fs::write("kubeconfig", server.kubeconfig(&token, "127.0.0.1"))?;
//! // ... start the agent with that kubeconfig ...
//! let state = server.wait_for(Duration::from_secs(60), |view| {
//!     view.label("gpu-1", "nvidia.com/cc.mode.state").map(str::to_owned)
//! });
//! assert_eq!(state.as_deref(), Some("on"));
//! # Ok(())
//! # }
//! ```

mod auth;
mod faults;
mod handle;
mod managed;
mod ops;
mod patch;
mod resources;
mod selector;
mod serve;
mod status;
mod store;
mod tls;
mod validate;
mod watch;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use auth::Rule;
pub use faults::{Fault, FaultAction, FaultId};
pub use handle::{ApiServer, ServiceAccountFiles};
pub use store::{HistoryEntry, OpenWatch, RequestRecord, View};

/// Why a server could not be started, or a request of the test itself was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApiServerError {
    /// The address could not be bound, or the server's thread could not be started.
    #[error("API server stand-in cannot listen on {address}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
    /// A certificate could not be made.
    #[error("Certificate of the API server stand-in cannot be made")]
    Certificate(#[from] rcgen::Error),
    /// TLS could not be set up.
    #[error("TLS of the API server stand-in cannot be set up")]
    Tls(#[from] rustls::Error),
    /// The stand-in does not have this resource.
    #[error("No resource {0:?} in the API server stand-in")]
    UnknownResource(String),
    /// The server's rules forbid it, as they would forbid a client.
    #[error("Refused with code {code} ({reason}): {message}")]
    Refused {
        /// The HTTP code a client would get.
        code: u16,
        /// The reason in the Status.
        reason: String,
        /// The message in the Status.
        message: String,
    },
}

impl From<status::ApiError> for ApiServerError {
    fn from(error: status::ApiError) -> Self {
        Self::Refused { code: error.code, reason: error.reason.to_owned(), message: error.message }
    }
}

/// How a server is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiServerConfig {
    /// Where it listens; port 0 takes a free one.
    pub address: SocketAddr,
    /// Names and addresses in its certificate.
    pub names: Vec<String>,
    /// How often a watch that allows bookmarks gets one (the real server: every minute).
    pub bookmark_interval: Duration,
    /// How many writes are kept for watches; older versions get 410.
    pub window: usize,
    /// 410 for a watch comes as an HTTP response instead of an ERROR event. The real server sends the event.
    pub gone_as_response: bool,
    /// Serve `sendInitialEvents` (a newer server) or refuse it with 422 (an older one).
    pub watch_list: bool,
    /// An imaginary kubelet ends deleted pods after this time, or after their grace period if that is shorter. None: a
    /// pod with a grace period stays, marked, until somebody deletes it with grace 0, as a kubelet does.
    pub pods_end_after: Option<Duration>,
}

impl Default for ApiServerConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            names: ["127.0.0.1", "10.0.2.2", "::1", "localhost", "kubernetes.default.svc"].map(str::to_owned).to_vec(),
            bookmark_interval: Duration::from_mins(1),
            window: 10_000,
            gone_as_response: false,
            watch_list: true,
            pods_end_after: None,
        }
    }
}

/// How long a cut body waits, so that what was sent before leaves the buffers.
pub(crate) const FLUSH: Duration = Duration::from_millis(50);

/// What the server's thread and the handle share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: ApiServerConfig,
    state: Mutex<store::State>,
    /// Rings at every write and every answered request.
    rang: Condvar,
    /// The store's version, for watches.
    pub(crate) changed: tokio::sync::watch::Sender<u64>,
    /// Counts up when every watch is to end.
    pub(crate) closing: tokio::sync::watch::Sender<u64>,
    /// Counts up when every connection is to be cut.
    pub(crate) cutting: tokio::sync::watch::Sender<u64>,
    /// Counts up when every held request is to go on.
    pub(crate) releasing: tokio::sync::watch::Sender<u64>,
    /// Refuse new connections.
    pub(crate) down: std::sync::atomic::AtomicBool,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, store::State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes watches and waiting tests.
    pub(crate) fn tell(&self) {
        let version = self.lock().version;
        self.changed.send_if_modified(|seen| std::mem::replace(seen, version) != version);
        self.rang.notify_all();
    }

    pub(crate) fn record(&self, record: RequestRecord) {
        self.lock().requests.push(record);
        self.rang.notify_all();
    }
}

/// One of something that is counted, as long as it is there.
pub(crate) struct Counted<'a> {
    shared: &'a Shared,
    count: fn(&mut store::State) -> &mut usize,
}

impl<'a> Counted<'a> {
    pub(crate) fn begin(shared: &'a Shared, count: fn(&mut store::State) -> &mut usize) -> Self {
        *count(&mut shared.lock()) += 1;
        shared.rang.notify_all();
        Self { shared, count }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        *(self.count)(&mut self.shared.lock()) -= 1;
        self.shared.rang.notify_all();
    }
}

pub(crate) type SharedRef = Arc<Shared>;
