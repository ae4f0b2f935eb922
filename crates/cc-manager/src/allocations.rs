//! Which pods the kubelet has given devices to, by its pod-resources service: a pod may be about to start a virtual machine
//! that does not hold its device yet.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use agent_core::resources::may_be_gpus;
use agent_core::state::{ErrorRecord, HolderRecord};
use agent_core::text::chain;
use hw_probe::{Bdf, PciFunction};
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use kubelet_api::pod_resources::{ContainerDevices, ListPodResourcesRequest, ListPodResourcesResponse};
use kubelet_api::socket::connect;

use crate::executor::DeviceFault;

/// Longest wait for connection and answer together.
const PATIENCE: Duration = Duration::from_secs(3);

/// A kubelet whose socket is younger, and that names no pod whatever, has not heard of its pods yet.
const BEGINNING: Duration = Duration::from_secs(10);

/// How often such a one is asked.
const AGAIN: Duration = Duration::from_millis(100);

/// The pod of each device, as `namespace/name`; none where the kubelet's socket is not there to be asked (it is not mounted under
/// the operator). Does not wait long: a kubelet that names no pod when it has just started is asked again for as long as for an
/// answer, and then it is an error.
pub(crate) async fn pods(socket: &Path, devices: &[PciFunction]) -> Result<BTreeMap<Bdf, String>, String> {
    if socket.as_os_str().is_empty() || !socket.exists() {
        return Ok(BTreeMap::new());
    }
    let mut has_just_started = false;
    let ask = async {
        let channel = connect(socket, PATIENCE).await.map_err(|error| chain(&error))?;
        let mut lister = PodResourcesListerClient::new(channel);
        loop {
            let answer = lister.list(ListPodResourcesRequest {}).await;
            let answer = answer.map_err(|status| format!("{:?}: {}", status.code(), status.message()))?.into_inner();
            has_just_started = answer.pod_resources.is_empty() && is_young(socket);
            if !has_just_started {
                return Ok(by_device(&answer, devices));
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    match tokio::time::timeout(PATIENCE, ask).await {
        Ok(answer) => answer,
        Err(_) if has_just_started => Err("The kubelet has just started and names no pod yet".to_owned()),
        Err(_) => Err(format!("No answer within {} s", PATIENCE.as_secs())),
    }
}

/// Whether a kubelet has made this socket a moment ago. A clock that was set back makes it young, and no more.
fn is_young(socket: &Path) -> bool {
    let made = std::fs::metadata(socket).and_then(|meta| meta.modified());
    made.is_ok_and(|made| SystemTime::now().duration_since(made).unwrap_or_default() < BEGINNING)
}

fn by_device(answer: &ListPodResourcesResponse, devices: &[PciFunction]) -> BTreeMap<Bdf, String> {
    let mut pods = BTreeMap::new();
    for pod in &answer.pod_resources {
        let given = pod.containers.iter().flat_map(|container| &container.devices);
        for given in given.filter(|given| may_be_gpus(&given.resource_name)) {
            for device in devices.iter().filter(|device| is_given(device, given)) {
                pods.entry(device.bdf).or_insert_with(|| format!("{}/{}", pod.namespace, pod.name));
            }
        }
    }
    pods
}

/// Plugins call a device by its address, or, as the reference's does, by the number of its VFIO device or its IOMMU group
/// (operator-contract section 7.4). Which number it is cannot be told: either counts.
fn is_given(device: &PciFunction, given: &ContainerDevices) -> bool {
    let group = device.iommu_group.map(|group| group.to_string());
    let cdev = device.vfio_cdev.as_ref().map(|cdev| cdev.name.trim_start_matches("vfio").to_owned());
    let address = device.bdf.to_string();
    given.device_ids.iter().any(|id| *id == address || Some(id) == group.as_ref() || Some(id) == cdev.as_ref())
}

/// Names the pods of devices that are known to be in use, and adds a fault for each device that a pod has without having begun
/// to use it.
pub(crate) fn name_pods(faults: &mut Vec<DeviceFault>, pods: &BTreeMap<Bdf, String>) {
    for fault in faults.iter_mut().filter(|fault| fault.busy) {
        let Some(pod) = pods.get(&fault.bdf) else { continue };
        if fault.holders.is_empty() {
            fault.holders.push(HolderRecord { bdf: fault.bdf, pid: None, comm: None, pod: None });
        }
        fault.holders.iter_mut().for_each(|holder| holder.pod = Some(pod.clone()));
        fault.error.message = format!("{}; the kubelet has given it to pod {pod}", fault.error.message);
    }
    for (bdf, pod) in pods {
        if !faults.iter().any(|fault| fault.bdf == *bdf) {
            faults.push(given(*bdf, pod));
        }
    }
}

fn given(bdf: Bdf, pod: &str) -> DeviceFault {
    let (namespace, name) = pod.split_once('/').unwrap_or(("", pod));
    let message = format!(
        "{bdf}: The kubelet has given it to pod {pod}; delete the pod (kubectl delete pod -n {namespace} {name}), or wait until \
         it has ended"
    );
    DeviceFault {
        bdf,
        busy: true,
        untouched: true,
        error: ErrorRecord { code: "InUse".to_owned(), message },
        holders: vec![HolderRecord { bdf, pid: None, comm: None, pod: Some(pod.to_owned()) }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::Inventory;
    use hw_probe::testing::FakeSysfs;
    use kubelet_api::pod_resources::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
    use kubelet_api::pod_resources::{
        AllocatableResourcesRequest, AllocatableResourcesResponse, ContainerResources, GetPodResourcesRequest,
        GetPodResourcesResponse, PodResources,
    };
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn pod(name: &str, resource: &str, ids: &[&str]) -> PodResources {
        let devices = vec![ContainerDevices {
            resource_name: resource.to_owned(),
            device_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            topology: None,
        }];
        let container = ContainerResources { name: "c".to_owned(), devices, ..ContainerResources::default() };
        PodResources {
            name: name.to_owned(),
            namespace: "ns".to_owned(),
            containers: vec![container],
            ..PodResources::default()
        }
    }

    #[test]
    fn devices_are_found_by_whatever_a_plugin_calls_them() {
        let sysfs = FakeSysfs::new();
        for (bdf, group) in [("0000:41:00.0", 17), ("0000:42:00.0", 18), ("0000:43:00.0", 19)] {
            sysfs.gpu(bdf, 0x2331).group(group);
        }
        let devices: Vec<PciFunction> = Inventory::scan(&sysfs.root()).gpus().cloned().collect();
        let pods = |pods: Vec<PodResources>| {
            let answer = ListPodResourcesResponse { pod_resources: pods };
            by_device(&answer, &devices).iter().map(|(bdf, pod)| format!("{bdf} {pod}")).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(
            pods(vec![pod("a", "nvidia.com/pgpu", &["0000:41:00.0"]), pod("b", "nvidia.com/GH100", &["18", "x", ""])]),
            "0000:41:00.0 ns/a, 0000:42:00.0 ns/b"
        );
        for others in ["example.com/nic", "nvidia.com/rdma_shared_device_a"] {
            assert_eq!(pods(vec![pod("a", others, &["0000:41:00.0", "18"])]), "", "{others}");
        }
        assert_eq!(pods(Vec::new()), "");
    }

    #[test]
    fn a_pod_is_named_with_the_holder_or_stands_for_it() {
        let [a, b]: [Bdf; 2] = ["0000:41:00.0", "0000:42:00.0"].map(|text| text.parse().unwrap());
        let busy = DeviceFault {
            bdf: a,
            busy: true,
            untouched: true,
            error: ErrorRecord { code: "InUse".to_owned(), message: "In use by pid 7 (qemu)".to_owned() },
            holders: vec![HolderRecord { bdf: a, pid: Some(7), comm: Some("qemu".to_owned()), pod: None }],
        };
        let mut faults = vec![busy];
        name_pods(&mut faults, &[(a, "ns/vm".to_owned()), (b, "ns/next".to_owned())].into());
        assert_eq!(faults.len(), 2);
        assert_eq!(
            (faults[0].holders[0].pid, faults[0].holders[0].pod.as_deref(), faults[1].holders[0].pod.as_deref()),
            (Some(7), Some("ns/vm"), Some("ns/next"))
        );
        assert!(faults[0].error.message.ends_with("pod ns/vm"), "{}", faults[0].error.message);
        assert!(faults[1].busy && faults[1].error.message.contains("kubectl delete pod -n ns next"));
    }

    #[tokio::test]
    async fn a_kubelet_that_is_not_there_says_nothing_and_a_silent_one_is_an_error() {
        let here = tempfile::tempdir().unwrap();
        let socket = here.path().join("kubelet.sock");
        assert_eq!(pods(&socket, &[]).await, Ok(BTreeMap::new()));
        assert_eq!(pods(Path::new(""), &[]).await, Ok(BTreeMap::new()));
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(pods(&socket, &[]).await.unwrap_err().contains("kubelet.sock"));
    }

    /// Names no pod until it has been asked so often.
    struct Starting(AtomicUsize);

    #[tonic::async_trait]
    impl PodResourcesLister for Starting {
        async fn list(
            &self,
            _: tonic::Request<ListPodResourcesRequest>,
        ) -> Result<tonic::Response<ListPodResourcesResponse>, tonic::Status> {
            let left = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            let pods = if left.is_ok() { Vec::new() } else { vec![pod("vm", "nvidia.com/pgpu", &["0000:41:00.0"])] };
            Ok(tonic::Response::new(ListPodResourcesResponse { pod_resources: pods }))
        }

        async fn get_allocatable_resources(
            &self,
            _: tonic::Request<AllocatableResourcesRequest>,
        ) -> Result<tonic::Response<AllocatableResourcesResponse>, tonic::Status> {
            Err(tonic::Status::unimplemented(""))
        }

        async fn get(
            &self,
            _: tonic::Request<GetPodResourcesRequest>,
        ) -> Result<tonic::Response<GetPodResourcesResponse>, tonic::Status> {
            Err(tonic::Status::unimplemented(""))
        }
    }

    #[tokio::test]
    async fn a_kubelet_that_has_just_started_is_asked_until_it_names_its_pods() {
        let sysfs = FakeSysfs::new();
        sysfs.gpu("0000:41:00.0", 0x2331).group(17);
        let devices: Vec<PciFunction> = Inventory::scan(&sysfs.root()).gpus().cloned().collect();
        let here = tempfile::tempdir().unwrap();
        // Empty answers, when the socket was made -> the pod, or what is told
        let cases = [
            (3, "now", Ok(Some("ns/vm"))),
            (usize::MAX, "now", Err("The kubelet has just started and names no pod yet")),
            // One that has been there for long has no pods.
            (usize::MAX, "1 hour ago", Ok(None)),
        ];
        for (number, (empty, age, wanted)) in cases.into_iter().enumerate() {
            let socket = here.path().join(number.to_string());
            let listener = kubelet_api::socket::listen(&socket).unwrap();
            let touched = std::process::Command::new("touch").args(["-d", age]).arg(&socket).status().unwrap();
            assert!(touched.success());
            let lister = PodResourcesListerServer::new(Starting(AtomicUsize::new(empty)));
            let router = tonic::transport::Server::builder().add_service(lister);
            tokio::spawn(kubelet_api::socket::serve(router, listener, std::future::pending()));
            let found = pods(&socket, &devices).await.map(|pods| pods.into_values().next());
            assert_eq!(found, wanted.map(|pod| pod.map(str::to_owned)).map_err(str::to_owned), "{empty} {age}");
        }
    }
}
