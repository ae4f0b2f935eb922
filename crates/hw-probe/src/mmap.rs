//! Whether the kernel lets a BAR be mapped at all.

use std::fs::OpenOptions;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// One page: the least that can be mapped.
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Asks for a mapping of a resource file through which nothing can be read or written, and gives it back at once. The
/// kernel checks lockdown before all else, and neither the mapping nor its end touches the device.
pub(crate) fn map_without_access(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    // SAFETY: The kernel chooses the address, so no existing mapping is replaced; PROT_NONE gives no access, and the
    // pointer is used for nothing but the end of the mapping.
    let mapping = unsafe { mmap(None, PAGE, ProtFlags::PROT_NONE, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: It is the whole of the mapping made above, and nothing refers to it.
    unsafe { munmap(mapping, PAGE.get()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_can_be_mapped_and_a_missing_one_cannot() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resource0");
        assert_eq!(map_without_access(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, [0; 4096]).unwrap();
        map_without_access(&path).unwrap();
        assert!(map_without_access(folder.path()).is_err());
    }
}
