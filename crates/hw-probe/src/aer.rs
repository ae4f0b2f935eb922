//! Errors that the kernel has counted on a function's PCI Express link (Advanced Error Reporting).
//!
//! The counters are the kernel's own: reading them asks no device.

use crate::sysfs::read;
use crate::{Bdf, SysRoot};

/// Errors since boot, or since the function appeared. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AerCounts {
    /// Put right by the link itself.
    pub correctable: u64,
    /// A transaction was lost.
    pub nonfatal: u64,
    /// The link is not to be relied upon any more.
    pub fatal: u64,
}

impl AerCounts {
    /// Reads them; none where the function is not there, has no such capability, or the firmware keeps it to itself.
    pub fn read(root: &SysRoot, bdf: Bdf) -> Option<Self> {
        let folder = root.function(bdf);
        let count = |name: &str, total: &str| total_of(&read(&folder.join(name)).ok()?, total);
        Some(Self {
            correctable: count("aer_dev_correctable", "TOTAL_ERR_COR")?,
            nonfatal: count("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL")?,
            fatal: count("aer_dev_fatal", "TOTAL_ERR_FATAL")?,
        })
    }
}

/// A line a kind of error, its name and its number; the sum of all is the last.
fn total_of(bytes: &[u8], total: &str) -> Option<u64> {
    let text = std::str::from_utf8(bytes).ok()?;
    text.lines().find_map(|line| line.strip_prefix(total)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    #[test]
    fn totals_are_read_and_half_an_answer_is_none() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        let read = || AerCounts::read(&fake.root(), gpu.bdf());
        assert_eq!(read(), None);
        let _ = gpu
            .attr("aer_dev_correctable", "RxErr 3\nBadTLP 0\nTOTAL_ERR_COR 3\n")
            .attr("aer_dev_nonfatal", "Undefined 0\nTLP 1\nTOTAL_ERR_NONFATAL 1\n");
        assert_eq!(read(), None);
        let _ = gpu.attr("aer_dev_fatal", "Undefined 0\nTOTAL_ERR_FATAL 0\n");
        assert_eq!(read(), Some(AerCounts { correctable: 3, nonfatal: 1, fatal: 0 }));
        for hostile in ["", "TOTAL_ERR_FATAL", "TOTAL_ERR_FATAL -1\n", "TOTAL_ERR_FATAL 99999999999999999999\n", "\0"] {
            let _ = gpu.attr("aer_dev_fatal", hostile);
            assert_eq!(read(), None, "{hostile:?}");
        }
    }
}
