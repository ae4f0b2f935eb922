//! What happens to devices without our doing: they come and go, are in use and let go.

use std::collections::BTreeMap;

use hw_probe::{Bdf, Inventory, RuntimePower};
use tokio::time::Instant;

use super::Controller;
use super::memory::Seen;
use super::state_dir::StateDir;
use crate::executor::Firmware;
use crate::plan;

impl<F: Firmware> Controller<F> {
    /// The kernel says that devices came, went or changed drivers: another set of devices is no matter for later, and a change
    /// that waits for a driver to let go may be possible now.
    pub(super) async fn look_for_other_devices(&mut self) {
        let root = self.root.clone();
        let Ok(inventory) = tokio::task::spawn_blocking(move || Inventory::scan(&root)).await else { return };
        let (before, now) = (&self.memory.seen, Seen::of(&inventory));
        if before.instances() != now.instances() {
            tracing::info!(event = "devices_changed", "Devices have come or gone");
            self.memory.next_round = Instant::now();
        } else if self.memory.awaited.iter().any(|bdf| before.0.get(bdf) != now.0.get(bdf)) {
            tracing::info!(event = "devices_changed", "A device that was in the way of a change has another driver");
            self.memory.next_round = Instant::now();
        }
    }

    /// Looks, every now and then, whether a device that was in use has been let go. If so it is to be looked at again: its user
    /// may have changed its knobs. It is not offered until then. A device that was in the way of a change is tried at once.
    pub(super) fn poll_releases(&mut self) {
        let now = Instant::now();
        if now < self.memory.next_poll {
            return;
        }
        let Some(known) = self.memory.known.as_ref() else {
            self.memory.next_poll = now + self.settings.resync;
            return;
        };
        let power = |bdf| Some((bdf, RuntimePower::read(&self.root, bdf)?));
        let powers: BTreeMap<Bdf, RuntimePower> = known.devices.iter().filter_map(|record| power(record.bdf)).collect();
        let released = self.memory.releases.see(&powers);
        let awaited = &self.memory.awaited;
        let often = self.memory.releases.any_awake() || !awaited.is_empty();
        self.memory.next_poll = now + if often { self.settings.release_poll } else { self.settings.resync };
        if !awaited.is_empty() && awaited.iter().all(|bdf| powers.get(bdf).is_some_and(|power| power.suspended)) {
            tracing::info!(event = "released", "Devices that were in the way of a change are free");
            self.memory.awaited.clear();
            self.memory.next_round = now;
        }
        if released.is_empty() || self.settings.only_observe {
            return;
        }
        for bdf in &released {
            tracing::info!(event = "released", device = %bdf, "Device was in use and is no longer: to be verified again");
        }
        self.counters.released(released.len());
        if let Some(mut file) = self.memory.known.take() {
            plan::doubt(&mut file.devices, &released);
            let state = StateDir {
                path: self.settings.state_dir.clone(),
                boot_id: file.origin.boot_id.clone(),
                node_uid: file.origin.node_uid.clone().unwrap_or_default(),
            };
            self.store(&state, file.transition, file.devices);
        }
        self.memory.next_round = now;
    }

    /// Whether a device is suspended, as far as the kernel says.
    pub(super) fn is_suspended(&self, bdf: Bdf) -> bool {
        RuntimePower::read(&self.root, bdf).is_some_and(|power| power.suspended)
    }

    /// A device is in use, or we have just had it.
    pub(super) fn look_at_power_soon(&mut self) {
        self.memory.next_poll = self.memory.next_poll.min(Instant::now() + self.settings.release_poll);
    }
}
