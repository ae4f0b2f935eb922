//! Types of the kubelet's device plugin v1beta1 and pod resources v1 interfaces, generated from proto/,
//! the constants that belong to them, and what it takes to speak gRPC over a Unix socket.

#![forbid(unsafe_code)]

pub mod socket;

/// Device plugin v1beta1: what a plugin serves, and the kubelet's registration service.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    reason = "generated from proto/deviceplugin_v1beta1.proto, where the comments are"
)]
pub mod device_plugin {
    tonic::include_proto!("v1beta1");
}

/// Pod resources v1: which devices the kubelet gave to which container.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    reason = "generated from proto/podresources_v1.proto, where the comments are"
)]
pub mod pod_resources {
    tonic::include_proto!("v1");
}

/// The only version of the device plugin interface that the kubelet accepts in a registration.
pub const VERSION: &str = "v1beta1";

/// Folder in which plugins and the kubelet meet. The kubelet does not move it with its root folder.
pub const PLUGIN_DIR: &str = "/var/lib/kubelet/device-plugins/";

/// Base name of the kubelet's registration socket in [`PLUGIN_DIR`].
pub const KUBELET_SOCKET: &str = "kubelet.sock";

/// Socket of the kubelet's pod resources service.
pub const POD_RESOURCES_SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";

/// Health of a device that may be allocated.
pub const HEALTHY: &str = "Healthy";

/// Health of a device that may not.
pub const UNHEALTHY: &str = "Unhealthy";

#[cfg(test)]
mod tests {
    use prost::Message;

    use crate::{device_plugin as dp, pod_resources as pr};

    fn text(field: u8, value: &str) -> Vec<u8> {
        bytes(field, value.as_bytes())
    }

    /// A length-delimited field; the tests keep every length under 128.
    fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
        let mut out = vec![field << 3 | 2, u8::try_from(value.len()).unwrap()];
        out.extend_from_slice(value);
        out
    }

    fn number(field: u8, value: u8) -> Vec<u8> {
        vec![field << 3, value]
    }

    #[test]
    fn device_plugin_field_numbers_are_those_of_kubernetes() {
        let register = dp::RegisterRequest {
            version: "v1beta1".into(),
            endpoint: "e.sock".into(),
            resource_name: "a/b".into(),
            options: Some(dp::DevicePluginOptions {
                pre_start_required: true,
                get_preferred_allocation_available: true,
            }),
        };
        let expected =
            [text(1, "v1beta1"), text(2, "e.sock"), text(3, "a/b"), bytes(4, &[number(1, 1), number(2, 1)].concat())]
                .concat();
        assert_eq!(register.encode_to_vec(), expected);

        let list = dp::ListAndWatchResponse {
            devices: vec![dp::Device {
                id: "0".into(),
                health: crate::HEALTHY.into(),
                topology: Some(dp::TopologyInfo { nodes: vec![dp::NumaNode { id: 1 }] }),
            }],
        };
        let device = [text(1, "0"), text(2, "Healthy"), bytes(3, &bytes(1, &number(1, 1)))].concat();
        assert_eq!(list.encode_to_vec(), bytes(1, &device));

        let preferred = dp::PreferredAllocationRequest {
            container_requests: vec![dp::ContainerPreferredAllocationRequest {
                available_device_ids: vec!["a".into(), "b".into()],
                must_include_device_ids: vec!["c".into()],
                allocation_size: 2,
            }],
        };
        let request = [text(1, "a"), text(1, "b"), text(2, "c"), number(3, 2)].concat();
        assert_eq!(preferred.encode_to_vec(), bytes(1, &request));

        let answer = dp::PreferredAllocationResponse {
            container_responses: vec![dp::ContainerPreferredAllocationResponse { device_ids: vec!["a".into()] }],
        };
        assert_eq!(answer.encode_to_vec(), bytes(1, &text(1, "a")));

        let allocate = dp::AllocateRequest {
            container_requests: vec![dp::ContainerAllocateRequest { devices_ids: vec!["7".into()] }],
        };
        assert_eq!(allocate.encode_to_vec(), bytes(1, &text(1, "7")));

        let response = dp::AllocateResponse {
            container_responses: vec![dp::ContainerAllocateResponse {
                envs: [("K".to_owned(), "V".to_owned())].into(),
                mounts: vec![dp::Mount { container_path: "/c".into(), host_path: "/h".into(), read_only: true }],
                devices: vec![dp::DeviceSpec {
                    container_path: "/d".into(),
                    host_path: "/e".into(),
                    permissions: "mrw".into(),
                }],
                annotations: [("A".to_owned(), "B".to_owned())].into(),
                cdi_devices: vec![dp::CdiDevice { name: "v/c=0".into() }],
            }],
        };
        let container = [
            bytes(1, &[text(1, "K"), text(2, "V")].concat()),
            bytes(2, &[text(1, "/c"), text(2, "/h"), number(3, 1)].concat()),
            bytes(3, &[text(1, "/d"), text(2, "/e"), text(3, "mrw")].concat()),
            bytes(4, &[text(1, "A"), text(2, "B")].concat()),
            bytes(5, &text(1, "v/c=0")),
        ]
        .concat();
        assert_eq!(response.encode_to_vec(), bytes(1, &container));

        let start = dp::PreStartContainerRequest { devices_ids: vec!["7".into()] };
        assert_eq!(start.encode_to_vec(), text(1, "7"));
    }

    #[test]
    fn pod_resources_field_numbers_are_those_of_kubernetes() {
        let request = pr::GetPodResourcesRequest { pod_name: "p".into(), pod_namespace: "n".into() };
        assert_eq!(request.encode_to_vec(), [text(1, "p"), text(2, "n")].concat());

        let topology = || Some(pr::TopologyInfo { nodes: vec![pr::NumaNode { id: 1 }] });
        let pod = pr::PodResources {
            name: "p".into(),
            namespace: "n".into(),
            containers: vec![pr::ContainerResources {
                name: "c".into(),
                devices: vec![pr::ContainerDevices {
                    resource_name: "a/b".into(),
                    device_ids: vec!["0".into()],
                    topology: topology(),
                }],
                cpu_ids: vec![3],
                memory: vec![pr::ContainerMemory { memory_type: "memory".into(), size: 9, topology: topology() }],
                dynamic_resources: vec![pr::DynamicResource {
                    claim_name: "q".into(),
                    claim_namespace: "n".into(),
                    claim_resources: vec![pr::ClaimResource {
                        cdi_devices: vec![pr::CdiDevice { name: "v/c=0".into() }],
                        driver_name: "d".into(),
                        pool_name: "o".into(),
                        device_name: "e".into(),
                        share_id: Some("s".into()),
                    }],
                }],
            }],
            cpu_ids: vec![4],
            memory: vec![],
        };
        let place = bytes(3, &bytes(1, &number(1, 1)));
        let devices = [text(1, "a/b"), text(2, "0"), place.clone()].concat();
        let memory = [text(1, "memory"), number(2, 9), place].concat();
        let claim = [bytes(1, &text(1, "v/c=0")), text(2, "d"), text(3, "o"), text(4, "e"), text(5, "s")].concat();
        let dynamic = [text(2, "q"), text(3, "n"), bytes(4, &claim)].concat();
        let container =
            [text(1, "c"), bytes(2, &devices), bytes(3, &[3]), bytes(4, &memory), bytes(5, &dynamic)].concat();
        let expected = [text(1, "p"), text(2, "n"), bytes(3, &container), bytes(4, &[4])].concat();
        assert_eq!(pod.encode_to_vec(), expected);

        let got = pr::GetPodResourcesResponse {
            pod_resources: Some(pr::PodResources { name: "p".into(), ..Default::default() }),
        };
        assert_eq!(got.encode_to_vec(), bytes(1, &text(1, "p")));

        let listed = pr::ListPodResourcesResponse {
            pod_resources: vec![pr::PodResources { name: "p".into(), ..Default::default() }],
        };
        assert_eq!(listed.encode_to_vec(), bytes(1, &text(1, "p")));

        let allocatable = pr::AllocatableResourcesResponse {
            devices: vec![pr::ContainerDevices { resource_name: "a/b".into(), ..Default::default() }],
            cpu_ids: vec![1],
            memory: vec![],
        };
        assert_eq!(allocatable.encode_to_vec(), [bytes(1, &text(1, "a/b")), bytes(2, &[1])].concat());
    }

    #[test]
    fn service_names_are_those_of_kubernetes() {
        use tonic::server::NamedService;
        struct Nobody;
        type Registration = dp::registration_server::RegistrationServer<Nobody>;
        type Plugin = dp::device_plugin_server::DevicePluginServer<Nobody>;
        type Lister = pr::pod_resources_lister_server::PodResourcesListerServer<Nobody>;
        assert_eq!(Registration::NAME, "v1beta1.Registration");
        assert_eq!(Plugin::NAME, "v1beta1.DevicePlugin");
        assert_eq!(Lister::NAME, "v1.PodResourcesLister");
    }
}
