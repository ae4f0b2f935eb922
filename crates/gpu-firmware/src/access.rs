//! What the rest of the crate needs of a device, however it is reached.

use crate::error::Fault;

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

    /// Resets the device by its bus, as [`Reset::reset`] otherwise: for a device that did not come back from a function reset.
    /// [`Fault::ResetUnavailable`] where there is no way that concerns this device alone, or none but devices that are ours.
    fn bus_reset(&mut self) -> Result<(), Fault> {
        Err(Fault::ResetUnavailable { methods: "no bus reset".into() })
    }
}

/// A way to reach a device. Dropping it puts back whatever it changed to get there (power, memory decoding).
pub trait BackEnd: Reset {
    /// Reads an aligned dword of configuration space.
    fn config32(&self, offset: u16) -> Result<u32, Fault>;

    /// Opens the register window. Configuration space must have been seen to answer.
    fn bar0(&mut self) -> Result<Box<dyn Bar0>, Fault>;
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
    use super::*;
    use crate::fake::{FakeGpu, Quirk};

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
