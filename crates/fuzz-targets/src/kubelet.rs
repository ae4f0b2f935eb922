//! What the kubelet, or whoever has found the socket, asks the device plugin.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use device_plugin::names::ResourceName;
use device_plugin::observe::{Places, observe};
use device_plugin::preferred::preferred;
use device_plugin::server::{Manner, PpciePolicy, Role, allocate};
use device_plugin::units::{BackendChoice, CcGate, Fault, IdScheme, Policy, Unit, units};
use hw_probe::testing::FakeSysfs;
use kubelet_api::device_plugin::{AllocateRequest, PreferredAllocationRequest};
use prost::Message;

/// The GPUs of an HGX node, of which one is dead.
fn hgx() -> &'static [Unit] {
    static UNITS: OnceLock<Vec<Unit>> = OnceLock::new();
    UNITS.get_or_init(|| {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        let policy = Policy {
            gpu: "pgpu".parse().expect("a good name"),
            nvswitch: "nvswitch".parse().expect("a good name"),
            scheme: IdScheme::Pci,
            backend: BackendChoice::Auto,
            gate: CcGate::Off,
        };
        let places = Places { root: fake.root(), state_dir: fake.path().join("run") };
        let mut units = units(&policy, &observe(&places).expect("the tree has functions"), &[]);
        let last = units.last_mut().expect("the tree has GPUs");
        last.fault = Some(Fault::Dead(last.bdf));
        units
    })
}

/// The first byte says how the plugin is set, the others are the message. Whatever they are: what is given is there,
/// healthy, given once, and with its nodes; what is preferred is available, has what it must have, and is as many as asked
/// for; what is refused has a reason that fits into an event.
pub fn kubelet(data: &[u8]) {
    let [manner, message @ ..] = data else { return };
    let units: Vec<Unit> = hgx().iter().map(|unit| Unit { ppcie: manner & 1 == 1, ..unit.clone() }).collect();
    let manner = Manner {
        role: if manner & 2 == 0 { Role::Kata } else { Role::Kubevirt },
        cdi_in_allocate: manner & 4 != 0,
        ppcie: [PpciePolicy::Enforce, PpciePolicy::Warn, PpciePolicy::Off][usize::from(manner >> 3) % 3],
        backend: BackendChoice::Auto,
    };
    if let Ok(request) = AllocateRequest::decode(message) {
        answers_allocate(&units, &request, manner);
    }
    if let Ok(request) = PreferredAllocationRequest::decode(message) {
        for container in &request.container_requests {
            let (available, must) = (&container.available_device_ids, &container.must_include_device_ids);
            match preferred(&units, available, must, container.allocation_size) {
                Err(error) => assert!(error.to_string().len() < 900, "{error}"),
                Ok(chosen) => {
                    assert_eq!(usize::try_from(container.allocation_size), Ok(chosen.len()), "as many as asked for");
                    assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), chosen.len(), "each once");
                    assert!(chosen.iter().all(|id| available.iter().any(|free| free == id)), "of what is available");
                    assert!(must.iter().all(|id| chosen.contains(&id.as_str())), "with what must be");
                    let mut turned = available.clone();
                    turned.reverse();
                    let again = preferred(&units, &turned, must, container.allocation_size);
                    assert_eq!(again.as_ref(), Ok(&chosen), "in whatever order it is asked");
                }
            }
        }
    }
}

fn answers_allocate(units: &[Unit], request: &AllocateRequest, manner: Manner) {
    let resource: ResourceName = "pgpu".parse().expect("a good name");
    let given = match allocate(&resource, units, request, manner) {
        Ok(given) => given,
        Err(refusal) => {
            let status = refusal.status();
            assert!(!status.message().is_empty() && status.message().len() < 900, "{}", status.message());
            return;
        }
    };
    let asked: Vec<&String> = request.container_requests.iter().flat_map(|request| &request.devices_ids).collect();
    assert_eq!(given.response.container_responses.len(), request.container_requests.len());
    assert!(!asked.is_empty() && asked.iter().collect::<BTreeSet<_>>().len() == asked.len(), "each once");
    for (request, response) in request.container_requests.iter().zip(&given.response.container_responses) {
        assert!(!response.devices.is_empty() && response.mounts.is_empty());
        assert_eq!(response.cdi_devices.is_empty(), manner.role == Role::Kubevirt || !manner.cdi_in_allocate);
        assert_eq!(response.envs.is_empty(), manner.role == Role::Kata);
        for id in &request.devices_ids {
            let unit = units.iter().find(|unit| unit.id == *id).expect("what is given is there");
            assert!(unit.is_healthy(), "what is given is healthy");
            for node in &unit.nodes {
                assert!(response.devices.iter().any(|device| device.host_path == *node), "{node} is given");
            }
        }
    }
    let is_part = units[0].ppcie && asked.len() < units.len();
    assert!(!(is_part && manner.ppcie == PpciePolicy::Enforce), "a part is not given");
    assert_eq!(given.partial.is_some(), is_part && manner.ppcie == PpciePolicy::Warn, "a part is told");
}
