//! `kubelet_internal_checkpoint`: what the device manager remembers over a restart.
//!
//! The layout is the real kubelet's (`Data` with `PodDeviceEntries` and `RegisteredDevices`, beside a `Checksum`). The
//! checksum's algorithm is ours: the real one hashes a dump of Go values.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kubelet_api::device_plugin as dp;
use prost::Message;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::devices::{Allocation, Manager, PodDevices};

/// Base name of the file in the plugin folder.
pub(crate) const FILE: &str = "kubelet_internal_checkpoint";

/// Why the checkpoint could not be read or written.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("Cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("Cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is not a checkpoint", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("Checksum of {} is {found}, should be {expected}", path.display())]
    Checksum { path: PathBuf, found: u64, expected: u64 },
    #[error("AllocResp in {} is not an allocate response", path.display())]
    Response { path: PathBuf },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: Data,
    checksum: u64,
    /// Not under the checksum, as in the real kubelet, and absent from older ones' files.
    #[serde(rename = "BootID", default, skip_serializing_if = "String::is_empty")]
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    // Go writes null for an empty list.
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Vec<String>>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "PodUID")]
    pod_uid: String,
    container_name: String,
    resource_name: String,
    #[serde(rename = "DeviceIDs")]
    device_ids: BTreeMap<i64, Vec<String>>,
    alloc_resp: String,
}

/// What a checkpoint holds.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) pods: PodDevices,
    pub(crate) resources: Vec<String>,
    pub(crate) boot_id: String,
}

/// Reads the checkpoint; `None` where there is none.
pub(crate) fn read(folder: &Path) -> Result<Option<Checkpoint>, Error> {
    let path = folder.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let file: File = match serde_json::from_slice(&text) {
        Ok(file) => file,
        Err(source) => return Err(Error::Parse { path, source }),
    };
    let expected = checksum(&file.data);
    if file.checksum != expected {
        return Err(Error::Checksum { path, found: file.checksum, expected });
    }
    let mut pods = PodDevices::new();
    for entry in file.data.pod_device_entries.unwrap_or_default() {
        let bytes = STANDARD.decode(&entry.alloc_resp).map_err(|_| Error::Response { path: path.clone() })?;
        let response = dp::ContainerAllocateResponse::decode(bytes.as_slice())
            .map_err(|_| Error::Response { path: path.clone() })?;
        pods.entry(entry.pod_uid)
            .or_default()
            .entry(entry.container_name)
            .or_default()
            .insert(entry.resource_name, Allocation { devices: entry.device_ids, response });
    }
    let resources = file.data.registered_devices.unwrap_or_default().into_keys().collect();
    Ok(Some(Checkpoint { pods, resources, boot_id: file.boot_id }))
}

/// Writes the manager's books: a temporary file beside the old one, then a rename over it.
pub(crate) fn write(folder: &Path, manager: &Manager) -> Result<(), Error> {
    let path = folder.join(FILE);
    let mut entries = Vec::new();
    for (pod_uid, containers) in &manager.pods {
        for (container_name, resources) in containers {
            for (resource_name, allocation) in resources {
                entries.push(Entry {
                    pod_uid: pod_uid.clone(),
                    container_name: container_name.clone(),
                    resource_name: resource_name.clone(),
                    device_ids: allocation.devices.clone(),
                    alloc_resp: STANDARD.encode(allocation.response.encode_to_vec()),
                });
            }
        }
    }
    let registered =
        manager.healthy.iter().map(|(resource, ids)| (resource.clone(), ids.iter().cloned().collect())).collect();
    let data =
        Data { pod_device_entries: (!entries.is_empty()).then_some(entries), registered_devices: Some(registered) };
    let file = File { checksum: checksum(&data), data, boot_id: boot_id() };
    let failed = |source: io::Error| Error::Write { path: path.clone(), source };
    let text = serde_json::to_vec(&file).map_err(|error| failed(error.into()))?;
    let temporary = folder.join(format!(".{FILE}"));
    let mut out = fs::File::create(&temporary).map_err(failed)?;
    out.write_all(&text).map_err(failed)?;
    fs::rename(&temporary, &path).map_err(failed)
}

/// Identity of this boot; empty where the kernel does not tell.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// FNV-1a, 32 bits, over the JSON of the data.
fn checksum(data: &Data) -> u64 {
    let text = serde_json::to_vec(data).unwrap_or_default();
    u64::from(text.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::kubelet::devices::Ask;

    fn filled() -> Manager {
        let mut manager = Manager::restore(PodDevices::new(), ["a/b".to_owned()], 0, Instant::now());
        let device = dp::Device { id: "7".into(), health: "Healthy".into(), topology: None };
        manager.listed("a/b", &[device]);
        let response = dp::ContainerAllocateResponse {
            devices: vec![dp::DeviceSpec {
                container_path: "/dev/vfio/7".into(),
                host_path: "/dev/vfio/7".into(),
                permissions: "mrw".into(),
            }],
            ..Default::default()
        };
        let ask = Ask { pod: "uid", container: "c", resource: "a/b", count: 1 };
        manager.book(ask, &["7".to_owned()].into(), response);
        manager
    }

    #[test]
    fn what_is_written_comes_back_and_has_the_real_layout() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
        let manager = filled();
        write(folder.path(), &manager).unwrap();
        let back = read(folder.path()).unwrap().unwrap();
        assert_eq!(back, Checkpoint { pods: manager.pods, resources: vec!["a/b".into()], boot_id: boot_id() });
        let text = fs::read_to_string(folder.path().join(FILE)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let entry = &json["Data"]["PodDeviceEntries"][0];
        assert_eq!(entry["PodUID"], "uid");
        assert_eq!(entry["ContainerName"], "c");
        assert_eq!(entry["ResourceName"], "a/b");
        assert_eq!(entry["DeviceIDs"], serde_json::json!({"-1": ["7"]}));
        assert!(entry["AllocResp"].is_string());
        assert_eq!(json["Data"]["RegisteredDevices"], serde_json::json!({"a/b": ["7"]}));
        assert!(json["Checksum"].is_u64());
    }

    #[test]
    fn a_damaged_checkpoint_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &filled()).unwrap();
        let path = folder.path().join(FILE);
        let good = fs::read_to_string(&path).unwrap();
        fs::write(&path, good.replace("\"uid\"", "\"other\"")).unwrap();
        assert!(matches!(read(folder.path()), Err(Error::Checksum { .. })));
        fs::write(&path, "{").unwrap();
        assert!(matches!(read(folder.path()), Err(Error::Parse { .. })));
    }
}
