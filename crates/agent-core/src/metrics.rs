//! Metrics in the OpenMetrics text form, every name prefixed `ccnode_`.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::registry::{Metric, Registry};

/// The metrics of one agent. Clones share the same registry.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry without metrics.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Registry::with_prefix("ccnode"))))
    }

    /// Adds `metric` (a `prometheus_client` counter, gauge, histogram or family; keep a clone of it) under
    /// `ccnode_<name>`. Names carry their unit (`..._seconds`); the encoder adds `_total` to counters and a full stop to
    /// the help text.
    pub fn register(&self, name: &str, help: &str, metric: impl Metric) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).register(name, help, metric);
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        let registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;

    #[test]
    fn names_carry_the_prefix() {
        let metrics = Metrics::new();
        let counter = <Counter>::default();
        metrics.clone().register("transitions", "Mode changes begun", counter.clone());
        counter.inc();
        let text = metrics.encode().unwrap();
        assert!(text.contains("# HELP ccnode_transitions Mode changes begun.\n"), "{text}");
        assert!(text.contains("ccnode_transitions_total 1\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
