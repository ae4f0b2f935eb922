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

/// Vendor-specific extended capability (gpu-cc-protocol section 1.2).
const VSEC: u32 = 0x0b;

/// Offset of the vendor-specific capability of that id and revision, by a bounded walk of the extended list that reads
/// no more words than it needs: each is an access to the device.
pub(crate) fn find_vsec(back: &dyn BackEnd, (id, revision): (u32, u32)) -> Result<Option<u16>, Fault> {
    let mut at = EXTENDED_START;
    for _ in 0..(CONFIG_END - EXTENDED_START) / 4 {
        let header = back.config32(at)?;
        if header == 0 || header == u32::MAX {
            return Ok(None);
        }
        if header & 0xffff == VSEC && back.config32(at + 4)? & 0xf_ffff == (revision << 16 | id) {
            return Ok(Some(at));
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
        assert_eq!(find_vsec(&back, (1, 1)), Ok(Some(0x2a4)));
        assert_eq!(find_vsec(&back, (2, 1)), Ok(None));
        // A list that bites its own tail.
        gpu.set_config(0x2a4, 0x1001_000b);
        assert_eq!(find_vsec(&back, (2, 1)), Ok(None));
        gpu.set_config(0x100, u32::MAX);
        assert_eq!(find_vsec(&back, (1, 1)), Ok(None));
        // The last dword may claim to be a capability; its body would lie outside.
        gpu.set_config(0x100, 0xffc1_0000);
        gpu.set_config(0xffc, 0x0001_000b);
        assert!(find_vsec(&back, (1, 1)).is_err());
    }
}
