//! What Kata finds: written before the kubelet is told of it, and kept until the kubelet has heard that it goes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use super::Controller;
use crate::cdi::{Problem, render};
use crate::names::ResourceName;
use crate::server::Role;
use crate::units::{Fault, Unit};

/// How long a CDI file keeps a device after the kubelet was told that it is of no use: no longer than a stream needs to
/// hear it.
const LINGER: Duration = Duration::from_millis(500);

impl Controller {
    /// Writes what is new before the kubelet is told of it, and keeps what goes until the kubelet has heard.
    pub(super) fn write_cdi(&mut self, now: &mut [Unit]) {
        if self.config.manner.role == Role::Kubevirt || self.config.looks.only_observe {
            return;
        }
        let stays = |unit: &Unit| now.iter().any(|now| named(now) == named(unit) && !now.nodes.is_empty());
        let until = Instant::now() + LINGER;
        for unit in self.units.iter().filter(|unit| !unit.nodes.is_empty() && !stays(unit)) {
            self.leaving.entry(named(unit)).or_insert_with(|| (until, unit.clone()));
        }
        self.leaving.retain(|_, (until, unit)| *until > Instant::now() && !stays(unit));
        let mut by_resource: BTreeMap<ResourceName, Vec<Unit>> = BTreeMap::new();
        for unit in now.iter().filter(|unit| !unit.nodes.is_empty()).chain(self.leaving.values().map(|(_, unit)| unit))
        {
            by_resource.entry(unit.resource.clone()).or_default().push(unit.clone());
        }
        let files: BTreeMap<ResourceName, String> =
            by_resource.iter().filter_map(|(name, units)| Some((name.clone(), render(name, units)?))).collect();
        let aside = self.aside.borrow().clone();
        let synced = self.cdi.sync(&files, &aside);
        for (resource, path) in &synced.written {
            let devices: Vec<&str> =
                by_resource.get(resource).into_iter().flatten().map(|unit| unit.id.as_str()).collect();
            let devices = devices.join(",");
            tracing::info!(event = "cdi_written", path = %path.display(), devices, %resource, "CDI file written");
        }
        let resolved = self.resolver.check(now, &aside);
        for path in &synced.removed {
            tracing::info!(event = "cdi_removed", path = %path.display(), "Stale CDI file removed");
        }
        // By one such file Kata finds no device at all.
        let in_the_way = resolved.problems.iter().find_map(|(path, problem)| {
            let text = format!("{}: {problem}", path.display());
            match problem {
                Problem::Unread(_) => None,
                Problem::Broken(_) => Some(Fault::CdiBroken(text)),
                Problem::Conflict { .. } => Some(Fault::CdiConflict(text)),
            }
        });
        for unit in now.iter_mut().filter(|unit| unit.fault.is_none()) {
            unit.fault = if let Some(error) = synced.failed.get(&unit.resource) {
                Some(Fault::NoCdi(error.clone()))
            } else {
                let own = resolved.failed.get(&named(unit)).cloned().map(Fault::CdiConflict);
                own.or_else(|| in_the_way.clone())
            };
        }
        let is_new = |(path, problem): &(&PathBuf, &Problem)| self.problems.get(*path) != Some(problem);
        for (path, problem) in resolved.problems.iter().filter(is_new) {
            tracing::warn!(
                event = "cdi_problem", path = %path.display(), code = problem.code(), reason = %problem,
                "A CDI file of this node may keep every Kata pod from starting"
            );
        }
        for path in self.problems.keys().filter(|path| !resolved.problems.contains_key(*path)) {
            tracing::info!(event = "cdi_problem_gone", path = %path.display(), "Nothing is wrong with this CDI file any more");
        }
        self.metrics.cdi_problems(&resolved.problems);
        self.problems = resolved.problems;
    }
}

/// What the kubelet and CDI call it.
fn named(unit: &Unit) -> (ResourceName, String) {
    (unit.resource.clone(), unit.id.clone())
}
