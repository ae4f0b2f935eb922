//! What the rest of the crate needs of a device, however it is reached.

use std::fmt;
use std::str::FromStr;

use hw_probe::{HostFacts, Lockdown, PciFunction, SysRoot};
use serde::Serialize;

use crate::clock::Clock;
use crate::error::Fault;
use crate::mmap::MappedBar0;
use crate::ownership::{Hold, OwnedDevice};
use crate::sysfs::SysfsBackEnd;
use crate::vfio::VfioBackEnd;

/// A way to reach a device, or that the way is to be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Whichever the kernel and the ownership allow, sysfs before VFIO: it takes one reset where VFIO takes three.
    #[default]
    Auto,
    /// BAR0 through sysfs, reset through the kernel's `reset` file.
    Sysfs,
    /// Both through an opened VFIO device.
    Vfio,
}

impl Access {
    /// Its name on command lines and in records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Sysfs => "sysfs",
            Self::Vfio => "vfio",
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// No way to reach a device has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Unknown access {0:?}; known are auto, sysfs and vfio")]
pub struct AccessError(String);

impl FromStr for Access {
    type Err = AccessError;

    fn from_str(text: &str) -> Result<Self, AccessError> {
        let all = [Self::Auto, Self::Sysfs, Self::Vfio];
        all.into_iter().find(|access| access.as_str() == text).ok_or_else(|| AccessError(text.to_owned()))
    }
}

/// The way to a device that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// [`Access::Sysfs`] or [`Access::Vfio`].
    pub access: Access,
    /// Why.
    pub why: &'static str,
}

/// Chooses the way to a device that is ours. Changes nothing and touches no register.
pub(crate) fn choose(owned: &OwnedDevice) -> Result<Choice, Fault> {
    let refuse = |access, reason| Err(Fault::AccessUnavailable { access, reason });
    // A group is held for the sake of any of its devices; one that has no driver cannot be opened all the same.
    let hold = if owned.function().is_vfio_bound() { owned.hold() } else { Hold::LockOnly };
    let (access, why) = match (hold, owned.places().access) {
        (Hold::Cdev, Access::Sysfs) => {
            return refuse(
                Access::Sysfs,
                "the kernel has no VFIO group files, and owning it otherwise claims its BARs",
            );
        }
        (Hold::LockOnly, Access::Vfio) => return refuse(Access::Vfio, "it is not bound to a VFIO driver"),
        (_, asked @ (Access::Sysfs | Access::Vfio)) => (asked, "asked for"),
        (Hold::Cdev, Access::Auto) => (Access::Vfio, "the kernel has no VFIO group files"),
        (hold, Access::Auto) => match (is_locked_down(&owned.places().root, owned.function()), hold) {
            (false, _) => (Access::Sysfs, "the kernel is not locked down"),
            (true, Hold::LockOnly) => return Err(Fault::Lockdown { path: owned.folder().join("resource0") }),
            (true, _) => (Access::Vfio, "the kernel is locked down"),
        },
    };
    Ok(Choice { access, why })
}

/// Whether the kernel refuses to map BARs through sysfs. Where the lockdown file is missing, which proves nothing, a
/// mapping of the function's BAR0 is tried; that touches no register.
pub(crate) fn is_locked_down(root: &SysRoot, function: &PciFunction) -> bool {
    match HostFacts::read(root).lockdown {
        Lockdown::None => false,
        Lockdown::Integrity | Lockdown::Confidentiality => true,
        Lockdown::Unknown => {
            let bar0 = function.bars.iter().find(|bar| bar.number == 0 && !bar.io);
            let size = bar0.map_or(0, |bar| bar.size);
            let path = root.function(function.bdf).join("resource0");
            matches!(MappedBar0::open(&path, size, None), Err(Fault::Lockdown { .. }))
        }
    }
}

/// Opens a device that is ours, the way that [`choose`] finds.
pub(crate) fn open(owned: &OwnedDevice, clock: &dyn Clock) -> Result<Box<dyn BackEnd>, Fault> {
    let Choice { access, why } = choose(owned)?;
    tracing::info!(device = %owned.bdf(), %access, "reached through {access}: {why}");
    match access {
        Access::Vfio => Ok(Box::new(VfioBackEnd::open(owned.clone(), clock)?)),
        _ => Ok(Box::new(SysfsBackEnd::open(owned.clone(), clock)?)),
    }
}

/// Registers behind BAR0: aligned 32-bit loads and stores, by byte offset.
pub trait Bar0: Send {
    /// Reads a register. What the device answers is returned as it is: all ones and error words are for the caller to
    /// recognise.
    fn read32(&self, register: u32) -> Result<u32, Fault>;

    /// Writes a register.
    fn write32(&self, register: u32, value: u32) -> Result<(), Fault>;
}

/// Resetting the device.
pub trait Reset: Send {
    /// Resets the device and returns when the reset has been done, or when its deadline has passed. Any [`Bar0`] of the
    /// device must have been dropped before.
    fn reset(&mut self) -> Result<(), Fault>;

    /// Resets the device by its bus, for one that does not come back from [`Reset::reset`]. Only where nothing but what is
    /// ours is on that bus; otherwise [`Fault::BusResetUnavailable`], and nothing was done. Configuration space need not
    /// answer. For the rest as [`Reset::reset`].
    fn bus_reset(&mut self) -> Result<(), Fault> {
        Err(Fault::BusResetUnavailable { reason: "this way to the device has none".into() })
    }
}

/// A way to reach a device. Dropping it puts back whatever it changed to get there (power, memory decoding).
pub trait BackEnd: Reset {
    /// Which way it is, to be shown.
    fn access(&self) -> Access;

    /// Reads an aligned dword of configuration space.
    fn config32(&self, offset: u16) -> Result<u32, Fault>;

    /// Opens the register window. Configuration space must have been seen to answer.
    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault>;

    /// Whether somebody wants the device back: it is being unbound or unplugged, and whoever does it waits for us. To be
    /// asked at safe points: where the knobs as they are may be activated, because giving up resets the device.
    fn release_requested(&self) -> bool {
        false
    }

    /// Gives up what is open of the device. Any [`Bar0`] must have been dropped before; configuration space can still be
    /// read, registers cannot. Returns whether the device was reset by that, which activates the knobs that it has now:
    /// it boots again.
    fn release(&mut self) -> Result<bool, Fault> {
        Ok(false)
    }
}

/// Upper half of an error word of the device's register bus (gpu-cc-protocol section 1.6).
const PRI_ERROR: u32 = 0xbadf;

/// Whether `value` is an error word of the register bus.
pub(crate) const fn is_pri_error(value: u32) -> bool {
    value >> 16 == PRI_ERROR
}

/// Reads a register whose value can be neither all ones nor an error word.
pub(crate) fn read_sane(bar0: &dyn Bar0, register: u32) -> Result<u32, Fault> {
    match bar0.read32(register)? {
        u32::MAX => Err(Fault::Bar0Dead { register }),
        value if is_pri_error(value) => Err(Fault::PriError { register, value }),
        value => Ok(value),
    }
}

/// Length of configuration space that the kernel can show.
const CONFIG_END: u16 = 4096;

/// First extended capability.
const EXTENDED_START: u16 = 0x100;

/// Ids of the extended capabilities that vendors fill (gpu-cc-protocol section 1.2).
const VSEC: u32 = 0x0b;
const DVSEC: u32 = 0x23;

/// A vendor's capability in extended configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Vendor-specific, of this id and revision.
    Vsec { id: u16, revision: u8 },
    /// Designated vendor-specific, of this vendor and id.
    Dvsec { vendor: u16, id: u16 },
}

impl Capability {
    /// Whether the capability that starts at `at` with this header is the one; its length in bytes if so.
    fn recognise(self, back: &dyn BackEnd, at: u16, header: u32) -> Result<Option<u16>, Fault> {
        let second = || back.config32(at + 4);
        let length = |second: u32| u16::try_from(second >> 20).unwrap_or(0);
        match (self, header & 0xffff) {
            (Self::Vsec { id, revision }, VSEC) => {
                let second = second()?;
                Ok((second & 0xf_ffff == u32::from(revision) << 16 | u32::from(id)).then(|| length(second)))
            }
            (Self::Dvsec { vendor, id }, DVSEC) => {
                let second = second()?;
                let is_it = second & 0xffff == u32::from(vendor) && back.config32(at + 8)? & 0xffff == u32::from(id);
                Ok(is_it.then(|| length(second)))
            }
            _ => Ok(None),
        }
    }
}

/// Reads the dword `offset` bytes into a vendor's capability; none where there is no such capability, or it ends before.
/// The walk of the extended list is bounded, and reads no more words than it needs: each is an access to the device.
pub(crate) fn capability_word(back: &dyn BackEnd, capability: Capability, offset: u16) -> Result<Option<u32>, Fault> {
    match find(back, capability)? {
        Some((start, length)) if offset + 4 <= length && start + offset < CONFIG_END => {
            back.config32(start + offset).map(Some)
        }
        _ => Ok(None),
    }
}

/// Offset and length in bytes of a vendor's capability.
fn find(back: &dyn BackEnd, capability: Capability) -> Result<Option<(u16, u16)>, Fault> {
    let mut at = EXTENDED_START;
    for _ in 0..(CONFIG_END - EXTENDED_START) / 4 {
        let header = back.config32(at)?;
        if header == 0 || header == u32::MAX {
            return Ok(None);
        }
        if let Some(length) = capability.recognise(back, at, header)? {
            return Ok(Some((at, length)));
        }
        let next = u16::try_from((header >> 20) & 0xffc).unwrap_or(0);
        if next < EXTENDED_START {
            return Ok(None);
        }
        at = next;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::Arc;

    use super::*;
    use crate::device::Device;
    use crate::fake::{FakeGpu, Quirk, Tree, function};
    use crate::mode::Mode;
    use crate::ownership::Ownership;

    #[test]
    fn the_way_is_chosen_by_lockdown_and_ownership() {
        let (sysfs, vfio) = (Ok(Access::Sysfs), Ok(Access::Vfio));
        for (lockdown, asked, driver, expected) in [
            (Lockdown::None, Access::Auto, Some("vfio-pci"), sysfs),
            (Lockdown::Integrity, Access::Auto, Some("vfio-pci"), vfio),
            (Lockdown::Confidentiality, Access::Auto, Some("vfio-pci"), vfio),
            // A plain file can be mapped.
            (Lockdown::Unknown, Access::Auto, Some("vfio-pci"), sysfs),
            (Lockdown::None, Access::Vfio, Some("vfio-pci"), vfio),
            (Lockdown::Integrity, Access::Sysfs, Some("vfio-pci"), sysfs),
            (Lockdown::None, Access::Auto, None, sysfs),
            (Lockdown::Integrity, Access::Auto, None, Err("Lockdown")),
            (Lockdown::None, Access::Vfio, None, Err("AccessUnavailable")),
            (Lockdown::Integrity, Access::Sysfs, None, sysfs),
        ] {
            let mut tree = Tree::new();
            tree.sysfs.lockdown(lockdown);
            tree.places.access = asked;
            let gpu = tree.function("0000:41:00.0", driver, Some(12));
            let ownership = Ownership::take(&[gpu], &tree.places).unwrap();
            let found = choose(&ownership.devices()[0]).map(|choice| choice.access).map_err(|fault| fault.code());
            assert_eq!(found, expected, "{lockdown:?}, {asked}, {driver:?}");
        }
    }

    /// A device that is reset by being given up, and perhaps wanted by somebody.
    struct Opened {
        gpu: FakeGpu,
        wanted: bool,
    }

    impl Reset for Opened {
        fn reset(&mut self) -> Result<(), Fault> {
            self.gpu.reset()
        }
    }

    impl BackEnd for Opened {
        fn access(&self) -> Access {
            Access::Vfio
        }

        fn config32(&self, offset: u16) -> Result<u32, Fault> {
            self.gpu.config32(offset)
        }

        fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault> {
            Ok(self.gpu.bar0())
        }

        fn release_requested(&self) -> bool {
            self.wanted
        }

        fn release(&mut self) -> Result<bool, Fault> {
            self.gpu.reset()?;
            Ok(true)
        }
    }

    fn device(gpu: &FakeGpu, wanted: bool) -> Device {
        let back = Opened { gpu: gpu.clone(), wanted };
        Device::with_back_end(&function(&gpu.bdf().to_string()), Box::new(back), Arc::new(gpu.clock.clone())).unwrap()
    }

    #[test]
    fn what_giving_up_activates_is_what_was_verified() {
        let gpu = FakeGpu::new();
        let mut device = device(&gpu, false);
        device.stage(Mode::On, &mut |_| ControlFlow::Continue(())).unwrap();
        device.reset().unwrap();
        device.verify(Mode::On).unwrap();
        let requests = gpu.requests();
        device.release().unwrap();
        assert_eq!((gpu.resets(), gpu.requests_after_reset_are_vector_of(Mode::On)), (2, Ok(())));
        assert_eq!(gpu.requests(), requests, "no register is needed to see it come back");
    }

    #[test]
    fn a_device_that_does_not_come_back_from_being_given_up_is_not_well() {
        let gpu = FakeGpu::in_mode(Mode::On);
        let mut device = device(&gpu, false);
        device.verify(Mode::On).unwrap();
        gpu.quirk(Quirk::DiesAtReset);
        assert_eq!(device.release().unwrap_err().code(), "OffBus");
    }

    #[test]
    fn whoever_wants_the_device_gets_it_before_the_next_knob_and_the_next_reset() {
        let gpu = FakeGpu::new();
        let mut device = device(&gpu, true);
        assert_eq!(device.stage(Mode::On, &mut |_| ControlFlow::Continue(())).unwrap_err().code(), "ReleaseRequested");
        assert!(!gpu.requests().contains(":="), "{}", gpu.requests());
        assert_eq!(device.reset().unwrap_err().code(), "ReleaseRequested");
        assert_eq!(device.bus_reset().unwrap_err().code(), "ReleaseRequested");
        assert_eq!(gpu.resets(), 0);
        // To look takes nothing away.
        assert!(device.observe().is_ok());
    }

    #[test]
    fn names_of_ways_are_read_and_written() {
        for access in [Access::Auto, Access::Sysfs, Access::Vfio] {
            assert_eq!(access.to_string().parse(), Ok(access));
            assert_eq!(serde_json::to_value(access).unwrap(), access.as_str());
        }
        let error = "Vfio".parse::<Access>().unwrap_err();
        assert_eq!(error.to_string(), "Unknown access \"Vfio\"; known are auto, sysfs and vfio");
    }

    #[test]
    fn error_words_are_never_data() {
        let gpu = FakeGpu::new();
        let bar0 = gpu.bar0();
        for (value, code) in [(u32::MAX, "Bar0Dead"), (0xbadf_1234, "PriError")] {
            gpu.quirk(Quirk::Stuck { register: 0x11_82cc, value });
            assert_eq!(read_sane(&*bar0, 0x11_82cc).unwrap_err().code(), code);
        }
        gpu.quirk(Quirk::Stuck { register: 0x11_82cc, value: 0xbad0_badf });
        assert_eq!(read_sane(&*bar0, 0x11_82cc), Ok(0xbad0_badf));
    }

    #[test]
    fn capability_walks_end() {
        let gpu = FakeGpu::new();
        let back = gpu.back_end();
        let (vsec, other) = (Capability::Vsec { id: 1, revision: 1 }, Capability::Vsec { id: 2, revision: 1 });
        assert_eq!((find(&back, vsec), find(&back, other)), (Ok(Some((0x2a4, 0x14))), Ok(None)));
        assert_eq!(find(&back, Capability::Dvsec { vendor: 0x10de, id: 0 }), Ok(None));
        // A list that bites its own tail.
        gpu.set_config(0x2a4, 0x1001_000b);
        assert_eq!(find(&back, other), Ok(None));
        gpu.set_config(0x100, u32::MAX);
        assert_eq!(find(&back, vsec), Ok(None));
        // The last dword may claim to be a capability; its body would lie outside.
        gpu.set_config(0x100, 0xffc1_0000);
        gpu.set_config(0xffc, 0x0001_000b);
        assert!(find(&back, vsec).is_err());
    }

    #[test]
    fn words_beyond_a_capability_s_end_are_not_its_words() {
        let gpu = FakeGpu::new();
        let (back, vsec) = (gpu.back_end(), Capability::Vsec { id: 1, revision: 1 });
        gpu.set_config(0x2b4, 7);
        gpu.set_config(0x2b8, 8);
        assert_eq!((capability_word(&back, vsec, 0x10), capability_word(&back, vsec, 0x14)), (Ok(Some(7)), Ok(None)));
        gpu.set_config(0x2a8, 0x0181_0001);
        assert_eq!(capability_word(&back, vsec, 0x14), Ok(Some(8)));
    }

    #[test]
    fn a_designated_capability_is_known_by_vendor_and_id() {
        let gpu = FakeGpu::new();
        let back = gpu.back_end();
        // As GB10x has it at 0xaf0, behind one of another vendor (gpu-cc-protocol section 10.1).
        gpu.set_config(0x2a4, 0xac01_000b);
        for (at, next, vendor) in [(0xac0, 0xaf0, 0x8086), (0xaf0, 0, 0x10de)] {
            gpu.set_config(at, next << 20 | 0x1_0023);
            gpu.set_config(at + 4, 0x0180_0000 | vendor);
            gpu.set_config(at + 8, 0x10_0000);
        }
        assert_eq!(find(&back, Capability::Dvsec { vendor: 0x10de, id: 0 }), Ok(Some((0xaf0, 0x18))));
        assert_eq!(find(&back, Capability::Dvsec { vendor: 0x10de, id: 1 }), Ok(None));
        assert_eq!(capability_word(&back, Capability::Dvsec { vendor: 0x10de, id: 0 }, 8), Ok(Some(0x10_0000)));
    }
}
