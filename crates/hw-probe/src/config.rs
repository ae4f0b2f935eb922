//! Configuration space: whether a function still answers, and where its capabilities are.
//!
//! Reading it moves no device: the kernel serves it without opening the function for a user, and a function in D3cold,
//! which the kernel would have to wake, is not asked. (The kernel may wake a sleeping bridge above.)

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sysfs::{Node, hex, patiently, patiently_each, read_at};
use crate::{Bdf, NVIDIA, SysRoot};

/// Size of the extended configuration space, in bytes. Readers without CAP_SYS_ADMIN get 64.
pub const SIZE: usize = 4096;

/// A reset of a dead device keeps the kernel from serving its configuration space for minutes.
const PATIENCE: Duration = Duration::from_secs(2);

/// The classic list fits this many 4-byte capabilities between 0x40 and 0x100.
const MOST_CLASSIC: usize = 48;

/// The extended list fits this many 4-byte headers between 0x100 and 0x1000.
const MOST_EXTENDED: usize = 960;

/// Configuration space that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file refuses, or does not answer in time.
    #[error("{bdf}: configuration space {} cannot be read", path.display())]
    Read {
        /// The function.
        bdf: Bdf,
        /// Its file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file ends before the ids.
    #[error("{bdf}: configuration space {} has only {length} bytes", path.display())]
    Short {
        /// The function.
        bdf: Bdf,
        /// Its file.
        path: PathBuf,
        /// Bytes that were there.
        length: usize,
    },
}

/// What a function answers when its ids are read from the device itself. sysfs files such as `vendor` are copies from
/// the time of enumeration and go on naming a device that has fallen off the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Liveness {
    /// The ids it was enumerated with.
    Answers,
    /// All ones: it is off the bus, or its link is down.
    Silent,
    /// Another vendor id than it was enumerated with; 0x0001 is a device that is not yet ready after a reset.
    Other(u16),
    /// It is in D3cold and was not asked.
    Asleep,
}

/// Asks the function whether it is there. Waits 2 seconds at most. An NVIDIA function counts as silent, too, when the word
/// at 0xf0, which hypervisors do not emulate, reads all ones (gpu-cc-protocol section 1.6); a reader without
/// CAP_SYS_ADMIN does not see it.
pub fn liveness(root: &SysRoot, bdf: Bdf) -> Result<Liveness, ConfigError> {
    let absent = || Err(ConfigError::Short { bdf, path: file(root, bdf), length: 0 });
    liveness_of_each(root, [bdf]).remove(&bdf).unwrap_or_else(absent)
}

/// The same for many functions. Waits 2 seconds at most for each that does not answer, and for the others as long as they take.
pub fn liveness_of_each(
    root: &SysRoot,
    bdfs: impl IntoIterator<Item = Bdf>,
) -> BTreeMap<Bdf, Result<Liveness, ConfigError>> {
    let mut told = BTreeMap::new();
    let (mut asked, mut reads) = (Vec::new(), Vec::new());
    for bdf in bdfs {
        let mut node = Node::new(root, &format!("sys/bus/pci/devices/{bdf}"), Some(bdf));
        if node.word("power_state").as_deref() == Some("D3cold") {
            told.insert(bdf, Ok(Liveness::Asleep));
            continue;
        }
        let enumerated = node.parsed("vendor", "a 16-bit id", |text| u16::try_from(hex(text)?).ok());
        let path = file(root, bdf);
        let target = path.clone();
        asked.push((bdf, path.clone()));
        reads.push((path, move || ask_words(&target, enumerated)));
    }
    for ((bdf, path), answer) in asked.into_iter().zip(patiently_each(reads, PATIENCE)) {
        let answer = match answer {
            Ok(Some(liveness)) => Ok(liveness),
            Ok(None) => Err(ConfigError::Short { bdf, path, length: 0 }),
            Err(source) => Err(ConfigError::Read { bdf, path, source }),
        };
        told.insert(bdf, answer);
    }
    told
}

/// Asks by two words; none where there is not even the first.
fn ask_words(file: &Path, enumerated: Option<u16>) -> io::Result<Option<Liveness>> {
    let word = |offset| Ok::<_, io::Error>(read_at(file, offset, 2)?.try_into().ok().map(u16::from_le_bytes));
    let Some(vendor) = word(0x00)? else { return Ok(None) };
    Ok(Some(match vendor {
        0xffff => Liveness::Silent,
        vendor if enumerated.is_some_and(|enumerated| enumerated != vendor) => Liveness::Other(vendor),
        NVIDIA if word(0xf0)? == Some(0xffff) => Liveness::Silent,
        _ => Liveness::Answers,
    }))
}

/// Asks the function whether it is there, and if it is reads its configuration space, all on one thread: what an
/// observer wants who asks many. A function that does not answer is asked for two words only, since each read of a dead one
/// can take a bus timeout. Waits 2 seconds at most.
pub(crate) fn ask(root: &SysRoot, bdf: Bdf) -> Result<(Liveness, Option<ConfigSpace>), ConfigError> {
    let mut node = Node::new(root, &format!("sys/bus/pci/devices/{bdf}"), Some(bdf));
    if node.word("power_state").as_deref() == Some("D3cold") {
        return Ok((Liveness::Asleep, None));
    }
    let enumerated = node.parsed("vendor", "a 16-bit id", |text| u16::try_from(hex(text)?).ok());
    let path = file(root, bdf);
    let target = path.clone();
    let read = move || {
        let Some(liveness) = ask_words(&target, enumerated)? else { return Ok(Err(0)) };
        let bytes = if liveness == Liveness::Answers { Some(read_at(&target, 0, SIZE)?) } else { None };
        match bytes {
            Some(bytes) if bytes.len() < 64 => Ok(Err(bytes.len())),
            bytes => Ok(Ok((liveness, bytes.map(ConfigSpace)))),
        }
    };
    match patiently(path.clone(), PATIENCE, read) {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(length)) => Err(ConfigError::Short { bdf, path, length }),
        Err(source) => Err(ConfigError::Read { bdf, path, source }),
    }
}

fn file(root: &SysRoot, bdf: Bdf) -> PathBuf {
    root.function(bdf).join("config")
}

fn bytes(root: &SysRoot, bdf: Bdf, offset: u64, length: usize) -> Result<Vec<u8>, ConfigError> {
    let path = file(root, bdf);
    let target = path.clone();
    patiently(path.clone(), PATIENCE, move || read_at(&target, offset, length)).map_err(|source| ConfigError::Read {
        bdf,
        path,
        source,
    })
}

/// A copy of a function's configuration space: 64 to 4096 bytes, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace(Vec<u8>);

/// One capability of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability id, of the classic or of the extended numbering.
    pub id: u16,
    /// Version; 0 for classic ones.
    pub version: u8,
    /// Offset of its header in configuration space.
    pub offset: u16,
    /// Whether it is in the extended list (from 0x100).
    pub is_extended: bool,
}

impl ConfigSpace {
    /// Reads as much as the kernel shows. Waits 2 seconds at most. The function should not be in D3cold ([`liveness`] tells): the
    /// kernel would wake it.
    pub fn read(root: &SysRoot, bdf: Bdf) -> Result<Self, ConfigError> {
        let bytes = bytes(root, bdf, 0, SIZE)?;
        if bytes.len() < 64 {
            return Err(ConfigError::Short { bdf, path: file(root, bdf), length: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// Takes bytes that came from elsewhere, the config region of a VFIO device for instance; at most 4096 of them.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes[..bytes.len().min(SIZE)].to_vec())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn array<const N: usize>(&self, offset: u16) -> Option<[u8; N]> {
        let start = usize::from(offset);
        self.0.get(start..start + N)?.try_into().ok()
    }

    /// The byte at `offset`, if it was read.
    pub fn u8(&self, offset: u16) -> Option<u8> {
        self.array(offset).map(u8::from_le_bytes)
    }

    /// The 16-bit word at `offset`, if it was read.
    pub fn u16(&self, offset: u16) -> Option<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    /// The 32-bit word at `offset`, if it was read.
    pub fn u32(&self, offset: u16) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    /// The same without what identifies one device: the 64-bit serial number (extended capability 3, which of a network card is
    /// its address) and the word of product data that was read last (classic capability 3). Zeros stand in their place.
    #[must_use]
    pub fn without_serials(&self) -> Self {
        let mut bytes = self.0.clone();
        for found in self.capabilities().into_iter().filter(|found| found.id == 3) {
            let start = usize::from(found.offset) + 4;
            let length = if found.is_extended { 8 } else { 4 };
            bytes.iter_mut().skip(start).take(length).for_each(|byte| *byte = 0);
        }
        Self(bytes)
    }

    /// All capabilities, in the order of the two lists. Both walks are bounded, step over entries that a hypervisor hid
    /// (id 0), and end at the first link that leads nowhere or back.
    pub fn capabilities(&self) -> Vec<Capability> {
        let mut found = self.classic();
        found.extend(self.extended());
        found
    }

    fn classic(&self) -> Vec<Capability> {
        const STATUS: u16 = 0x06;
        const HAS_LIST: u16 = 1 << 4;
        let mut found: Vec<Capability> = Vec::new();
        let mut seen = Vec::new();
        if self.u16(STATUS).is_none_or(|status| status == 0xffff || status & HAS_LIST == 0) {
            return found;
        }
        let mut next = self.u8(0x34);
        while let Some(pointer) = next {
            let offset = u16::from(pointer & 0xfc);
            if offset < 0x40 || pointer == 0xff || seen.contains(&offset) || seen.len() == MOST_CLASSIC {
                break;
            }
            seen.push(offset);
            let Some(header) = self.u16(offset).filter(|header| *header != 0xffff) else { break };
            let [id, pointer] = header.to_le_bytes();
            if id != 0 {
                found.push(Capability { id: id.into(), version: 0, offset, is_extended: false });
            }
            next = Some(pointer);
        }
        found
    }

    fn extended(&self) -> Vec<Capability> {
        let mut found: Vec<Capability> = Vec::new();
        let mut seen = vec![false; SIZE / 4];
        let mut offset = 0x100_u16;
        for _ in 0..MOST_EXTENDED {
            let Some(header) = self.u32(offset).filter(|header| !matches!(*header, 0 | u32::MAX)) else { break };
            if std::mem::replace(&mut seen[usize::from(offset / 4)], true) {
                break;
            }
            let [id_low, id_high, version, _] = header.to_le_bytes();
            let id = u16::from_le_bytes([id_low, id_high]);
            if id != 0 {
                found.push(Capability { id, version: version & 0xf, offset, is_extended: true });
            }
            offset = u16::try_from((header >> 20) & 0xffc).unwrap_or(0);
            if offset < 0x100 {
                break;
            }
        }
        found
    }

    /// Offset of the classic capability `id` (0x01 power management, 0x10 PCI Express).
    pub fn capability(&self, id: u8) -> Option<u16> {
        self.classic().into_iter().find(|found| found.id == u16::from(id)).map(|found| found.offset)
    }

    /// Offset of the first extended capability `id` (0x01 AER, 0x0b vendor-specific, 0x23 DVSEC).
    pub fn extended_capability(&self, id: u16) -> Option<u16> {
        self.extended().into_iter().find(|found| found.id == id).map(|found| found.offset)
    }

    /// Offset of the vendor-specific capability (0x0b) with this VSEC id and revision.
    pub fn vsec(&self, id: u16, revision: u8) -> Option<u16> {
        self.find_extended(0x0b, |offset| {
            let word = self.u32(offset + 4)?;
            Some(word & 0xf_ffff == u32::from(id) | u32::from(revision & 0xf) << 16)
        })
    }

    /// Offset of the designated vendor-specific capability (0x23) of this vendor with this DVSEC id.
    pub fn dvsec(&self, vendor: u16, id: u16) -> Option<u16> {
        self.find_extended(0x23, |offset| Some(self.u16(offset + 4)? == vendor && self.u16(offset + 8)? == id))
    }

    fn find_extended(&self, id: u16, fits: impl Fn(u16) -> Option<bool>) -> Option<u16> {
        let of_id = self.extended().into_iter().filter(|found| found.id == id);
        of_id.map(|found| found.offset).find(|offset| fits(*offset).unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeSysfs, h200_config};
    use proptest::prelude::*;

    fn list(config: &ConfigSpace) -> Vec<(u16, u16, bool)> {
        config.capabilities().into_iter().map(|found| (found.id, found.offset, found.is_extended)).collect()
    }

    #[test]
    fn serial_numbers_are_taken_out() {
        let mut bytes = h200_config();
        // The last of the real list at 0x2f0 is the serial number; the classic list gets product data behind MSI-X.
        bytes[0x2f4..0x2fc].copy_from_slice(&[0xab; 8]);
        bytes[0xb1] = 0xc0;
        bytes[0xc0..0xc8].copy_from_slice(&[3, 0, 0, 0x80, 0xcd, 0xcd, 0xcd, 0xcd]);
        let clean = ConfigSpace::from_bytes(&bytes).without_serials();
        assert!(!clean.as_bytes().iter().any(|byte| matches!(byte, 0xab | 0xcd)));
        assert_eq!(list(&clean), list(&ConfigSpace::from_bytes(&bytes)));
        // Nothing else changes, and a list that ends early is no harm.
        assert_eq!(ConfigSpace::from_bytes(&h200_config()).without_serials().as_bytes(), h200_config());
        assert_eq!(ConfigSpace::from_bytes(&bytes[..0xc2]).without_serials().as_bytes().len(), 0xc2);
    }

    #[test]
    fn the_capabilities_of_a_real_h200() {
        let config = ConfigSpace::from_bytes(&h200_config());
        assert_eq!((config.u16(0), config.u16(2), config.u16(0x2e)), (Some(0x10de), Some(0x2335), Some(0x18bf)));
        // h200-observed: what the hypervisor hid has id 0 and is stepped over.
        let expected = [
            (0x01, 0x40, false),
            (0x05, 0x48, false),
            (0x10, 0x60, false),
            (0x11, 0xb0, false),
            (0x18, 0x12c, true),
            (0x01, 0x1b8, true),
            (0x0b, 0x2a4, true),
            (0x04, 0x2b8, true),
            (0x03, 0x2f0, true),
        ];
        assert_eq!(list(&config), expected);
        assert_eq!((config.capability(0x10), config.extended_capability(0x0b)), (Some(0x60), Some(0x2a4)));
        assert_eq!((config.vsec(1, 1), config.vsec(1, 2), config.vsec(2, 1)), (Some(0x2a4), None, None));
        assert_eq!(config.dvsec(0x10de, 0), None);
        assert_eq!(config.u32(0x60 + 4), Some(0x112c_8021), "DEVCAP");
        assert_eq!(config.u32(0x2a4 + 0x10), Some(0), "security-fault word");
    }

    #[test]
    fn a_dvsec_is_found_by_vendor_and_id() {
        let mut bytes = vec![0; SIZE];
        bytes[0x100..0x104].copy_from_slice(&0xaf01_0023_u32.to_le_bytes());
        bytes[0x104..0x10a].copy_from_slice(&[0x86, 0x80, 0, 0, 0, 0]);
        bytes[0xaf0..0xaf4].copy_from_slice(&0x0001_0023_u32.to_le_bytes());
        bytes[0xaf4..0xafa].copy_from_slice(&[0xde, 0x10, 0, 0, 0, 0]);
        let config = ConfigSpace::from_bytes(&bytes);
        assert_eq!(
            (config.dvsec(0x10de, 0), config.dvsec(0x10de, 1), config.dvsec(0x8086, 0)),
            (Some(0xaf0), None, Some(0x100))
        );
    }

    #[test]
    fn loops_and_dead_devices_end_the_walk() {
        let mut bytes = h200_config();
        bytes[0xb1] = 0x40;
        bytes[0x2f0..0x2f4].copy_from_slice(&0x1001_0003_u32.to_le_bytes());
        assert_eq!(list(&ConfigSpace::from_bytes(&bytes)).len(), 9);
        assert_eq!(list(&ConfigSpace::from_bytes(&[0xff; SIZE])), []);
        assert_eq!(list(&ConfigSpace::from_bytes(&[0; SIZE])), []);
        assert_eq!(list(&ConfigSpace::from_bytes(&h200_config()[..0x61])), [(1, 0x40, false), (5, 0x48, false)]);
    }

    #[test]
    fn liveness_believes_the_device_and_not_the_kernels_copy() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        let ask = || {
            let alone = liveness(&fake.root(), gpu.bdf()).unwrap();
            let (with_config, config) = super::ask(&fake.root(), gpu.bdf()).unwrap();
            assert_eq!((with_config, config.is_some()), (alone, alone == Liveness::Answers));
            alone
        };
        assert_eq!(ask(), Liveness::Answers);
        gpu.patch_config(0xf0, &[0xff, 0xff]);
        assert_eq!(ask(), Liveness::Silent);
        gpu.config(&[0xff; SIZE]);
        assert_eq!(ask(), Liveness::Silent);
        gpu.patch_config(0, &[0x01, 0x00]);
        assert_eq!(ask(), Liveness::Other(1));
        gpu.attr("power_state", "D3cold\n");
        assert_eq!(ask(), Liveness::Asleep);
        gpu.attr("power_state", "D0\n").config(&h200_config()[..64]);
        assert_eq!(ask(), Liveness::Answers);
    }

    #[test]
    fn errors_name_device_and_file() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330).config(&[0xde]);
        let path = fake.root().function(gpu.bdf()).join("config").display().to_string();
        let short = liveness(&fake.root(), gpu.bdf()).unwrap_err().to_string();
        assert!(short.starts_with("0000:41:00.0: ") && short.contains(&path), "{short}");
        assert!(ConfigSpace::read(&fake.root(), gpu.bdf()).unwrap_err().to_string().ends_with("has only 1 bytes"));
        gpu.remove_attr("config");
        let absent = liveness(&fake.root(), gpu.bdf()).unwrap_err().to_string();
        assert!(absent.starts_with("0000:41:00.0: ") && absent.contains(&path), "{absent}");
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_walks(bytes in proptest::collection::vec(any::<u8>(), 0..SIZE)) {
            let config = ConfigSpace::from_bytes(&bytes);
            let found = config.capabilities();
            prop_assert!(found.len() <= MOST_CLASSIC + MOST_EXTENDED);
            config.vsec(1, 1);
            config.dvsec(0x10de, 0);
        }
    }
}
