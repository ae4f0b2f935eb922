//! What differs from chip to chip: registers, budgets, how the status word is read, which knobs there are.

use std::time::Duration;

use hw_probe::{Architecture, CcEnable, PciFunction};

use crate::access::Capability;
use crate::clock::Wait;
use crate::error::Fault;
use crate::knob::Knob;
use crate::mode::{Effective, Mode};

/// PMC_BOOT_0, the same on every chip.
pub(crate) const BOOT_0: u32 = 0x0;

/// Values of PMC_BOOT_0 that mean that the device has locked itself (gpu-cc-protocol section 1.6).
pub(crate) const BOOT_0_SECURITY_FAULT: [u32; 2] = [0xbadf_0200, 0xbad0_0200];

/// First of the four words of the FSP's status scratch, the same on every chip (gpu-cc-protocol section 5.1).
pub(crate) const FSP_STATUS: u32 = 0x8f_0320;

/// Value of the boot scratch register that means booted (gpu-cc-protocol section 5.1).
pub(crate) const BOOTED: u32 = 0xff;

/// How long the BAR firewall may stay closed (gpu-cc-protocol sections 5.2 and 12).
pub(crate) const FIREWALL: Wait = Wait::new(Duration::from_secs(15), Duration::from_millis(10));

/// Bit of a GB10x's status word that lets CC be enabled on a board with NVLink-C2C (gpu-cc-protocol section 12, "BMSAI").
pub(crate) const BMSAI: u32 = 1 << 8;

/// One chip, as far as its confidential-computing control goes.
#[derive(Debug)]
pub struct Chip {
    /// Name in lower case, as in the device table.
    pub name: &'static str,
    /// Boot scratch register.
    pub(crate) boot: u32,
    /// How long a boot may take, and how often to look.
    pub(crate) boot_wait: Wait,
    /// What says that the firmware is in recovery.
    pub(crate) recovery: Recovery,
    /// Register that holds the mode the device booted with.
    pub(crate) status: u32,
    /// Reads that register's value.
    pub(crate) decode: fn(u32) -> Effective,
    /// Word of configuration space that holds the security fault, where one is known.
    pub(crate) fault_word: Option<ConfigWord>,
    /// Word of configuration space with the bit that is 1 while BAR0 is closed.
    pub(crate) firewall: Option<(ConfigWord, u32)>,
    /// How its FSP is spoken to.
    pub(crate) mailbox: Mailbox,
    /// The kind of device, which says what makes up a mode.
    pub(crate) family: Family,
    /// Value of the BAR0 decoupler knob in the modes that want it on.
    pub(crate) decoupler_on: u16,
    /// Every knob that belongs to the vector of some mode, in the order they are read for a look.
    pub(crate) knobs: &'static [Knob],
    /// Those of them that a firmware may lack; a missing one counts as 0.
    pub(crate) optional: &'static [Knob],
}

impl Chip {
    /// The mode that the value of the chip's status register means (gpu-cc-protocol section 3). The caller has seen to it
    /// that it is no error word.
    pub fn effective(&self, status: u32) -> Effective {
        (self.decode)(status)
    }
}

/// A register and how its value is understood.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recovery {
    pub(crate) register: u32,
    pub(crate) is_on: fn(u32) -> bool,
}

/// A dword of a capability in extended configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConfigWord {
    pub(crate) capability: Capability,
    /// Bytes from the capability's start.
    pub(crate) offset: u16,
}

/// A way to speak with the FSP (gpu-cc-protocol sections 4.8 and 4.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mailbox {
    /// The EMEM queues of this channel.
    Emem(u32),
    /// The MNOC mailbox, port 0.
    Mnoc,
}

/// Devices whose modes are made of the same knobs (gpu-cc-protocol section 6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// GPUs with CC and protected PCIe.
    Hopper,
    /// GPUs with CC, whose NVLinks are encrypted without protected PCIe.
    Blackwell,
    /// NVSwitches, with protected PCIe alone.
    Switch,
}

/// Holds the security fault of GH100 and GB20x, and GB20x's firewall bit (gpu-cc-protocol section 12).
const VSEC: Capability = Capability::Vsec { id: 1, revision: 1 };
/// Holds the security fault and the firewall bit of GB10x (gpu-cc-protocol sections 1.6 and 5.2).
const DVSEC: Capability = Capability::Dvsec { vendor: 0x10de, id: 0 };

const HOPPER_BOOT: Wait = Wait::new(Duration::from_secs(5), Duration::from_millis(10));
const BLACKWELL_BOOT: Wait = Wait::new(Duration::from_secs(10), Duration::from_millis(10));

/// Bit 30 of the word says "in recovery" on GH100 and LS10.
const fn recovery_flag(value: u32) -> bool {
    value & (1 << 30) != 0
}

/// 0 and 1 in the low byte mean health on Blackwell.
const fn recovery_byte(value: u32) -> bool {
    value & 0xff > 1
}

/// Hopper GPUs.
pub static GH100: Chip = Chip {
    name: "gh100",
    boot: 0x2_00bc,
    boot_wait: HOPPER_BOOT,
    recovery: Recovery { register: 0x2_0120, is_on: recovery_flag },
    status: 0x11_82cc,
    decode: decode_gh100,
    fault_word: Some(ConfigWord { capability: VSEC, offset: 0x10 }),
    firewall: None,
    mailbox: Mailbox::Emem(2),
    family: Family::Hopper,
    decoupler_on: 2,
    knobs: &[Knob::CCM, Knob::CCD, Knob::BAR0_DECOUPLER, Knob::PPCIE, Knob::K2, Knob::K4, Knob::K34],
    // Firmware from before protected PCIe.
    optional: &[Knob::PPCIE],
};

/// What all Blackwell GPUs share.
const BLACKWELL: Chip = Chip {
    name: "gb10x",
    boot: 0x2_00bc,
    boot_wait: BLACKWELL_BOOT,
    recovery: Recovery { register: 0x8a_a128, is_on: recovery_byte },
    status: 0x590,
    decode: decode_blackwell,
    fault_word: Some(ConfigWord { capability: DVSEC, offset: 0x14 }),
    firewall: Some((ConfigWord { capability: DVSEC, offset: 0x8 }, 1 << 20)),
    mailbox: Mailbox::Mnoc,
    family: Family::Blackwell,
    // The newer rules leave the decoupler and the unnamed knobs alone (gpu-cc-protocol sections 6.1 and 12).
    decoupler_on: 0,
    knobs: &[Knob::CCM, Knob::CCD],
    optional: &[],
};

/// Blackwell GPUs of data centres: GB100, GB102, GB110, GB112.
pub static GB10X: Chip = BLACKWELL;

/// Blackwell GPUs of workstations and PCIe servers: GB202, GB203, GB205, GB206, GB207.
pub static GB20X: Chip = Chip {
    name: "gb20x",
    boot: 0xad_00bc,
    fault_word: Some(ConfigWord { capability: VSEC, offset: 0x10 }),
    firewall: Some((ConfigWord { capability: VSEC, offset: 0x14 }, 1 << 24)),
    ..BLACKWELL
};

/// Third-generation NVSwitches.
pub static LS10: Chip = Chip {
    name: "ls10",
    boot: 0x6_60bc,
    boot_wait: HOPPER_BOOT,
    recovery: Recovery { register: 0x6_6120, is_on: recovery_flag },
    status: 0x2_8c50,
    decode: decode_ls10,
    fault_word: None,
    firewall: None,
    mailbox: Mailbox::Emem(2),
    family: Family::Switch,
    decoupler_on: 0,
    knobs: &[Knob::PPCIE, Knob::CCM, Knob::CCD, Knob::BAR0_DECOUPLER, Knob::K2, Knob::K4, Knob::K34],
    // Which knobs the switch's firmware knows is not public (gpu-cc-protocol sections 10.5 and 13, question 14).
    optional: &[Knob::PPCIE, Knob::CCM, Knob::CCD, Knob::BAR0_DECOUPLER, Knob::K2, Knob::K4, Knob::K34],
};

/// Bits 1:0 are CC and developer's tools, bit 5 protected PCIe; all others are masked off (gpu-cc-protocol section 3).
const fn decode_gh100(status: u32) -> Effective {
    match (status & 0b11, status & (1 << 5) != 0) {
        (0, false) => Effective::Off,
        (0, true) => Effective::Ppcie,
        (1, false) => Effective::On,
        (2, _) => Effective::InvalidDevtoolsOnly,
        (_, false) => Effective::Devtools,
        (_, true) => Effective::InvalidCcWithPpcie,
    }
}

/// Bits 1:0 as on Hopper; there is no protected PCIe (gpu-cc-protocol section 3).
const fn decode_blackwell(status: u32) -> Effective {
    decode_gh100(status & 0b11)
}

/// Bit 0 is protected PCIe (gpu-cc-protocol section 3).
const fn decode_ls10(status: u32) -> Effective {
    if status & 1 == 0 { Effective::Off } else { Effective::Ppcie }
}

/// Whether and how CC can be enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Enable {
    Yes,
    /// If the firmware shows [`BMSAI`].
    WithBmsai,
    No(&'static str),
}

/// What may be done with a device.
#[derive(Clone, Debug)]
pub struct Support {
    /// Its chip.
    pub chip: &'static Chip,
    /// Product name, for messages.
    pub model: String,
    enable: Enable,
}

impl Support {
    /// What can be done with `function`, or why nothing.
    pub fn of(function: &PciFunction) -> Result<Self, Fault> {
        let unsupported = |model: &str, reason| Err(Fault::Unsupported { model: model.to_owned(), reason });
        let Some(model) = &function.model else {
            if function.is_gpu() || function.is_nvswitch() {
                return Err(Fault::UnknownDevice { vendor: function.vendor, device: function.device });
            }
            return unsupported("Not a GPU", "only GPUs and NVSwitches have a confidential-computing mode");
        };
        if function.is_virtual_function {
            return unsupported(&model.name, "an SR-IOV virtual function has no mode of its own");
        }
        let chip = match (model.architecture, model.chip.as_str()) {
            (Architecture::Hopper, "gh100") => &GH100,
            (Architecture::Blackwell, "gb100" | "gb102" | "gb110" | "gb112") => &GB10X,
            (Architecture::Blackwell, "gb202" | "gb203" | "gb205" | "gb206" | "gb207") => &GB20X,
            (Architecture::Laguna, "ls10") => &LS10,
            (Architecture::Hopper | Architecture::Blackwell | Architecture::Laguna, _) => {
                return unsupported(&model.name, "this chip of a known family is not known itself");
            }
            (Architecture::Limerock, _) => {
                return unsupported(&model.name, "this NVSwitch has neither confidential computing nor protected PCIe");
            }
            _ => return unsupported(&model.name, "GPUs before Hopper have no confidential computing"),
        };
        let has_c2c = model.has_c2c == Some(true) || model.cc_enable == CcEnable::OffOnly;
        let enable = match model.cc_enable {
            CcEnable::No => Enable::No("confidential computing cannot be enabled on this model"),
            CcEnable::BySubsystem => Enable::No(
                "whether confidential computing can be enabled depends on the board, and its subsystem id is unknown",
            ),
            CcEnable::Yes | CcEnable::OffOnly if has_c2c && chip.name == GB10X.name => Enable::WithBmsai,
            CcEnable::Yes | CcEnable::OffOnly if has_c2c => {
                Enable::No("confidential computing cannot be enabled on models with NVLink-C2C")
            }
            CcEnable::Yes | CcEnable::OffOnly => Enable::Yes,
        };
        Ok(Self { chip, model: model.name.clone(), enable })
    }

    /// The mode that this device is in when its node is in `mode`, or why it cannot be: a switch of a node with CC is off.
    pub fn target(&self, mode: Mode) -> Result<Mode, Fault> {
        let reason = match (self.chip.family, mode, self.enable) {
            (_, Mode::Off, _) | (Family::Switch, Mode::On | Mode::Devtools, _) => return Ok(Mode::Off),
            (Family::Switch, Mode::Ppcie, _) => return Ok(Mode::Ppcie),
            (Family::Blackwell, Mode::Ppcie, _) => {
                "protected PCIe is of Hopper GPUs with NVSwitches; several Blackwell GPUs are confidential with mode on"
            }
            (_, _, Enable::Yes) | (Family::Blackwell, _, Enable::WithBmsai) => return Ok(mode),
            (_, _, Enable::No(reason)) => reason,
            (_, _, Enable::WithBmsai) => "confidential computing cannot be enabled on models with NVLink-C2C",
        };
        Err(Fault::Unsupported { model: self.model.clone(), reason })
    }

    /// Whether the model leaves it to the firmware whether the device can be brought to `mode`
    /// ([`Device::can_be`](crate::Device::can_be)).
    pub fn depends_on_firmware(&self, mode: Mode) -> bool {
        self.enable == Enable::WithBmsai && matches!(mode, Mode::On | Mode::Devtools)
    }

    /// Whether a device that shows this status word can be brought to `mode`: what the model alone does not tell.
    pub(crate) fn allows(&self, mode: Mode, status: u32) -> Result<(), Fault> {
        if self.enable == Enable::WithBmsai && mode != Mode::Off && status & BMSAI == 0 {
            let reason = "confidential computing cannot be enabled on models with NVLink-C2C whose firmware does not offer it \
                          (status bit 8)";
            return Err(Fault::Unsupported { model: self.model.clone(), reason });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hw_probe::{BarFirewall, DeviceKind, Model};

    use super::*;
    use crate::fake::{function, model};

    #[test]
    fn status_words_are_masked_and_never_guessed() {
        let hopper = [
            (0x00, Effective::Off),
            (0x01, Effective::On),
            (0x03, Effective::Devtools),
            (0x02, Effective::InvalidDevtoolsOnly),
            (0x20, Effective::Ppcie),
            (0x21, Effective::InvalidCcWithPpcie),
            (0x22, Effective::InvalidDevtoolsOnly),
            (0x23, Effective::InvalidCcWithPpcie),
            (0x180, Effective::Off),
            (0x181, Effective::On),
        ];
        for (status, effective) in hopper {
            assert_eq!((GH100.decode)(status), effective, "{status:#x}");
        }
        for chip in [&GB10X, &GB20X] {
            for (status, effective) in [
                (0x144, Effective::Off),
                (0x165, Effective::On),
                (0x163, Effective::Devtools),
                (0x162, Effective::InvalidDevtoolsOnly),
            ] {
                assert_eq!((chip.decode)(status), effective, "{status:#x}");
            }
        }
        assert_eq!([0xfffe, 0x1, 0x3].map(LS10.decode), [Effective::Off, Effective::Ppcie, Effective::Ppcie]);
    }

    #[test]
    fn what_means_recovery_differs() {
        let is_on = |chip: &Chip, value| (chip.recovery.is_on)(value);
        for chip in [&GH100, &LS10] {
            assert_eq!([0, 2, 0xbfff_ffff, 0x4000_0000].map(|value| is_on(chip, value)), [false, false, false, true]);
        }
        for chip in [&GB10X, &GB20X] {
            assert_eq!([0, 1, 0x4000_0001, 2, 0xff].map(|value| is_on(chip, value)), [false, false, false, true, true]);
        }
    }

    /// The registers here and those of the device table come from the same sections; neither may drift.
    #[test]
    fn the_device_table_says_the_same() {
        let devices = [
            (DeviceKind::Gpu, 0x2330, &GH100),
            (DeviceKind::Gpu, 0x2901, &GB10X),
            (DeviceKind::Gpu, 0x2980, &GB10X),
            (DeviceKind::Gpu, 0x3182, &GB10X),
            (DeviceKind::Gpu, 0x3200, &GB10X),
            (DeviceKind::Gpu, 0x2bb5, &GB20X),
            (DeviceKind::Gpu, 0x2c31, &GB20X),
            (DeviceKind::Gpu, 0x2f04, &GB20X),
            (DeviceKind::Gpu, 0x2d04, &GB20X),
            (DeviceKind::Gpu, 0x2d80, &GB20X),
            (DeviceKind::NvSwitch, 0x22a3, &LS10),
        ];
        for (kind, device, chip) in devices {
            let model = Model::lookup(kind, device, None).unwrap();
            let mut function = function("0000:41:00.0");
            (function.kind, function.model) = (kind, Some(model.clone()));
            let found = Support::of(&function).unwrap().chip;
            assert_eq!(found.name, chip.name, "{device:04x}");
            assert_eq!(model.boot_register, Some(chip.boot), "{device:04x}");
            let status = model.cc_register.or(model.ppcie_register).unwrap();
            assert_eq!(status.offset, chip.status, "{device:04x}");
            let firewall = model.bar_firewall.map(|firewall| match firewall {
                BarFirewall::Dvsec { vendor, id, offset, bit } => (Capability::Dvsec { vendor, id }, offset, 1 << bit),
                BarFirewall::Vsec { id, revision, offset, bit } => {
                    (Capability::Vsec { id, revision }, offset, 1_u32 << bit)
                }
            });
            let expected = chip.firewall.map(|(word, mask)| (word.capability, word.offset, mask));
            assert_eq!(firewall, expected, "{device:04x}");
        }
    }

    #[test]
    fn what_cannot_be_driven_says_so_by_name() {
        let with = |architecture, chip: &str| {
            let mut function = function("0000:41:00.0");
            function.model = Some(model(architecture, chip));
            Support::of(&function).map(|support| support.chip.name).map_err(|fault| fault.to_string())
        };
        assert_eq!(with(Architecture::Hopper, "gh100"), Ok("gh100"));
        assert_eq!(with(Architecture::Blackwell, "gb112"), Ok("gb10x"));
        assert_eq!(with(Architecture::Blackwell, "gb207"), Ok("gb20x"));
        assert_eq!(with(Architecture::Laguna, "ls10"), Ok("ls10"));
        for (architecture, chip, reason) in [
            (Architecture::Blackwell, "gb999", "not known"),
            (Architecture::Limerock, "lr10", "neither"),
            (Architecture::Ada, "ad102", "before Hopper"),
            (Architecture::Hopper, "gh999", "not known"),
        ] {
            let text = with(architecture, chip).unwrap_err();
            assert!(text.starts_with("Testing: ") && text.contains(reason), "{text}");
        }
        let mut unknown = function("0000:41:00.0");
        unknown.model = None;
        assert_eq!(Support::of(&unknown).unwrap_err().code(), "UnknownDevice");
        unknown.kind = DeviceKind::NvidiaOther;
        assert_eq!(Support::of(&unknown).unwrap_err().code(), "Unsupported");
    }

    /// A device of this chip, of a model that can be enabled or not, with C2C or not.
    fn support(architecture: Architecture, chip: &str, cc_enable: CcEnable, has_c2c: Option<bool>) -> Support {
        let mut function = function("0000:41:00.0");
        function.model = Some(model(architecture, chip));
        let model = function.model.as_mut().unwrap();
        (model.cc_enable, model.has_c2c) = (cc_enable, has_c2c);
        Support::of(&function).unwrap()
    }

    #[test]
    fn a_node_s_mode_is_its_devices_own_or_a_refusal() {
        // The device's mode in the node's modes on, devtools, ppcie; off is everybody's. `x`: refused.
        let table = [
            (Architecture::Hopper, "gh100", CcEnable::Yes, Some(false), "on devtools ppcie"),
            (Architecture::Hopper, "gh100", CcEnable::Yes, None, "on devtools ppcie"),
            (Architecture::Hopper, "gh100", CcEnable::Yes, Some(true), "x x x"),
            (Architecture::Hopper, "gh100", CcEnable::OffOnly, Some(true), "x x x"),
            (Architecture::Hopper, "gh100", CcEnable::BySubsystem, None, "x x x"),
            (Architecture::Hopper, "gh100", CcEnable::No, None, "x x x"),
            (Architecture::Blackwell, "gb100", CcEnable::Yes, Some(false), "on devtools x"),
            (Architecture::Blackwell, "gb110", CcEnable::OffOnly, Some(true), "on devtools x"),
            (Architecture::Blackwell, "gb202", CcEnable::OffOnly, Some(true), "x x x"),
            (Architecture::Laguna, "ls10", CcEnable::No, None, "off off ppcie"),
        ];
        for (architecture, chip, cc_enable, has_c2c, expected) in table {
            let support = support(architecture, chip, cc_enable, has_c2c);
            let target = |mode| support.target(mode).map_or("x", Mode::as_str);
            let found = [Mode::On, Mode::Devtools, Mode::Ppcie].map(target).join(" ");
            assert_eq!(found, expected, "{chip} {cc_enable:?} {has_c2c:?}");
            assert_eq!(target(Mode::Off), "off");
        }
    }

    #[test]
    fn boards_with_c2c_need_the_firmware_s_word() {
        let board = support(Architecture::Blackwell, "gb100", CcEnable::OffOnly, Some(true));
        assert!(board.allows(Mode::Off, 0).is_ok() && board.allows(Mode::On, BMSAI).is_ok());
        let text = board.allows(Mode::On, !BMSAI).unwrap_err().to_string();
        assert!(text.contains("C2C") && text.contains("status bit 8"), "{text}");
        let other = support(Architecture::Blackwell, "gb100", CcEnable::Yes, Some(false));
        assert!(other.allows(Mode::On, 0).is_ok());
    }
}
