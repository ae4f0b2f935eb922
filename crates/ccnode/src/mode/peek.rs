//! The mode that a device booted with, read from its status register without owning it.

use gpu_firmware::{Chip, Effective};
use hw_probe::registers::{self, Registers};
use hw_probe::{Condition, Holders, PciFunction, SysRoot};

/// The mode, or why it cannot be read without side effects.
pub(super) fn active(
    root: &SysRoot,
    function: &PciFunction,
    holders: &Holders,
    chip: &Chip,
) -> Result<Effective, String> {
    match registers::read(root, function, &Condition::read(root, function), holders) {
        // The words are judged there; which of the invalid states it is, the word tells.
        Registers::Read { mode: Some(_), mode_register: Some(word), .. } => Ok(chip.effective(word)),
        Registers::Read { reason, .. } => Err(reason.unwrap_or_else(|| "the registers do not say it".into())),
        Registers::NotRead { reason } => Err(reason),
    }
}
