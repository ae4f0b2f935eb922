//! What differs from chip to chip: registers, budgets, how the status word is read.

use std::time::Duration;

use hw_probe::{Architecture, CcEnable, PciFunction};

use crate::clock::Wait;
use crate::error::Fault;
use crate::mode::{Effective, Mode};

/// PMC_BOOT_0, the same on every chip.
pub(crate) const BOOT_0: u32 = 0x0;

/// Values of PMC_BOOT_0 that mean that the device has locked itself (gpu-cc-protocol section 1.6).
pub(crate) const BOOT_0_SECURITY_FAULT: [u32; 2] = [0xbadf_0200, 0xbad0_0200];

/// First of the four words of the FSP's status scratch, the same on every chip (gpu-cc-protocol section 5.1).
pub(crate) const FSP_STATUS: u32 = 0x8f_0320;

/// Value of the boot scratch register that means booted (gpu-cc-protocol section 5.1).
pub(crate) const BOOTED: u32 = 0xff;

/// One chip, as far as its confidential-computing control goes.
#[derive(Debug)]
pub struct Chip {
    /// Name in lower case, as in the device table.
    pub name: &'static str,
    /// Boot scratch register.
    pub(crate) boot: u32,
    /// How long a boot may take, and how often to look.
    pub(crate) boot_wait: Wait,
    /// Register and bit that mean firmware recovery.
    pub(crate) recovery: (u32, u32),
    /// Register that holds the mode the device booted with.
    pub(crate) status: u32,
    /// Reads that register's value.
    pub(crate) decode: fn(u32) -> Effective,
    /// Word within the vendor-specific capability (id 1) that holds the security fault.
    pub(crate) fault_word: u16,
    /// EMEM channel to speak with the FSP.
    pub(crate) emem_channel: u32,
    /// Value of the BAR0 decoupler knob in the modes that want it on.
    pub(crate) decoupler_on: u16,
}

/// Hopper GPUs.
pub static GH100: Chip = Chip {
    name: "gh100",
    boot: 0x2_00bc,
    boot_wait: Wait::new(Duration::from_secs(5), Duration::from_millis(10)),
    recovery: (0x2_0120, 1 << 30),
    status: 0x11_82cc,
    decode: decode_gh100,
    fault_word: 0x10,
    emem_channel: 2,
    decoupler_on: 2,
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

/// What may be done with a device.
#[derive(Clone, Debug)]
pub struct Support {
    /// Its chip.
    pub chip: &'static Chip,
    /// Product name, for messages.
    pub model: String,
    cc_enable: CcEnable,
}

impl Support {
    /// What this version can do with `function`, or why nothing.
    pub fn of(function: &PciFunction) -> Result<Self, Fault> {
        let unsupported = |model: &str, reason| Err(Fault::Unsupported { model: model.to_owned(), reason });
        let Some(model) = &function.model else {
            if function.is_gpu() || function.is_nvswitch() {
                return Err(Fault::UnknownDevice { vendor: function.vendor, device: function.device });
            }
            return unsupported("Not a GPU", "only GPUs and NVSwitches have a confidential-computing mode");
        };
        let architecture = model.architecture;
        if function.is_virtual_function {
            return unsupported(&model.name, "an SR-IOV virtual function has no mode of its own");
        }
        match architecture {
            Architecture::Hopper if model.chip == GH100.name => {
                let c2c = model.has_c2c == Some(true) && model.cc_enable == CcEnable::Yes;
                let cc_enable = if c2c { CcEnable::OffOnly } else { model.cc_enable };
                Ok(Self { chip: &GH100, model: model.name.clone(), cc_enable })
            }
            Architecture::Blackwell => {
                unsupported(&model.name, "the firmware mailbox of Blackwell GPUs is not supported by this version")
            }
            Architecture::Laguna => unsupported(&model.name, "NVSwitches are not supported by this version"),
            Architecture::Limerock => {
                unsupported(&model.name, "this NVSwitch has neither confidential computing nor protected PCIe")
            }
            Architecture::Hopper => unsupported(&model.name, "this Hopper chip is not known"),
            _ => unsupported(&model.name, "GPUs before Hopper have no confidential computing"),
        }
    }

    /// Whether `mode` can be set, or why not.
    pub fn check(&self, mode: Mode) -> Result<(), Fault> {
        let reason = match (mode, self.cc_enable) {
            (Mode::Ppcie, _) => "ppcie needs the board's NVSwitches, which this version does not support",
            (Mode::Off, _) | (_, CcEnable::Yes) => return Ok(()),
            (_, CcEnable::No) => "confidential computing cannot be enabled on this model",
            (_, CcEnable::OffOnly) => "confidential computing cannot be enabled on models with NVLink-C2C",
            (_, CcEnable::BySubsystem) => {
                "whether confidential computing can be enabled depends on the board, and its subsystem id is unknown"
            }
        };
        Err(Fault::Unsupported { model: self.model.clone(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{function, model};

    #[test]
    fn hopper_status_is_masked_and_never_guessed() {
        let table = [
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
        for (status, effective) in table {
            assert_eq!((GH100.decode)(status), effective, "{status:#x}");
        }
    }

    #[test]
    fn what_cannot_be_driven_yet_says_so_by_name() {
        let with = |architecture, chip: &str| {
            let mut function = function("0000:41:00.0");
            function.model = Some(model(architecture, chip));
            Support::of(&function).map(|support| support.chip.name).map_err(|fault| fault.to_string())
        };
        assert_eq!(with(Architecture::Hopper, "gh100"), Ok("gh100"));
        for (architecture, chip, reason) in [
            (Architecture::Blackwell, "gb100", "Blackwell"),
            (Architecture::Laguna, "ls10", "NVSwitches"),
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
        unknown.kind = hw_probe::DeviceKind::NvidiaOther;
        assert_eq!(Support::of(&unknown).unwrap_err().code(), "Unsupported");
    }

    #[test]
    fn modes_are_refused_where_the_model_has_not_got_them() {
        let check = |cc_enable, has_c2c, mode| {
            let mut function = function("0000:41:00.0");
            let model = function.model.as_mut().unwrap();
            (model.cc_enable, model.has_c2c) = (cc_enable, has_c2c);
            Support::of(&function).unwrap().check(mode).is_ok()
        };
        for mode in [Mode::On, Mode::Devtools] {
            assert!(check(CcEnable::Yes, Some(false), mode));
            assert!(check(CcEnable::Yes, None, mode));
            assert!(!check(CcEnable::Yes, Some(true), mode));
            assert!(!check(CcEnable::OffOnly, Some(true), mode));
            assert!(!check(CcEnable::BySubsystem, None, mode));
            assert!(!check(CcEnable::No, None, mode));
        }
        for cc_enable in [CcEnable::Yes, CcEnable::No, CcEnable::OffOnly, CcEnable::BySubsystem] {
            assert!(check(cc_enable, None, Mode::Off));
            assert!(!check(cc_enable, None, Mode::Ppcie));
        }
    }
}
