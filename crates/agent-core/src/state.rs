//! Schemas of the host files that agents exchange.
//!
//! Every file names the machine and the boot it was written in; a reader discards what belongs to another. Fields that a
//! reader does not know are ignored, and one schema version older or newer is accepted, so that agents of neighbouring
//! releases understand each other.

use hw_probe::Bdf;
use serde::{Deserialize, Serialize};

/// Version of the schemas in this module.
pub const SCHEMA: u32 = 1;

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
