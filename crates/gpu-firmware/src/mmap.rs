//! BAR0 through a mapping of sysfs's `resource0`.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::O_NOFOLLOW;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::access::Bar0;
use crate::error::Fault;

/// A mapped register window.
#[derive(Debug)]
pub(crate) struct MappedBar0 {
    base: NonNull<c_void>,
    size: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing else holds `base`. Registers are accessed by
// single aligned volatile loads and stores, which the device orders.
unsafe impl Send for MappedBar0 {}

impl MappedBar0 {
    /// Maps `size` bytes of the resource file at `path`. `driver` is named when the region is claimed.
    pub(crate) fn open(path: &Path, size: u64, driver: Option<&str>) -> Result<Self, Fault> {
        let size = usize::try_from(size).ok().and_then(NonZeroUsize::new).ok_or(Fault::NoBar0)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_NOFOLLOW)
            .open(path)
            .map_err(|error| open_fault(path, &error))?;
        let found = file.metadata().map_err(|error| Fault::from_io("look at", path, &error))?.len();
        if found < size.get() as u64 {
            // Beyond the end of the file a load would raise SIGBUS.
            return Err(Fault::UnexpectedContent {
                path: path.to_owned(),
                found: format!("{found:#x} bytes"),
                expected: "the size of BAR0",
            });
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no memory of this program, and the
        // length is that of the file.
        let base =
            unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &file, 0) }
                .map_err(|errno| map_fault(path, errno, driver))?;
        Ok(Self { base, size })
    }

    /// The address of a register, if it lies in the window and is aligned.
    fn address(&self, register: u32) -> Result<NonNull<u32>, Fault> {
        let outside = Fault::OutsideBar0 { register, size: self.size.get() as u64 };
        let Ok(offset) = usize::try_from(register) else { return Err(outside) };
        if !register.is_multiple_of(4) || offset.checked_add(4).is_none_or(|end| end > self.size.get()) {
            return Err(outside);
        }
        // SAFETY: `offset` and the three bytes after it lie in the mapping, as was just checked.
        Ok(unsafe { self.base.byte_add(offset) }.cast())
    }
}

impl Bar0 for MappedBar0 {
    fn read32(&self, register: u32) -> Result<u32, Fault> {
        let address = self.address(register)?;
        // SAFETY: `address` is aligned and in the mapping, which lives as long as `self`; the load is volatile because
        // the device may change the value, and reading may do something. Nobody can revoke the mapping while the group
        // file is held: claiming the BAR needs the VFIO device opened.
        Ok(u32::from_le(unsafe { address.read_volatile() }))
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), Fault> {
        let address = self.address(register)?;
        // SAFETY: as for `read32`; the mapping is writable.
        unsafe { address.write_volatile(value.to_le()) };
        Ok(())
    }
}

impl Drop for MappedBar0 {
    fn drop(&mut self) {
        // SAFETY: `base` and `size` are those of a mapping that this value made and nobody else uses.
        if let Err(errno) = unsafe { munmap(self.base, self.size.get()) } {
            tracing::warn!(%errno, "cannot unmap BAR0");
        }
    }
}

fn open_fault(path: &Path, error: &std::io::Error) -> Fault {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => Fault::NoBar0,
        Some(Errno::EPERM) => Fault::Lockdown { path: path.to_owned() },
        _ => Fault::from_io("open", path, error),
    }
}

/// What a refused mapping means (gpu-cc-protocol section 1.4).
fn map_fault(path: &Path, errno: Errno, driver: Option<&str>) -> Fault {
    match errno {
        Errno::EPERM => Fault::Lockdown { path: path.to_owned() },
        Errno::EINVAL | Errno::EBUSY => {
            Fault::BusyRegion { path: path.to_owned(), driver: driver.map(ToOwned::to_owned) }
        }
        _ => Fault::from_errno("map", path, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aligned_words_inside_the_window_are_reached() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0xef, 0xbe, 0xad, 0xde].repeat(1024)).unwrap();
        let bar0 = MappedBar0::open(file.path(), 4096, None).unwrap();
        assert_eq!(bar0.read32(0xffc), Ok(0xdead_beef));
        bar0.write32(8, 0x1234_5678).unwrap();
        for register in [1, 2, 3, 0xffe, 0x1000, u32::MAX - 3, u32::MAX] {
            let outside = Err(Fault::OutsideBar0 { register, size: 4096 });
            assert_eq!(bar0.read32(register), outside);
            assert_eq!(bar0.write32(register, 0), outside.map(drop));
        }
        drop(bar0);
        assert_eq!(std::fs::read(file.path()).unwrap()[8..12], [0x78, 0x56, 0x34, 0x12]);
    }

    #[test]
    fn a_window_larger_than_its_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 100]).unwrap();
        assert_eq!(MappedBar0::open(file.path(), 4096, None).unwrap_err().code(), "UnexpectedContent");
        assert_eq!(MappedBar0::open(file.path(), 0, None).unwrap_err().code(), "NoBar0");
        assert_eq!(MappedBar0::open(Path::new("/nonexistent/resource0"), 4096, None).unwrap_err().code(), "NoBar0");
    }

    #[test]
    fn refusals_of_the_kernel_have_their_own_errors() {
        let path = Path::new("resource0");
        let table = [
            (Errno::EPERM, "Lockdown"),
            (Errno::EINVAL, "BusyRegion"),
            (Errno::EACCES, "PermissionDenied"),
            (Errno::ENODEV, "OffBus"),
            (Errno::ENOMEM, "Io"),
        ];
        for (errno, code) in table {
            assert_eq!(map_fault(path, errno, Some("vfio-pci")).code(), code);
        }
    }
}
