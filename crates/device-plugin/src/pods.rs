//! Which pod has which device: by the kubelet's pod-resources service, or, where that is not mounted, by its book.

use std::path::Path;
use std::time::{Duration, SystemTime};

use agent_core::resources::may_be_gpus;
use agent_core::text::chain;
use hw_probe::{Inventory, PciFunction};
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use kubelet_api::pod_resources::{ListPodResourcesRequest, ListPodResourcesResponse};
use kubelet_api::socket::connect;
use tokio::time::Instant;

use crate::checkpoint::{Book, Given};
use crate::plugin::{SocketId, socket_id};
use crate::units::Unit;

/// Longest wait for connection and answer together.
const PATIENCE: Duration = Duration::from_secs(1);

/// For so long after its start the kubelet may name some of its pods and not yet others: they come from several sources.
const BEGINNING: Duration = Duration::from_mins(2);

/// What is known of the pods' devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pods {
    /// Nothing, and why.
    Unknown(String),
    /// The kubelet's answer: every device of such a resource, with its pod as `namespace/name`.
    Told(Vec<Given>),
    /// The answer of a kubelet that has just started and may not know all its pods, with what its book has besides.
    Beginning(Vec<Given>),
    /// The kubelet's book, with the pods' UIDs. Pods that have ended stay in it until the kubelet admits another.
    Booked(Vec<Given>),
}

impl Pods {
    /// What the kubelet's book tells.
    pub fn by_book(book: &Book) -> Self {
        match book {
            Book::Absent => Self::Unknown("the kubelet has no book of its allocations".into()),
            Book::Unreadable(cause) => Self::Unknown(cause.clone()),
            Book::Read(given) => {
                Self::Booked(given.iter().filter(|given| may_be_gpus(&given.resource)).cloned().collect())
            }
        }
    }

    /// Where this is from, in a word, and what is missing.
    pub fn source(&self) -> String {
        match self {
            Self::Told(_) => "the kubelet's pod-resources service".into(),
            Self::Beginning(_) => {
                "the kubelet's pod-resources service, and what it does not tell yet, its checkpoint".into()
            }
            Self::Booked(_) => "the kubelet's checkpoint, which has ended pods until the next one is admitted".into(),
            Self::Unknown(why) => format!("not seen: {why}"),
        }
    }

    /// Whether anything is known.
    pub fn are_known(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }

    /// The pod that has one of `units`, under whatever ID a plugin has called it.
    pub fn of(&self, unit: &Unit, units: &[Unit], inventory: &Inventory) -> Option<&str> {
        self.given(unit, units, inventory).next().map(|given| given.pod.as_str())
    }

    /// What the kubelet tells that it has given of one of `units` under a name or an ID by which nobody is called now: under
    /// its present one it would be given twice.
    pub fn otherwise(&self, unit: &Unit, units: &[Unit], inventory: &Inventory) -> Option<&Given> {
        // The book has pods that have ended, and it stays as it is while nothing is offered.
        let is_present = !matches!(self, Self::Booked(_));
        self.given(unit, units, inventory).find(|given| is_present && !is_called(unit, given))
    }

    fn given(&self, unit: &Unit, units: &[Unit], inventory: &Inventory) -> impl Iterator<Item = &Given> {
        let given = match self {
            Self::Told(given) | Self::Beginning(given) | Self::Booked(given) => given.as_slice(),
            Self::Unknown(_) => &[],
        };
        let names: Vec<String> = unit
            .functions
            .iter()
            .filter_map(|bdf| inventory.get(*bdf))
            .flat_map(names)
            .chain([unit.id.clone()])
            .collect();
        // A number may be that of one unit's node and of another's group. Who is called so is meant.
        let is_anothers = |given: &Given| units.iter().any(|other| other.bdf != unit.bdf && is_called(other, given));
        let is_its = |given: &&Given| is_called(unit, given) || names.contains(&given.id) && !is_anothers(given);
        given.iter().filter(is_its).collect::<Vec<_>>().into_iter()
    }
}

/// Whether this is what the kubelet calls a unit now.
fn is_called(unit: &Unit, given: &Given) -> bool {
    unit.id == given.id && unit.resource.to_string() == given.resource
}

/// Plugins call a device by its address, or by the number of its VFIO device or its IOMMU group.
fn names(function: &PciFunction) -> Vec<String> {
    let cdev = function.vfio_cdev.as_ref().and_then(|cdev| cdev.name.strip_prefix("vfio")).map(str::to_owned);
    let group = function.iommu_group.map(|group| group.to_string());
    [Some(function.bdf.to_string()), cdev, group].into_iter().flatten().collect()
}

/// What the kubelet's pod-resources service has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    given: Vec<Given>,
    /// Whether it named any pod, with devices or without: a kubelet that knows of none has just started.
    names_pods: bool,
    service: SocketId,
    /// How old the service's socket is.
    age: Duration,
}

/// Knows for how long the kubelet may not tell of all pods: when it starts, its service answers before it has heard of them,
/// while its book has their devices already.
#[derive(Debug, Default)]
pub struct Listener {
    service: Option<(SocketId, Instant)>,
    /// Whether this kubelet has told of all pods once.
    is_whole: bool,
}

impl Listener {
    /// What is known of the pods by this answer and the kubelet's book.
    pub fn hear(&mut self, now: Instant, answer: Answer, book: &Book) -> Pods {
        let Answer { mut given, names_pods, service, age } = answer;
        let since = match self.service {
            Some((known, since)) if known == service => since,
            _ => {
                self.is_whole = false;
                self.service = Some((service, now));
                now
            }
        };
        let is_missing = |booked: &&Given| {
            may_be_gpus(&booked.resource)
                && !given.iter().any(|told| told.resource == booked.resource && told.id == booked.id)
        };
        let missing: Vec<Given> = book.given().iter().filter(is_missing).cloned().collect();
        let is_known = !matches!(book, Book::Unreadable(_));
        let is_old = names_pods && age.max(now - since) >= BEGINNING;
        self.is_whole = self.is_whole || is_known && missing.is_empty() || is_old;
        match book {
            _ if self.is_whole => Pods::Told(given),
            Book::Unreadable(cause) => {
                Pods::Unknown(format!("the kubelet has just started and may not tell of all pods, and {cause}"))
            }
            Book::Absent | Book::Read(_) => {
                given.extend(missing);
                given.sort();
                Pods::Beginning(given)
            }
        }
    }
}

/// Asks the kubelet; none where there is no socket to ask at. Waits 1 second at most.
pub async fn ask(socket: &Path) -> Option<Result<Answer, String>> {
    if socket.as_os_str().is_empty() {
        return None;
    }
    let service = socket_id(socket)?;
    let ask = async {
        let channel = connect(socket, PATIENCE).await.map_err(|error| chain(&error))?;
        let answer = PodResourcesListerClient::new(channel).list(ListPodResourcesRequest {}).await;
        answer.map_err(|status| format!("the kubelet refused: {:?}: {}", status.code(), status.message()))
    };
    let answer = match tokio::time::timeout(PATIENCE, ask).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(format!("the kubelet has not answered on {} within {PATIENCE:?}", socket.display())),
    };
    Some(answer.and_then(|answer| {
        if socket_id(socket) != Some(service) {
            return Err("the kubelet has restarted while it was asked".to_owned());
        }
        let made = std::fs::metadata(socket).and_then(|meta| meta.modified());
        // A clock that was set back makes it young, and no more.
        let age = made.ok().and_then(|made| SystemTime::now().duration_since(made).ok()).unwrap_or_default();
        Ok(Answer { names_pods: !answer.pod_resources.is_empty(), given: told(answer), service, age })
    }))
}

fn told(answer: ListPodResourcesResponse) -> Vec<Given> {
    let mut given = Vec::new();
    for pod in answer.pod_resources {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let devices = pod.containers.into_iter().flat_map(|container| container.devices);
        for device in devices.filter(|device| may_be_gpus(&device.resource_name)) {
            let one = |id| Given { resource: device.resource_name.clone(), id, pod: name.clone() };
            given.extend(device.device_ids.into_iter().map(one));
        }
    }
    given.sort();
    given.dedup();
    given
}

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;
    use kubelet_api::pod_resources::{ContainerDevices, ContainerResources, PodResources};

    use super::*;

    const GPU: &str = "0000:41:00.0";

    fn given(resource: &str, id: &str) -> Given {
        Given { resource: resource.into(), id: id.into(), pod: "ns/a".into() }
    }

    #[test]
    fn a_unit_is_found_under_whatever_a_plugin_calls_it() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").cdev(17);
        fake.function("0000:41:00.1", 0x10de, 0x22ba, 0x04_0300).group(5).driver("vfio-pci").cdev(3);
        let inventory = Inventory::scan(&fake.root());
        let functions = vec![GPU.parse().unwrap(), "0000:41:00.1".parse().unwrap()];
        let unit = Unit { functions, ..Unit::sample("old-name") };
        for (id, found) in
            [(GPU, true), ("17", true), ("5", true), ("3", true), ("old-name", true), ("18", false), ("", false)]
        {
            for pods in [Pods::Told(vec![given("nvidia.com/x", id)]), Pods::Booked(vec![given("nvidia.com/x", id)])] {
                let units = std::slice::from_ref(&unit);
                assert_eq!(pods.of(&unit, units, &inventory), found.then_some("ns/a"), "{id}");
            }
        }
        assert_eq!(Pods::Unknown("?".into()).of(&unit, &[], &inventory), None);
    }

    #[test]
    fn a_number_that_two_units_have_is_that_of_the_one_that_is_called_so() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).group(5).driver("vfio-pci").cdev(7);
        fake.gpu("0000:42:00.0", 0x2330).group(7).driver("vfio-pci").cdev(5);
        let inventory = Inventory::scan(&fake.root());
        let unit = |bdf: &str, id: &str| Unit {
            id: id.into(),
            bdf: bdf.parse().unwrap(),
            functions: vec![bdf.parse().unwrap()],
            ..Unit::sample("0000:41:00.0")
        };
        let resource = "nvidia.com/pgpu";
        // What units are called, what is given -> the pods of both, and which of them are given under another name
        let cases = [
            (["7", "5"], (resource, "5"), [false, true], [false, false]),
            (["7", "5"], (resource, "7"), [true, false], [false, false]),
            ([GPU, "0000:42:00.0"], (resource, GPU), [true, false], [false, false]),
            // Under a name that nobody has any more it cannot be told whose number it is.
            ([GPU, "0000:42:00.0"], (resource, "5"), [true, true], [true, true]),
            ([GPU, "0000:42:00.0"], ("nvidia.com/old", GPU), [true, false], [true, false]),
        ];
        for (ids, (resource, id), has, otherwise) in cases {
            let units = [unit(GPU, ids[0]), unit("0000:42:00.0", ids[1])];
            let pods = Pods::Told(vec![given(resource, id)]);
            let found = units.each_ref().map(|unit| pods.of(unit, &units, &inventory).is_some());
            let others = units.each_ref().map(|unit| pods.otherwise(unit, &units, &inventory).is_some());
            assert_eq!((found, others), (has, otherwise), "{ids:?} {resource} {id}");
            let booked = Pods::Booked(vec![given(resource, id)]);
            assert!(units.iter().all(|unit| booked.otherwise(unit, &units, &inventory).is_none()), "{ids:?} {id}");
        }
    }

    #[test]
    fn others_resources_do_not_count() {
        let devices = |resource: &str, ids: &[&str]| ContainerDevices {
            resource_name: resource.into(),
            device_ids: ids.iter().map(ToString::to_string).collect(),
            topology: None,
        };
        let container = ContainerResources {
            devices: vec![
                devices("nvidia.com/pgpu", &["2", "1", "1"]),
                devices("example.com/nic", &["3"]),
                devices("nvidia.com/rdma_shared_device_a", &["3"]),
            ],
            ..ContainerResources::default()
        };
        let pod = PodResources {
            name: "a".into(),
            namespace: "ns".into(),
            containers: vec![container],
            ..PodResources::default()
        };
        let found = told(ListPodResourcesResponse { pod_resources: vec![pod] });
        assert_eq!(found, [given("nvidia.com/pgpu", "1"), given("nvidia.com/pgpu", "2")]);
        let book = Book::Read(vec![given("example.com/nic", "3"), given("nvidia.com/pgpu", "1")]);
        assert_eq!(Pods::by_book(&book), Pods::Booked(vec![given("nvidia.com/pgpu", "1")]));
        assert!(!Pods::by_book(&Book::Absent).are_known());
    }

    #[test]
    fn a_kubelet_that_has_just_started_takes_no_pod_away() {
        // After how many seconds, which kubelet, for how long its socket is there, what it tells, whether it names any pod, its
        // book -> what is known
        type Case<'a> = (u64, SocketId, u64, &'a [&'a Given], bool, Book, Pods);
        let begun = Instant::now();
        let here = tempfile::tempdir().unwrap();
        let service = |name: &str| {
            let path = here.path().join(name);
            drop(std::os::unix::net::UnixListener::bind(&path));
            socket_id(&path).unwrap()
        };
        let (first, second, third) = (service("a"), service("b"), service("c"));
        let (one, other) = (given("nvidia.com/pgpu", "1"), given("nvidia.com/pgpu", "2"));
        let book = |given: &[&Given]| Book::Read(given.iter().map(|given| (*given).clone()).collect());
        let both = book(&[&one, &other]);
        let (told, beginning) = (
            |given: &[&Given]| Pods::Told(given.iter().map(|given| (*given).clone()).collect()),
            |given: &[&Given]| Pods::Beginning(given.iter().map(|given| (*given).clone()).collect()),
        );
        let nic = given("example.com/nic", "3");
        let cases: &[Case] = &[
            // Young, and its book has what it does not tell.
            (0, first, 0, &[], false, both.clone(), beginning(&[&one, &other])),
            (1, first, 1, &[&one], true, both.clone(), beginning(&[&one, &other])),
            (1, first, 2, &[&one, &other], true, both.clone(), told(&[&one, &other])),
            // Once it has told of all, its word counts, whatever the book still has.
            (1, first, 3, &[&one], true, both.clone(), told(&[&one])),
            (1, first, 4, &[], true, both.clone(), told(&[])),
            // Another kubelet, which names no pod for as long as it hears of none.
            (1, second, 0, &[], false, both.clone(), beginning(&[&one, &other])),
            (3600, second, 3600, &[], false, both.clone(), beginning(&[&one, &other])),
            // It names some: a pod that ended while it was away is in its book, and is gone.
            (1, second, 3601, &[&one], true, both.clone(), told(&[&one])),
            // The clock was set back: it has been known for long enough.
            (1, third, 0, &[&one], true, both.clone(), beginning(&[&one, &other])),
            (BEGINNING.as_secs(), third, 0, &[&one], true, both.clone(), told(&[&one])),
            // Nothing is missing.
            (1, first, 0, &[], false, book(&[]), told(&[])),
            (1, second, 0, &[], false, Book::Absent, told(&[])),
            (1, first, 0, &[&one], false, book(&[&one, &nic]), told(&[&one])),
        ];
        let (mut listener, mut now) = (Listener::default(), begun);
        for (at, (seconds, service, age, given, names_pods, book, pods)) in cases.iter().enumerate() {
            now += Duration::from_secs(*seconds);
            let given = given.iter().map(|given| (*given).clone()).collect();
            let answer = Answer { given, names_pods: *names_pods, service: *service, age: Duration::from_secs(*age) };
            assert_eq!(listener.hear(now, answer, book), *pods, "case {at}");
        }
        let young = |names_pods| Answer { given: vec![], names_pods, service: third, age: Duration::ZERO };
        let broken = Book::Unreadable("it is broken".into());
        let Pods::Unknown(why) = listener.hear(now, young(true), &broken) else { panic!("it is not known") };
        assert!(why.contains("just started") && why.contains("it is broken"), "{why}");
        assert_eq!(listener.hear(now + BEGINNING, young(true), &broken), told(&[]));
    }

    #[tokio::test]
    async fn a_kubelet_that_is_not_there_is_not_asked_and_a_dead_one_is_an_error() {
        let here = tempfile::tempdir().unwrap();
        let socket = here.path().join("kubelet.sock");
        assert_eq!(ask(&socket).await, None);
        assert_eq!(ask(Path::new("")).await, None);
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(ask(&socket).await.unwrap().unwrap_err().contains("kubelet.sock"));
    }
}
