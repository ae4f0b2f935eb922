//! What every agent shares: logs, metrics and health endpoint, readiness values, drain, safe host files, and the
//! schemas of the files that agents exchange. No Kubernetes.
//!
//! An agent's `run` starts with the same lines:
//!
//! ```no_run
//! # async fn run(log: agent_core::logs::LogArgs, health: agent_core::health::HealthArgs) -> anyhow_free::Result {
//! agent_core::logs::init(&log)?;
//! let shutdown = agent_core::shutdown::Shutdown::on_signals()?;
//! let readiness = agent_core::readiness::Registry::default();
//! let metrics = agent_core::metrics::Metrics::new();
//! if let Some(addr) = health.addr()? {
//!     let server = agent_core::http::bind(addr, readiness.clone(), metrics.clone()).await?;
//!     server.serve(shutdown.clone()).await;
//! }
//! # Ok(()) }
//! # mod anyhow_free { pub type Result = std::result::Result<(), Box<dyn std::error::Error>>; }
//! ```
#![forbid(unsafe_code)]

pub mod backoff;
pub mod cdi;
pub mod features;
pub mod health;
pub mod hostfile;
mod hostroot;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod readiness;
pub mod resources;
pub mod shutdown;
pub mod state;
pub mod text;
pub mod uevents;
pub mod validations;
pub mod work;

pub use hostroot::host_root;
