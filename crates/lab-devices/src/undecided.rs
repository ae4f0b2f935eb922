//! Points that the documents mark as uncertain or do not name, each with the value the virtual devices use.
//!
//! No code that drives devices may rely on any of these.

/// FSP error code of a knob write that the knob's permission knob denies (gpu-cc-protocol section 13, question 1).
/// The value is ours, chosen to be recognisable; [`DeviceSpec::denied_write_error`](crate::DeviceSpec) overrides it.
pub const DENIED_WRITE_ERROR: u32 = 0xdead;

/// FSP error code of a command, or a form of a command, that the model does not know.
pub const UNKNOWN_COMMAND_ERROR: u32 = 0xbeef;

/// Whether a permission knob can itself be written in-band. Section 4.10 only says that they are changed out-of-band.
pub const PERMISSION_KNOBS_WRITABLE_IN_BAND: bool = false;

/// What a register outside the list of section 10.5 reads as, and any register in the PRI error window after a reset.
/// The documents give the class `0xbadfXXXX` only.
pub const PRI_ERROR: u32 = 0xbadf_0000;

/// The four FSP status scratch registers once booted (section 5.1 names the registers, not their values).
pub const FSP_STATUS_SCRATCH: u32 = 0;

/// Task id in a reply. Section 4.5 has seen 3.
pub const REPLY_TASK_ID: u32 = 3;

/// NVDM type of a mistyped reply: any type but the right one (0x15) does.
pub const MISTYPED_REPLY_NVDM: u8 = 0x14;

/// Revision id of the NVSwitch. The GPUs' 0xa1 is observed (h200-observed).
pub const SWITCH_REVISION: u8 = 0xa1;

/// Subsystem device id of the NVSwitch; no document names one.
pub const SWITCH_SUBSYSTEM_DEVICE: u16 = 0;

/// Type bits of the NVSwitch's BAR0: 64-bit prefetchable, like the GPUs'.
pub const SWITCH_BAR0_TYPE: u32 = 0x0c;

/// Whether an FLR clears bit 25 of config dword 0x488 (a bus reset does).
pub const FLR_CLEARS_HDA_BIT: bool = false;

/// DEVCTL after a reset: the default of the PCI Express specification. The observed value was set by its kernel.
pub const DEVCTL_DEFAULT: u16 = 0x2810;
