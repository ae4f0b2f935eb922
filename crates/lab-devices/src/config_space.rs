//! PCI configuration space of a virtual device: 4096 bytes, laid out as read from a real H200 (h200-observed),
//! less what the rig cannot carry (interrupts: no MSI, no MSI-X, no interrupt pin).

use crate::kind::{Chip, ModelKind};
use crate::spec::DeviceSpec;
use crate::undecided;

/// Bytes of configuration space. Fewer would mean "not PCI Express".
pub(crate) const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const CACHE_LINE: usize = 0x0c;
const PM: usize = 0x40;
const PMCSR: usize = PM + 4;
const PCIE: usize = 0x60;
/// Offset of DEVCTL, whose bit 15 starts an FLR.
pub(crate) const DEVCTL: usize = PCIE + 8;
/// Offset of DEVCAP, whose bit 28 says that there are FLRs.
pub(crate) const DEVCAP: usize = PCIE + 4;
/// DEVCAP of a device that can do FLRs, as observed (h200-observed).
pub(crate) const DEVCAP_FLR: u32 = 0x112c_8021;
const LNKCTL: usize = PCIE + 0x10;
const DEVCTL2: usize = PCIE + 0x28;
const LNKCTL2: usize = PCIE + 0x30;
const LTR_LATENCY: usize = 0x130;
const AER: usize = 0x1b8;
/// VSEC id 1, revision 1, of GH100 and GB20x; security fault at +0x10, GB20x's BAR firewall at +0x14, bit 24
/// (gpu-cc-protocol sections 1.6 and 5.2).
const VSEC: usize = 0x2a4;
pub(crate) const VSEC_FAULT: usize = VSEC + 0x10;
pub(crate) const VSEC_FIREWALL: usize = VSEC + 0x14;
/// DVSEC of vendor 10de, id 0, of GB10x: flags beside the id at +8, security fault at +0x14.
const DVSEC: usize = 0xaf0;
pub(crate) const DVSEC_FLAGS: usize = DVSEC + 0x08;
pub(crate) const DVSEC_FAULT: usize = DVSEC + 0x14;
/// Bit 25 of this dword is the one that the kernel's quirk for NVIDIA display functions sets (virtual-gpu-rig
/// section 6, item 6).
const HDA: usize = 0x488;

/// Max_Payload_Size in DEVCTL survives an FLR (PCI Express specification).
const DEVCTL_PAYLOAD: u8 = 0xe0;

/// What a write to configuration space asks of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ConfigEffect {
    None,
    FunctionReset,
}

pub(crate) struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    /// Bits that store what is written. All others, BARs, ROM and interrupt line among them, are read-only here:
    /// QEMU sizes and places BARs by itself and only forwards the writes (virtual-gpu-rig section 7, item 7).
    writable: Box<[u8; SIZE]>,
    defaults: Box<[u8; SIZE]>,
}

impl ConfigSpace {
    pub(crate) fn new(spec: &DeviceSpec) -> ConfigSpace {
        let mut defaults = Box::new([0; SIZE]);
        for (offset, value) in contents(spec) {
            put(&mut defaults, offset, value);
        }
        let mut writable = Box::new([0; SIZE]);
        let masks = [
            (COMMAND, 0x0547),
            (CACHE_LINE, 0xff),
            (PMCSR, 0x3),
            (DEVCTL, 0x7fff),
            (LNKCTL, 0x0fdb),
            (DEVCTL2, 0xffff),
            (LNKCTL2, 0xffff),
            (HDA, 1 << 25),
        ];
        let gpu_masks = [
            (LTR_LATENCY, 0x1fff_1fff),
            (AER + 0x08, 0x07ff_f031),
            (AER + 0x0c, 0x07ff_f031),
            (AER + 0x14, 0x0000_f1c1),
            (AER + 0x18, 0x0000_0140),
        ];
        for (offset, mask) in masks {
            put(&mut writable, offset, mask);
        }
        if spec.model.is_gpu() {
            for (offset, mask) in gpu_masks {
                put(&mut writable, offset, mask);
            }
        }
        ConfigSpace { bytes: defaults.clone(), writable, defaults }
    }

    /// Bytes past the end read all ones.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in addresses(offset).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> ConfigEffect {
        let mut effect = ConfigEffect::None;
        for (at, &byte) in addresses(offset).zip(data) {
            if at >= SIZE {
                break;
            }
            let mask = self.writable[at];
            let new = (self.bytes[at] & !mask) | (byte & mask);
            match at {
                // D1 and D2 are not supported; asking for them changes nothing.
                PMCSR if matches!(new & 3, 1 | 2) => {}
                _ => self.bytes[at] = new,
            }
            if at == DEVCTL + 1 && byte & 0x80 != 0 {
                effect = ConfigEffect::FunctionReset;
            }
        }
        effect
    }

    /// Sets a dword that the device itself changes, whatever a host may write.
    pub(crate) fn set(&mut self, offset: usize, value: u32) {
        put(&mut self.bytes, offset, value);
    }

    /// Puts the function into D3hot.
    pub(crate) fn sleep(&mut self) {
        self.bytes[PMCSR] |= 0x3;
    }

    /// Whether BAR accesses reach the device: memory decode is on and the power state is D0.
    pub(crate) fn decodes_memory(&self) -> bool {
        self.bytes[COMMAND] & 0x2 != 0 && matches!(self.bytes[PMCSR] & 0x3, 0)
    }

    /// What a function-level reset does: everything but link settings, payload size and sticky registers.
    pub(crate) fn function_reset(&mut self) {
        for range in [COMMAND..COMMAND + 2, CACHE_LINE..CACHE_LINE + 1, PMCSR..PMCSR + 2, DEVCTL2..DEVCTL2 + 2] {
            self.bytes[range.clone()].copy_from_slice(&self.defaults[range]);
        }
        let payload = self.bytes[DEVCTL] & DEVCTL_PAYLOAD;
        self.bytes[DEVCTL] = (self.defaults[DEVCTL] & !DEVCTL_PAYLOAD) | payload;
        self.bytes[DEVCTL + 1] = self.defaults[DEVCTL + 1];
        if self.writable[LTR_LATENCY] != 0 {
            self.bytes[LTR_LATENCY..LTR_LATENCY + 4].copy_from_slice(&self.defaults[LTR_LATENCY..LTR_LATENCY + 4]);
        }
        if undecided::FLR_CLEARS_HDA_BIT {
            self.bytes[HDA..HDA + 4].copy_from_slice(&self.defaults[HDA..HDA + 4]);
        }
    }

    /// What a bus reset or a power cycle does: everything.
    pub(crate) fn bus_reset(&mut self) {
        self.bytes.copy_from_slice(&*self.defaults);
    }
}

/// The addresses of an access that begins at `offset`; it may begin anywhere, and never wraps.
pub(crate) fn addresses(offset: u64) -> impl Iterator<Item = usize> {
    (0..).map(move |by| usize::try_from(offset.saturating_add(by)).unwrap_or(usize::MAX))
}

fn put(bytes: &mut [u8; SIZE], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// The dwords that are not zero after a bus reset.
fn contents(spec: &DeviceSpec) -> Vec<(usize, u32)> {
    let kind = spec.model;
    let revision = match kind {
        ModelKind::Nic => 0,
        _ if kind.is_switch() => undecided::SWITCH_REVISION,
        _ => 0xa1,
    };
    let [serial_high, serial_low] = {
        let serial = spec.serial.unwrap_or_else(|| name_hash(&spec.name));
        [dword(serial >> 32), dword(serial)]
    };
    let mut dwords = vec![
        (0x00, u32::from(kind.device_id()) << 16 | u32::from(kind.vendor_id())),
        (0x04, 0x0010_0000),
        (0x08, kind.class() << 8 | u32::from(revision)),
        (0x2c, u32::from(kind.subsystem_id()) << 16 | u32::from(kind.vendor_id())),
        (0x34, 0x40),
        (0x3c, 0xff),
        // Power management, D0 and D3hot, no soft reset.
        (PM, 0x0013_6001),
        (PMCSR, 0x0000_0008),
        // PCI Express endpoint: FLR, link 32 GT/s x16.
        (PCIE, 0x0002_0010),
        (DEVCAP, DEVCAP_FLR),
        (DEVCTL, u32::from(undecided::DEVCTL_DEFAULT)),
        (PCIE + 0x0c, 0x0045_7905),
        (LNKCTL, 0x1105_0000),
        (PCIE + 0x24, 0x0007_0813),
        (PCIE + 0x2c, 0x0180_003e),
        (LNKCTL2, 0x005e_0005),
    ];
    let serial = |at: usize, next: u32| [(at, next << 20 | 0x0001_0003), (at + 4, serial_low), (at + 8, serial_high)];
    if kind.is_gpu() {
        dwords.extend([
            (0x10, 0x0c),
            (0x18, 0x0c),
            (0x20, 0x0c),
            // The entries of id 0 are capabilities that the real device's hypervisor hid. A walker must step over them.
            (0x100, 0x12c0_0000),
            (0x12c, 0x1341_0018),
            (0x134, 0x1b81_0000),
            (AER, 0x2482_0001),
            (AER + 0x08, 0x0018_0000),
            (AER + 0x0c, 0x0046_3030),
            (AER + 0x18, 0x0000_00a0),
            (0x248, 0x2501_0000),
        ]);
        // What follows is known where it lies, not what lies around it: the rest is as on the H200 that was read.
        match kind.chip() {
            Chip::Hopper => {
                dwords.extend([(0x250, 0x2a41_0000), (VSEC, 0x2f01_000b), (VSEC + 4, 0x0141_0001)]);
                dwords.extend([(VSEC + 8, 0x0001_0002)]);
                dwords.extend(serial(0x2f0, 0));
            }
            Chip::Gb20x => {
                dwords.extend([(0x250, 0x2a41_0000), (VSEC, 0x2f01_000b), (VSEC + 4, 0x0181_0001)]);
                dwords.extend(serial(0x2f0, 0));
            }
            Chip::Gb10x => {
                dwords.extend([(0x250, 0x2f01_0000), (DVSEC, 0x0001_0023), (DVSEC + 4, 0x0180_10de)]);
                dwords.extend(serial(0x2f0, 0xaf0));
            }
            _ => {
                dwords.push((0x250, 0x2f01_0000));
                dwords.extend(serial(0x2f0, 0));
            }
        }
    } else {
        let bar0 = if kind.is_switch() { undecided::SWITCH_BAR0_TYPE } else { 0 };
        dwords.push((0x10, bar0));
        dwords.extend(serial(0x100, 0));
    }
    dwords
}

/// The low half of a word.
fn dword(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or_default()
}

/// FNV-1a, for what must differ from device to device and be the same in every run.
pub(crate) fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(kind: ModelKind) -> ConfigSpace {
        ConfigSpace::new(&DeviceSpec::new("dev0", kind))
    }

    fn read32(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn capabilities(space: &ConfigSpace) -> Vec<(u64, u32)> {
        let mut found = Vec::new();
        let mut at = u64::from(read32(space, 0x34) & 0xff);
        while at != 0 && found.len() < 48 {
            let header = read32(space, at);
            found.push((at, header & 0xff));
            at = u64::from(header >> 8 & 0xff);
        }
        at = 0x100;
        while at != 0 && found.len() < 96 {
            let header = read32(space, at);
            found.push((at, header & 0xffff));
            at = u64::from(header >> 20 & 0xffc);
        }
        found
    }

    #[test]
    fn ids_and_class_are_those_of_the_model() {
        for (kind, ids, class, subsystem) in [
            (ModelKind::H100, 0x2330_10de, 0x0302_00a1, 0x16c1_10de),
            (ModelKind::H200, 0x2335_10de, 0x0302_00a1, 0x18bf_10de),
            (ModelKind::Gh200, 0x2342_10de, 0x0302_00a1, 0x16eb_10de),
            (ModelKind::B200, 0x2901_10de, 0x0302_00a1, 0x1999_10de),
            (ModelKind::B300, 0x3182_10de, 0x0302_00a1, 0x20e6_10de),
            (ModelKind::Gb200, 0x2941_10de, 0x0302_00a1, 0x2045_10de),
            (ModelKind::Gb300, 0x31c2_10de, 0x0302_00a1, 0x21f1_10de),
            (ModelKind::RtxPro6000, 0x2bb5_10de, 0x0302_00a1, 0x204e_10de),
            (ModelKind::RtxPro6000Audio, 0x22e8_10de, 0x0403_00a1, 0x204e_10de),
            (ModelKind::A100, 0x20b0_10de, 0x0302_00a1, 0x0000_10de),
            (ModelKind::UnknownGpu, 0x3f00_10de, 0x0302_00a1, 0x0000_10de),
            (ModelKind::Ls10, 0x22a3_10de, 0x0680_00a1, 0x0000_10de),
            (ModelKind::Lr10, 0x1af1_10de, 0x0680_00a1, 0x0000_10de),
            (ModelKind::Nic, 0x10d3_8086, 0x0200_0000, 0x0000_8086),
        ] {
            let space = space(kind);
            assert_eq!([read32(&space, 0), read32(&space, 8), read32(&space, 0x2c)], [ids, class, subsystem], "{kind}");
            assert_ne!(read32(&space, 0xf0) & 0xffff, 0xffff, "the liveness word");
            assert_eq!(read32(&space, 0x64) >> 28 & 1, 1, "FLR capable");
            assert_eq!(read32(&space, 0x70) >> 16 & 0x3ff, 0x105, "link is 32 GT/s x16");
        }
    }

    #[test]
    fn capability_lists_end_and_hold_what_is_observed() {
        let gpu = [
            (0x40, 0x01),
            (0x60, 0x10),
            (0x100, 0),
            (0x12c, 0x18),
            (0x134, 0),
            (0x1b8, 0x01),
            (0x248, 0),
            (0x250, 0),
            (0x2a4, 0x0b),
            (0x2f0, 0x03),
        ];
        assert_eq!(capabilities(&space(ModelKind::H200)), gpu);
        assert_eq!(capabilities(&space(ModelKind::Ls10)), [(0x40, 0x01), (0x60, 0x10), (0x100, 0x03)]);
        let with = |more: &[(u64, u32)]| [&gpu[..8], more].concat();
        let gb20x = with(&[(0x2a4, 0x0b), (0x2f0, 0x03)]);
        assert_eq!(capabilities(&space(ModelKind::RtxPro6000)), gb20x);
        assert_eq!(capabilities(&space(ModelKind::B200)), with(&[(0x2f0, 0x03), (0xaf0, 0x23)]));
        assert_eq!(capabilities(&space(ModelKind::A100)), with(&[(0x2f0, 0x03)]));
        assert_eq!(capabilities(&space(ModelKind::Nic)), [(0x40, 0x01), (0x60, 0x10), (0x100, 0x03)]);
        assert_eq!(read32(&space(ModelKind::H100), 0x2a8), 0x0141_0001, "VSEC id 1, revision 1");
        assert_eq!(read32(&space(ModelKind::RtxPro6000), 0x2a8) & 0xf_ffff, 0x1_0001, "VSEC id 1, revision 1");
        assert_eq!(read32(&space(ModelKind::B200), 0xaf4) & 0xffff, 0x10de, "DVSEC of NVIDIA");
        assert_eq!(read32(&space(ModelKind::B200), 0xaf8) & 0xffff, 0, "DVSEC id 0");
        assert_eq!(read32(&space(ModelKind::H100), 0x2b4), 0, "no security fault");
    }

    #[test]
    fn bars_rom_and_interrupt_line_are_read_only_and_the_quirk_bit_is_not() {
        let mut space = space(ModelKind::H100);
        for (offset, before) in [(0x10, 0x0c), (0x14, 0), (0x18, 0x0c), (0x20, 0x0c), (0x30, 0), (0x3c, 0xff)] {
            assert_eq!(space.write(offset, &[0xff; 4]), ConfigEffect::None);
            assert_eq!(read32(&space, offset), before, "{offset:#x}");
        }
        space.write(0x488, &0x0200_0000_u32.to_le_bytes());
        assert_eq!(read32(&space, 0x488), 0x0200_0000);
    }

    #[test]
    fn flr_bit_is_noticed_in_every_width_and_reads_zero() {
        for (offset, data) in [(0x68, vec![0x10, 0xa8]), (0x69, vec![0xa8]), (0x68, vec![0x10, 0xa8, 0, 0])] {
            let mut space = space(ModelKind::H100);
            assert_eq!(space.write(offset, &data), ConfigEffect::FunctionReset);
            assert_eq!(read32(&space, 0x68) & 0x8000, 0);
        }
    }

    #[test]
    fn power_state_takes_d0_and_d3hot_only() {
        let mut space = space(ModelKind::H100);
        space.write(0x04, &[0x02, 0]);
        assert!(space.decodes_memory());
        for (asked, got) in [(3, 3), (1, 3), (2, 3), (0, 0)] {
            space.write(0x44, &[asked]);
            assert_eq!(read32(&space, 0x44) & 0xf, 0x8 | got, "asked {asked}");
        }
    }

    #[test]
    fn an_flr_clears_less_than_a_bus_reset() {
        let mut space = space(ModelKind::H100);
        let set = |space: &mut ConfigSpace| {
            space.write(0x04, &[0x46, 0x05]);
            space.write(0x68, &[0x3f, 0x51]);
            space.write(0x70, &[0x40, 0x00]);
            space.write(0x488, &[0, 0, 0, 2]);
        };
        let seen = |space: &ConfigSpace| [0x04, 0x68, 0x70, 0x488].map(|at| read32(space, at));
        set(&mut space);
        space.function_reset();
        assert_eq!(seen(&space), [0x0010_0000, 0x0000_2830, 0x1105_0040, 0x0200_0000]);
        set(&mut space);
        space.bus_reset();
        assert_eq!(seen(&space), [0x0010_0000, 0x0000_2810, 0x1105_0000, 0]);
    }

    #[test]
    fn reads_past_the_end_are_all_ones() {
        let mut data = [0; 4];
        space(ModelKind::H100).read(4094, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        space(ModelKind::H100).read(u64::MAX - 1, &mut data[..1]);
        assert_eq!(data[0], 0xff);
    }
}
