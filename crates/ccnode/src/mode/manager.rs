//! Whether cc-manager manages this node.

use std::path::Path;

use agent_core::hostfile::HostDir;
use agent_core::state::{DEVICES_FILE, DevicesFile, STATE_DIR, state_dir};
use gpu_firmware::Mode;

use crate::agents::{self, Agent, CC_MANAGER};

/// The file that cc-manager makes after its first attempt, and that its pod removes when it ends in order.
pub(crate) const READINESS_FILE: &str = "run/nvidia/validations/.cc-manager-ctr-ready";

/// What tells that cc-manager manages this node.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Evidence {
    /// What was seen.
    pub(super) what: String,
    /// The node's name, as far as it can be told.
    node: String,
    /// Whether it is seen to run.
    is_running: bool,
}

impl Evidence {
    /// What to do instead.
    pub(super) fn advice(&self, target: Mode) -> String {
        let Self { what, node, is_running } = self;
        let stale = if *is_running { "" } else { ", or if cc-manager is gone for good" };
        format!(
            "cc-manager manages this node ({what}), and brings its devices to what the node's label says; use the label: \
             kubectl label node {node} nvidia.com/cc.mode={target} --overwrite (--standalone does it here and now all the \
             same{stale})"
        )
    }
}

/// Looks for cc-manager: its process, what it has written in this boot, and its readiness file, which does not outlive the
/// boot. Another PID namespace hides its process, not its files.
pub(super) fn evidence(root: &Path, boot_id: Option<&str>) -> Option<Evidence> {
    let node = || agents::host_name(root).unwrap_or_else(|| "NODE".to_owned());
    if let Some(agent) = agents::running(root, CC_MANAGER) {
        let node = agents::node_of(root, &agent).unwrap_or_else(node);
        let Agent { pid, name } = agent;
        return Some(Evidence { what: format!("process {pid} is {name}"), node, is_running: true });
    }
    let record = boot_id.is_some_and(|boot_id| {
        let dir = HostDir::open_existing(state_dir(root)).ok().flatten();
        dir.is_some_and(|dir| matches!(DevicesFile::load(&dir, boot_id), Ok(Some(_))))
    });
    let file = if record {
        format!("{STATE_DIR}/{DEVICES_FILE} was written in this boot")
    } else if root.join(READINESS_FILE).exists() {
        format!("/{READINESS_FILE} is there")
    } else {
        return None;
    };
    Some(Evidence { what: file, node: node(), is_running: false })
}

#[cfg(test)]
mod tests {
    use agent_core::state::Origin;
    use hw_probe::testing::FakeSysfs;

    use super::*;

    #[test]
    fn the_evidence_is_named_and_the_label_is_told() {
        let fake = FakeSysfs::new();
        fake.file("proc/sys/kernel/hostname", "Lab-Node\n");
        let look = || evidence(fake.path(), Some("boot"));
        assert_eq!(look(), None);
        let told = |part: &str| {
            let text = look().unwrap().advice(Mode::On);
            assert!(text.contains(part), "{text}");
            assert!(
                text.contains("kubectl label node ") && text.contains(" nvidia.com/cc.mode=on --overwrite"),
                "{text}"
            );
        };
        fake.file(READINESS_FILE, "");
        told("(/run/nvidia/validations/.cc-manager-ctr-ready is there)");
        told("label node lab-node ");
        told("gone for good");

        let dir = HostDir::open(state_dir(fake.path())).unwrap();
        let file = |boot: &str| DevicesFile { origin: Origin::now(boot, None), transition: None, devices: Vec::new() };
        file("another").store(&dir).unwrap();
        told(".cc-manager-ctr-ready is there");
        file("boot").store(&dir).unwrap();
        told("(/run/nvidia/ccnode/devices.json was written in this boot)");

        fake.process(70, "not-cc-manager", "", &[]);
        told("devices.json");
        fake.process(71, "k8s-cc-manager", "", &[]);
        told("(process 71 is k8s-cc-manager)");
        fake.file("proc/71/environ", "A=b\0NODE_NAME=gpu-7.example\0");
        told("label node gpu-7.example ");
        fake.file("proc/71/environ", "NODE_NAME=$(reboot)\0");
        told("label node lab-node ");
    }
}
