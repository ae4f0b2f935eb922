//! Which BAR0 offsets exist (gpu-cc-protocol section 10.5) and what each of them is.

use crate::emem::{self, EmemRegister};
use crate::kind::{Chip, ModelKind, Transport};
use crate::mnoc::{self, MnocRegister};
use crate::undecided;

/// A register by its behaviour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Register {
    /// PMC_BOOT_0.
    Boot0,
    /// Reads the same value always.
    Constant(u32),
    /// 0 until booted, 0xff after.
    Boot,
    /// The status of the link to a Grace CPU: 0 until booted.
    C2c,
    /// The effective mode, latched on entering the ready state.
    Status,
    /// The first word in recovery, the second one otherwise.
    Recovery(u32, u32),
    /// Stores what is written; cleared by every reset.
    FunctionScratch,
    /// Stores what is written; cleared by bus resets only.
    BusScratch,
    /// Takes writes, reads 0.
    Sink,
    /// A register of the firmware processor's EMEM queues.
    Emem(u8, EmemRegister),
    /// A register of the firmware processor's MNOC mailbox.
    Mnoc(MnocRegister),
}

/// The flag of GH100 and LS10 that says "in recovery".
const RECOVERY_FLAG: u32 = 1 << 30;

/// The EMEM channels that may be used (gpu-cc-protocol sections 4.8 and 10.5).
pub(crate) fn channels(kind: ModelKind) -> &'static [u8] {
    match kind.chip() {
        Chip::Hopper => &[1, 2],
        Chip::Laguna => &[2],
        _ => &[],
    }
}

/// The register at a dword-aligned offset; none where the documents list none.
pub(crate) fn lookup(kind: ModelKind, offset: u32) -> Option<Register> {
    if offset == 0 {
        return kind.boot_0().map(|_| Register::Boot0);
    }
    match kind.chip().transport()? {
        Transport::Emem => {
            if let Some((channel, register)) = emem::decode(offset) {
                return channels(kind).contains(&channel).then_some(Register::Emem(channel, register));
            }
        }
        Transport::Mnoc => {
            if let Some(register) = mnoc::decode(offset) {
                return Some(Register::Mnoc(register));
            }
        }
    }
    match offset {
        0x00_1498 if kind.has_c2c() => return Some(Register::C2c),
        0x8f_012c => return Some(Register::Constant(0x1100)),
        0x8f_0278 => return Some(Register::Constant(0x0200_0200)),
        0x8f_0abc => return Some(Register::Constant(0x20)),
        0x8f_0320 | 0x8f_0324 | 0x8f_0328 | 0x8f_032c => {
            return Some(Register::Constant(undecided::FSP_STATUS_SCRATCH));
        }
        _ => {}
    }
    match kind.chip() {
        Chip::Hopper => hopper(offset),
        Chip::Laguna => laguna(offset),
        Chip::Gb10x => blackwell(offset, 0x02_00bc),
        Chip::Gb20x => blackwell(offset, 0xad_00bc),
        Chip::Bare | Chip::Other => None,
    }
}

fn hopper(offset: u32) -> Option<Register> {
    match offset {
        0x02_00bc => Some(Register::Boot),
        0x02_0120 => Some(Register::Recovery(RECOVERY_FLAG, 0)),
        // The device-info table: no rows.
        0x02_24fc => Some(Register::Constant(0)),
        0x11_82cc => Some(Register::Status),
        0x00_1458 => Some(Register::FunctionScratch),
        0x09_1288 => Some(Register::BusScratch),
        0x12_004c | 0x12_2204 => Some(Register::Sink),
        _ => None,
    }
}

fn blackwell(offset: u32, boot: u32) -> Option<Register> {
    match offset {
        0x00_0590 => Some(Register::Status),
        0x8a_a128 => Some(Register::Recovery(undecided::RECOVERY_ACTIVE, undecided::RECOVERY_NONE)),
        // The device-info table: no rows.
        0x02_24fc => Some(Register::Constant(0)),
        _ if offset == boot => Some(Register::Boot),
        _ => None,
    }
}

fn laguna(offset: u32) -> Option<Register> {
    match offset {
        0x06_60bc => Some(Register::Boot),
        0x06_6120 => Some(Register::Recovery(RECOVERY_FLAG, 0)),
        // The 16 scratch words that a host dumps when a boot failed (section 5.1).
        0x02_84e0..=0x02_851c if offset.is_multiple_of(4) => Some(Register::Constant(0)),
        0x02_8c50 => Some(Register::Status),
        0x00_dfe0 => Some(Register::FunctionScratch),
        0x09_1288 => Some(Register::BusScratch),
        _ => None,
    }
}
