//! Whether the kernel lets a BAR be mapped at all, and reading a few of its registers.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

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

/// Most registers of one look.
pub(crate) const MOST_WORDS: usize = 4;

/// How a look at registers ended without words.
#[derive(Debug)]
pub(crate) enum Unread {
    /// The kernel refuses the mapping, or the file is not what it should be.
    Refused(io::Error),
    /// Another took the BAR between the mapping and the load: the kernel revoked the mapping.
    Taken,
    /// The loads did not end in time.
    Late,
    /// The process that was to load ended otherwise.
    Lost(String),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        Self::Refused(error)
    }
}

/// Pages of a resource file, mapped for reading, each with one register in it.
pub(crate) struct Window {
    pages: [Option<(NonNull<c_void>, usize)>; MOST_WORDS],
}

impl Window {
    /// Maps the pages of these registers, which are multiples of 4 and at most [`MOST_WORDS`]. Nothing is read yet.
    pub(crate) fn open(path: &Path, registers: &[u32]) -> io::Result<Self> {
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
        let found = file.metadata()?;
        let mut window = Self { pages: [None; MOST_WORDS] };
        if registers.len() > MOST_WORDS || !found.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a window of registers"));
        }
        for (page, register) in window.pages.iter_mut().zip(registers) {
            // Beyond the end of the file a load would raise SIGBUS.
            if !register.is_multiple_of(4) || u64::from(*register) + 4 > found.len() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "register outside of the window"));
            }
            let within = usize::try_from(*register).unwrap_or(usize::MAX) % PAGE.get();
            let start = libc::off_t::from(*register) - libc::off_t::try_from(within).unwrap_or(0);
            // SAFETY: The kernel chooses the address, so no existing mapping is replaced; nothing is loaded from it here.
            let base = unsafe { mmap(None, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, start) }?;
            *page = Some((base, within));
        }
        Ok(window)
    }

    /// Loads the registers in a process of their own, for a mapping that the kernel revokes raises SIGBUS, which ends that
    /// process alone. It stops after a first word of all ones: such a device answers nothing. Waits for `patience` at most,
    /// and little longer.
    pub(crate) fn read(&self, patience: Duration) -> Result<Vec<u32>, Unread> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
        let theirs = File::from(theirs);
        // SAFETY: The child of a process with threads may only do what is safe in a signal handler: it calls `load`, which
        // makes system calls on what exists already, allocates nothing, takes no lock, and never returns.
        match unsafe { fork() }.map_err(io::Error::from)? {
            ForkResult::Child => self.load(&theirs),
            ForkResult::Parent { child } => {
                drop(theirs);
                gather(child, ours, patience)
            }
        }
    }

    fn load(&self, to: &File) -> ! {
        // A revoked mapping is expected: it must end the process at once, whatever handlers there are, and dump no core.
        // SAFETY: Setting the default disposition runs no code of ours.
        let ready = unsafe { signal(Signal::SIGBUS, SigHandler::SigDfl) }.is_ok() && set_dumpable(false).is_ok();
        let mut ended = !ready;
        for (base, within) in self.pages.iter().flatten() {
            if ended {
                break;
            }
            // SAFETY: `within` is a multiple of 4 below the page's size, so the address is aligned and in the mapping; the
            // load is volatile because the device may change the value.
            let word = u32::from_le(unsafe { base.byte_add(*within).cast::<u32>().read_volatile() });
            // A pipe has room for these few bytes; without a reader an error or SIGPIPE ends us.
            ended = nix::unistd::write(to, &word.to_le_bytes()).is_err() || word == u32::MAX;
        }
        // SAFETY: Ends this process without running what the parent registered to run at its own end.
        unsafe { libc::_exit(i32::from(!ready)) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for (base, _) in self.pages.iter().flatten() {
            // SAFETY: It is the whole of a mapping made by `open`, and nothing refers to it any more.
            let _ = unsafe { munmap(*base, PAGE.get()) };
        }
    }
}

/// What the child wrote until it ended.
fn gather(child: Pid, from: OwnedFd, patience: Duration) -> Result<Vec<u32>, Unread> {
    let deadline = Instant::now() + patience;
    let mut bytes = Vec::new();
    let mut from = File::from(from);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = PollTimeout::try_from(left.as_millis().saturating_add(1).min(60_000)).unwrap_or(PollTimeout::ZERO);
        let ready = match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], wait) {
            Err(Errno::EINTR) => continue,
            Err(error) => Err(Unread::Refused(error.into())),
            Ok(0) => Err(Unread::Late),
            Ok(_) => Ok(()),
        };
        let mut chunk = [0; 64];
        match ready.and_then(|()| from.read(&mut chunk).map_err(Unread::Refused)) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) => {
                let _ = kill(child, Signal::SIGKILL);
                reap(child);
                return Err(error);
            }
        }
    }
    match reap(child) {
        Some(WaitStatus::Exited(_, 0)) => {}
        Some(WaitStatus::Signaled(_, Signal::SIGBUS, _)) => return Err(Unread::Taken),
        other => return Err(Unread::Lost(format!("{other:?}"))),
    }
    Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
}

/// How the child ended; none when it does not end within a second, stuck in its load.
fn reap(child: Pid) -> Option<WaitStatus> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(Errno::EINTR) => {}
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(status) => return Some(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

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

    fn registers() -> (tempfile::NamedTempFile, Vec<u8>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..3 * 4096_u32 / 4).flat_map(|index| (0x1000_0000 + 4 * index).to_le_bytes()).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn registers_are_loaded_by_another_process() {
        let (file, _) = registers();
        let window = Window::open(file.path(), &[0, 0x1004, 0x2ffc]).unwrap();
        for _ in 0..3 {
            let words = window.read(Duration::from_secs(20)).unwrap();
            assert_eq!(words, [0x1000_0000, 0x1000_1004, 0x1000_2ffc]);
        }
        for register in [2, 0x3000, u32::MAX - 3] {
            assert!(Window::open(file.path(), &[register]).is_err(), "{register:#x}");
        }
        assert!(Window::open(file.path(), &[0; 5]).is_err());
    }

    #[test]
    fn a_dead_device_is_asked_for_one_word() {
        let (file, _) = registers();
        file.as_file().write_all_at(&[0xff; 4], 0).unwrap();
        let window = Window::open(file.path(), &[0, 0x1004]).unwrap();
        assert_eq!(window.read(Duration::from_secs(20)).unwrap(), [u32::MAX]);
    }

    #[test]
    fn a_mapping_that_is_revoked_ends_the_other_process_alone() {
        let (file, _) = registers();
        let window = Window::open(file.path(), &[0, 0x1004]).unwrap();
        // A file that is cut short raises SIGBUS as a revoked BAR does.
        file.as_file().set_len(0).unwrap();
        assert!(matches!(window.read(Duration::from_secs(20)), Err(Unread::Taken)));
    }
}
