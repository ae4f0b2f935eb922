//! Who holds VFIO and NVIDIA device nodes, by what `/proc` shows.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::SysRoot;
use crate::sysfs::read_head;

/// Most processes looked at.
const MOST_PROCESSES: usize = 65_536;

/// Most descriptors looked at in all.
const MOST_DESCRIPTORS: usize = 1 << 20;

/// Most holders told.
const MOST_HOLDERS: usize = 4096;

/// Longest look: more processes than that are not looked at.
const PATIENCE: Duration = Duration::from_secs(3);

/// Every process that is seen to hold such a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holders {
    /// By node, then by process.
    pub list: Vec<Holder>,
    /// Why there may be more; none when every process of the machine was looked at.
    pub limit: Option<String>,
}

/// One process with one node open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holder {
    /// The node: `/dev/vfio/12`, `/dev/vfio/devices/vfio3`, `/dev/nvidia0`.
    pub node: String,
    /// Process id; none in a bundle, which names processes only.
    pub pid: Option<u32>,
    /// Its name, at most 15 bytes.
    pub comm: String,
    /// Path of its control group in the unified hierarchy, else of the first.
    pub cgroup: Option<String>,
    /// Pod that the control group belongs to.
    pub pod_uid: Option<String>,
}

/// Looks at the descriptors of every process that `/proc` shows, opening none of them. Bounded in number and to 3 seconds.
pub fn holders(root: &SysRoot) -> Holders {
    let mut search = Search { list: Vec::new(), denied: 0, descriptors: 0, cut: false };
    let deadline = Instant::now() + PATIENCE;
    let processes = match processes(root) {
        Ok(processes) => processes,
        Err(error) => return Holders { list: Vec::new(), limit: Some(format!("proc cannot be listed: {error}")) },
    };
    if processes.is_empty() {
        return Holders { list: Vec::new(), limit: Some("proc shows no process".into()) };
    }
    search.cut = processes.len() > MOST_PROCESSES;
    for pid in processes.into_iter().take(MOST_PROCESSES) {
        if Instant::now() > deadline || search.descriptors > MOST_DESCRIPTORS || search.list.len() >= MOST_HOLDERS {
            search.cut = true;
            break;
        }
        search.look_at(root, pid);
    }
    search.list.sort_unstable();
    search.list.dedup();
    let limit = if search.cut {
        Some("There are too many processes to look at all of them".into())
    } else if search.denied > 0 {
        Some(format!("{} processes may not be looked at, which needs root", search.denied))
    } else if fs::read_link(root.join("proc/self/ns/pid")).is_ok_and(|name| name != Path::new(INITIAL_NAMESPACE)) {
        Some("Only the processes of one PID namespace are seen; with hostPID all are".into())
    } else {
        None
    };
    Holders { list: search.list, limit }
}

/// The PID namespace of the machine has a fixed number.
const INITIAL_NAMESPACE: &str = "pid:[4026531836]";

fn processes(root: &SysRoot) -> io::Result<Vec<u32>> {
    let mut pids: Vec<u32> = Vec::new();
    for entry in fs::read_dir(root.join("proc"))? {
        let name = entry?.file_name();
        let number = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        pids.extend(number.and_then(|number| number.parse::<u32>().ok()));
        if pids.len() > MOST_PROCESSES {
            break;
        }
    }
    pids.sort_unstable();
    Ok(pids)
}

struct Search {
    list: Vec<Holder>,
    denied: usize,
    descriptors: usize,
    cut: bool,
}

impl Search {
    /// A process that ends meanwhile holds nothing.
    fn look_at(&mut self, root: &SysRoot, pid: u32) {
        let directory = root.join(format!("proc/{pid}"));
        let listing = match fs::read_dir(directory.join("fd")) {
            Ok(listing) => listing,
            Err(error) => {
                self.denied += usize::from(error.kind() == io::ErrorKind::PermissionDenied);
                return;
            }
        };
        let mut nodes: Vec<String> = Vec::new();
        for entry in listing.flatten() {
            self.descriptors += 1;
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            nodes.extend(target.to_str().filter(|target| concerns(target)).map(str::to_owned));
        }
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() {
            return;
        }
        let text = |name: &str| {
            let bytes = read_head(&directory.join(name), 4096).unwrap_or_default();
            String::from_utf8_lossy(&bytes).trim_end().to_owned()
        };
        let comm = text("comm");
        let cgroup = cgroup(&text("cgroup"));
        let pod_uid = cgroup.as_deref().and_then(pod_uid);
        for node in nodes {
            let (comm, cgroup, pod_uid) = (comm.clone(), cgroup.clone(), pod_uid.clone());
            self.list.push(Holder { node, pid: Some(pid), comm, cgroup, pod_uid });
        }
    }
}

fn concerns(target: &str) -> bool {
    // `/dev/vfio/vfio` is the container, which says nothing of a device; `/dev/iommu` neither.
    (target.starts_with("/dev/vfio/") && target != "/dev/vfio/vfio") || target.starts_with("/dev/nvidia")
}

/// Lines are `number:controllers:path`; the unified hierarchy has number 0 and no controllers.
fn cgroup(text: &str) -> Option<String> {
    let paths = || text.lines().filter_map(|line| line.splitn(3, ':').nth(2).map(|path| (line, path)));
    paths().find(|(line, _)| line.starts_with("0::")).or_else(|| paths().next()).map(|(_, path)| path.to_owned())
}

/// The pod's UID in a path of the kubelet's: `.../pod<UID>/...`, or under systemd `...-pod<UID with underscores>.slice/...`.
fn pod_uid(path: &str) -> Option<String> {
    path.split('/').find_map(|part| {
        let part = part.strip_suffix(".slice").unwrap_or(part);
        let uid = part.rfind("pod").map(|at| part[at + 3..].replace('_', "-"))?;
        let whole = uid.len() == 36 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        whole.then_some(uid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    const UID: &str = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";

    #[test]
    fn holders_are_told_with_name_and_pod() {
        let fake = FakeSysfs::new();
        fake.process(1, "systemd", "0::/init.scope\n", &["/dev/null"]);
        let slice = format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice/cri-containerd-aa.scope\n",
            UID.replace('-', "_")
        );
        fake.process(77, "qemu-system-x86", &slice, &["/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/12", "/dev/kvm"]);
        let plain = format!("12:cpu:/kubepods/burstable/pod{UID}/aa\n0::/\n");
        fake.process(9, "nvidia-persiste", "3:devices:/system.slice\n", &["/dev/nvidia0", "/dev/nvidiactl"]);
        fake.process(100, "cloud-hyperviso", &plain, &["/dev/vfio/devices/vfio3"]);
        let found = holders(&fake.root());
        assert_eq!(found.limit, None);
        let list: Vec<_> = found
            .list
            .iter()
            .map(|holder| (holder.node.as_str(), holder.pid, holder.comm.as_str(), holder.pod_uid.as_deref()))
            .collect();
        assert_eq!(
            list,
            [
                ("/dev/nvidia0", Some(9), "nvidia-persiste", None),
                ("/dev/nvidiactl", Some(9), "nvidia-persiste", None),
                ("/dev/vfio/12", Some(77), "qemu-system-x86", Some(UID)),
                ("/dev/vfio/devices/vfio3", Some(100), "cloud-hyperviso", None),
            ]
        );
        assert_eq!(found.list[0].cgroup.as_deref(), Some("/system.slice"));
        assert_eq!(pod_uid(&format!("/kubepods/burstable/pod{UID}/aa")).as_deref(), Some(UID));
    }

    #[test]
    fn what_cannot_be_seen_is_said() {
        let fake = FakeSysfs::new();
        assert_eq!(holders(&fake.root()).limit.as_deref(), Some("proc shows no process"));
        fake.process(7, "x", "\u{fffd}", &[]);
        fake.remove_file("proc/7/cgroup");
        assert_eq!(holders(&fake.root()), Holders { list: vec![], limit: None });
        std::fs::create_dir_all(fake.path().join("proc/self/ns")).unwrap();
        std::os::unix::fs::symlink("pid:[4026532000]", fake.path().join("proc/self/ns/pid")).unwrap();
        assert!(holders(&fake.root()).limit.unwrap().contains("PID namespace"));
    }

    #[test]
    fn paths_without_a_pod_have_none() {
        for path in ["", "/", "/podman/x", "/kubepods/pod", "/kubepods/pod1234", "/a-podé/b", "/kubepods-pod.slice"] {
            assert_eq!(pod_uid(path), None, "{path}");
        }
        assert_eq!(cgroup(""), None);
        assert_eq!(cgroup("nonsense\n1:x:/y"), Some("/y".into()));
    }
}
