//! Which pod has which device: by the kubelet's pod-resources service, or, where that is not mounted, by its book.

use std::path::Path;
use std::time::Duration;

use agent_core::text::chain;
use hw_probe::{Inventory, PciFunction};
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use kubelet_api::pod_resources::{ListPodResourcesRequest, ListPodResourcesResponse};
use kubelet_api::socket::connect;

use crate::checkpoint::{Book, Given};
use crate::units::Unit;

/// Longest wait for connection and answer together.
const PATIENCE: Duration = Duration::from_secs(1);

/// Resources of NVIDIA's plugins and of ours begin so.
const RESOURCES: &str = "nvidia.com/";

/// What is known of the pods' devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pods {
    /// Nothing, and why.
    Unknown(String),
    /// The kubelet's answer: every device of such a resource, with its pod as `namespace/name`.
    Told(Vec<Given>),
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
                Self::Booked(given.iter().filter(|given| is_nvidias(&given.resource)).cloned().collect())
            }
        }
    }

    /// Where this is from, in a word, and what is missing.
    pub fn source(&self) -> String {
        match self {
            Self::Told(_) => "the kubelet's pod-resources service".into(),
            Self::Booked(_) => "the kubelet's checkpoint, which has ended pods until the next one is admitted".into(),
            Self::Unknown(why) => format!("not seen: {why}"),
        }
    }

    /// Whether anything is known.
    pub fn are_known(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }

    /// The pod that has a unit, under whatever ID a plugin has called it.
    pub fn of(&self, unit: &Unit, inventory: &Inventory) -> Option<&str> {
        let (Self::Told(given) | Self::Booked(given)) = self else { return None };
        let names: Vec<String> = unit
            .functions
            .iter()
            .filter_map(|bdf| inventory.get(*bdf))
            .flat_map(names)
            .chain([unit.id.clone()])
            .collect();
        given.iter().find(|given| names.contains(&given.id)).map(|given| given.pod.as_str())
    }
}

/// Plugins call a device by its address, or by the number of its VFIO device or its IOMMU group.
fn names(function: &PciFunction) -> Vec<String> {
    let cdev = function.vfio_cdev.as_ref().and_then(|cdev| cdev.name.strip_prefix("vfio")).map(str::to_owned);
    let group = function.iommu_group.map(|group| group.to_string());
    [Some(function.bdf.to_string()), cdev, group].into_iter().flatten().collect()
}

fn is_nvidias(resource: &str) -> bool {
    resource.starts_with(RESOURCES)
}

/// Asks the kubelet; none where there is no socket to ask at. Waits 1 second at most.
pub async fn ask(socket: &Path) -> Option<Result<Pods, String>> {
    if socket.as_os_str().is_empty() || !socket.exists() {
        return None;
    }
    let ask = async {
        let channel = connect(socket, PATIENCE).await.map_err(|error| chain(&error))?;
        let answer = PodResourcesListerClient::new(channel).list(ListPodResourcesRequest {}).await;
        answer.map_err(|status| format!("the kubelet refused: {:?}: {}", status.code(), status.message()))
    };
    Some(match tokio::time::timeout(PATIENCE, ask).await {
        Ok(answer) => answer.map(|answer| Pods::Told(told(answer.into_inner()))),
        Err(_) => Err(format!("the kubelet has not answered on {} within {PATIENCE:?}", socket.display())),
    })
}

fn told(answer: ListPodResourcesResponse) -> Vec<Given> {
    let mut given = Vec::new();
    for pod in answer.pod_resources {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let devices = pod.containers.into_iter().flat_map(|container| container.devices);
        for device in devices.filter(|device| is_nvidias(&device.resource_name)) {
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
                assert_eq!(pods.of(&unit, &inventory), found.then_some("ns/a"), "{id}");
            }
        }
        assert_eq!(Pods::Unknown("?".into()).of(&unit, &inventory), None);
    }

    #[test]
    fn others_resources_do_not_count() {
        let devices = |resource: &str, ids: &[&str]| ContainerDevices {
            resource_name: resource.into(),
            device_ids: ids.iter().map(ToString::to_string).collect(),
            topology: None,
        };
        let container = ContainerResources {
            devices: vec![devices("nvidia.com/pgpu", &["2", "1", "1"]), devices("example.com/nic", &["3"])],
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
