//! What people are shown of what the kubelet is told: on request, and in a file that the host sees.

use std::path::PathBuf;

use agent_core::hostfile::HostDir;
use agent_core::state::{ErrorRecord, FileProblem, Origin, UNITS_DIR, UNITS_FILE, UnitRecord, UnitsFile};
use agent_core::text::chain;

use super::Controller;
use crate::cdi::Problem;
use crate::units::Unit;

impl Controller {
    /// Shows people what the kubelet is told, and why: on request, and in a file that the host sees.
    pub(super) fn show(&mut self) {
        let file = self.file();
        self.metrics
            .allocated(file.units.iter().filter_map(|unit| Some((&*unit.resource, &*unit.id, unit.pod.as_deref()?))));
        self.metrics.quarantined(self.quarantine.count());
        let folder = self.config.plugin_dir.join(UNITS_DIR);
        let is_told = self.written.as_ref().is_some_and(|written| written.says_as(&file));
        if is_told && folder.join(UNITS_FILE).exists() {
            return;
        }
        if let Ok(text) = serde_json::to_string(&file) {
            self.config.looks.state.show(text);
        }
        // Without the kubelet's folder there is no kubelet either.
        let stored = match HostDir::open_existing(&self.config.plugin_dir) {
            Ok(None) => return,
            Ok(Some(_)) => HostDir::open(&folder).map_err(Into::into).and_then(|folder| file.store(&folder)),
            Err(error) => Err(error.into()),
        };
        match stored {
            Ok(()) => self.written = Some(file),
            Err(error) => self.once("units-file", &chain(&error), |why| {
                tracing::info!(reason = why, "What the kubelet is told cannot be written down for ccnode status");
            }),
        }
    }

    fn file(&self) -> UnitsFile {
        let inventory = self.seen.as_ref().map(|seen| &seen.inventory);
        let boot_id = inventory.and_then(|inventory| inventory.host.boot_id.clone()).unwrap_or_default();
        let record = |unit: &Unit| {
            let remarks = unit.functions.iter().filter_map(|bdf| self.remarks.get(bdf)).flatten();
            UnitRecord {
                resource: unit.resource.to_string(),
                id: unit.id.clone(),
                bdf: unit.bdf,
                functions: unit.functions.clone(),
                nodes: unit.nodes.clone(),
                numa: unit.numa.iter().copied().collect(),
                healthy: unit.fault.is_none(),
                error: unit
                    .fault
                    .as_ref()
                    .map(|fault| ErrorRecord { code: fault.code().to_owned(), message: fault.to_string() }),
                pod: inventory.and_then(|inventory| self.pods.of(unit, &self.units, inventory)).map(str::to_owned),
                remarks: remarks.map(ToString::to_string).collect(),
            }
        };
        UnitsFile {
            origin: Origin::now(boot_id, None),
            ids: self.config.policy.scheme.word().to_owned(),
            ids_reason: self.ids.as_ref().map_or_else(|| "--device-id-scheme".to_owned(), |ids| ids.why.to_string()),
            pods: self.pods.source(),
            blind: self.blind(),
            cdi_problems: self.problems.iter().map(file_problem).collect(),
            units: self.units.iter().map(record).collect(),
        }
    }
}

fn file_problem((path, problem): (&PathBuf, &Problem)) -> FileProblem {
    let error = ErrorRecord { code: problem.code().to_owned(), message: problem.to_string() };
    FileProblem { path: path.display().to_string(), error }
}
