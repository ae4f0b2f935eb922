//! Labels and annotations of one Kubernetes node.
//!
//! [`NodeClient`] keeps one metadata-only watch on one node and writes metadata by small patches of just the keys that
//! change. Nothing in here gives up: an API server that is away, slow or refusing is waited for with growing, jittered
//! delays, and what was last seen stays visible meanwhile.

#![forbid(unsafe_code)]

mod change;
mod client;
mod counts;
mod error;
mod events;
pub mod operands;
mod pods;
mod state;
#[cfg(feature = "testing")]
pub mod testing;
mod wait;
mod watch;

pub use change::Change;
pub use client::{NodeClient, Timing, connect, nodes};
pub use counts::Counts;
pub use error::NodeError;
pub use events::{Event, Events, Sender as EventSender};
pub use pods::{Eviction, Pod};
pub use state::{NodeState, NodeView};

/// Names of labels (operator-contract section 2.1).
pub mod labels {
    /// The wanted mode: `on`, `off`, `devtools`, `ppcie`; absent or empty means the default.
    pub const CC_MODE: &str = "nvidia.com/cc.mode";
    /// The last applied or found mode, or `failed`.
    pub const CC_MODE_STATE: &str = "nvidia.com/cc.mode.state";
    /// The scheduling gate: `"true"` for on and ppcie, `"false"` for off, empty otherwise.
    pub const CC_READY_STATE: &str = "nvidia.com/cc.ready.state";
}

/// Names of annotations.
pub mod annotations {
    /// JSON: per device the configured and the active mode, when verified, the last error.
    pub const CC_STATUS: &str = "ccnode.dev/cc-status";
    /// Anything: a new value makes cc-manager try at once what it waits to try again.
    pub const RETRY: &str = "ccnode.dev/retry";
    /// JSON: the change of mode under way, and the labels as they were before components were paused.
    pub const TRANSITION: &str = "ccnode.dev/transition";
}
