//! The device manager's books: which devices there are, how they are, and who has them. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use kubelet_api::device_plugin as dp;
use thiserror::Error;

/// The NUMA node under which devices without topology are booked.
pub(crate) const NO_NUMA: i64 = -1;

/// Why devices could not be chosen. The texts are those of the real device manager, which end up in the pod's status.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum Refusal {
    #[error("pod {pod:?} container {container:?} changed request for resource {resource:?} from {had} to {wanted}")]
    Changed { pod: String, container: String, resource: String, had: usize, wanted: usize },
    #[error("cannot allocate unregistered device {0}")]
    Unregistered(String),
    #[error("no healthy devices present; cannot allocate unhealthy devices {0}")]
    NoneHealthy(String),
    #[error("previously allocated devices are no longer healthy; cannot allocate unhealthy devices {0}")]
    NoLongerHealthy(String),
    #[error("requested number of devices unavailable for {resource}. Requested: {wanted}, Available: {available}")]
    Unavailable { resource: String, wanted: usize, available: usize },
    #[error("unexpectedly allocated less resources than required. Requested: {wanted}, Got: {got}")]
    TooFew { wanted: usize, got: usize },
}

/// A device as its plugin last listed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// As listed; anything but "Healthy" is unhealthy.
    pub(crate) health: String,
    /// `None`: listed without topology.
    pub(crate) numa: Option<Vec<i64>>,
}

/// The plugin behind a resource.
#[derive(Clone, Debug, Default)]
pub(crate) struct Endpoint {
    /// Base name of its socket; empty when known from the checkpoint alone.
    pub(crate) socket: String,
    pub(crate) options: Option<dp::DevicePluginOptions>,
    /// Set when the plugin's stream ended. From then on the kubelet makes no call to it.
    pub(crate) stopped: Option<Instant>,
}

/// What one container was given of one resource.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Allocation {
    /// Device ids by NUMA node.
    pub(crate) devices: BTreeMap<i64, Vec<String>>,
    pub(crate) response: dp::ContainerAllocateResponse,
}

impl Allocation {
    pub(crate) fn ids(&self) -> BTreeSet<String> {
        self.devices.values().flatten().cloned().collect()
    }
}

/// Allocations by resource name.
pub(crate) type ByResource = BTreeMap<String, Allocation>;

/// Allocations by pod UID, container name and resource name.
pub(crate) type PodDevices = BTreeMap<String, BTreeMap<String, ByResource>>;

/// Device ids by resource that a pod's init containers have given back to it.
pub(crate) type Reusable = BTreeMap<String, BTreeSet<String>>;

/// What the node says of one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) capacity: usize,
    pub(crate) allocatable: usize,
}

/// What one container asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) pod: &'a str,
    pub(crate) container: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) count: usize,
}

/// The first half of a choice.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Nothing is to be allocated: none asked for, or the container has its devices already.
    Nothing,
    /// These, and no question to the plugin.
    Chosen(BTreeSet<String>),
    /// Ask the plugin where it offers to be asked, then call [`Manager::choose_rest`].
    Prefer {
        /// Free devices, in no particular order.
        available: Vec<String>,
        /// Taken already, from an init container of the pod.
        chosen: BTreeSet<String>,
    },
}

/// The books.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    pub(crate) endpoints: BTreeMap<String, Endpoint>,
    pub(crate) devices: BTreeMap<String, BTreeMap<String, Device>>,
    pub(crate) healthy: BTreeMap<String, BTreeSet<String>>,
    unhealthy: BTreeMap<String, BTreeSet<String>>,
    allocated: BTreeMap<String, BTreeSet<String>>,
    pub(crate) pods: PodDevices,
    /// Resources dropped from the books; the node keeps showing them with zero.
    removed: BTreeSet<String>,
    seed: u64,
}

impl Manager {
    /// Starts from what the checkpoint kept. The resources of the last run are there with no devices, and their plugins
    /// count as stopped, until they register again.
    pub(crate) fn restore(
        pods: PodDevices,
        resources: impl IntoIterator<Item = String>,
        seed: u64,
        now: Instant,
    ) -> Self {
        let mut manager = Self { seed, allocated: devices_of(&pods), pods, ..Self::default() };
        for resource in resources {
            manager.healthy.insert(resource.clone(), BTreeSet::new());
            manager.unhealthy.insert(resource.clone(), BTreeSet::new());
            manager.endpoints.insert(resource, Endpoint { stopped: Some(now), ..Endpoint::default() });
        }
        manager
    }

    /// A plugin was dialled and told its options. Its predecessor, if any, is out; the devices stay until the next list.
    pub(crate) fn connected(&mut self, resource: &str, socket: &str, options: dp::DevicePluginOptions) {
        self.endpoints
            .insert(resource.to_owned(), Endpoint { socket: socket.to_owned(), options: Some(options), stopped: None });
    }

    /// A stream of `resource` ended. The real kubelet looks at the resource name alone here: when a plugin registers
    /// anew before its old stream ends, the end of the old one takes the new one down as well.
    pub(crate) fn disconnected(&mut self, resource: &str, now: Instant) {
        let Some(endpoint) = self.endpoints.get_mut(resource) else { return };
        endpoint.stopped = Some(now);
        let gone = self.healthy.insert(resource.to_owned(), BTreeSet::new()).unwrap_or_default();
        self.unhealthy.entry(resource.to_owned()).or_default().extend(gone);
    }

    /// A list came in: it replaces the one before.
    pub(crate) fn listed(&mut self, resource: &str, list: &[dp::Device]) {
        let mut devices = BTreeMap::new();
        let (mut healthy, mut unhealthy) = (BTreeSet::new(), BTreeSet::new());
        for device in list {
            if device.health == kubelet_api::HEALTHY {
                healthy.insert(device.id.clone());
            } else {
                unhealthy.insert(device.id.clone());
            }
            let numa = device.topology.as_ref().map(|topology| topology.nodes.iter().map(|node| node.id).collect());
            devices.insert(device.id.clone(), Device { health: device.health.clone(), numa });
        }
        self.devices.insert(resource.to_owned(), devices);
        self.healthy.insert(resource.to_owned(), healthy);
        self.unhealthy.insert(resource.to_owned(), unhealthy);
    }

    /// Capacity and allocatable by resource. Resources whose plugin has been gone longer than `grace` leave the books
    /// and show zero from then on.
    pub(crate) fn counts(&mut self, now: Instant, grace: Duration) -> BTreeMap<String, Counts> {
        let known: BTreeSet<String> = self.healthy.keys().chain(self.unhealthy.keys()).cloned().collect();
        let mut counts = BTreeMap::new();
        for resource in known {
            let expired = self.endpoints.get(&resource).is_none_or(|endpoint| {
                endpoint.stopped.is_some_and(|stopped| now.saturating_duration_since(stopped) > grace)
            });
            if expired {
                self.endpoints.remove(&resource);
                self.healthy.remove(&resource);
                self.unhealthy.remove(&resource);
                self.removed.insert(resource);
                continue;
            }
            let healthy = self.healthy.get(&resource).map_or(0, BTreeSet::len);
            let unhealthy = self.unhealthy.get(&resource).map_or(0, BTreeSet::len);
            self.removed.remove(&resource);
            counts.insert(resource, Counts { capacity: healthy + unhealthy, allocatable: healthy });
        }
        for resource in &self.removed {
            counts.entry(resource.clone()).or_default();
        }
        counts
    }

    /// Whether the device manager has a say in `resource`; others are left to the scheduler alone.
    pub(crate) fn manages(&self, resource: &str) -> bool {
        self.healthy.contains_key(resource) || self.allocated.contains_key(resource)
    }

    /// Frees what pods have that are no longer active.
    pub(crate) fn free_inactive(&mut self, active: &BTreeSet<String>) {
        let before = self.pods.len();
        self.pods.retain(|uid, _| active.contains(uid));
        if self.pods.len() != before {
            self.rebook();
        }
    }

    /// Makes the set of allocated devices agree with the pods again, as after a failed Allocate.
    pub(crate) fn rebook(&mut self) {
        self.allocated = devices_of(&self.pods);
    }

    /// Begins to choose devices for one container and resource.
    pub(crate) fn choose(&mut self, ask: Ask<'_>, reusable: &BTreeSet<String>) -> Result<Choice, Refusal> {
        let resource = ask.resource.to_owned();
        let had = self
            .pods
            .get(ask.pod)
            .and_then(|pod| pod.get(ask.container))
            .and_then(|container| container.get(ask.resource))
            .map(Allocation::ids);
        let mut needed = ask.count;
        if let Some(had) = &had {
            if had.len() != ask.count {
                return Err(Refusal::Changed {
                    pod: ask.pod.to_owned(),
                    container: ask.container.to_owned(),
                    resource,
                    had: had.len(),
                    wanted: ask.count,
                });
            }
            needed = 0;
        }
        // Health comes before the count, so even a request for zero needs a healthy device.
        let Some(healthy) = self.healthy.get(ask.resource) else { return Err(Refusal::Unregistered(resource)) };
        if healthy.is_empty() {
            return Err(Refusal::NoneHealthy(resource));
        }
        if had.is_some_and(|had| !had.is_subset(healthy)) {
            return Err(Refusal::NoLongerHealthy(resource));
        }
        if needed == 0 {
            return Ok(Choice::Nothing);
        }
        let healthy = healthy.clone();
        let in_use = self.allocated.entry(resource.clone()).or_default();
        let mut chosen = BTreeSet::new();
        for id in reusable.iter().take(needed) {
            in_use.insert(id.clone());
            chosen.insert(id.clone());
        }
        needed -= chosen.len();
        if needed == 0 {
            return Ok(Choice::Chosen(chosen));
        }
        let available: Vec<String> = healthy.difference(in_use).cloned().collect();
        if available.len() < needed {
            return Err(Refusal::Unavailable { resource, wanted: needed, available: available.len() });
        }
        Ok(Choice::Prefer { available: self.shuffled(available), chosen })
    }

    /// Completes a choice. What the plugin prefers counts only as far as it was available.
    pub(crate) fn choose_rest(
        &mut self,
        ask: Ask<'_>,
        available: &[String],
        mut chosen: BTreeSet<String>,
        preferred: &[String],
    ) -> Result<BTreeSet<String>, Refusal> {
        let in_use = self.allocated.entry(ask.resource.to_owned()).or_default();
        let first = available.iter().filter(|id| preferred.contains(id));
        for id in first.chain(available) {
            if chosen.len() >= ask.count {
                break;
            }
            if chosen.insert(id.clone()) {
                in_use.insert(id.clone());
            }
        }
        if chosen.len() < ask.count {
            return Err(Refusal::TooFew { wanted: ask.count, got: chosen.len() });
        }
        Ok(chosen)
    }

    /// Books an allocation that the plugin has agreed to.
    pub(crate) fn book(&mut self, ask: Ask<'_>, ids: &BTreeSet<String>, response: dp::ContainerAllocateResponse) {
        let mut devices: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for id in ids {
            let numa = self
                .devices
                .get(ask.resource)
                .and_then(|devices| devices.get(id))
                .and_then(|device| device.numa.clone())
                .filter(|nodes| !nodes.is_empty())
                .unwrap_or_else(|| vec![NO_NUMA]);
            for node in numa {
                devices.entry(node).or_default().push(id.clone());
            }
        }
        self.pods
            .entry(ask.pod.to_owned())
            .or_default()
            .entry(ask.container.to_owned())
            .or_default()
            .insert(ask.resource.to_owned(), Allocation { devices, response });
    }

    /// Allocations of one container.
    pub(crate) fn container(&self, pod: &str, container: &str) -> Option<&ByResource> {
        self.pods.get(pod)?.get(container)
    }

    /// Which pod and container have a device.
    pub(crate) fn holder(&self, resource: &str, id: &str) -> Option<(&str, &str)> {
        self.pods.iter().find_map(|(pod, containers)| {
            containers.iter().find_map(|(container, resources)| {
                let held = resources.get(resource)?.devices.values().flatten().any(|held| held == id);
                held.then_some((pod.as_str(), container.as_str()))
            })
        })
    }

    /// The real kubelet hands ids out in the order of a hash map. This order is as arbitrary, but the same every time.
    fn shuffled(&self, mut ids: Vec<String>) -> Vec<String> {
        ids.sort_by_key(|id| {
            let mut hasher = DefaultHasher::new();
            (self.seed, id).hash(&mut hasher);
            hasher.finish()
        });
        ids
    }
}

fn devices_of(pods: &PodDevices) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for resources in pods.values().flat_map(BTreeMap::values) {
        for (resource, allocation) in resources {
            all.entry(resource.clone()).or_default().extend(allocation.ids());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: &str = "nvidia.com/pgpu";

    fn listed(devices: &[(&str, &str, Option<i64>)]) -> Vec<dp::Device> {
        devices
            .iter()
            .map(|(id, health, numa)| dp::Device {
                id: (*id).to_owned(),
                health: (*health).to_owned(),
                topology: numa.map(|id| dp::TopologyInfo { nodes: vec![dp::NumaNode { id }] }),
            })
            .collect()
    }

    fn manager(devices: &[(&str, &str, Option<i64>)]) -> Manager {
        let mut manager = Manager::default();
        manager.connected(R, "p.sock", dp::DevicePluginOptions::default());
        manager.listed(R, &listed(devices));
        manager
    }

    fn ask(pod: &str, count: usize) -> Ask<'_> {
        Ask { pod, container: "c", resource: R, count }
    }

    fn take(manager: &mut Manager, pod: &str, count: usize, preferred: &[&str]) -> Result<BTreeSet<String>, Refusal> {
        let preferred: Vec<String> = preferred.iter().map(|id| (*id).to_owned()).collect();
        let ids = match manager.choose(ask(pod, count), &BTreeSet::new())? {
            Choice::Nothing => BTreeSet::new(),
            Choice::Chosen(ids) => ids,
            Choice::Prefer { available, chosen } => {
                manager.choose_rest(ask(pod, count), &available, chosen, &preferred)?
            }
        };
        if !ids.is_empty() {
            manager.book(ask(pod, count), &ids, dp::ContainerAllocateResponse::default());
        }
        Ok(ids)
    }

    fn counts(manager: &mut Manager) -> (usize, usize) {
        let counts = manager.counts(Instant::now(), Duration::from_mins(5)).get(R).copied().unwrap_or_default();
        (counts.capacity, counts.allocatable)
    }

    #[test]
    fn unhealthy_devices_lower_allocatable_and_a_lost_plugin_takes_all_of_it() {
        let mut manager =
            manager(&[("0", "Healthy", None), ("1", "Unhealthy", None), ("2", "weird", None), ("3", "Healthy", None)]);
        assert_eq!(counts(&mut manager), (4, 2));
        manager.disconnected(R, Instant::now());
        assert_eq!(counts(&mut manager), (4, 0));
        manager.connected(R, "p.sock", dp::DevicePluginOptions::default());
        assert_eq!(counts(&mut manager), (4, 0), "registering alone brings nothing back");
        manager.listed(R, &listed(&[("0", "Healthy", None)]));
        assert_eq!(counts(&mut manager), (1, 1));
    }

    #[test]
    fn after_the_grace_period_the_resource_shows_zero() {
        let mut manager = manager(&[("0", "Healthy", None)]);
        let now = Instant::now();
        manager.disconnected(R, now);
        let grace = Duration::from_mins(5);
        assert_eq!(manager.counts(now + grace, grace)[R], Counts { capacity: 1, allocatable: 0 });
        let late = now + grace + Duration::from_secs(1);
        assert_eq!(manager.counts(late, grace)[R], Counts::default());
        assert!(!manager.manages(R));
    }

    #[test]
    fn devices_are_never_given_twice_and_refusals_carry_the_real_texts() {
        let mut manager = manager(&[("0", "Healthy", None), ("1", "Healthy", None), ("2", "Unhealthy", None)]);
        let first = take(&mut manager, "a", 1, &[]).unwrap();
        let second = take(&mut manager, "b", 1, &["2", "0", "1"]).unwrap();
        assert!(first.is_disjoint(&second) && !second.contains("2"));
        assert_eq!(
            take(&mut manager, "c", 1, &[]).unwrap_err().to_string(),
            "requested number of devices unavailable for nvidia.com/pgpu. Requested: 1, Available: 0"
        );
        assert_eq!(
            take(&mut manager, "a", 2, &[]).unwrap_err().to_string(),
            r#"pod "a" container "c" changed request for resource "nvidia.com/pgpu" from 1 to 2"#
        );
        assert_eq!(take(&mut manager, "a", 1, &[]), Ok(BTreeSet::new()), "asked again, nothing new");
        manager.free_inactive(&["b".to_owned()].into());
        assert_eq!(take(&mut manager, "c", 1, &[]).unwrap(), first);
        manager.listed(R, &listed(&[("9", "Healthy", None)]));
        assert_eq!(
            take(&mut manager, "c", 1, &[]).unwrap_err().to_string(),
            "previously allocated devices are no longer healthy; cannot allocate unhealthy devices nvidia.com/pgpu"
        );
        manager.disconnected(R, Instant::now());
        assert_eq!(
            take(&mut manager, "d", 0, &[]).unwrap_err().to_string(),
            "no healthy devices present; cannot allocate unhealthy devices nvidia.com/pgpu"
        );
        let other = Ask { pod: "d", container: "c", resource: "x/y", count: 1 };
        assert_eq!(
            manager.choose(other, &BTreeSet::new()).unwrap_err().to_string(),
            "cannot allocate unregistered device x/y"
        );
    }

    #[test]
    fn preferences_count_as_far_as_they_are_available() {
        let mut manager = manager(&[("0", "Healthy", None), ("1", "Healthy", None), ("2", "Healthy", None)]);
        assert_eq!(take(&mut manager, "a", 2, &["1", "2", "77"]).unwrap(), ["1".to_owned(), "2".to_owned()].into());
        assert_eq!(take(&mut manager, "b", 1, &["1"]).unwrap(), ["0".to_owned()].into());
    }

    #[test]
    fn init_containers_devices_are_used_again() {
        let mut manager = manager(&[("0", "Healthy", None), ("1", "Healthy", None)]);
        let reusable: BTreeSet<String> = ["1".to_owned()].into();
        assert_eq!(manager.choose(ask("a", 1), &reusable), Ok(Choice::Chosen(reusable.clone())));
        let Ok(Choice::Prefer { available, chosen }) = manager.choose(ask("a", 2), &reusable) else { panic!() };
        assert_eq!((available, chosen), (vec!["0".to_owned()], reusable));
    }

    #[test]
    fn a_restart_keeps_allocations_and_shows_zero_until_plugins_are_back() {
        let mut before = manager(&[("0", "Healthy", Some(1)), ("1", "Healthy", None)]);
        take(&mut before, "a", 1, &["0"]).unwrap();
        let mut manager = Manager::restore(before.pods.clone(), [R.to_owned()], 0, Instant::now());
        assert_eq!(counts(&mut manager), (0, 0));
        assert!(manager.manages(R));
        assert_eq!(manager.choose(ask("a", 1), &BTreeSet::new()), Err(Refusal::NoneHealthy(R.to_owned())));
        manager.connected(R, "p.sock", dp::DevicePluginOptions::default());
        manager.listed(R, &listed(&[("0", "Healthy", Some(1)), ("1", "Healthy", None)]));
        assert_eq!(take(&mut manager, "b", 1, &["0"]).unwrap(), ["1".to_owned()].into(), "0 is still a's");
        assert_eq!(manager.pods["a"]["c"][R].devices, [(1, vec!["0".to_owned()])].into());
        assert_eq!(manager.pods["b"]["c"][R].devices, [(NO_NUMA, vec!["1".to_owned()])].into());
        assert_eq!(manager.holder(R, "0"), Some(("a", "c")));
    }
}
