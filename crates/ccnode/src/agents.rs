//! The agents on this node, as far as processes tell: without asking any of them.

use std::fs;
use std::path::Path;

/// Names under which cc-manager runs, ours and the reference's.
pub(crate) const CC_MANAGER: &[&str] = &["cc-manager", "k8s-cc-manager"];

/// Names under which the device plugin runs, ours and the reference's, as far as the kernel keeps them.
pub(crate) const DEVICE_PLUGIN: &[&str] = &["device-plugin", "nvidia-sandbox-", "nvidia-kubevirt"];

/// Names of all agents that write what `ccnode cleanup` removes. The kernel keeps 15 bytes of a name.
pub(crate) const ALL: &[&str] =
    &["cc-manager", "k8s-cc-manager", "vfio-manager", "device-plugin", "nvidia-sandbox-", "nvidia-kubevirt"];

/// The PID namespace of the machine has a fixed number.
const INITIAL_NAMESPACE: &str = "pid:[4026531836]";

/// Most that is read of a process's environment.
const MOST_BYTES: usize = 1 << 20;

/// A process of an agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Agent {
    pub(crate) pid: u32,
    pub(crate) name: String,
}

/// The first process with one of these names.
pub(crate) fn running(root: &Path, names: &[&str]) -> Option<Agent> {
    let entries = fs::read_dir(root.join("proc")).ok()?;
    let found = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_owned();
        names.contains(&name.as_str()).then_some(Agent { pid, name })
    });
    found.min()
}

/// Whether a process that is not seen does not run: `proc` shows those of the whole machine.
pub(crate) fn sees_all(root: &Path) -> bool {
    let is_initial = |pid: &str| {
        let name = fs::read_link(root.join(format!("proc/{pid}/ns/pid")));
        name.is_ok_and(|name| name == Path::new(INITIAL_NAMESPACE))
    };
    // A `proc` that hides others' processes hides the first one, too.
    root.join("proc/1").is_dir() && (is_initial("1") || is_initial("self"))
}

/// The node that a process was told it is on. It says so in its environment.
pub(crate) fn node_of(root: &Path, agent: &Agent) -> Option<String> {
    let environment = fs::read(root.join(format!("proc/{}/environ", agent.pid))).ok()?;
    let mut words = environment.get(..environment.len().min(MOST_BYTES))?.split(|byte| *byte == 0);
    let name = words.find_map(|word| std::str::from_utf8(word).ok()?.strip_prefix("NODE_NAME="))?;
    is_name(name).then(|| name.to_owned())
}

/// The machine's host name, as a kubelet makes a node's name of it.
pub(crate) fn host_name(root: &Path) -> Option<String> {
    let name = fs::read_to_string(root.join("proc/sys/kernel/hostname")).ok()?;
    Some(name.trim().to_ascii_lowercase()).filter(|name| is_name(name))
}

/// Whether this can be a name of an object: what is not goes into no command line that people copy.
pub(crate) fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
    !name.is_empty() && name.len() <= 253 && !name.starts_with('-') && name.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;

    use super::*;

    #[test]
    fn the_node_is_named_by_the_agent_and_by_the_host() {
        let fake = FakeSysfs::new();
        let root = fake.path();
        assert_eq!((host_name(root), running(root, CC_MANAGER)), (None, None));
        fake.file("proc/sys/kernel/hostname", "Lab-Node\n");
        assert_eq!(host_name(root).as_deref(), Some("lab-node"));
        fake.process(70, "not-cc-manager", "", &[]);
        fake.process(72, "cc-manager", "", &[]);
        fake.process(71, "k8s-cc-manager", "", &[]);
        let agent = running(root, CC_MANAGER).unwrap();
        assert_eq!(agent, Agent { pid: 71, name: "k8s-cc-manager".to_owned() });
        assert_eq!(node_of(root, &agent), None);
        for (environment, name) in [
            ("A=b\0NODE_NAME=gpu-7.example\0", Some("gpu-7.example")),
            ("NODE_NAME=$(reboot)\0", None),
            ("NODE_NAME=--all\0", None),
        ] {
            fake.file("proc/71/environ", environment);
            assert_eq!(node_of(root, &agent).as_deref(), name, "{environment:?}");
        }
    }

    #[test]
    fn only_the_machines_own_namespace_shows_all_processes() {
        for (process, namespace, all) in
            [(1, "pid:[4026532999]", false), (1, INITIAL_NAMESPACE, true), (2, INITIAL_NAMESPACE, false)]
        {
            let fake = FakeSysfs::new();
            assert!(!sees_all(fake.path()));
            fake.process(process, "init", "", &[]);
            let folder = fake.path().join(format!("proc/{process}/ns"));
            fs::create_dir_all(&folder).unwrap();
            std::os::unix::fs::symlink(namespace, folder.join("pid")).unwrap();
            assert_eq!(sees_all(fake.path()), all, "{process} {namespace}");
        }
    }
}
