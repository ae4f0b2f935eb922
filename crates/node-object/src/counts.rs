//! Requests to the API server, counted.

use agent_core::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::error::NodeError;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    verb: &'static str,
    resource: &'static str,
    result: &'static str,
}

/// What was asked of the API server, and what came of it. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    requests: Family<Request, Counter>,
    watch_restarts: Counter,
    conflicts: Counter,
}

impl Counts {
    /// Shows the counts among an agent's metrics.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(
            "api_requests",
            "Requests to the API server, by verb, resource and result (ok, or the code of the error)",
            self.requests.clone(),
        );
        metrics.register(
            "api_watch_restarts",
            "Watches of the node that ended, for whatever reason, and were taken up again",
            self.watch_restarts.clone(),
        );
        metrics.register(
            "api_conflict_retries",
            "Patches of the node that were computed anew because it had changed meanwhile",
            self.conflicts.clone(),
        );
    }

    pub(crate) fn request(&self, verb: &'static str, failure: Option<&NodeError>) {
        // The words of the error texts; the first is the request's own verb but for what is created.
        let (verb, resource) = match verb.split_once(' ') {
            None => (verb, "nodes"),
            Some(("write", _)) => ("create", "events"),
            Some((verb, _)) => (verb, "pods"),
        };
        let result = failure.map_or("ok", NodeError::code);
        self.requests.get_or_create(&Request { verb, resource, result }).inc();
    }

    pub(crate) fn watch_restarted(&self) {
        self.watch_restarts.inc();
    }

    pub(crate) fn conflicted(&self) {
        self.conflicts.inc();
    }
}
