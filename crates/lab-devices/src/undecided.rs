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
/// The documents give the upper half, `0xbadf`, only.
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

/// PMC_BOOT_0 of GB10x and of GB20x (section 13, question 9); [`DeviceSpec::boot_0`](crate::DeviceSpec) overrides them.
pub const GB10X_BOOT_0: u32 = 0x1a00_00a1;
/// See [`GB10X_BOOT_0`].
pub const GB20X_BOOT_0: u32 = 0x1b20_00a1;

/// Device id of the GPU that no table knows: outside every range of the device table.
pub const UNKNOWN_GPU_DEVICE: u16 = 0x3f00;
/// Its PMC_BOOT_0, a value that no table has.
pub const UNKNOWN_GPU_BOOT_0: u32 = 0x1f00_00a1;

/// Device id of the audio function of an RTX board; no document names one.
pub const AUDIO_DEVICE: u16 = 0x22e8;

/// Subsystem device id where no document names one.
pub const OTHER_SUBSYSTEM_DEVICE: u16 = 0;

/// Size of a Blackwell's BAR0 in MiB. Section 1.4 only says that it holds offset 0x2c01e00.
pub const BLACKWELL_BAR0_MIB: u64 = 64;

/// Sizes of the only BAR of the audio function and of the network card, in KiB; both are 32-bit and not prefetchable.
pub const AUDIO_BAR0_KIB: u64 = 16;
/// See [`AUDIO_BAR0_KIB`].
pub const NIC_BAR0_KIB: u64 = 128;

/// What the registers of the audio function and of the network card read as.
pub const OTHER_FUNCTION_READ: u32 = 0;

/// What BAR0 reads as while the BAR firewall is up (section 13, question 7);
/// [`DeviceSpec::firewall_read`](crate::DeviceSpec) overrides it.
pub const FIREWALL_READ: u32 = 0xffff_ffff;

/// Bit 2 of the Blackwell status word says whether knob 10 is 2 (section 10.5);
/// [`DeviceSpec::decoupler_in_status`](crate::DeviceSpec) overrides it.
pub const DECOUPLER_IN_STATUS: bool = true;

/// What the Blackwell recovery register reads as on a healthy device: 0 and 1 both mean healthy (section 1.6).
pub const RECOVERY_NONE: u32 = 0;
/// What it reads as in recovery: anything but 0 and 1 in its low byte.
pub const RECOVERY_ACTIVE: u32 = 2;

/// PMC_BOOT_0 after a security fault; 0xbad00200 is known as well (section 1.6). Every other register reads the same.
pub const SECURITY_FAULT_BOOT_0: u32 = 0xbadf_0200;
/// The security-fault word that `security-fault` without a word stands for: bit 30, device lockdown.
pub const SECURITY_FAULT_WORD: u32 = 1 << 30;

/// The C2C status register of parts with NVLink-C2C, once booted (section 12: 0x1498 is 0xff).
pub const C2C_STATUS_UP: u32 = 0xff;

/// Whether the MNOC ready bit is set again as soon as all dwords of a message have arrived, rather than when FSP has taken
/// it: section 10.4 says "until all dwords arrive" and "idle".
pub const MNOC_READY_WHILE_REQUEST_WAITS: bool = false;
/// Whether the MNOC credit bit is set while no request is under way.
pub const MNOC_CREDIT_WHEN_IDLE: bool = true;
/// What the MNOC data register reads as when no message waits.
pub const MNOC_EMPTY_READ: u32 = 0;
/// The longest message that MNOC port 0 takes, in bytes (section 4.2: its segmentation threshold).
pub const MNOC_LARGEST_MESSAGE: u32 = 4160;
/// The send-side error bit clears with the next reply (section 4.9).
pub const MNOC_SEND_ERROR_CLEARS_WITH_NEXT_REPLY: bool = true;

/// The reply that lies about with `fsp-stale-reply`: that to the read of a knob whose value is 1.
pub const STALE_REPLY_VALUE: u32 = 1;
