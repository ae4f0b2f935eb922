//! What Kata's shim does when it creates a pod's sandbox: pod resources, then CDI, then VFIO nodes, then BDFs.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kubelet_api::pod_resources as pr;
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use serde::Serialize;
use thiserror::Error;

use super::cdi;

/// How long the pod-resources call may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a pod's devices could not be resolved.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum Error {
    #[error("{0:?} is not NAMESPACE/NAME")]
    Name(String),
    #[error("Pod resources are out of reach")]
    Connect(#[from] kubelet_api::socket::Error),
    #[error("GetPodResources failed for pod({name}) in namespace({namespace}): {text}")]
    Get { namespace: String, name: String, text: String },
    #[error("Pod {namespace}/{name} has no devices")]
    NoDevices { namespace: String, name: String },
    #[error("CDI specs are unusable")]
    Cdi(#[from] cdi::Error),
    #[error("CDI device {0} is unresolvable: no spec defines it")]
    Unresolvable(String),
    #[error("CDI device {device} has no VFIO device node")]
    NoNode { device: String },
    #[error("CDI device {device}: {} does not exist", path.display())]
    NodeMissing { device: String, path: PathBuf },
    #[error("CDI device {device}: {} is not a character device", path.display())]
    NotADevice { device: String, path: PathBuf },
    #[error("CDI device {device}: no PCI function is behind {node}")]
    NoFunction { device: String, node: String },
    #[error("CDI device {device}: {node} is not a VFIO path")]
    NotVfio { device: String, node: String },
    #[error("Cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// A pod's devices, down to PCI.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Resolved {
    /// NAMESPACE/NAME.
    pub pod: String,
    /// In the order of the pod-resources answer.
    pub devices: Vec<ResolvedDevice>,
}

/// One device of a pod.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct ResolvedDevice {
    /// The container that has it.
    pub container: String,
    /// Resource name.
    pub resource: String,
    /// Device id.
    pub id: String,
    /// Fully qualified CDI device name.
    pub cdi: String,
    /// The spec that defines it.
    pub spec: PathBuf,
    /// VFIO nodes that would be cold-plugged.
    pub nodes: Vec<String>,
    /// PCI functions behind them.
    pub bdfs: Vec<String>,
}

/// Asks the kubelet's pod-resources socket for `pod` (NAMESPACE/NAME) and resolves all its devices below `root`.
pub async fn resolve(socket: &Path, root: &Path, pod: &str) -> Result<Resolved, Error> {
    let (namespace, name) = pod.split_once('/').ok_or_else(|| Error::Name(pod.to_owned()))?;
    let channel = kubelet_api::socket::connect(socket, DEADLINE).await?;
    let failed = |text: String| Error::Get { namespace: namespace.to_owned(), name: name.to_owned(), text };
    let mut client = PodResourcesListerClient::new(channel);
    let request = pr::GetPodResourcesRequest { pod_name: name.to_owned(), pod_namespace: namespace.to_owned() };
    let answer = match tokio::time::timeout(DEADLINE, client.get(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(failed(super::go_error(&status))),
        Err(_) => return Err(failed(format!("no answer within {DEADLINE:?}"))),
    };
    let mut wanted = Vec::new();
    for container in answer.pod_resources.into_iter().flat_map(|pod| pod.containers) {
        for devices in container.devices {
            for id in devices.device_ids {
                wanted.push((container.name.clone(), devices.resource_name.clone(), id));
            }
        }
    }
    if wanted.is_empty() {
        return Err(Error::NoDevices { namespace: namespace.to_owned(), name: name.to_owned() });
    }
    let devices = down_to_pci(root, wanted)?;
    Ok(Resolved { pod: pod.to_owned(), devices })
}

fn down_to_pci(root: &Path, wanted: Vec<(String, String, String)>) -> Result<Vec<ResolvedDevice>, Error> {
    let specs = cdi::load(root)?;
    let mut resolved: Vec<ResolvedDevice> = Vec::new();
    for (container, resource, id) in wanted {
        let cdi = format!("{resource}={id}");
        // A device on several NUMA nodes is listed once for each.
        if resolved.iter().any(|device| device.cdi == cdi && device.container == container) {
            continue;
        }
        let device = specs.get(&cdi).ok_or_else(|| Error::Unresolvable(cdi.clone()))?;
        let (mut nodes, mut bdfs) = (Vec::new(), Vec::new());
        for node in &device.nodes {
            exists(root, &cdi, node)?;
            // The container device that all legacy groups share stands for no function.
            if node == "/dev/vfio/vfio" {
                continue;
            }
            bdfs.extend(functions(root, &cdi, node)?);
            nodes.push(node.clone());
        }
        if nodes.is_empty() {
            return Err(Error::NoNode { device: cdi });
        }
        resolved.push(ResolvedDevice { container, resource, id, cdi, spec: device.spec.clone(), nodes, bdfs });
    }
    Ok(resolved)
}

pub(crate) fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// The node must be there; on a live root it must be a character device as well.
fn exists(root: &Path, device: &str, node: &str) -> Result<(), Error> {
    let path = below(root, node);
    match fs::metadata(&path) {
        Ok(found) if root == Path::new("/") && !found.file_type().is_char_device() => {
            Err(Error::NotADevice { device: device.to_owned(), path })
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::NodeMissing { device: device.to_owned(), path })
        }
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// PCI functions behind a VFIO node: the one of a cdev, all of a group.
fn functions(root: &Path, device: &str, node: &str) -> Result<Vec<String>, Error> {
    let nothing = || Error::NoFunction { device: device.to_owned(), node: node.to_owned() };
    if let Some(name) = node.strip_prefix("/dev/vfio/devices/") {
        if let Ok(target) = fs::canonicalize(below(root, "sys/class/vfio-dev").join(name).join("device")) {
            let bdf = target.file_name().and_then(|name| name.to_str()).ok_or_else(nothing)?;
            return Ok(vec![bdf.to_owned()]);
        }
        let devices = below(root, "sys/bus/pci/devices");
        let found: Vec<String> =
            names(&devices)?.into_iter().filter(|bdf| devices.join(bdf).join("vfio-dev").join(name).exists()).collect();
        return if found.is_empty() { Err(nothing()) } else { Ok(found) };
    }
    if let Some(group) = node.strip_prefix("/dev/vfio/") {
        let found = names(&below(root, "sys/kernel/iommu_groups").join(group).join("devices"))?;
        return if found.is_empty() { Err(nothing()) } else { Ok(found) };
    }
    Err(Error::NotVfio { device: device.to_owned(), node: node.to_owned() })
}

/// Names in a folder, sorted; none where the folder is missing.
fn names(folder: &Path) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Read { path: folder.into(), source };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(nodes: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let list: Vec<String> = nodes.iter().map(|node| format!("            - path: {node}\n")).collect();
        let list = list.concat();
        fs::create_dir_all(at("var/run/cdi")).unwrap();
        let spec = format!(
            "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n{list}"
        );
        fs::write(at("var/run/cdi/nvidia.com-pgpu.yaml"), spec).unwrap();
        fs::create_dir_all(at("dev/vfio/devices")).unwrap();
        for node in ["dev/vfio/vfio", "dev/vfio/12", "dev/vfio/99", "dev/vfio/devices/vfio3", "dev/vfio/devices/vfio4"]
        {
            fs::write(at(node), "").unwrap();
        }
        fs::create_dir_all(at("sys/devices/pci0000:00/0000:41:00.0/vfio-dev/vfio3")).unwrap();
        fs::create_dir_all(at("sys/class/vfio-dev/vfio3")).unwrap();
        std::os::unix::fs::symlink(at("sys/devices/pci0000:00/0000:41:00.0"), at("sys/class/vfio-dev/vfio3/device"))
            .unwrap();
        fs::create_dir_all(at("sys/bus/pci/devices/0000:42:00.0/vfio-dev/vfio4")).unwrap();
        fs::create_dir_all(at("sys/kernel/iommu_groups/12/devices/0000:41:00.0")).unwrap();
        fs::create_dir_all(at("sys/kernel/iommu_groups/12/devices/0000:41:00.1")).unwrap();
        root
    }

    fn try_out(nodes: &[&str], id: &str) -> Result<ResolvedDevice, Error> {
        let root = root(nodes);
        let wanted = vec![("c".to_owned(), "nvidia.com/pgpu".to_owned(), id.to_owned())];
        down_to_pci(root.path(), wanted).map(|mut devices| devices.remove(0))
    }

    #[test]
    fn cdevs_and_groups_lead_to_their_functions() {
        assert_eq!(try_out(&["/dev/vfio/devices/vfio3"], "0").unwrap().bdfs, ["0000:41:00.0"]);
        assert_eq!(try_out(&["/dev/vfio/devices/vfio4"], "0").unwrap().bdfs, ["0000:42:00.0"]);
        let group = try_out(&["/dev/vfio/vfio", "/dev/vfio/12"], "0").unwrap();
        assert_eq!(
            (group.nodes, group.bdfs),
            (vec!["/dev/vfio/12".into()], vec!["0000:41:00.0".into(), "0000:41:00.1".into()])
        );
    }

    #[test]
    fn every_dead_end_has_its_reason() {
        let cases: [(&[&str], &str, &str); 6] = [
            (&["/dev/vfio/devices/vfio3"], "1", "nvidia.com/pgpu=1 is unresolvable"),
            (&["/dev/vfio/devices/vfio9"], "0", "vfio9 does not exist"),
            (&["/dev/vfio/99"], "0", "no PCI function is behind /dev/vfio/99"),
            (&["/dev/vfio/vfio"], "0", "has no VFIO device node"),
            (&["/dev/vfio/devices/vfio3", "/sys/kernel"], "0", "/sys/kernel is not a VFIO path"),
            (&["/dev/vfio/devices/vfio3", "/dev/null"], "0", "does not exist"),
        ];
        for (nodes, id, expected) in cases {
            let error = try_out(nodes, id).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_plain_file_is_no_device_on_a_live_root() {
        let error = exists(Path::new("/"), "a/b=0", "/proc/version").unwrap_err();
        assert!(error.to_string().ends_with("/proc/version is not a character device"));
        exists(Path::new("/"), "a/b=0", "/dev/null").unwrap();
    }
}
