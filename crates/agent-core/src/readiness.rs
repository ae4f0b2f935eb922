//! Readiness: the agent is ready when every part that registered says so.
//!
//! Readiness tells that the agent works, never that the hardware is right: one dead GPU must not take an agent out of
//! service (design promise 10).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The parts that readiness waits for, by name. Clones share the same registry.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Mutex<BTreeMap<String, bool>>>);

/// One part's say. Dropping it changes nothing: a part that ended without a word stays not ready.
#[derive(Debug)]
pub struct Guard {
    registry: Registry,
    name: String,
}

impl Registry {
    /// Registers a part that is not ready yet.
    pub fn register(&self, name: impl Into<String>) -> Guard {
        let name = name.into();
        self.set(&name, false);
        Guard { registry: self.clone(), name }
    }

    /// Names of the parts that are not ready; empty when the agent is.
    pub fn pending(&self) -> Vec<String> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.iter().filter(|(_, ready)| !**ready).map(|(name, _)| name.clone()).collect()
    }

    /// Whether every registered part is ready.
    pub fn is_ready(&self) -> bool {
        self.pending().is_empty()
    }

    fn set(&self, name: &str, ready: bool) {
        let before = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), ready);
        if before != Some(ready) {
            tracing::debug!(part = name, ready, "Readiness of a part changed");
        }
    }
}

impl Guard {
    /// Says that the part is ready.
    pub fn ready(&self) {
        self.registry.set(&self.name, true);
    }

    /// Says that the part is not ready (any more).
    pub fn not_ready(&self) {
        self.registry.set(&self.name, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_all_parts_are() {
        let registry = Registry::default();
        assert!(registry.is_ready());
        let watch = registry.register("watch");
        let apply = registry.register("first-apply");
        assert_eq!(registry.pending(), ["first-apply", "watch"]);
        watch.ready();
        apply.ready();
        assert!(registry.is_ready());
        watch.not_ready();
        assert_eq!(registry.pending(), ["watch"]);
        drop(watch);
        assert!(!registry.is_ready());
    }
}
