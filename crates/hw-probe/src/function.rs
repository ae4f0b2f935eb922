//! What sysfs says of one PCI function, and what ccnode makes of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Bdf;

/// NVIDIA's PCI vendor id.
pub const NVIDIA: u16 = 0x10de;

/// Stands in [`PciFunction::reset_methods`] for whatever the kernel would use, on kernels that offer `reset` but have no
/// `reset_method` (before 5.15).
pub const RESET_UNNAMED: &str = "unnamed";

/// Stands in [`PciFunction::driver`] when a driver is bound whose name cannot be read: never mistake it for none.
pub const DRIVER_UNREADABLE: &str = "(unreadable)";

/// One PCI function as sysfs showed it at the time of the scan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PciFunction {
    /// PCI address.
    pub bdf: Bdf,
    /// Inode of its folder in sysfs. The kernel gives every folder there a number of its own and none twice in a boot, so
    /// another number is another device, or one that was taken out and put back (its knobs may have changed meanwhile).
    /// It means nothing on another machine or in another boot, and so is not part of what is recorded.
    #[serde(skip)]
    pub instance: Option<u64>,
    /// Vendor id (`0x10de` is NVIDIA).
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id, where sysfs has it.
    pub subsystem_vendor: Option<u16>,
    /// Subsystem device id, where sysfs has it.
    pub subsystem_device: Option<u16>,
    /// Class code, 24 bits: base class, sub-class, programming interface.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// What the class and the ids say it is.
    pub kind: DeviceKind,
    /// The device table's knowledge of this model; present for every NVIDIA GPU and NVSwitch that the table knows.
    pub model: Option<Model>,
    /// Product name for people: the table's (`H100`), or where that is only generic or missing the PCI ID repository's
    /// (`GB202 [GeForce RTX 5090]`), else the generic one, else none.
    pub name: Option<String>,
    /// Name of the bound driver.
    pub driver: Option<String>,
    /// Text of `driver_override`, when one is set (the kernel prints `(null)` for none).
    pub driver_override: Option<String>,
    /// Number of the IOMMU group.
    pub iommu_group: Option<u32>,
    /// VFIO character device, when a VFIO driver is bound and the kernel has cdevs.
    pub vfio_cdev: Option<VfioCdev>,
    /// NUMA node; none where the kernel says -1.
    pub numa_node: Option<u32>,
    /// Assigned memory BARs and I/O BARs by their true resource numbers (0 to 5).
    pub bars: Vec<Bar>,
    /// Words of `reset_method`, in the order the kernel tries them; empty when the function cannot be reset;
    /// [`RESET_UNNAMED`] alone when the kernel does not say how.
    pub reset_methods: Vec<String>,
    /// Runtime power state.
    pub power: Power,
    /// PCI Express link, where the function has one; not read, and so none, while the function is in D3cold.
    pub link: Option<Link>,
    /// Whether it is an SR-IOV virtual function (`physfn` exists).
    pub is_virtual_function: bool,
    /// The bridges above this function, nearest first, the root port last; empty on a root bus.
    pub upstream: Vec<Bdf>,
    /// Functions that the kernel links to this one as consumers (a GPU's audio function, usually).
    pub consumers: Vec<Bdf>,
    /// Text of `modalias`, without the line end.
    pub modalias: Option<String>,
}

impl PciFunction {
    /// Whether it is an NVIDIA GPU, of whatever generation.
    pub fn is_gpu(&self) -> bool {
        self.kind == DeviceKind::Gpu
    }

    /// Product name with the board's form, for people; its ids where it has no name.
    pub fn product(&self) -> String {
        let Self { name, vendor, device, model, .. } = self;
        let name = name.clone().unwrap_or_else(|| format!("{vendor:04x}:{device:04x}"));
        match model.as_ref().and_then(|model| model.form_factor) {
            Some(FormFactor::Pcie) => name + " PCIe",
            Some(FormFactor::Sxm) => name + " SXM",
            None => name,
        }
    }

    /// Whether it is an NVSwitch.
    pub fn is_nvswitch(&self) -> bool {
        self.kind == DeviceKind::NvSwitch
    }

    /// Whether the bound driver is a VFIO driver: `vfio-pci`, a variant such as `nvgrace_gpu_vfio_pci`, or any driver
    /// under which the kernel made a VFIO character device. The one notion of it in all of ccnode.
    pub fn is_vfio_bound(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| self.vfio_cdev.is_some() || is_vfio(driver))
    }

    /// Whether its driver keeps VFIO from taking its IOMMU group: neither a VFIO driver nor one that the kernel lets share the
    /// group (`pcieport` of bridges, `pci-stub`). A function without a driver does not.
    pub fn blocks_its_group(&self) -> bool {
        !self.is_vfio_bound() && self.driver.as_deref().is_some_and(blocks)
    }
}

fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("_vfio_pci") || driver.ends_with("-vfio-pci")
}

fn blocks(driver: &str) -> bool {
    !matches!(driver, "pcieport" | "pci-stub") && !is_vfio(driver)
}

/// A function whose vendor, device or class cannot be read, so that it is not known what it is. What failed is among
/// [`crate::Inventory::problems`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unclassified {
    /// PCI address.
    pub bdf: Bdf,
    /// Vendor id, if that could be read.
    pub vendor: Option<u16>,
    /// Device id, if that could be read.
    pub device: Option<u16>,
    /// Class code, if that could be read.
    pub class: Option<u32>,
    /// Name of the bound driver.
    pub driver: Option<String>,
    /// Number of the IOMMU group.
    pub iommu_group: Option<u32>,
}

impl Unclassified {
    /// Whether it may be a GPU or an NVSwitch: its vendor is NVIDIA or not known.
    pub fn may_be_nvidia(&self) -> bool {
        self.vendor.is_none_or(|vendor| vendor == NVIDIA)
    }

    /// As [`PciFunction::blocks_its_group`].
    pub fn blocks_its_group(&self) -> bool {
        self.driver.as_deref().is_some_and(blocks)
    }
}

impl fmt::Display for Unclassified {
    /// What is not known, and what is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bdf: _, vendor, device, class, driver, iommu_group: _ } = self;
        let missing = [("vendor", vendor.is_none()), ("device", device.is_none()), ("class", class.is_none())];
        let missing: Vec<&str> = missing.iter().filter(|(_, missing)| *missing).map(|(name, _)| *name).collect();
        write!(f, "It cannot be told what this is: {} cannot be read", missing.join(" and "))?;
        if let Some(vendor) = vendor {
            write!(f, "; vendor {vendor:#06x}")?;
        }
        if let Some(device) = device {
            write!(f, "; device {device:#06x}")?;
        }
        if let Some(class) = class {
            write!(f, "; class {class:#08x}")?;
        }
        driver.as_ref().map_or(Ok(()), |driver| write!(f, "; bound to {driver}"))
    }
}

/// What a function is, by vendor and class (gpu-cc-protocol section 1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// NVIDIA, class 0x030000 (VGA) or 0x030200 (3D).
    Gpu,
    /// NVIDIA, class 0x068000 (other bridge).
    #[serde(rename = "nvswitch")]
    NvSwitch,
    /// NVIDIA, any other class: audio and USB functions of boards, bridges.
    NvidiaOther,
    /// Another vendor's.
    Foreign,
}

/// One resource line of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bar {
    /// Resource number, the N of `resourceN`: 64-bit BARs leave a gap.
    pub number: u8,
    /// First bus address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// Whether it is I/O space rather than memory.
    pub io: bool,
    /// Whether it is a 64-bit memory BAR.
    pub is_64bit: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
}

/// The VFIO character device of a bound function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfioCdev {
    /// Entry under `vfio-dev/` (`vfio0`); its node is `/dev/vfio/devices/<name>`.
    pub name: String,
    /// Major number, from its `dev` file.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Runtime power management of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Power {
    /// `power/control`: `auto` or `on`.
    pub control: Option<String>,
    /// `power/runtime_status`: `active`, `suspended`, ...
    pub runtime_status: Option<String>,
    /// `power_state`: `D0`, `D3hot`, `D3cold`, `unknown`.
    pub state: Option<String>,
}

/// Speed and width of a PCI Express link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// `current_link_speed` as the kernel words it (`32.0 GT/s PCIe`).
    pub speed: String,
    /// Lanes in use; 0 when the link is down.
    pub width: u8,
    /// `max_link_speed`.
    pub max_speed: String,
    /// Most lanes.
    pub max_width: u8,
}

/// GPU and NVSwitch generations, oldest first, so that "Hopper or newer" is a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// GK1xx.
    Kepler,
    /// GM1xx, GM2xx.
    Maxwell,
    /// GP1xx.
    Pascal,
    /// GV1xx.
    Volta,
    /// TU1xx.
    Turing,
    /// GA1xx.
    Ampere,
    /// AD1xx.
    Ada,
    /// GH100.
    Hopper,
    /// GB1xx, GB2xx.
    Blackwell,
    /// NVSwitch LR10.
    Limerock,
    /// NVSwitch LS10.
    Laguna,
}

/// What the device table (devices.csv) knows of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// The table's name: `H100`, `RTX-PRO-6000`, `Generic-GB202`.
    pub name: String,
    /// Generation.
    pub architecture: Architecture,
    /// Chip in lower case: `gh100`, `gb202`, `ls10`.
    pub chip: String,
    /// Board form, where the subsystem id tells.
    pub form_factor: Option<FormFactor>,
    /// Whether the GPU hangs on a Grace CPU by NVLink-C2C; none where the table cannot tell without the subsystem id.
    pub has_c2c: Option<bool>,
    /// Whether a module's id has one bit flipped on this board; none where the table cannot tell.
    pub module_id_bit_flip: Option<bool>,
    /// Whether the confidential-computing state can be read.
    pub cc_query: bool,
    /// Whether confidential computing can be enabled.
    pub cc_enable: CcEnable,
    /// Whether it takes part in protected PCIe (Hopper GPUs and LS10 switches).
    pub ppcie: bool,
    /// How its firmware is spoken to; none for devices without an FSP.
    pub fsp_transport: Option<FspTransport>,
    /// BAR0 offset of the boot status word (gpu-cc-protocol section 5.1); none for devices without an FSP.
    pub boot_register: Option<u32>,
    /// Where the effective CC mode is shown (gpu-cc-protocol section 3).
    pub cc_register: Option<BitField>,
    /// Where the effective PPCIe mode is shown.
    pub ppcie_register: Option<BitField>,
    /// What tells whether BAR0 is still closed after a reset; none for models without a BAR firewall.
    pub bar_firewall: Option<BarFirewall>,
}

/// Bits of a 32-bit BAR0 register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitField {
    /// Offset in BAR0, in bytes, a multiple of 4.
    pub offset: u32,
    /// Highest bit, 0 to 31.
    pub high: u8,
    /// Lowest bit, not above `high`.
    pub low: u8,
}

impl BitField {
    /// The field's value in the register's `word`.
    pub fn extract(self, word: u32) -> u32 {
        let width = u32::from(self.high.saturating_sub(self.low)) + 1;
        let mask = u32::MAX >> 32_u32.saturating_sub(width);
        word.checked_shr(u32::from(self.low)).unwrap_or(0) & mask
    }
}

/// The configuration-space bit that is 1 while BAR0 is closed (gpu-cc-protocol sections 5.2 and 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BarFirewall {
    /// In a designated vendor-specific capability (id 0x23).
    Dvsec {
        /// Vendor of the capability.
        vendor: u16,
        /// Its DVSEC id.
        id: u16,
        /// Offset of the 32-bit word from the capability's start, in bytes.
        offset: u16,
        /// Bit of the word.
        bit: u8,
    },
    /// In a vendor-specific capability (id 0x0b).
    Vsec {
        /// The capability's VSEC id.
        id: u16,
        /// Its revision.
        revision: u8,
        /// Offset of the 32-bit word from the capability's start, in bytes.
        offset: u16,
        /// Bit of the word.
        bit: u8,
    },
}

/// Whether a model's confidential-computing mode can be turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CcEnable {
    /// Yes.
    Yes,
    /// No.
    No,
    /// Only `off` is accepted (C2C parts without the firmware bit that says otherwise).
    OffOnly,
    /// Depends on a subsystem id that the table does not know.
    BySubsystem,
}

/// How a board is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FormFactor {
    /// Add-in card.
    Pcie,
    /// Module on an HGX baseboard.
    Sxm,
}

/// Mailbox through which the FSP (the device's security processor) is spoken to (gpu-cc-protocol section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FspTransport {
    /// EMEM queue, channel 2: Hopper GPUs and LS10 switches.
    EmemChannel2,
    /// MNOC mailbox, port 0: Blackwell GPUs.
    MnocPort0,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_cut_out_of_words() {
        for (high, low, word, value) in [
            (1, 0, 0xffff_fffe, 2),
            (5, 5, 0x20, 1),
            (5, 5, 0xffff_ffdf, 0),
            (31, 0, 0x1234_5678, 0x1234_5678),
            (31, 31, 1 << 31, 1),
        ] {
            assert_eq!(BitField { offset: 0, high, low }.extract(word), value, "[{high}:{low}] of {word:#x}");
        }
    }
}
