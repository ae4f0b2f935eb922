//! Which BAR0 offsets exist (gpu-cc-protocol section 10.5) and what each of them is.

use crate::emem::{self, EmemRegister};
use crate::spec::ModelKind;
use crate::undecided;

/// A register by its behaviour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Register {
    /// Reads the same value always.
    Constant(u32),
    /// 0 until booted, 0xff after.
    Boot,
    /// The effective mode, latched on entering the ready state.
    Status,
    /// Stores what is written; cleared by every reset.
    FunctionScratch,
    /// Stores what is written; cleared by bus resets only.
    BusScratch,
    /// Takes writes, reads 0.
    Sink,
    /// A register of the firmware processor's mailbox.
    Emem(u8, EmemRegister),
}

/// The mailbox channels that may be used (gpu-cc-protocol sections 4.8 and 10.5).
pub(crate) fn channels(kind: ModelKind) -> &'static [u8] {
    if kind.is_switch() { &[2] } else { &[1, 2] }
}

/// The register at a dword-aligned offset; none where the documents list none.
pub(crate) fn lookup(kind: ModelKind, offset: u32) -> Option<Register> {
    if let Some((channel, register)) = emem::decode(offset) {
        return channels(kind).contains(&channel).then_some(Register::Emem(channel, register));
    }
    match offset {
        0x09_1288 => return Some(Register::BusScratch),
        0x8f_012c => return Some(Register::Constant(0x1100)),
        0x8f_0278 => return Some(Register::Constant(0x0200_0200)),
        0x8f_0abc => return Some(Register::Constant(0x20)),
        0x8f_0320 | 0x8f_0324 | 0x8f_0328 | 0x8f_032c => {
            return Some(Register::Constant(undecided::FSP_STATUS_SCRATCH));
        }
        _ => {}
    }
    if kind.is_switch() { laguna(offset) } else { hopper(offset) }
}

fn hopper(offset: u32) -> Option<Register> {
    match offset {
        0x00_0000 => Some(Register::Constant(0x1800_00a1)),
        0x02_00bc => Some(Register::Boot),
        // Recovery flag (bit 30) and the device-info table: nothing to recover, no rows.
        0x02_0120 | 0x02_24fc => Some(Register::Constant(0)),
        0x11_82cc => Some(Register::Status),
        0x00_1458 => Some(Register::FunctionScratch),
        0x12_004c | 0x12_2204 => Some(Register::Sink),
        _ => None,
    }
}

fn laguna(offset: u32) -> Option<Register> {
    match offset {
        0x00_0000 => Some(Register::Constant(0x0070_00a1)),
        0x06_60bc => Some(Register::Boot),
        // Recovery flag (bit 30), and the 16 scratch words that a host dumps when a boot failed (section 5.1).
        0x06_6120 | 0x02_84e0..=0x02_851c if offset.is_multiple_of(4) => Some(Register::Constant(0)),
        0x02_8c50 => Some(Register::Status),
        0x00_dfe0 => Some(Register::FunctionScratch),
        _ => None,
    }
}
