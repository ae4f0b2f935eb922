//! What every agent shares: logs, metrics and health endpoint, readiness values, drain, safe host files, and the
//! schemas of the files that agents exchange. No Kubernetes.

pub mod state;
