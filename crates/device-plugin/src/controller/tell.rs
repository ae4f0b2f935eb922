//! What is new to the log and to the kubelet, and a plugin for each resource.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::Controller;
use crate::names::ResourceName;
use crate::plugin::{Plugin, Waits};
use crate::units::{Fault, Unit};

impl Controller {
    /// Tells the log what is new, and the kubelet.
    pub(super) fn tell(&mut self, now: Vec<Unit>) {
        for unit in &now {
            let before = self.units.iter().find(|before| before.id == unit.id && before.bdf == unit.bdf);
            // By cause and not by words: the steps of a mode change are one piece of news.
            let cause = |unit: &Unit| unit.fault.as_ref().map(Fault::code);
            if before.is_none_or(|before| cause(before) != cause(unit)) {
                tell(unit);
            }
        }
        for gone in self.units.iter().filter(|before| !now.iter().any(|unit| unit.id == before.id)) {
            tracing::info!(
                event = "unit_gone", unit = gone.id, bdf = %gone.bdf, resource = %gone.resource,
                "The unit is no longer on this node under this ID"
            );
        }
        self.units = now;
        self.metrics.told(&self.units);
        self.publish();
    }

    /// Hands each resource its units, and brings a resource to life that has none yet.
    fn publish(&mut self) {
        if self.config.looks.only_observe {
            return;
        }
        let mut lists: BTreeMap<ResourceName, Vec<Unit>> =
            self.resources.keys().map(|name| (name.clone(), Vec::new())).collect();
        for unit in &self.units {
            lists.entry(unit.resource.clone()).or_default().push(unit.clone());
        }
        for (resource, list) in lists {
            if let Some(sender) = self.resources.get(&resource) {
                sender.send_if_modified(|told| {
                    let news = **told != list;
                    if news {
                        *told = Arc::new(list);
                    }
                    news
                });
            } else {
                let (sender, units) = watch::channel(Arc::new(list));
                let plugin = Plugin {
                    resource: resource.clone(),
                    units,
                    folder: self.config.plugin_dir.clone(),
                    manner: self.config.manner,
                    shutdown: self.shutdown.clone(),
                    ready: self.readiness.register(resource.to_string()),
                    metrics: self.metrics.clone(),
                    lately: self.lately.clone(),
                    aside: self.aside.clone(),
                    waits: Waits::default(),
                };
                self.tasks.spawn(plugin.run());
                self.resources.insert(resource, sender);
            }
        }
    }
}

fn tell(unit: &Unit) {
    let (unit_id, bdf, resource) = (&unit.id, unit.bdf, &unit.resource);
    match &unit.fault {
        None => tracing::info!(
            event = "unit_health", unit = unit_id, %bdf, %resource, healthy = true, reason = "",
            numa = ?unit.numa, nodes = unit.nodes.join(","), "The unit can be allocated"
        ),
        Some(fault) => tracing::warn!(
            event = "unit_health", unit = unit_id, %bdf, %resource, healthy = false, reason = %fault, code = fault.code(),
            "The unit cannot be allocated"
        ),
    }
}
