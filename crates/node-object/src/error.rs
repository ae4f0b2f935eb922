//! What can go wrong between an agent and its node object.

use std::time::Duration;

/// A failed request, in terms of its cause and cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// Neither a service account nor a usable kubeconfig.
    #[error("No way to reach the API server: not in a pod with a service account, and {kubeconfig} is not usable")]
    Config {
        /// Which kubeconfig was tried.
        kubeconfig: String,
        /// Why it is not usable.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no node of this name.
    #[error("Node {node} does not exist in the API; check NODE_NAME and whether the kubelet has registered")]
    Absent {
        /// The node.
        node: String,
    },
    /// The credentials are not accepted (401).
    #[error("API server does not accept our credentials for node {node}; check the service account's token")]
    Unauthorized {
        /// The node.
        node: String,
        /// The API server's answer.
        source: Box<kube::Error>,
    },
    /// RBAC or an admission rule refuses (403).
    #[error(
        "API server forbids us to {verb} node {node}; the role needs get, list, watch and patch on nodes, and list and watch on pods of its namespace"
    )]
    Forbidden {
        /// The node.
        node: String,
        /// `list`, `watch` or `patch`.
        verb: &'static str,
        /// The API server's answer.
        source: Box<kube::Error>,
    },
    /// Values that a patch was computed from kept changing under it.
    #[error("Node {node} changed under {attempts} attempts to patch it")]
    Conflict {
        /// The node.
        node: String,
        /// How often it was tried.
        attempts: u32,
        /// The API server's last answer.
        source: Box<kube::Error>,
    },
    /// The resource version to watch from is too old (410): the node must be listed again.
    #[error("Watch of node {node} has fallen too far behind")]
    Gone {
        /// The node.
        node: String,
    },
    /// No answer in time.
    #[error("API server did not answer within {} s to {verb} node {node}", after.as_secs())]
    Timeout {
        /// The node.
        node: String,
        /// `list`, `watch` or `patch`.
        verb: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// Everything else: unreachable, overloaded, or a refusal of the content.
    #[error("Cannot {verb} node {node}")]
    Api {
        /// The node.
        node: String,
        /// `list`, `watch` or `patch`.
        verb: &'static str,
        /// What happened.
        source: Box<kube::Error>,
    },
}

impl NodeError {
    pub(crate) fn of(node: &str, verb: &'static str, error: kube::Error) -> Self {
        let node = node.to_owned();
        let status = if let kube::Error::Api(status) = &error { status.code } else { 0 };
        match status {
            401 => Self::Unauthorized { node, source: Box::new(error) },
            403 => Self::Forbidden { node, verb, source: Box::new(error) },
            404 => Self::Absent { node },
            410 => Self::Gone { node },
            _ => Self::Api { node, verb, source: Box::new(error) },
        }
    }

    /// The stable code, the same in log, Event, metric and documentation.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Config { .. } => "ApiConfig",
            Self::Absent { .. } => "NodeAbsent",
            Self::Unauthorized { .. } => "ApiUnauthorized",
            Self::Forbidden { .. } => "ApiForbidden",
            Self::Conflict { .. } => "ApiConflict",
            Self::Gone { .. } => "ApiGone",
            Self::Timeout { .. } => "ApiTimeout",
            Self::Api { source, .. } => match **source {
                kube::Error::Api(ref status) if status.code == 429 => "ApiThrottled",
                kube::Error::Api(ref status) if status.code < 500 => "ApiRejected",
                _ => "ApiUnavailable",
            },
        }
    }

    /// The HTTP status, where the API server gave one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Absent { .. } => Some(404),
            Self::Gone { .. } => Some(410),
            Self::Config { .. } | Self::Timeout { .. } => None,
            Self::Unauthorized { source, .. }
            | Self::Forbidden { source, .. }
            | Self::Conflict { source, .. }
            | Self::Api { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
        }
    }

    /// How long the API server asked us to wait before the next request.
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::Api { source, .. } = self else { return None };
        let kube::Error::Api(status) = &**source else { return None };
        let seconds = status.details.as_ref()?.retry_after_seconds;
        // A server's word is honoured, but not to the point of never coming back.
        (seconds > 0).then(|| Duration::from_secs(u64::from(seconds.min(300))))
    }

    /// The error and all its causes in one line.
    pub fn line(&self) -> String {
        agent_core::text::chain(self)
    }
}
