//! From what a look has found, and what is remembered of former looks, to the units.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::hostfile::HostDir;
use agent_core::state::{UNITS_DIR, UnitRecord, UnitsFile};
use hw_probe::{AerCounts, Bdf, Inventory};
use tokio::time::Instant;

use super::Controller;
use super::look::Sight;
use crate::checkpoint;
use crate::health::{self, Remark};
use crate::units::{Observation, Unit, units};

impl Controller {
    /// The units by what a look has found, and by what is remembered of former looks.
    pub(super) fn judge(&mut self, Sight { mut seen, book, errors }: Sight) -> Vec<Unit> {
        // The look took its time, and its word of cc-manager may be an old one.
        seen.hear(&self.config.places);
        self.book = book;
        self.choose_ids(&mut seen);
        self.remark(&seen, &errors);
        self.write_features(&seen);
        let before = if self.seen.is_none() { self.inherit(&seen.inventory) } else { self.units.clone() };
        let mut now = units(&self.config.policy, &seen, &before);
        for fall in self.flaps.settle(Instant::now(), &mut now) {
            self.metrics.fell(fall);
        }
        self.quarantine.watch(&seen.inventory);
        self.looked.clone_from(&now);
        self.quarantine.settle(&mut now);
        self.seen = Some(seen);
        now
    }

    /// Takes over what the agent before this one has offered and held back in this boot, as it has written down for people: a
    /// unit once offered stays listed, and one in quarantine stays there.
    fn inherit(&mut self, inventory: &Inventory) -> Vec<Unit> {
        let boot_id = inventory.host.boot_id.clone().unwrap_or_default();
        let folder = HostDir::open_existing(self.config.plugin_dir.join(UNITS_DIR)).ok().flatten();
        let Some(file) = folder.and_then(|folder| UnitsFile::load(&folder, &boot_id).ok().flatten()) else {
            return Vec::new();
        };
        let is_held = |record: &&UnitRecord| record.error.as_ref().is_some_and(|error| error.code == "held");
        let held: BTreeSet<Bdf> = file.units.iter().filter(is_held).map(|record| record.bdf).collect();
        self.quarantine.inherit(&held, inventory, Instant::now());
        file.units.iter().filter_map(|record| once_offered(record, inventory)).collect()
    }

    /// By which kind of ID units are called from now on. Nothing is awaited between this and [`Self::publish`], so that no
    /// allocation comes between.
    fn choose_ids(&mut self, seen: &mut Observation) {
        let ours = checkpoint::resources(&self.config.policy, &seen.inventory);
        if !self.config.looks.ids_by_book {
            let scheme = self.config.policy.scheme;
            if let Some(given) = checkpoint::contradiction(&self.book, &ours, scheme) {
                let text = format!("pod {} has device {} of {}", given.pod, given.id, given.resource);
                self.once("ids", &text, |text| {
                    tracing::warn!(
                        reason = text,
                        "Units are called otherwise than a pod's device is, as --device-id-scheme asks: that device is offered \
                         twice until the pod has ended"
                    );
                });
            }
            self.metrics.called(scheme, "chosen");
            return;
        }
        let lately = self.lately.all();
        let decision = checkpoint::decide(&self.book, &lately, &ours, self.ids.as_ref());
        let text = decision.why.to_string();
        self.once("ids", &text, |reason| {
            tracing::info!(event = "id_scheme", scheme = decision.scheme.word(), reason, "How units are called");
        });
        self.config.policy.scheme = decision.scheme;
        seen.given = self.book.given().iter().map(|given| (given.resource.clone(), given.id.clone())).collect();
        seen.given.extend(lately);
        self.metrics.called(decision.scheme, decision.why.code());
        self.ids = Some(decision);
    }

    /// Notes what is to be remarked of devices that can be used, and logs what is new of it.
    fn remark(&mut self, seen: &Observation, errors: &BTreeMap<Bdf, AerCounts>) {
        let mut remarks: BTreeMap<Bdf, Vec<Remark>> = BTreeMap::new();
        for main in seen.inventory.gpus().chain(seen.inventory.nvswitches()) {
            let mut of_main = health::link(&seen.inventory, main);
            of_main.extend(errors.get(&main.bdf).and_then(|counts| self.errors.since(main, *counts)));
            let before = self.remarks.get(&main.bdf).map(Vec::as_slice).unwrap_or_default();
            for remark in of_main.iter().filter(|remark| !before.contains(remark)) {
                tracing::warn!(
                    event = "device_remark", bdf = %main.bdf, code = remark.code(), reason = %remark,
                    "The device works less well than it could"
                );
            }
            if !of_main.is_empty() {
                remarks.insert(main.bdf, of_main);
            }
        }
        self.errors.keep(|bdf| seen.inventory.get(bdf).is_some());
        self.metrics.remarked(&remarks, errors);
        self.remarks = remarks;
    }

    /// Keeps the feature file as the node is.
    fn write_features(&mut self, seen: &Observation) {
        let file = &self.config.looks.features_file;
        if self.config.looks.only_observe {
            return;
        }
        match file.sync(&seen.inventory) {
            Ok(true) => {
                tracing::info!(event = "features", path = %file.path().display(), "The node's features are told anew");
            }
            Ok(false) => {}
            Err(why) => self.once("features", &why, |why| {
                tracing::warn!(reason = why, "The feature file for Node Feature Discovery is left as it is");
            }),
        }
    }
}

/// A unit as far as it must be known to stay listed; all else is found anew.
fn once_offered(record: &UnitRecord, inventory: &Inventory) -> Option<Unit> {
    let lead = inventory.get(record.bdf).filter(|lead| lead.is_gpu() || lead.is_nvswitch())?;
    let resource = record.resource.split_once('/')?.1.parse().ok()?;
    Some(Unit::bare(record.id.clone(), resource, record.bdf, (lead.vendor, lead.device)))
}
