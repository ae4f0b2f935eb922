//! What keeps a function from being used, as far as sysfs and configuration space tell (gpu-cc-protocol section 1.6).

use std::error::Error as _;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigSpace, Liveness, ask};
use crate::{BarFirewall, DeviceKind, NVIDIA, PciFunction, SysRoot};

/// A function's answer, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What configuration space answers; none when it cannot be read.
    pub liveness: Option<Liveness>,
    /// What is wrong, the gravest first; empty for a device of which nothing bad is known.
    pub faults: Vec<Fault>,
}

/// One reason why a function is broken, not ready, or not understood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case")]
pub enum Fault {
    /// Configuration space reads all ones, at its ids or at 0xf0.
    OffBus,
    /// Configuration space answers vendor id 0x0001: not ready yet after a reset.
    NotReady,
    /// Configuration space answers another vendor id than at enumeration.
    OtherDevice {
        /// The vendor id that answers now.
        vendor: u16,
    },
    /// Configuration space cannot be read.
    ConfigUnreadable {
        /// Why.
        cause: String,
    },
    /// The capability pointer reads 0xff.
    ConfigBroken,
    /// The function is in D3cold: it has no power, and nobody may ask it without waking it.
    D3cold,
    /// The security-fault word is not 0: the device may have locked itself.
    SecurityFault {
        /// The word.
        word: u32,
        /// Its offset in configuration space.
        offset: u16,
    },
    /// The BAR firewall is closed: BAR0 does not answer until the firmware opens it.
    FirewallClosed,
    /// BAR0 has no address.
    NoBar0,
    /// The kernel knows no way to reset it.
    NoReset,
    /// The device table does not know the chip, so nothing is known of its registers.
    UnknownChip {
        /// The device id.
        device: u16,
    },
}

impl Fault {
    /// The stable name of the fault, as in JSON.
    pub fn code(&self) -> &'static str {
        match self {
            Self::OffBus => "off-bus",
            Self::NotReady => "not-ready",
            Self::OtherDevice { .. } => "other-device",
            Self::ConfigUnreadable { .. } => "config-unreadable",
            Self::ConfigBroken => "config-broken",
            Self::D3cold => "d3cold",
            Self::SecurityFault { .. } => "security-fault",
            Self::FirewallClosed => "firewall-closed",
            Self::NoBar0 => "no-bar0",
            Self::NoReset => "no-reset",
            Self::UnknownChip { .. } => "unknown-chip",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OffBus => f.write_str(
                "Configuration space reads all ones: the device is off the bus; what else is shown is the kernel's memory of it",
            ),
            Self::NotReady => f.write_str("The device is not ready yet after a reset"),
            Self::OtherDevice { vendor } => {
                write!(f, "Configuration space answers vendor id {vendor:#06x} instead of the one it was enumerated with")
            }
            Self::ConfigUnreadable { cause } => write!(f, "Configuration space cannot be read: {cause}"),
            Self::ConfigBroken => f.write_str("The capability pointer in configuration space reads 0xff"),
            Self::D3cold => f.write_str("The device is in D3cold: it has no power and does not answer"),
            Self::SecurityFault { word, offset } => {
                write!(f, "The security-fault word at {offset:#x} in configuration space is {word:#010x}")?;
                named_bits(*word, *offset).map_or(Ok(()), |names| write!(f, " ({names})"))
            }
            Self::FirewallClosed => f.write_str("The BAR firewall is closed: BAR0 does not answer"),
            Self::NoBar0 => f.write_str("BAR0 has no address"),
            Self::NoReset => f.write_str("The kernel knows no way to reset the device"),
            Self::UnknownChip { device } => {
                write!(f, "Device id {device:#06x} is not in the device table: what it can do is not known")
            }
        }
    }
}

/// Offset of the security-fault word of GB10x, the only one whose bits have public names (gpu-cc-protocol section 1.6).
const GB10X_WORD: u16 = 0xb04;

fn named_bits(word: u32, offset: u16) -> Option<String> {
    const NAMES: [(u8, &str); 7] = [
        (10, "FSP SCPM"),
        (11, "FSP DCLS"),
        (12, "FSP EMP"),
        (13, "FSP uncorrectable error"),
        (14, "FSP watchdog"),
        (30, "device lockdown"),
        (31, "function lockdown"),
    ];
    let set: Vec<&str> = NAMES.iter().filter(|(bit, _)| word >> bit & 1 == 1).map(|(_, name)| *name).collect();
    (offset == GB10X_WORD && !set.is_empty()).then(|| set.join(", "))
}

impl Condition {
    /// Asks configuration space, which moves no device: a function in D3cold is not asked. Waits 2 seconds at most.
    pub fn read(root: &SysRoot, function: &PciFunction) -> Self {
        let mut faults = Vec::new();
        let answer = ask(root, function.bdf);
        match &answer {
            Ok((Liveness::Answers, config)) => {
                if let Some(config) = config {
                    in_config(function, config, &mut faults);
                }
            }
            Ok((Liveness::Silent, _)) => faults.push(Fault::OffBus),
            Ok((Liveness::Other(0x0001), _)) => faults.push(Fault::NotReady),
            Ok((Liveness::Other(vendor), _)) => faults.push(Fault::OtherDevice { vendor: *vendor }),
            Ok((Liveness::Asleep, _)) => faults.push(Fault::D3cold),
            Err(error) => faults.push(unreadable(error)),
        }
        in_sysfs(function, &mut faults);
        Self { liveness: answer.ok().map(|(liveness, _)| liveness), faults }
    }
}

fn unreadable(error: &crate::config::ConfigError) -> Fault {
    let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    Fault::ConfigUnreadable { cause }
}

fn in_config(function: &PciFunction, config: &ConfigSpace, faults: &mut Vec<Fault>) {
    if config.u8(0x34) == Some(0xff) {
        faults.push(Fault::ConfigBroken);
    }
    if function.vendor != NVIDIA {
        return;
    }
    if let Some((offset, word)) = security_word(function, config)
        && word != 0
    {
        faults.push(Fault::SecurityFault { word, offset });
    }
    if firewall_closed(function, config) == Some(true) {
        faults.push(Fault::FirewallClosed);
    }
}

/// Hopper and GB20x have the word in a vendor-specific capability, GB10x in a designated one (gpu-cc-protocol section 1.6).
fn security_word(function: &PciFunction, config: &ConfigSpace) -> Option<(u16, u32)> {
    let chip = function.model.as_ref().filter(|_| function.is_gpu())?.chip.as_str();
    let offset = if chip.starts_with("gb1") {
        config.dvsec(NVIDIA, 0)? + 0x14
    } else if chip.starts_with("gh1") || chip.starts_with("gb2") {
        config.vsec(1, 1)? + 0x10
    } else {
        return None;
    };
    // All ones is a dead device, which is told otherwise.
    Some((offset, config.u32(offset).filter(|word| *word != u32::MAX)?))
}

fn firewall_closed(function: &PciFunction, config: &ConfigSpace) -> Option<bool> {
    let (word, bit) = match function.model.as_ref()?.bar_firewall? {
        BarFirewall::Dvsec { vendor, id, offset, bit } => (config.dvsec(vendor, id)?.checked_add(offset)?, bit),
        BarFirewall::Vsec { id, revision, offset, bit } => {
            let start = config.vsec(id, revision)?;
            // The header tells the capability's length: what lies beyond it is another's.
            let length = config.u32(start.checked_add(4)?)? >> 20;
            (start.checked_add(offset)?, (length >= u32::from(offset) + 4).then_some(bit)?)
        }
    };
    let word = config.u32(word).filter(|word| *word != u32::MAX)?;
    Some(word.checked_shr(bit.into()).unwrap_or(0) & 1 == 1)
}

fn in_sysfs(function: &PciFunction, faults: &mut Vec<Fault>) {
    if !matches!(function.kind, DeviceKind::Gpu | DeviceKind::NvSwitch) || function.is_virtual_function {
        return;
    }
    if !function.bars.iter().any(|bar| bar.number == 0 && !bar.io) {
        faults.push(Fault::NoBar0);
    }
    if function.reset_methods.is_empty() {
        faults.push(Fault::NoReset);
    }
    if function.model.is_none() {
        faults.push(Fault::UnknownChip { device: function.device });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Inventory;
    use crate::testing::{FakeFunction, FakeSysfs, h200_config};

    const GPU: &str = "0000:41:00.0";

    fn faults(device: u16, sick: impl for<'a> Fn(FakeFunction<'a>) -> FakeFunction<'a>) -> Vec<Fault> {
        let fake = FakeSysfs::new();
        sick(fake.gpu(GPU, device));
        let inventory = Inventory::scan(&fake.root());
        Condition::read(&fake.root(), inventory.functions.first().unwrap()).faults
    }

    /// A DVSEC(10de, 0) at 0xaf0, as GB10x has it (gpu-cc-protocol section 10.1).
    fn with_dvsec(gpu: FakeFunction<'_>) -> FakeFunction<'_> {
        // The last of the real H200's list at 0x2f0 is made to point to it.
        gpu.patch_config(0x2f0, &0xaf01_0003_u32.to_le_bytes())
            .patch_config(0xaf0, &0x0001_0023_u32.to_le_bytes())
            .patch_config(0xaf4, &[0xde, 0x10, 0, 0, 0, 0])
    }

    /// The VSEC of GB20x is long enough for the firewall's word, which is closed; a real Hopper's ends before it.
    fn closed_gb20x(gpu: FakeFunction<'_>) -> FakeFunction<'_> {
        gpu.patch_config(0x2a4, &0x2f01_000b_u32.to_le_bytes())
            .patch_config(0x2a8, &0x0181_0001_u32.to_le_bytes())
            .patch_config(0x2b8, &[0, 0, 0, 1])
    }

    #[test]
    fn each_sickness_has_its_reason_and_a_healthy_device_none() {
        type Case = (&'static str, u16, for<'a> fn(FakeFunction<'a>) -> FakeFunction<'a>, &'static [Fault]);
        let cases: [Case; 18] = [
            ("healthy", 0x2330, |gpu| gpu, &[]),
            ("healthy GB100", 0x2901, |gpu| with_dvsec(gpu), &[]),
            ("all ones", 0x2330, |gpu| gpu.config(&[0xff; 4096]), &[Fault::OffBus]),
            ("0xf0 all ones", 0x2330, |gpu| gpu.patch_config(0xf0, &[0xff, 0xff]), &[Fault::OffBus]),
            ("after a reset", 0x2330, |gpu| gpu.patch_config(0, &[0x01, 0x00]), &[Fault::NotReady]),
            ("swapped", 0x2330, |gpu| gpu.patch_config(0, &[0x86, 0x80]), &[Fault::OtherDevice { vendor: 0x8086 }]),
            ("capabilities", 0x2330, |gpu| gpu.patch_config(0x34, &[0xff]), &[Fault::ConfigBroken]),
            ("D3cold", 0x2330, |gpu| gpu.power("auto", "suspended", "D3cold").config(&[0xff; 64]), &[Fault::D3cold]),
            (
                "Hopper's fault word",
                0x2330,
                |gpu| gpu.patch_config(0x2b4, &[1, 0, 0, 0x40]),
                &[Fault::SecurityFault { word: 0x4000_0001, offset: 0x2b4 }],
            ),
            (
                "GB20x's fault word",
                0x2bb5,
                |gpu| gpu.patch_config(0x2b4, &[0, 0, 0, 0x80]),
                &[Fault::SecurityFault { word: 0x8000_0000, offset: 0x2b4 }],
            ),
            (
                "GB10x's fault word",
                0x2901,
                |gpu| with_dvsec(gpu).patch_config(0xb04, &[0, 0, 0, 0x80]),
                &[Fault::SecurityFault { word: 0x8000_0000, offset: 0xb04 }],
            ),
            ("a fault word that is dead", 0x2330, |gpu| gpu.patch_config(0x2b4, &[0xff; 4]), &[]),
            (
                "GB10x's firewall",
                0x2901,
                |gpu| with_dvsec(gpu).patch_config(0xaf8, &[0, 0, 0x10, 0]),
                &[Fault::FirewallClosed],
            ),
            ("GB20x's firewall", 0x2bb5, closed_gb20x, &[Fault::FirewallClosed]),
            ("no BARs", 0x2330, |gpu| gpu.bars(&[]), &[Fault::NoBar0]),
            ("no reset", 0x2330, |gpu| gpu.reset_methods(""), &[Fault::NoReset]),
            ("unknown chip", 0x9999, |gpu| gpu, &[Fault::UnknownChip { device: 0x9999 }]),
            ("64 bytes", 0x2330, |gpu| gpu.config(&h200_config()[..64]), &[]),
        ];
        for (name, device, sick, expected) in cases {
            assert_eq!(faults(device, sick), expected, "{name}");
        }
    }

    #[test]
    fn unreadable_configuration_space_is_a_fault_with_its_cause() {
        let found = faults(0x2330, |gpu| gpu.remove_attr("config"));
        let [Fault::ConfigUnreadable { cause }] = found.as_slice() else { panic!("{found:?}") };
        assert!(cause.contains("No such file"), "{cause}");
        let found = faults(0x2330, |gpu| gpu.config(&[0xde]));
        assert!(
            found[0].to_string().contains("has only 1 bytes") || found[0].to_string().contains("only"),
            "{found:?}"
        );
    }

    #[test]
    fn bits_are_named_only_where_their_names_are_public() {
        let text = |offset| Fault::SecurityFault { word: 0x8000_4000, offset }.to_string();
        assert!(text(GB10X_WORD).ends_with("is 0x80004000 (FSP watchdog, function lockdown)"), "{}", text(GB10X_WORD));
        assert!(text(0x2b4).ends_with("is 0x80004000"), "{}", text(0x2b4));
    }

    #[test]
    fn the_code_is_the_name_in_json() {
        for fault in [
            Fault::OffBus,
            Fault::NotReady,
            Fault::OtherDevice { vendor: 1 },
            Fault::ConfigUnreadable { cause: String::new() },
            Fault::ConfigBroken,
            Fault::D3cold,
            Fault::SecurityFault { word: 1, offset: 2 },
            Fault::FirewallClosed,
            Fault::NoBar0,
            Fault::NoReset,
            Fault::UnknownChip { device: 1 },
        ] {
            let json = serde_json::to_value(&fault).unwrap();
            assert_eq!(json["fault"], fault.code());
            assert_eq!(serde_json::from_value::<Fault>(json).unwrap(), fault);
        }
    }
}
