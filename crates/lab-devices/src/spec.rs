//! What a virtual device is: its model, firmware and settings, as written in a topology file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::kind::{Chip, ModelKind};
use crate::undecided;

/// Which knobs the firmware knows (gpu-cc-protocol section 10.5). An unknown one is answered with error 0x1e3.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// Hopper: knobs 1 to 47. Blackwell: the same without Protected PCIe's 44 and 45. LS10: 2, 4, 6, 8, 10, 34, 44, 45.
    #[default]
    Current,
    /// As `Current` without 44 to 47, firmware from before Protected PCIe; on Blackwell also without 1 to 4, 33 and 34,
    /// which newer tools no longer touch there (section 12).
    Old,
}

impl Firmware {
    /// The ids of the knobs that exist on a device of this kind; none on one without a firmware processor to talk to.
    pub fn knob_ids(self, kind: ModelKind) -> BTreeSet<u16> {
        let blackwell = matches!(kind.chip(), Chip::Gb10x | Chip::Gb20x);
        let all: BTreeSet<u16> = match kind.chip() {
            Chip::Hopper => (1..=47).collect(),
            Chip::Gb10x | Chip::Gb20x => (1..=47).filter(|id| !matches!(id, 44 | 45)).collect(),
            Chip::Laguna => [2, 4, 6, 8, 10, 34, 44, 45].into(),
            Chip::Bare | Chip::Other => BTreeSet::new(),
        };
        let lacks = |id: u16| matches!(id, 44..=47) || blackwell && matches!(id, 1..=4 | 33 | 34);
        match self {
            Firmware::Current => all,
            Firmware::Old => all.into_iter().filter(|id| !lacks(*id)).collect(),
        }
    }
}

/// One virtual device. Every field but `name` and `model` has a default; unknown fields are refused.
///
/// ```toml
/// name = "gpu0"
/// model = "h100"
/// boot_ms = 300
/// knobs = { 8 = 1 }          # CCM on at power-up
/// firmware = "old"
/// faults = ["boot-slow:2000"]
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Name of the device and of its socket: letters, digits, `-` and `_`, unique in the fleet.
    pub name: String,
    /// What it imitates.
    pub model: ModelKind,
    /// From a reset to boot-complete (`boot_ms`). Field logs have 0.3 to 0.4 s for an FLR (section 5.1).
    #[serde(rename = "boot_ms", default = "default_boot", with = "millis")]
    pub boot: Duration,
    /// From a reset until config space answers (`config_retry_ms`); before that, dword 0 reads 0xffff0001 and the
    /// rest all ones. It comes before the boot time.
    #[serde(rename = "config_retry_ms", default, with = "millis")]
    pub config_retry: Duration,
    /// How long the BAR firewall of a Blackwell GPU stays up (`firewall_ms`), after config space answers and before the
    /// boot time.
    #[serde(rename = "firewall_ms", default = "default_firewall", with = "millis")]
    pub firewall: Duration,
    /// From a doorbell to the reply (`fsp_latency_ms`).
    #[serde(rename = "fsp_latency_ms", default = "default_fsp_latency", with = "millis")]
    pub fsp_latency: Duration,
    /// Knobs that differ from their defaults (permission knobs 1, all others 0) at the very first power-up.
    #[serde(default, with = "knob_map")]
    pub knobs: BTreeMap<u16, u16>,
    /// Which knobs exist.
    #[serde(default)]
    pub firmware: Firmware,
    /// Knobs that the firmware lacks beyond those its profile lacks.
    #[serde(default)]
    pub absent_knobs: BTreeSet<u16>,
    /// FSP error code of a write that a permission knob denies. Real devices' code is unknown.
    #[serde(default = "default_denied_write_error")]
    pub denied_write_error: u32,
    /// PCI device serial number; by default made from the name.
    #[serde(default)]
    pub serial: Option<u64>,
    /// PMC_BOOT_0, where it is to be another than the model's. Blackwell's is not documented.
    #[serde(default)]
    pub boot_0: Option<u32>,
    /// What BAR0 reads as while the BAR firewall is up. What real devices answer is unknown.
    #[serde(default = "default_firewall_read")]
    pub firewall_read: u32,
    /// Whether bit 2 of a Blackwell's status word shows the BAR0 decoupler.
    #[serde(default = "default_decoupler_in_status")]
    pub decoupler_in_status: bool,
    /// Bit 8 of the status word of a Blackwell with C2C: CC can be enabled all the same (section 12, BMSAI).
    #[serde(default)]
    pub bmsai: bool,
    /// Size of a GPU's BAR2 in MiB, a power of two. Real ones have up to 256 GiB, which few emulated hosts can place.
    #[serde(default = "default_bar2_mib")]
    pub bar2_mib: u64,
    /// What is wrong with the device from the start.
    #[serde(default)]
    pub faults: Vec<Fault>,
}

fn default_boot() -> Duration {
    Duration::from_millis(300)
}

fn default_firewall() -> Duration {
    Duration::from_millis(50)
}

fn default_firewall_read() -> u32 {
    undecided::FIREWALL_READ
}

fn default_decoupler_in_status() -> bool {
    undecided::DECOUPLER_IN_STATUS
}

fn default_fsp_latency() -> Duration {
    Duration::from_millis(1)
}

fn default_denied_write_error() -> u32 {
    undecided::DENIED_WRITE_ERROR
}

fn default_bar2_mib() -> u64 {
    64
}

/// What is wrong with a [`DeviceSpec`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// The name cannot be a file name of a socket.
    #[error("Virtual device {0:?}: the name may only have letters, digits, - and _, and at most 32 of them")]
    Name(String),
    /// An initial knob that the firmware does not have.
    #[error("Virtual device {name}: its firmware has no knob {knob}")]
    NoSuchKnob {
        /// The device.
        name: String,
        /// The knob.
        knob: u16,
    },
    /// A fault that a device of this model cannot have.
    #[error("Virtual device {name}: a {model} cannot have the fault {fault}")]
    Fault {
        /// The device.
        name: String,
        /// What it imitates.
        model: ModelKind,
        /// The fault.
        fault: Fault,
    },
    /// `bmsai` on a device that has no such bit.
    #[error("Virtual device {name}: bmsai is for Blackwell GPUs with C2C, and this is a {model}")]
    Bmsai {
        /// The device.
        name: String,
        /// What it imitates.
        model: ModelKind,
    },
    /// The BAR2 size is not a power of two from 1 MiB to 256 GiB.
    #[error("Virtual device {name}: BAR2 of {mib} MiB is not a power of two from 1 to 262144")]
    Bar2 {
        /// The device.
        name: String,
        /// The size asked for.
        mib: u64,
    },
}

impl DeviceSpec {
    /// A healthy device with default settings.
    pub fn new(name: impl Into<String>, model: ModelKind) -> DeviceSpec {
        DeviceSpec {
            name: name.into(),
            model,
            boot: default_boot(),
            config_retry: Duration::ZERO,
            firewall: default_firewall(),
            fsp_latency: default_fsp_latency(),
            knobs: BTreeMap::new(),
            firmware: Firmware::default(),
            absent_knobs: BTreeSet::new(),
            denied_write_error: default_denied_write_error(),
            serial: None,
            boot_0: None,
            firewall_read: default_firewall_read(),
            decoupler_in_status: default_decoupler_in_status(),
            bmsai: false,
            bar2_mib: default_bar2_mib(),
            faults: Vec::new(),
        }
    }

    /// The ids of the knobs that exist on this device.
    pub fn knob_ids(&self) -> BTreeSet<u16> {
        &self.firmware.knob_ids(self.model) - &self.absent_knobs
    }

    /// Size in bytes of BAR `index`; 0 where there is none (h200-observed; gpu-cc-protocol section 1.4).
    pub fn bar_size(&self, index: u32) -> u64 {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let kind = self.model;
        match index {
            0 if kind.is_switch() => 32 * MIB,
            0 => match (kind.chip(), kind) {
                (Chip::Gb10x | Chip::Gb20x, _) => undecided::BLACKWELL_BAR0_MIB * MIB,
                (Chip::Other, ModelKind::Nic) => undecided::NIC_BAR0_KIB * KIB,
                (Chip::Other, _) => undecided::AUDIO_BAR0_KIB * KIB,
                _ => 16 * MIB,
            },
            2 if kind.is_gpu() => self.bar2_mib.saturating_mul(MIB),
            4 if kind.is_gpu() => 32 * MIB,
            _ => 0,
        }
    }

    /// Checks that the device can have a fault.
    pub fn check_fault(&self, fault: &Fault) -> Result<(), SpecError> {
        if fault.applies_to(self.model) {
            return Ok(());
        }
        Err(SpecError::Fault { name: self.name.clone(), model: self.model, fault: *fault })
    }

    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), SpecError> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || self.name.len() > 32 || !self.name.chars().all(fits) {
            return Err(SpecError::Name(self.name.chars().take(64).collect()));
        }
        let ids = self.knob_ids();
        if let Some(&knob) = self.knobs.keys().find(|id| !ids.contains(id)) {
            return Err(SpecError::NoSuchKnob { name: self.name.clone(), knob });
        }
        if self.bmsai && !(self.model.has_c2c() && self.model.chip() == Chip::Gb10x) {
            return Err(SpecError::Bmsai { name: self.name.clone(), model: self.model });
        }
        self.faults.iter().try_for_each(|fault| self.check_fault(fault))?;
        if !self.bar2_mib.is_power_of_two() || self.bar2_mib > 256 << 10 {
            return Err(SpecError::Bar2 { name: self.name.clone(), mib: self.bar2_mib });
        }
        Ok(())
    }
}

/// Durations as whole milliseconds.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

/// Knob maps in formats whose keys are text.
mod knob_map {
    use std::collections::BTreeMap;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &BTreeMap<u16, u16>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(value.iter().map(|(id, value)| (id.to_string(), value)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<u16, u16>, D::Error> {
        BTreeMap::<String, u16>::deserialize(from)?
            .into_iter()
            .map(|(id, value)| match id.parse() {
                Ok(id) => Ok((id, value)),
                Err(_) => Err(D::Error::custom(format!("{id:?} is not a knob id"))),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_text_becomes_a_spec_and_back() {
        let text = r#"
            name = "gpu0"
            model = "h200"
            boot_ms = 2500
            firmware = "old"
            knobs = { 8 = 1, 10 = 2 }
            faults = ["boot-slow:2000", "fsp-error-code:8:0x202"]
        "#;
        let spec: DeviceSpec = toml::from_str(text).unwrap();
        let expected = DeviceSpec {
            boot: Duration::from_millis(2500),
            firmware: Firmware::Old,
            knobs: [(8, 1), (10, 2)].into(),
            faults: vec![Fault::BootSlow(2000), Fault::FspErrorCode { knob: Some(8), code: 0x202 }],
            ..DeviceSpec::new("gpu0", ModelKind::H200)
        };
        assert_eq!(spec, expected);
        assert_eq!(toml::from_str::<DeviceSpec>(&toml::to_string(&spec).unwrap()).unwrap(), spec);
    }

    #[test]
    fn what_a_topology_may_not_say_is_refused() {
        for (text, part) in [
            ("name = 'a'\nmodel = 'h300'", "unknown variant `h300`"),
            ("name = 'a'\nmodel = 'h100'\nboot = 3", "unknown field `boot`"),
            ("name = 'a'\nmodel = 'h100'\nknobs = { CCM = 1 }", "\"CCM\" is not a knob id"),
            ("name = 'a'\nmodel = 'h100'\nfaults = ['on-fire']", "\"on-fire\" is not a fault"),
            ("model = 'h100'", "missing field `name`"),
        ] {
            let error = toml::from_str::<DeviceSpec>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn validation_finds_bad_names_knobs_and_sizes() {
        let good = DeviceSpec::new("gpu0", ModelKind::H100);
        assert_eq!(good.validate(), Ok(()));
        let cases = [
            DeviceSpec { name: "../x".into(), ..good.clone() },
            DeviceSpec { name: String::new(), ..good.clone() },
            DeviceSpec { knobs: [(48, 1)].into(), ..good.clone() },
            DeviceSpec { firmware: Firmware::Old, knobs: [(45, 1)].into(), ..good.clone() },
            DeviceSpec { model: ModelKind::Ls10, knobs: [(7, 1)].into(), ..good.clone() },
            DeviceSpec { bar2_mib: 48, ..good.clone() },
            DeviceSpec { bmsai: true, ..good.clone() },
            DeviceSpec { bmsai: true, model: ModelKind::B200, ..good.clone() },
            DeviceSpec { model: ModelKind::B200, knobs: [(45, 1)].into(), ..good.clone() },
            DeviceSpec { model: ModelKind::A100, knobs: [(8, 1)].into(), ..good.clone() },
            DeviceSpec { faults: vec![Fault::FirewallStuck], ..good.clone() },
        ];
        for spec in cases {
            assert!(spec.validate().is_err(), "{spec:?}");
        }
        assert_eq!(DeviceSpec { bmsai: true, ..DeviceSpec::new("gpu0", ModelKind::Gb200) }.validate(), Ok(()));
    }
}
