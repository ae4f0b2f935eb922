//! The device table: `data/devices.csv`, turned into a static by `build.rs`.

use crate::function::{
    Architecture, BarFirewall, BitField, CcEnable, DeviceKind, FormFactor, FspTransport, Model, NVIDIA,
};

struct Row {
    first: u16,
    last: u16,
    is_range: bool,
    subsystem: Option<u16>,
    kind: DeviceKind,
    name: &'static str,
    pci_ids_name: Option<&'static str>,
    architecture: Architecture,
    chip: &'static str,
    form_factor: Option<FormFactor>,
    has_c2c: Option<bool>,
    module_id_bit_flip: Option<bool>,
    cc_query: bool,
    cc_enable: CcEnable,
    ppcie: bool,
    fsp_transport: Option<FspTransport>,
    boot_register: Option<u32>,
    cc_register: Option<BitField>,
    ppcie_register: Option<BitField>,
    bar_firewall: Option<BarFirewall>,
}

#[allow(clippy::unreadable_literal, reason = "the generated rows are for the compiler")]
mod rows {
    use super::{Architecture, BarFirewall, BitField, CcEnable, DeviceKind, FormFactor, FspTransport, Row};

    include!(concat!(env!("OUT_DIR"), "/devices.rs"));
}
use rows::ROWS;

/// What `vendor` and `class` say a function is: the classes match exactly (gpu-cc-protocol section 1.1).
pub(crate) fn classify(vendor: u16, class: u32) -> DeviceKind {
    match (vendor, class) {
        (NVIDIA, 0x03_0000 | 0x03_0200) => DeviceKind::Gpu,
        (NVIDIA, 0x06_8000) => DeviceKind::NvSwitch,
        (NVIDIA, _) => DeviceKind::NvidiaOther,
        _ => DeviceKind::Foreign,
    }
}

impl Model {
    /// What the device table knows of an NVIDIA GPU or NVSwitch; the most specific row wins: device and subsystem id,
    /// then device id, then range of device ids. None for other kinds and for models the table does not know.
    pub fn lookup(kind: DeviceKind, device: u16, subsystem_device: Option<u16>) -> Option<Self> {
        ROWS.iter()
            .filter(|row| row.kind == kind && (row.first..=row.last).contains(&device))
            .filter(|row| row.subsystem.is_none() || row.subsystem == subsystem_device)
            .max_by_key(|row| (row.subsystem.is_some(), !row.is_range))
            .map(|row| Self {
                name: row.name.to_owned(),
                architecture: row.architecture,
                chip: row.chip.to_owned(),
                form_factor: row.form_factor,
                has_c2c: row.has_c2c,
                module_id_bit_flip: row.module_id_bit_flip,
                cc_query: row.cc_query,
                cc_enable: row.cc_enable,
                ppcie: row.ppcie,
                fsp_transport: row.fsp_transport,
                boot_register: row.boot_register,
                cc_register: row.cc_register,
                ppcie_register: row.ppcie_register,
                bar_firewall: row.bar_firewall,
            })
    }

    /// Whether the table knows no name of its own for this model, only its chip (`Generic-GB202`).
    pub fn is_generic(&self) -> bool {
        self.name.starts_with("Generic-")
    }
}

/// The table's copy of the PCI ID repository's text for an NVIDIA device id.
pub(crate) fn pci_ids_name(device: u16) -> Option<&'static str> {
    ROWS.iter().find(|row| row.first == device && row.pci_ids_name.is_some()).and_then(|row| row.pci_ids_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(device: u16, subsystem: u16) -> Model {
        Model::lookup(DeviceKind::Gpu, device, Some(subsystem)).unwrap()
    }

    #[test]
    fn classes_match_exactly() {
        for (vendor, class, kind) in [
            (0x10de, 0x03_0000, DeviceKind::Gpu),
            (0x10de, 0x03_0200, DeviceKind::Gpu),
            (0x10de, 0x06_8000, DeviceKind::NvSwitch),
            (0x10de, 0x03_0001, DeviceKind::NvidiaOther),
            (0x10de, 0x04_0300, DeviceKind::NvidiaOther),
            (0x10de, 0x06_0400, DeviceKind::NvidiaOther),
            (0x8086, 0x03_0200, DeviceKind::Foreign),
        ] {
            assert_eq!(classify(vendor, class), kind, "{vendor:04x} {class:06x}");
        }
    }

    #[test]
    fn the_most_specific_row_wins() {
        // device, subsystem, name, form factor, C2C, CC can be enabled
        type Case = (u16, u16, &'static str, Option<FormFactor>, Option<bool>, CcEnable);
        let cases: [Case; 11] = [
            (0x2330, 0x16c1, "H100", Some(FormFactor::Sxm), Some(false), CcEnable::Yes),
            (0x2330, 0xffff, "H100", None, None, CcEnable::Yes),
            (0x2331, 0x1626, "H100", Some(FormFactor::Pcie), Some(false), CcEnable::Yes),
            (0x2335, 0x18bf, "H200", Some(FormFactor::Sxm), Some(false), CcEnable::Yes),
            (0x237f, 0, "Generic-GH100", None, None, CcEnable::Yes),
            (0x2bb5, 0x0000, "Generic-GB202", None, None, CcEnable::Yes),
            (0x2bb5, 0x204e, "RTX-PRO-6000", None, Some(false), CcEnable::Yes),
            (0x31c2, 0x20e5, "GB300", Some(FormFactor::Sxm), Some(false), CcEnable::Yes),
            (0x31c2, 0x21f1, "GB300", Some(FormFactor::Sxm), Some(true), CcEnable::OffOnly),
            (0x31c2, 0x1234, "GB300", None, None, CcEnable::BySubsystem),
            (0x20b0, 0x1450, "Generic-GA100", None, None, CcEnable::No),
        ];
        for (device, subsystem, name, form_factor, has_c2c, cc_enable) in cases {
            let model = gpu(device, subsystem);
            let found = (model.name.as_str(), model.form_factor, model.has_c2c, model.cc_enable);
            assert_eq!(found, (name, form_factor, has_c2c, cc_enable), "{device:04x}/{subsystem:04x}");
        }
    }

    #[test]
    fn registers_are_those_of_the_generation() {
        let hopper = gpu(0x2330, 0x16c1);
        assert_eq!(hopper.boot_register, Some(0x2_00bc));
        assert_eq!(hopper.cc_register, Some(BitField { offset: 0x11_82cc, high: 1, low: 0 }));
        assert_eq!(hopper.ppcie_register, Some(BitField { offset: 0x11_82cc, high: 5, low: 5 }));
        assert_eq!(hopper.bar_firewall, None);
        assert_eq!(hopper.fsp_transport, Some(FspTransport::EmemChannel2));

        let b200 = gpu(0x2901, 0x1999);
        assert_eq!((b200.boot_register, b200.ppcie), (Some(0x2_00bc), false));
        assert_eq!(b200.cc_register, Some(BitField { offset: 0x590, high: 1, low: 0 }));
        assert_eq!(b200.bar_firewall, Some(BarFirewall::Dvsec { vendor: 0x10de, id: 0, offset: 8, bit: 20 }));

        let rtx = gpu(0x2bb5, 0x204e);
        assert_eq!(rtx.boot_register, Some(0xad_00bc));
        assert_eq!(rtx.bar_firewall, Some(BarFirewall::Vsec { id: 1, revision: 1, offset: 0x14, bit: 24 }));

        let switch = Model::lookup(DeviceKind::NvSwitch, 0x22a3, Some(0x1796)).unwrap();
        assert_eq!((switch.architecture, switch.chip.as_str(), switch.ppcie), (Architecture::Laguna, "ls10", true));
        assert_eq!(switch.boot_register, Some(0x6_60bc));
        assert_eq!(switch.ppcie_register, Some(BitField { offset: 0x2_8c50, high: 0, low: 0 }));
        assert_eq!((switch.cc_query, switch.cc_enable), (false, CcEnable::No));
    }

    #[test]
    fn newer_upstream_rules_are_used() {
        // gpu-cc-protocol section 12: the Hopper range starts at 0x2300.
        assert_eq!(Model::lookup(DeviceKind::Gpu, 0x22ff, None), None);
        assert!(Model::lookup(DeviceKind::Gpu, 0x2300, None).is_some());
        assert_eq!(gpu(0x2342, 0x16eb).cc_enable, CcEnable::OffOnly);
    }

    #[test]
    fn a_class_that_does_not_fit_finds_nothing() {
        assert_eq!(Model::lookup(DeviceKind::NvSwitch, 0x2330, Some(0x16c1)), None);
        assert_eq!(Model::lookup(DeviceKind::Gpu, 0x22a3, None), None);
        assert_eq!(Model::lookup(DeviceKind::NvidiaOther, 0x2330, None), None);
    }

    #[test]
    fn every_row_is_consistent() {
        for row in ROWS {
            let hopper_or_newer = row.architecture >= Architecture::Hopper && row.kind == DeviceKind::Gpu;
            assert_eq!(row.cc_query, hopper_or_newer, "{:04x}", row.first);
            assert_eq!(row.cc_query, row.cc_register.is_some(), "{:04x}", row.first);
            assert_eq!(row.ppcie, row.ppcie_register.is_some(), "{:04x}", row.first);
            assert_eq!(row.fsp_transport.is_some(), row.boot_register.is_some(), "{:04x}", row.first);
        }
    }
}
