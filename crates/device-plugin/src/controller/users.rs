//! Who has the devices: pods by the kubelet, processes by the host. Learnt after the kubelet was told, since nobody waits for it.

use agent_core::uevents::DeviceEvents;
use hw_probe::{Holders, holders};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::{Controller, Waited};
use crate::pods::{self, Pods};
use crate::quarantine::{Facts, Quarantine};
use crate::units::withdrawn;

impl Controller {
    /// Learns who has the devices, after the kubelet was told: nobody waits for these answers.
    pub(super) async fn learn(&mut self, devices: &mut DeviceEvents) -> Waited<()> {
        // What is not seen is not judged anew.
        if self.trouble.is_some() {
            self.show();
            return Waited::Done(());
        }
        let socket = self.config.looks.pod_resources.clone();
        self.pods = match self.waiting(devices, async move { pods::ask(&socket).await }).await {
            Waited::Done(Some(Ok(answer))) => self.listener.hear(Instant::now(), answer, &self.book),
            Waited::Done(Some(Err(why))) => {
                self.once("pod-resources", &why, |why| {
                    tracing::warn!(
                        reason = why,
                        "The kubelet does not tell which pod has which device; its book has to do"
                    );
                });
                Pods::by_book(&self.book)
            }
            Waited::Done(None) => Pods::by_book(&self.book),
            Waited::News => return Waited::News,
            Waited::Over => return Waited::Over,
        };
        let Some(seen) = &self.seen else { return Waited::Done(()) };
        let held: Option<Holders> = if Quarantine::asks(&self.looked, &self.pods, &seen.inventory) {
            let root = self.config.places.root.clone();
            match self.waiting(devices, spawn_blocking(move || holders(&root))).await {
                Waited::Done(holders) => holders.ok(),
                Waited::News => return Waited::News,
                Waited::Over => return Waited::Over,
            }
        } else {
            None
        };
        let Some(seen) = &self.seen else { return Waited::Done(()) };
        let facts = Facts { inventory: &seen.inventory, pods: &self.pods, holders: held.as_ref() };
        let has_news = self.quarantine.step(Instant::now(), &self.looked, &facts);
        if has_news {
            let mut now = self.looked.clone();
            self.quarantine.settle(&mut now);
            // What cc-manager has said meanwhile still counts.
            let mut now = withdrawn(&self.config.policy, seen, &now);
            self.write_cdi(&mut now);
            self.tell(now);
        }
        self.show();
        self.say_what_is_not_seen();
        Waited::Done(())
    }

    fn say_what_is_not_seen(&mut self) {
        if let Pods::Unknown(why) = &self.pods {
            let why = why.clone();
            self.once("pods", &why, |why| {
                tracing::info!(
                    reason = why,
                    "It is not known which pod has which device: a device that outlives its pod in use is not held back"
                );
            });
        }
        if let Some(blind) = self.blind() {
            self.once("use", &blind, |blind| {
                tracing::info!(reason = blind, "It cannot be seen whether some units are in use");
            });
        }
    }

    /// Why it cannot be seen of some units whether they are in use.
    pub(super) fn blind(&self) -> Option<String> {
        let units: Vec<String> = self.quarantine.unseen().iter().map(ToString::to_string).collect();
        (!units.is_empty() && self.pods.are_known()).then(|| {
            format!(
                "{}: the processes of the host are not seen (that takes hostPID and CAP_SYS_PTRACE), and the device was not seen \
                 to sleep on VFIO since this agent started",
                units.join(", ")
            )
        })
    }
}
