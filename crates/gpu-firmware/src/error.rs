//! Everything that can go wrong with a device, each with a stable code and a cure (gpu-cc-protocol section 9).

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use hw_probe::Bdf;
use nix::errno::Errno;
use serde::Serialize;

use crate::access::Access;
use crate::knob::{Knob, KnobState};
use crate::mode::{Effective, Mode};

/// What went wrong, and with which device.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
#[error("{bdf}: {fault}")]
pub struct Error {
    /// The device.
    pub bdf: Bdf,
    /// What went wrong.
    #[serde(flatten)]
    pub fault: Box<Fault>,
}

impl Error {
    /// An error of one device.
    pub fn new(bdf: Bdf, fault: Fault) -> Self {
        Self { bdf, fault: Box::new(fault) }
    }

    /// The stable code, the same in log, Event, metric and documentation.
    pub fn code(&self) -> &'static str {
        self.fault.code()
    }

    /// The cure, in one line.
    pub fn remedy(&self) -> &'static str {
        self.fault.remedy()
    }

    /// Device, cause and cure in one line.
    pub fn line(&self) -> String {
        format!("{self}; {}", self.remedy())
    }
}

/// A process that holds a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Process id, as seen from this process's PID namespace.
    pub pid: u32,
    /// The process's short name.
    pub comm: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.comm)
    }
}

/// What can go wrong with a device. Registers are BAR0 byte offsets unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
#[serde(tag = "code")]
pub enum Fault {
    /// A file of the device may not be opened.
    #[error("Cannot open {}: permission denied (errno {errno})", path.display())]
    PermissionDenied {
        /// The file.
        path: PathBuf,
        /// EACCES or EPERM.
        errno: i32,
    },
    /// The kernel is locked down and refuses direct access to PCI devices.
    #[error("Cannot use {}: the kernel refuses direct PCI access, as it does when locked down", path.display())]
    Lockdown {
        /// The file.
        path: PathBuf,
    },
    /// A driver or a VFIO user has claimed the BAR for itself.
    #[error("Cannot map {}: the region is claimed{}", path.display(), by_driver(driver.as_deref()))]
    BusyRegion {
        /// The resource file.
        path: PathBuf,
        /// The driver bound at that time.
        driver: Option<String>,
    },
    /// A file operation failed in a way that means nothing more precise.
    #[error("Cannot {action} {}: {}", path.display(), errno_text(*errno))]
    Io {
        /// What was tried (`read`, `write`, ...).
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error number.
        errno: i32,
    },
    /// A file holds less than, or other than, what it must.
    #[error("{} holds {found:?}, not {expected}", path.display())]
    UnexpectedContent {
        /// The file.
        path: PathBuf,
        /// What it holds, cut to a line.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// Configuration space does not answer: the device has fallen off the bus, or is unplugged.
    #[error("Off the bus: {what}")]
    OffBus {
        /// What was seen.
        what: String,
    },
    /// Configuration space answers with other ids than the scan saw.
    #[error("Another device than the scan saw: configuration space says {found:08x}, the scan said {expected:08x}")]
    DeviceChanged {
        /// Device and vendor id expected, as the first dword of configuration space.
        expected: u32,
        /// First dword read.
        found: u32,
    },
    /// The BAR firewall of a Blackwell GPU does not open after a reset.
    #[error("BAR firewall still closed after {waited_ms} ms: its word in configuration space reads {word:08x}")]
    FirewallClosed {
        /// The word with the firewall's bit.
        word: u32,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// BAR0 reads all ones although configuration space answers.
    #[error("BAR0 does not answer: register {register:#x} reads ffffffff")]
    Bar0Dead {
        /// The register read.
        register: u32,
    },
    /// There is no usable BAR0: firmware or kernel assigned none.
    #[error("No BAR0: the kernel lists no memory resource 0 for it")]
    NoBar0,
    /// A register outside the mapped window was asked for.
    #[error("Register {register:#x} lies outside BAR0 ({size:#x} bytes) or is not aligned")]
    OutsideBar0 {
        /// The register.
        register: u32,
        /// Size of the window in bytes.
        size: u64,
    },
    /// The device has locked itself after a security fault.
    #[error(
        "Security fault: BOOT_0 reads {boot0:08x}, the fault word in configuration space {}",
        optional_word(*fault_word)
    )]
    SecFault {
        /// PMC_BOOT_0.
        boot0: u32,
        /// The fault word of configuration space, where it could be read.
        fault_word: Option<u32>,
    },
    /// The device's security processor is in recovery mode.
    #[error("In firmware recovery: register {register:#x} reads {value:08x}")]
    Recovery {
        /// The register that says so.
        register: u32,
        /// Its value.
        value: u32,
    },
    /// An NVIDIA GPU or switch that the device table does not know.
    #[error("Unknown device {vendor:04x}:{device:04x}")]
    UnknownDevice {
        /// Vendor id.
        vendor: u16,
        /// Device id.
        device: u16,
    },
    /// A known device, or a mode of it, that this version cannot handle or that the device does not have.
    #[error("{model}: {reason}")]
    Unsupported {
        /// Product name.
        model: String,
        /// Why.
        reason: &'static str,
    },
    /// The device did not finish booting in time.
    #[error(
        "Did not finish booting within {} ms: register {register:#x} reads {last:08x}, wanted {wanted:08x}; FSP status {}",
        waited_ms,
        fsp_words(fsp_status)
    )]
    BootTimeout {
        /// The boot register.
        register: u32,
        /// Its last value.
        last: u32,
        /// The value that means booted.
        wanted: u32,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
        /// The four words of the FSP's status scratch (0x8f0320 to 0x8f032c), where they could be read.
        fsp_status: [Option<u32>; 4],
    },
    /// The device's register bus answered with an error word.
    #[error("Register {register:#x} answers with the bus error {value:08x}")]
    PriError {
        /// The register read.
        register: u32,
        /// The error word; its upper half is 0xbadf.
        value: u32,
    },
    /// The device's firmware does not take the next request.
    #[error("Firmware queue is stuck: head {head:#x}, tail {tail:#x}")]
    FspBusy {
        /// Command queue head.
        head: u32,
        /// Command queue tail.
        tail: u32,
    },
    /// The device's firmware did not answer in time.
    #[error("Firmware did not answer within {waited_ms} ms: {mailbox}")]
    FspNoResponse {
        /// The mailbox, as last read.
        mailbox: String,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The firmware's MNOC mailbox does not work as it should.
    #[error("Firmware mailbox: {what}; it reads {info:08x}")]
    MnocError {
        /// What is wrong.
        what: &'static str,
        /// RECV_INFO or SEND_INFO, whichever it is about.
        info: u32,
    },
    /// The firmware's answer is not one to the question.
    #[error("Firmware answered wrongly: {reason}; reply {}", words(dwords))]
    FspProtocol {
        /// What is wrong with it.
        reason: &'static str,
        /// The whole reply.
        dwords: Vec<u32>,
    },
    /// The firmware refused the request with an error code whose meaning is not public.
    #[error("Firmware refused knob {knob} with error {error:#x}; reply {}", words(dwords))]
    FspError {
        /// The firmware's code.
        error: u32,
        /// The knob concerned.
        knob: Knob,
        /// The whole reply.
        dwords: Vec<u32>,
    },
    /// The firmware does not know the knob (error 0x1e3).
    #[error("Firmware does not know knob {knob}")]
    KnobUnsupported {
        /// The knob.
        knob: Knob,
    },
    /// The knob may not be changed from the host: its permission knob reads 0.
    #[error("Knob {knob} may not be changed from the host: its permission, knob {permission}, reads 0")]
    InBandDenied {
        /// The knob.
        knob: Knob,
        /// Its permission knob.
        permission: Knob,
    },
    /// A knob reads back other than it was written.
    #[error("Knob {knob} was written {wrote} and reads back {read}")]
    KnobMismatch {
        /// The knob.
        knob: Knob,
        /// The value written.
        wrote: u16,
        /// The value read.
        read: u16,
    },
    /// The kernel has no way to reset the device.
    #[error("Cannot be reset by the kernel; reset methods: {}", methods_text(methods))]
    ResetUnavailable {
        /// Text of `reset_method`.
        methods: String,
    },
    /// The kernel tried to reset the device and failed.
    #[error("Reset failed: {}; reset methods: {}", errno_text(*errno), methods_text(methods))]
    ResetFailed {
        /// The kernel's error number.
        errno: i32,
        /// Text of `reset_method`.
        methods: String,
    },
    /// The kernel is still busy resetting the device.
    #[error("Reset did not end within {waited_ms} ms; the kernel is still waiting for the device")]
    ResetTimeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The device does not wake up.
    #[error("Does not wake up: power/runtime_status says {status:?} {waited_ms} ms after power/control was set to on")]
    PowerStuck {
        /// Last text of `power/runtime_status`.
        status: String,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// After the reset the device is not in the mode that was asked for.
    #[error("Asked for {want}, found {effective} with knobs {}", knobs_text(knobs))]
    VerifyFailed {
        /// The mode asked for.
        want: Mode,
        /// The mode the device booted with.
        effective: Effective,
        /// The knobs as read.
        knobs: Vec<KnobState>,
    },
    /// After the reset the device has developer's tools on without confidential computing (state 2).
    #[error("Asked for {want}, found state 2, developer's tools without confidential computing")]
    InvalidDevtoolsOnly {
        /// The mode asked for.
        want: Mode,
    },
    /// Somebody else uses the device.
    #[error("In use: {}", user_text(driver.as_deref(), *group, holders))]
    InUse {
        /// The bound driver, when it is one that uses the device itself.
        driver: Option<String>,
        /// The IOMMU group whose VFIO file is held.
        group: Option<u32>,
        /// Processes seen holding it; may be empty where other processes' files are hidden.
        holders: Vec<Holder>,
    },
    /// Another process of ccnode works on the device.
    #[error("Locked by {} ({})", holder.as_deref().unwrap_or("another process"), path.display())]
    LockHeld {
        /// The lock file.
        path: PathBuf,
        /// What the holder wrote of itself: process id and role.
        holder: Option<String>,
    },
    /// The device's driver or IOMMU group is no longer what it was when ownership was taken.
    #[error("No longer ours: {what} was {before:?} and is {now:?}")]
    OwnershipChanged {
        /// `driver` or `iommu_group`.
        what: &'static str,
        /// As it was when ownership was taken.
        before: Option<String>,
        /// As it is.
        now: Option<String>,
    },
    /// The device is bound to VFIO, and there is no group file to own it by.
    #[error("IOMMU group {} has no VFIO group file", group_text(*group))]
    NoGroupFile {
        /// The group, where the device has one.
        group: Option<u32>,
    },
    /// A lock folder that others could tamper with.
    #[error("{} is not safe for locks: {reason}", path.display())]
    UnsafePath {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Somebody asked to stop before the device was reset. The mode it has now and at the next reset are those of before.
    #[error("Stopped before the reset; {undone} knobs that were written have their former values again")]
    Stopped {
        /// Knobs that were written and written back.
        undone: usize,
    },
    /// The work on this device ended without a result: its thread could not be started or panicked.
    #[error("Work ended without a result: {what}")]
    Interrupted {
        /// What happened.
        what: String,
    },
    /// Somebody wants the device that we have opened: it is being unbound or unplugged. It was given back at a safe point.
    #[error("Given up half-way: it is being unbound or unplugged")]
    ReleaseRequested,
    /// The kernel refused one of VFIO's calls, in a way that means nothing more precise.
    #[error("VFIO refused to {action} {}: {}", path.display(), errno_text(*errno))]
    VfioRefused {
        /// What was tried (`open`, `reset`, ...).
        action: &'static str,
        /// VFIO's file.
        path: PathBuf,
        /// The kernel's error number.
        errno: i32,
    },
    /// A device of the IOMMU group is used by the host, so that the kernel gives no device of it to VFIO.
    #[error("IOMMU group {group} cannot be opened by VFIO: {}", members_text(members))]
    GroupNotViable {
        /// The group.
        group: u32,
        /// Its members that have a driver other than a VFIO driver, with that driver.
        members: Vec<(Bdf, String)>,
    },
    /// The way to reach the device that was asked for is not open.
    #[error("Cannot be reached through {access}, as was asked for: {reason}")]
    AccessUnavailable {
        /// What was asked for.
        access: Access,
        /// Why not.
        reason: &'static str,
    },
    /// An opened device does not take part in memory accesses: it was put to sleep, or its memory decoding turned off.
    #[error("BAR0 is closed: register {register:#x} cannot be reached through VFIO")]
    Bar0Closed {
        /// The register.
        register: u32,
    },
    /// The device's bus may not be reset, or not by us.
    #[error("Its bus cannot be reset: {reason}")]
    BusResetUnavailable {
        /// Why not.
        reason: String,
    },
}

impl Fault {
    /// The stable code: the variant's name.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::PermissionDenied { .. } => "PermissionDenied",
            Self::Lockdown { .. } => "Lockdown",
            Self::BusyRegion { .. } => "BusyRegion",
            Self::Io { .. } => "Io",
            Self::UnexpectedContent { .. } => "UnexpectedContent",
            Self::OffBus { .. } => "OffBus",
            Self::DeviceChanged { .. } => "DeviceChanged",
            Self::FirewallClosed { .. } => "FirewallClosed",
            Self::Bar0Dead { .. } => "Bar0Dead",
            Self::NoBar0 => "NoBar0",
            Self::OutsideBar0 { .. } => "OutsideBar0",
            Self::SecFault { .. } => "SecFault",
            Self::Recovery { .. } => "Recovery",
            Self::UnknownDevice { .. } => "UnknownDevice",
            Self::Unsupported { .. } => "Unsupported",
            Self::BootTimeout { .. } => "BootTimeout",
            Self::PriError { .. } => "PriError",
            Self::FspBusy { .. } => "FspBusy",
            Self::FspNoResponse { .. } => "FspNoResponse",
            Self::MnocError { .. } => "MnocError",
            Self::FspProtocol { .. } => "FspProtocol",
            Self::FspError { .. } => "FspError",
            Self::KnobUnsupported { .. } => "KnobUnsupported",
            Self::InBandDenied { .. } => "InBandDenied",
            Self::KnobMismatch { .. } => "KnobMismatch",
            Self::ResetUnavailable { .. } => "ResetUnavailable",
            Self::ResetFailed { .. } => "ResetFailed",
            Self::ResetTimeout { .. } => "ResetTimeout",
            Self::PowerStuck { .. } => "PowerStuck",
            Self::VerifyFailed { .. } => "VerifyFailed",
            Self::InvalidDevtoolsOnly { .. } => "InvalidDevtoolsOnly",
            Self::InUse { .. } => "InUse",
            Self::LockHeld { .. } => "LockHeld",
            Self::OwnershipChanged { .. } => "OwnershipChanged",
            Self::NoGroupFile { .. } => "NoGroupFile",
            Self::UnsafePath { .. } => "UnsafePath",
            Self::Stopped { .. } => "Stopped",
            Self::Interrupted { .. } => "Interrupted",
            Self::ReleaseRequested => "ReleaseRequested",
            Self::VfioRefused { .. } => "VfioRefused",
            Self::GroupNotViable { .. } => "GroupNotViable",
            Self::AccessUnavailable { .. } => "AccessUnavailable",
            Self::Bar0Closed { .. } => "Bar0Closed",
            Self::BusResetUnavailable { .. } => "BusResetUnavailable",
        }
    }

    /// Whether the way to the firmware is blocked in a manner that a reset may clear.
    pub(crate) const fn is_mailbox_stuck(&self) -> bool {
        matches!(self, Self::FspBusy { .. } | Self::FspNoResponse { .. } | Self::MnocError { .. })
    }

    /// Whether a device whose configuration space answers did not come back from a reset.
    pub(crate) const fn is_missing_after_reset(&self) -> bool {
        matches!(
            self,
            Self::BootTimeout { .. } | Self::FirewallClosed { .. } | Self::Bar0Dead { .. } | Self::PriError { .. }
        )
    }

    /// The cure, in one line.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::PermissionDenied { .. } => {
                "run as root, with the device's files in sysfs and /dev/vfio writable; in a container: privileged, as its device \
                 rules refuse /dev/vfio otherwise"
            }
            Self::Lockdown { .. } => {
                "bind the GPU to vfio-pci, which lockdown allows, or turn Secure Boot's lockdown off on this host"
            }
            Self::BusyRegion { .. } => "stop the virtual machine or the driver that uses the GPU, then try again",
            Self::Io { .. } | Self::UnexpectedContent { .. } => "check the kernel log for this device, then try again",
            Self::OffBus { .. } => {
                "reseat or power-cycle the device, or power-cycle the host; look for link errors in the kernel log"
            }
            Self::DeviceChanged { .. } | Self::OwnershipChanged { .. } => {
                "nothing was done to it; let the change settle, then try again"
            }
            Self::Bar0Dead { .. } => "power-cycle the host; if it stays so the device is faulty",
            Self::NoBar0 => {
                "enable large BARs (Above 4G Decoding) in the host's firmware and look for resource errors in the kernel log"
            }
            Self::OutsideBar0 { .. } => "check the device's resource sizes; this BAR is smaller than any known GPU's",
            Self::SecFault { .. } => {
                "power-cycle the host; a reset does not clear it. If it returns, have the device replaced"
            }
            Self::Recovery { .. } => "power-cycle the host; if it returns, update or repair the device's firmware",
            Self::UnknownDevice { .. } => "use a version of ccnode that knows this device, or take it off this node",
            Self::Unsupported { .. } => "choose a mode and a device that this version supports",
            Self::BootTimeout { .. } | Self::FirewallClosed { .. } => {
                "try again; if it stays so, power-cycle the host and check the device's firmware"
            }
            Self::PriError { .. } => "try again; if it stays so, reset the device or power-cycle the host",
            Self::FspBusy { .. } | Self::MnocError { .. } => {
                "shut down any virtual machine that had the GPU, reset the GPU, then try again"
            }
            Self::FspNoResponse { .. } | Self::FspProtocol { .. } => {
                "reset the device, then try again; if it stays so, update its firmware"
            }
            Self::FspError { .. } => "update the GPU's firmware; if it stays so, report the error code",
            Self::KnobUnsupported { .. } => "update the GPU's firmware",
            Self::InBandDenied { .. } => "allow the change out of band (BMC or vendor tool), or make it there",
            Self::KnobMismatch { .. } | Self::VerifyFailed { .. } => {
                "try again; if it stays so, check the device's firmware version"
            }
            Self::ResetUnavailable { .. } => {
                "check the device's reset_method file; without FLR or a bus reset only a power cycle helps"
            }
            Self::ResetFailed { .. } => "look for the device in the kernel log, then try again or power-cycle the host",
            Self::ResetTimeout { .. } => "wait for the kernel to give up (about 2 minutes), then power-cycle the host",
            Self::PowerStuck { .. } => {
                "look for power errors of the device in the kernel log, then power-cycle the host"
            }
            Self::InvalidDevtoolsOnly { .. } => "set any mode again; this state is repaired by it",
            Self::InUse { .. } => {
                "stop the virtual machine or program that uses the GPU, or bind the GPU to vfio-pci if a driver does"
            }
            Self::LockHeld { .. } => "wait for it to end; the lock goes with its process",
            Self::NoGroupFile { .. } => {
                "use a kernel with VFIO group files (CONFIG_VFIO_GROUP), and an IOMMU turned on"
            }
            Self::UnsafePath { .. } => "make it a folder owned by root that nobody else can write to",
            Self::Stopped { .. } | Self::Interrupted { .. } => "try again",
            Self::ReleaseRequested => "bind it to vfio-pci again, or leave it to whoever took it",
            Self::VfioRefused { .. } => {
                "look for vfio in the kernel log; the modules vfio_pci and vfio_iommu_type1 must be loaded"
            }
            Self::GroupNotViable { .. } => "unbind those devices, or bind them to vfio-pci as well",
            Self::AccessUnavailable { .. } => "let the access be chosen automatically, or bind the device to vfio-pci",
            Self::Bar0Closed { .. } => {
                "try again; if it stays so, look for power errors of the device in the kernel log"
            }
            Self::BusResetUnavailable { .. } => "power-cycle the host to reset it",
        }
    }

    /// The fault of a failed file operation; `what` says which for people.
    pub(crate) fn from_io(action: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::from_errno(action, path, Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32)))
    }

    /// The fault of a failed file operation on one of a device's own files (gpu-cc-protocol section 1.4).
    pub(crate) fn from_errno(action: &'static str, path: &Path, errno: Errno) -> Self {
        let path = path.to_owned();
        match errno {
            Errno::EACCES => Self::PermissionDenied { path, errno: errno as i32 },
            Errno::ENODEV | Errno::ENXIO => Self::OffBus { what: format!("{} says {}", path.display(), errno.desc()) },
            _ => Self::Io { action, path, errno: errno as i32 },
        }
    }
}

fn by_driver(driver: Option<&str>) -> String {
    driver.map_or_else(String::new, |driver| format!(" (bound driver: {driver})"))
}

fn errno_text(errno: i32) -> String {
    format!("{} (errno {errno})", Errno::from_raw(errno).desc())
}

fn optional_word(word: Option<u32>) -> String {
    word.map_or_else(|| "unreadable".to_owned(), |word| format!("{word:08x}"))
}

fn fsp_words(fsp: &[Option<u32>; 4]) -> String {
    fsp.map(optional_word).join(" ")
}

fn words(dwords: &[u32]) -> String {
    let mut text = String::new();
    for dword in dwords.iter().take(16) {
        let _ = write!(text, "{}{dword:08x}", if text.is_empty() { "" } else { " " });
    }
    if dwords.len() > 16 {
        let _ = write!(text, " and {} more", dwords.len() - 16);
    }
    if text.is_empty() { "empty".to_owned() } else { text }
}

pub(crate) fn methods_text(methods: &str) -> &str {
    if methods.is_empty() { "none" } else { methods }
}

fn group_text(group: Option<u32>) -> String {
    group.map_or_else(|| "(none)".to_owned(), |group| group.to_string())
}

fn members_text(members: &[(Bdf, String)]) -> String {
    let texts: Vec<_> = members.iter().map(|(bdf, driver)| format!("{bdf} is on driver {driver}")).collect();
    if texts.is_empty() { "another of its devices is used by the host".to_owned() } else { texts.join(", ") }
}

fn knobs_text(knobs: &[KnobState]) -> String {
    knobs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn user_text(driver: Option<&str>, group: Option<u32>, holders: &[Holder]) -> String {
    let mut parts = Vec::new();
    if let Some(driver) = driver {
        parts.push(format!("driver {driver} is bound"));
    }
    if let Some(group) = group {
        parts.push(format!("VFIO group {group} is held"));
    }
    let mut text = parts.join(", ");
    if !holders.is_empty() {
        let names: Vec<_> = holders.iter().map(ToString::to_string).collect();
        let _ = write!(text, " by {}", names.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_device_cause_and_cure() {
        let bdf = "0000:41:00.0".parse().unwrap();
        let error = Error::new(bdf, Fault::Lockdown { path: "/sys/x/resource0".into() });
        assert_eq!(error.code(), "Lockdown");
        assert_eq!(
            error.line(),
            "0000:41:00.0: Cannot use /sys/x/resource0: the kernel refuses direct PCI access, as it does when locked \
             down; bind the GPU to vfio-pci, which lockdown allows, or turn Secure Boot's lockdown off on this host"
        );
    }

    #[test]
    fn registers_and_replies_are_in_the_text() {
        let texts = [
            (
                Fault::BootTimeout {
                    register: 0x20_00bc,
                    last: 0,
                    wanted: 0xff,
                    waited_ms: 5000,
                    fsp_status: [Some(0), None, Some(1), Some(0xffff_ffff)],
                },
                "Did not finish booting within 5000 ms: register 0x2000bc reads 00000000, wanted 000000ff; FSP status \
                 00000000 unreadable 00000001 ffffffff",
            ),
            (
                Fault::FspError {
                    error: 0x202,
                    knob: Knob::CCM,
                    dwords: vec![0xc000_0000, 0x1510_de7e, 3, 0x13, 0x202],
                },
                "Firmware refused knob CCM (8) with error 0x202; reply c0000000 1510de7e 00000003 00000013 00000202",
            ),
            (
                Fault::InUse {
                    driver: None,
                    group: Some(12),
                    holders: vec![Holder { pid: 7, comm: "qemu-system-x86".into() }],
                },
                "In use: VFIO group 12 is held by pid 7 (qemu-system-x86)",
            ),
            (Fault::FspProtocol { reason: "short", dwords: vec![] }, "Firmware answered wrongly: short; reply empty"),
        ];
        for (fault, text) in texts {
            assert_eq!(fault.to_string(), text);
        }
    }

    #[test]
    fn as_data_an_error_has_its_device_code_and_facts() {
        let bdf = "0000:41:00.0".parse().unwrap();
        let json = |fault: Fault| serde_json::to_value(Error::new(bdf, fault)).unwrap();
        assert_eq!(json(Fault::NoBar0), serde_json::json!({ "bdf": "0000:41:00.0", "code": Fault::NoBar0.code() }));
        let fault = Fault::FspError { error: 0x202, knob: Knob::CCM, dwords: vec![1, 2] };
        let code = fault.code();
        let expected =
            serde_json::json!({ "bdf": "0000:41:00.0", "code": code, "error": 0x202, "knob": 8, "dwords": [1, 2] });
        assert_eq!(json(fault), expected);
        let want = Mode::On;
        assert_eq!(json(Fault::InvalidDevtoolsOnly { want })["want"], "on");
    }

    #[test]
    fn errno_means_what_the_protocol_says() {
        let path = Path::new("/sys/d/config");
        assert_eq!(Fault::from_errno("open", path, Errno::EACCES).code(), "PermissionDenied");
        assert_eq!(Fault::from_errno("read", path, Errno::ENODEV).code(), "OffBus");
        assert_eq!(Fault::from_errno("read", path, Errno::EIO).code(), "Io");
    }
}
