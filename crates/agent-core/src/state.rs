//! Schemas of the host files that agents exchange.
//!
//! Every file names the machine and the boot it was written in; a reader discards what belongs to another. Fields that a
//! reader does not know are ignored, and one schema version older or newer is accepted, so that agents of neighbouring
//! releases understand each other.

use std::path::{Path, PathBuf};

use hw_probe::{Bdf, PciFunction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hostfile::{HostDir, HostFileError};

/// Version of the schemas in this module.
pub const SCHEMA: u32 = 1;

/// Where the exchanged files are on the host.
pub const STATE_DIR: &str = "/run/nvidia/ccnode";
/// Name of [`DevicesFile`] in [`STATE_DIR`].
pub const DEVICES_FILE: &str = "devices.json";
/// Name of [`BindingsFile`] in [`STATE_DIR`].
pub const BINDINGS_FILE: &str = "bindings.json";
/// Name of [`UnitsFile`], in [`UNITS_DIR`] in the kubelet's device plugin folder.
pub const UNITS_FILE: &str = "units.json";
/// The folder of [`UNITS_FILE`] in the kubelet's device plugin folder: the one place that the device plugin may write in every
/// setting and that the host sees. The kubelet, which removes sockets there when it starts, leaves folders alone.
pub const UNITS_DIR: &str = "ccnode";
/// Largest exchanged file that is read, in bytes: a thousand times what a node with 16 devices needs.
const MAX_BYTES: u64 = 4 << 20;

/// [`STATE_DIR`] as it is seen below the host's root file system (`/` outside containers).
pub fn state_dir(host_root: &Path) -> PathBuf {
    host_root.join(STATE_DIR.trim_start_matches('/'))
}

/// Why an exchanged file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] HostFileError),
    /// Its content.
    #[error("{path} does not hold what it should")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Reads one exchanged file; none when it is absent, of another boot, or of a schema too far from ours.
fn load<T: DeserializeOwned>(dir: &HostDir, name: &str, boot_id: &str) -> Result<Option<T>, StateError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        schema: u32,
        #[serde(default)]
        boot_id: Option<String>,
    }
    let Some(bytes) = dir.read(name, MAX_BYTES)? else { return Ok(None) };
    let content = |source| StateError::Content { path: dir.path().join(name), source };
    // The head first: what belongs elsewhere is discarded whatever the rest looks like.
    let head: Head = serde_json::from_slice(&bytes).map_err(content)?;
    let path = dir.path().join(name);
    if head.schema.abs_diff(SCHEMA) > 1 {
        tracing::warn!(path = %path.display(), schema = head.schema, known = SCHEMA, "File of an unknown schema discarded");
        return Ok(None);
    }
    if boot_id.is_empty() || head.boot_id.as_deref() != Some(boot_id) {
        tracing::debug!(path = %path.display(), "File of another boot discarded");
        return Ok(None);
    }
    serde_json::from_slice(&bytes).map(Some).map_err(content)
}

fn store<T: Serialize>(value: &T, dir: &HostDir, name: &str) -> Result<(), StateError> {
    Ok(dir.write_atomic(name, &text(value, dir, name)?, 0o644)?)
}

fn text<T: Serialize>(value: &T, dir: &HostDir, name: &str) -> Result<Vec<u8>, StateError> {
    let mut bytes =
        serde_json::to_vec(value).map_err(|source| StateError::Content { path: dir.path().join(name), source })?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl DevicesFile {
    /// Reads `devices.json`; none when it is absent, of another boot, or of a schema too far from ours.
    pub fn load(dir: &HostDir, boot_id: &str) -> Result<Option<Self>, StateError> {
        load(dir, DEVICES_FILE, boot_id)
    }

    /// Replaces `devices.json`.
    pub fn store(&self, dir: &HostDir) -> Result<(), StateError> {
        store(self, dir, DEVICES_FILE)
    }

    /// The record of the device at `function`'s address, if it is the same device.
    pub fn record(&self, function: &PciFunction) -> Option<&DeviceRecord> {
        let identity = Identity::of(function);
        self.devices.iter().find(|record| record.bdf == function.bdf && record.identity == identity)
    }
}

impl BindingsFile {
    /// Reads `bindings.json`; none when it is absent, of another boot, or of a schema too far from ours.
    pub fn load(dir: &HostDir, boot_id: &str) -> Result<Option<Self>, StateError> {
        load(dir, BINDINGS_FILE, boot_id)
    }

    /// Replaces `bindings.json`.
    pub fn store(&self, dir: &HostDir) -> Result<(), StateError> {
        store(self, dir, BINDINGS_FILE)
    }
}

impl UnitsFile {
    /// Reads `units.json`; none when it is absent, of another boot, or of a schema too far from ours.
    pub fn load(dir: &HostDir, boot_id: &str) -> Result<Option<Self>, StateError> {
        load(dir, UNITS_FILE, boot_id)
    }

    /// Replaces `units.json`, which is of no use after this boot.
    pub fn store(&self, dir: &HostDir) -> Result<(), StateError> {
        Ok(dir.write_for_this_boot(UNITS_FILE, &text(self, dir, UNITS_FILE)?, 0o644)?)
    }

    /// Whether both say the same, whenever they were written.
    pub fn says_as(&self, other: &Self) -> bool {
        let origin = Origin { written_at: self.origin.written_at, ..other.origin.clone() };
        *self == Self { origin, ..other.clone() }
    }
}

impl Origin {
    /// An origin of this schema, written now.
    pub fn now(boot_id: impl Into<String>, node_uid: Option<String>) -> Self {
        Self { schema: SCHEMA, node_uid, boot_id: boot_id.into(), written_at: jiff::Timestamp::now() }
    }
}

impl Identity {
    /// The identity of a function as the scan saw it.
    pub fn of(function: &PciFunction) -> Self {
        Self {
            instance: function.instance,
            ids: format!("{:04x}:{:04x}", function.vendor, function.device),
            subsystem: function
                .subsystem_vendor
                .zip(function.subsystem_device)
                .map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")),
        }
    }
}

/// `devices.json`: what cc-manager last verified of each device, and what is in transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DevicesFile {
    /// Who wrote it, and when.
    #[serde(flatten)]
    pub origin: Origin,
    /// The transition under way, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transition: Option<Transition>,
    /// One record a device, by address.
    pub devices: Vec<DeviceRecord>,
}

/// What every exchanged file says of its origin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    /// Schema version.
    pub schema: u32,
    /// UID of the node object, where the writer knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,
    /// The kernel's boot id.
    pub boot_id: String,
    /// When it was written (RFC 3339, UTC).
    pub written_at: jiff::Timestamp,
}

/// A mode change that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    /// The mode that is wanted: `on`, `off`, `devtools`, `ppcie`.
    pub target: String,
    /// How far it has come, for people.
    pub step: String,
    /// When it began.
    pub started_at: jiff::Timestamp,
}

/// What cc-manager knows of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceRecord {
    /// PCI address.
    pub bdf: Bdf,
    /// What the device was when it was verified; another identity at the same address is another device.
    pub identity: Identity,
    /// Mode that the knobs ask for (takes effect at a reset).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configured_mode: Option<String>,
    /// Mode that the device booted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_mode: Option<String>,
    /// When both were last read from the device under ownership.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified_at: Option<jiff::Timestamp>,
    /// Whether the device may be offered: verified in the wanted mode, and in no transition.
    pub usable: bool,
    /// The last error, while it lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorRecord>,
}

/// What can be read of a device without its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// The kernel's number for it in this boot ([`PciFunction::instance`]): a device that was taken out and put back is
    /// another one, even of the same model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
    /// Vendor and device id, `10de:2330`.
    pub ids: String,
    /// Subsystem ids, `10de:16c1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
}

/// An error with its stable code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorRecord {
    /// The code, the same in log, Event, metric and documentation.
    pub code: String,
    /// Device, cause and cure in one line.
    pub message: String,
}

/// The annotation `ccnode.dev/cc-status`: what cc-manager says of its node to people and tools. It changes only when the
/// truth does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CcStatus {
    /// Schema version.
    pub schema: u32,
    /// UID of the node object that it was written for.
    #[serde(default)]
    pub node_uid: String,
    /// The kernel's boot id.
    #[serde(default)]
    pub boot_id: String,
    /// The mode that is asked for, or whatever else the label says.
    #[serde(default)]
    pub wanted: String,
    /// `applied`, `failed`, `not-begun` or `observed`.
    #[serde(default)]
    pub result: String,
    /// Since when `wanted` and `result` are what they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<jiff::Timestamp>,
    /// Why it is not applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorRecord>,
    /// Who has the devices that are in the way of a change, as far as that can be told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<HolderRecord>,
    /// Every GPU and NVSwitch, by address.
    #[serde(default)]
    pub devices: Vec<DeviceStatus>,
}

/// Who has a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HolderRecord {
    /// The device.
    pub bdf: Bdf,
    /// The process, where it can be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its short name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comm: Option<String>,
    /// The pod that the kubelet gave the device to, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// A device in [`CcStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// PCI address.
    pub bdf: Bdf,
    /// Vendor and device id.
    #[serde(default)]
    pub ids: String,
    /// Subsystem ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// Mode that the knobs ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configured_mode: Option<String>,
    /// Mode that the device booted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_mode: Option<String>,
    /// When both were last read under ownership.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified_at: Option<jiff::Timestamp>,
    /// The last error, while it lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorRecord>,
}

impl From<&DeviceRecord> for DeviceStatus {
    fn from(record: &DeviceRecord) -> Self {
        Self {
            bdf: record.bdf,
            ids: record.identity.ids.clone(),
            subsystem: record.identity.subsystem.clone(),
            configured_mode: record.configured_mode.clone(),
            active_mode: record.active_mode.clone(),
            verified_at: record.verified_at,
            error: record.error.clone(),
        }
    }
}

/// `units.json`: what the device plugin tells the kubelet, and why. It changes only when that does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnitsFile {
    /// Who wrote it, and when.
    #[serde(flatten)]
    pub origin: Origin,
    /// What IDs are: `pci` or `iommu`.
    #[serde(default)]
    pub ids: String,
    /// Why they are that.
    #[serde(default)]
    pub ids_reason: String,
    /// Where `pod` is from, or why it is not known.
    #[serde(default)]
    pub pods: String,
    /// Why it cannot be seen of some units whether they are in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blind: Option<String>,
    /// CDI files of whomever by which Kata may start no pod with devices at all, by path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdi_problems: Vec<FileProblem>,
    /// Every unit, by resource and ID.
    #[serde(default)]
    pub units: Vec<UnitRecord>,
}

/// A file that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileProblem {
    /// The file.
    pub path: String,
    /// What is wrong with it.
    #[serde(flatten)]
    pub error: ErrorRecord,
}

/// One thing that the kubelet can hand out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnitRecord {
    /// The whole name of its resource, `nvidia.com/pgpu`.
    pub resource: String,
    /// Device ID for the kubelet, device name for CDI.
    pub id: String,
    /// The GPU or switch; the first by address where the group has more.
    pub bdf: Bdf,
    /// Every function that goes along.
    #[serde(default)]
    pub functions: Vec<Bdf>,
    /// Device nodes.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// NUMA nodes.
    #[serde(default)]
    pub numa: Vec<u32>,
    /// Whether it may be allocated.
    pub healthy: bool,
    /// Why it may not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorRecord>,
    /// The pod that has it, as `namespace/name` or `pod UID`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// What does not keep it from being used: a link that is slower than it could be, errors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// `bindings.json`: the driver and the override that each device had before vfio-manager took it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BindingsFile {
    /// Who wrote it, and when.
    #[serde(flatten)]
    pub origin: Origin,
    /// One record a device that was taken and not given back.
    pub devices: Vec<BindingRecord>,
}

/// A device as it was before it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BindingRecord {
    /// PCI address.
    pub bdf: Bdf,
    /// What the device was.
    pub identity: Identity,
    /// Driver it had; none when it was driverless.
    #[serde(default)]
    pub driver: Option<String>,
    /// `driver_override` it had.
    #[serde(default)]
    pub driver_override: Option<String>,
    /// When it was taken.
    pub taken_at: jiff::Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(boot_id: &str) -> DevicesFile {
        DevicesFile {
            origin: Origin::now(boot_id, Some("uid".to_owned())),
            transition: None,
            devices: vec![DeviceRecord {
                bdf: "0000:41:00.0".parse().unwrap(),
                identity: Identity {
                    instance: Some(4711),
                    ids: "10de:2330".to_owned(),
                    subsystem: Some("10de:16c1".to_owned()),
                },
                configured_mode: Some("on".to_owned()),
                active_mode: Some("on".to_owned()),
                verified_at: Some(jiff::Timestamp::now()),
                usable: true,
                error: None,
            }],
        }
    }

    #[test]
    fn files_come_back_in_the_same_boot_only() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path()).unwrap();
        assert_eq!(DevicesFile::load(&dir, "boot").unwrap(), None);
        let written = file("boot");
        written.store(&dir).unwrap();
        assert_eq!(DevicesFile::load(&dir, "boot").unwrap().unwrap(), written);
        assert_eq!(DevicesFile::load(&dir, "another").unwrap(), None);
        assert_eq!(DevicesFile::load(&dir, "").unwrap(), None);

        let bindings = BindingsFile { origin: Origin::now("boot", None), devices: Vec::new() };
        bindings.store(&dir).unwrap();
        assert_eq!(BindingsFile::load(&dir, "boot").unwrap().unwrap(), bindings);
    }

    #[test]
    fn neighbouring_schemas_and_unknown_fields_are_read() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path()).unwrap();
        for (schema, read) in [(0, true), (1, true), (2, true), (3, false), (u32::MAX, false)] {
            let mut value = serde_json::to_value(file("boot")).unwrap();
            value["schema"] = schema.into();
            value["news"] = "from the future".into();
            dir.write_atomic(DEVICES_FILE, value.to_string().as_bytes(), 0o644).unwrap();
            assert_eq!(DevicesFile::load(&dir, "boot").unwrap().is_some(), read, "schema {schema}");
        }
    }

    #[test]
    fn nonsense_is_an_error_and_never_a_panic() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path()).unwrap();
        for text in ["", "{", "[]", "{\"schema\":-1}", "{\"schema\":1,\"bootId\":\"boot\"}", "\u{0}"] {
            dir.write_atomic(DEVICES_FILE, text.as_bytes(), 0o644).unwrap();
            let error = DevicesFile::load(&dir, "boot").unwrap_err();
            assert!(error.to_string().contains("devices.json"), "{text:?}");
        }
    }

    #[test]
    fn the_directory_below_a_host_root() {
        assert_eq!(state_dir(Path::new("/")), Path::new("/run/nvidia/ccnode"));
        assert_eq!(state_dir(Path::new("/host")), Path::new("/host/run/nvidia/ccnode"));
    }
}
