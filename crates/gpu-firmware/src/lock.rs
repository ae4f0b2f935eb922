//! One lock a device, across processes and containers: whoever binds, unbinds, writes knobs or resets holds it.
//!
//! It is an open-file-description lock on `/run/nvidia/ccnode/locks/<BDF>`: the kernel releases it when its holder dies,
//! and two threads of one process exclude each other as well. The file's content says who took it last, for people; it
//! is believed only while the lock is held. Files are never removed, since a lock on a removed file excludes nobody.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hw_probe::Bdf;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, openat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode as FileMode, SFlag, fstat, mkdirat};
use nix::unistd::{ftruncate, geteuid};

use crate::clock::{Clock, Wait};
use crate::error::{Error, Fault};
use crate::ownership::Places;

/// Folders below the base that the locks are in.
const FOLDER: &str = "nvidia/ccnode/locks";

/// Most that is read of a lock file.
const CONTENT_LIMIT: u64 = 256;

/// How often a held lock is tried again.
pub(crate) const RETRY: Duration = Duration::from_millis(100);

/// The lock of one device, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct DeviceLock {
    bdf: Bdf,
    _file: File,
}

impl DeviceLock {
    /// Takes the lock, or says who has it ([`Fault::LockHeld`]). Never waits.
    pub fn take(bdf: Bdf, places: &Places) -> Result<Self, Error> {
        lock(bdf, places).map_err(|fault| Error::new(bdf, fault))
    }

    /// Takes the lock, waiting up to `patience` for its holder.
    pub fn take_within(bdf: Bdf, places: &Places, patience: Duration, clock: &dyn Clock) -> Result<Self, Error> {
        let mut held = None;
        let taken = Wait::new(patience, RETRY).poll(clock, || match Self::take(bdf, places) {
            Err(error) if matches!(*error.fault, Fault::LockHeld { .. }) => {
                held = Some(error);
                Ok(None)
            }
            other => other.map(Some),
        })?;
        match (taken, held) {
            (Some(lock), _) => Ok(lock),
            (None, Some(error)) => Err(error),
            // A wait always looks at least once, and a look that takes no lock says why.
            (None, None) => Self::take(bdf, places),
        }
    }

    /// The device it locks.
    pub const fn bdf(&self) -> Bdf {
        self.bdf
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the constants are 0 and 1; libc declares them wider than the fields"
)]
fn lock(bdf: Bdf, places: &Places) -> Result<DeviceLock, Fault> {
    let (folder, folder_path) = open_folder(&places.run)?;
    let path = folder_path.join(bdf.to_string());
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let name = bdf.to_string();
    let descriptor = openat(folder.as_fd(), name.as_str(), flags, FileMode::from_bits_truncate(0o644))
        .map_err(|errno| open_fault(&path, errno))?;
    check(&path, &descriptor, SFlag::S_IFREG)?;
    let mut file = File::from(descriptor);
    let request = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&request)) {
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EACCES) => return Err(Fault::LockHeld { path, holder: holder(&mut file) }),
        Err(errno) => return Err(Fault::from_errno("lock", &path, errno)),
    }
    // Only people read this, so a failure to write it does not fail the lock.
    let note = format!("pid {} ({})\n", std::process::id(), places.role);
    if let Err(error) = ftruncate(&file, 0).map_err(std::io::Error::from).and_then(|()| file.write_all(note.as_bytes()))
    {
        tracing::debug!(path = %path.display(), %error, "cannot note the lock's holder");
    }
    Ok(DeviceLock { bdf, _file: file })
}

/// What the holder wrote of itself: one printable line.
fn holder(file: &mut File) -> Option<String> {
    let mut text = Vec::new();
    file.take(CONTENT_LIMIT).read_to_end(&mut text).ok()?;
    let line: String =
        String::from_utf8_lossy(&text).lines().next()?.chars().filter(|character| !character.is_control()).collect();
    (!line.is_empty()).then_some(line)
}

/// Opens the lock folder below `base`, making what is missing. No symbolic link is followed below the base, and nobody
/// but its owner (root, or whoever we are) may write to any of it.
fn open_folder(base: &Path) -> Result<(OwnedFd, PathBuf), Fault> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
    let mut folder = nix::fcntl::open(base, flags, FileMode::empty()).map_err(|errno| open_fault(base, errno))?;
    let mut path = base.to_owned();
    check(&path, &folder, SFlag::S_IFDIR)?;
    for component in Path::new(FOLDER).components() {
        let Component::Normal(name) = component else { continue };
        path.push(name);
        match mkdirat(folder.as_fd(), name, FileMode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(open_fault(&path, errno)),
        }
        folder = openat(folder.as_fd(), name, flags | OFlag::O_NOFOLLOW, FileMode::empty())
            .map_err(|errno| open_fault(&path, errno))?;
        check(&path, &folder, SFlag::S_IFDIR)?;
    }
    Ok((folder, path))
}

fn open_fault(path: &Path, errno: Errno) -> Fault {
    let unsafe_path = |reason| Fault::UnsafePath { path: path.to_owned(), reason };
    match errno {
        Errno::ELOOP => unsafe_path("it is a symbolic link"),
        Errno::ENOTDIR => unsafe_path("it is not a folder"),
        Errno::EISDIR => unsafe_path("it is not a file"),
        Errno::EPERM => Fault::PermissionDenied { path: path.to_owned(), errno: errno as i32 },
        _ => Fault::from_errno("open", path, errno),
    }
}

fn check(path: &Path, file: &OwnedFd, kind: SFlag) -> Result<(), Fault> {
    let stat = fstat(file).map_err(|errno| Fault::from_errno("look at", path, errno))?;
    match unsafe_reason(&stat, kind, geteuid().as_raw()) {
        None => Ok(()),
        Some(reason) => Err(Fault::UnsafePath { path: path.to_owned(), reason }),
    }
}

fn unsafe_reason(stat: &FileStat, kind: SFlag, me: u32) -> Option<&'static str> {
    if stat.st_mode & SFlag::S_IFMT.bits() != kind.bits() {
        Some("it is not of the right type")
    } else if stat.st_uid != 0 && stat.st_uid != me {
        Some("it belongs to somebody else")
    } else if stat.st_mode & 0o022 != 0 {
        Some("others may write to it")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::fake::{FakeClock, places};

    fn bdf() -> Bdf {
        "0000:41:00.0".parse().unwrap()
    }

    #[test]
    fn a_held_lock_names_its_holder_and_a_dropped_one_is_free() {
        let tree = tempfile::tempdir().unwrap();
        let places = places(tree.path());
        let lock = DeviceLock::take(bdf(), &places).unwrap();
        assert_eq!(lock.bdf(), bdf());
        let error = DeviceLock::take(bdf(), &places).unwrap_err();
        assert_eq!(error.code(), "LockHeld");
        let expected = format!("0000:41:00.0: Locked by pid {} (testing)", std::process::id());
        assert!(error.to_string().starts_with(&expected), "{error}");
        let other = "0000:42:00.0".parse().unwrap();
        assert!(DeviceLock::take(other, &places).is_ok(), "another device's lock is another lock");
        drop(lock);
        assert!(DeviceLock::take(bdf(), &places).is_ok());
    }

    #[test]
    fn patience_ends() {
        let tree = tempfile::tempdir().unwrap();
        let (places, clock) = (places(tree.path()), FakeClock::default());
        let lock = DeviceLock::take(bdf(), &places).unwrap();
        let patience = Duration::from_secs(3);
        let error = DeviceLock::take_within(bdf(), &places, patience, &clock).unwrap_err();
        assert_eq!(error.code(), "LockHeld");
        assert!(clock.now() >= patience && clock.now() < patience + RETRY * 2);
        drop(lock);
        assert!(DeviceLock::take_within(bdf(), &places, Duration::ZERO, &clock).is_ok());
    }

    #[test]
    fn folders_that_others_could_tamper_with_are_refused() {
        let reason = |prepare: &dyn Fn(&Path)| {
            let tree = tempfile::tempdir().unwrap();
            let places = places(tree.path());
            prepare(&places.run);
            match *DeviceLock::take(bdf(), &places).unwrap_err().fault {
                Fault::UnsafePath { reason, .. } => reason,
                other => panic!("{other}"),
            }
        };
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(reason(&|run| mode(run, 0o777)), "others may write to it");
        assert_eq!(
            reason(&|run| {
                fs::create_dir(run.join("nvidia")).unwrap();
                mode(&run.join("nvidia"), 0o775);
            }),
            "others may write to it"
        );
        // With O_DIRECTORY and O_NOFOLLOW a link is "not a folder" to the kernel.
        assert_eq!(
            reason(&|run| {
                fs::create_dir(run.join("elsewhere")).unwrap();
                symlink(run.join("elsewhere"), run.join("nvidia")).unwrap();
            }),
            "it is not a folder"
        );
        assert_eq!(reason(&|run| fs::write(run.join("nvidia"), "").unwrap()), "it is not a folder");
        let locks = |run: &Path| {
            fs::create_dir_all(run.join(FOLDER)).unwrap();
            for folder in ["nvidia", "nvidia/ccnode", FOLDER] {
                mode(&run.join(folder), 0o755);
            }
            run.join(FOLDER).join(bdf().to_string())
        };
        assert_eq!(reason(&|run| symlink(run.join("target"), locks(run)).unwrap()), "it is a symbolic link");
        assert_eq!(reason(&|run| fs::create_dir(locks(run)).unwrap()), "it is not a file");
    }

    #[test]
    fn a_strange_lock_file_is_read_harmlessly() {
        let tree = tempfile::tempdir().unwrap();
        let places = places(tree.path());
        let _lock = DeviceLock::take(bdf(), &places).unwrap();
        let path = places.run.join(FOLDER).join(bdf().to_string());
        let holder = || match *DeviceLock::take(bdf(), &places).unwrap_err().fault {
            Fault::LockHeld { holder, .. } => holder,
            other => panic!("{other}"),
        };
        fs::write(&path, "").unwrap();
        assert_eq!(holder(), None);
        fs::write(&path, b"\x1b[31mpid \xff\nsecond").unwrap();
        assert_eq!(holder().as_deref(), Some("[31mpid \u{fffd}"));
        fs::write(&path, vec![b'x'; 100_000]).unwrap();
        assert_eq!(holder().unwrap().len() as u64, CONTENT_LIMIT);
    }
}
