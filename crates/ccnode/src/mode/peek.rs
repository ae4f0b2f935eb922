//! The mode that a device booted with, read from its status register without owning it.

use gpu_firmware::{Chip, Effective};
use hw_probe::{Holders, PciFunction, SysRoot};

/// The mode, or why it cannot be read without side effects.
pub(super) fn active(
    _root: &SysRoot,
    function: &PciFunction,
    _holders: &Holders,
    _chip: &Chip,
) -> Result<Effective, String> {
    let status = function.power.runtime_status.as_deref();
    let state = function.power.state.as_deref();
    Err(if status == Some("suspended") || state.is_some_and(|state| state.starts_with("D3")) {
        "it is asleep, and is not woken for a look".into()
    } else {
        "registers are read under ownership alone".into()
    })
}
