//! Files on the host that a root process can read and write without being led astray.
//!
//! A [`HostDir`] is a directory that only root (or we) can write. Files are opened beneath it by plain name, symbolic
//! links are never followed, and what is read is checked for owner, mode and size first. Writing makes an exclusive
//! temporary file beside the old one, syncs it, and renames it over: a reader sees the old bytes or the new ones.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// A directory that is safe to keep files in.
#[derive(Debug)]
pub struct HostDir {
    path: PathBuf,
    fd: OwnedFd,
}

/// What went wrong with a host file, and where.
#[derive(Debug, thiserror::Error)]
pub enum HostFileError {
    /// A call failed.
    #[error("Cannot {action} {path}")]
    Io {
        /// `open`, `create`, `read`, `write`, `rename`, `remove`, `check`.
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Someone else could change the file or directory.
    #[error("{path} is not trusted: {reason}; make it root's alone (owner root, mode {wanted})")]
    Untrusted {
        /// The path concerned.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// The mode it should have.
        wanted: &'static str,
    },
    /// The file is larger than its reader accepts.
    #[error("{path} holds more than {max} bytes")]
    TooLarge {
        /// The path concerned.
        path: PathBuf,
        /// Most bytes accepted.
        max: u64,
    },
    /// A path that is not absolute, or a file name that is not one plain name.
    #[error("{path:?} is not a usable {what}")]
    Name {
        /// What was given.
        path: PathBuf,
        /// `file name` or `absolute path`.
        what: &'static str,
    },
}

impl HostDir {
    /// Opens the directory at the absolute `path`, making what is missing of it with mode 0755.
    ///
    /// Symbolic links on the way (such as `/var/run`) are resolved once, and only those that root or we own. Every
    /// directory on the resolved way must belong to root or to us and be writable by nobody else, save sticky ones such
    /// as `/tmp` above the last.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, HostFileError> {
        Self::walk(path.as_ref(), true).and_then(|dir| {
            dir.ok_or_else(|| HostFileError::Io {
                action: "open",
                path: path.as_ref().to_owned(),
                source: Errno::ENOENT.into(),
            })
        })
    }

    /// Like [`HostDir::open`], but makes nothing: none when the directory is absent.
    pub fn open_existing(path: impl AsRef<Path>) -> Result<Option<Self>, HostFileError> {
        Self::walk(path.as_ref(), false)
    }

    /// The path it was opened by, links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn walk(path: &Path, create: bool) -> Result<Option<Self>, HostFileError> {
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain {
            return Err(HostFileError::Name { path: path.to_owned(), what: "absolute path" });
        }
        let (resolved, missing) = resolve(path)?;
        if !missing.is_empty() && !create {
            return Ok(None);
        }
        let at_root =
            |source: Errno| HostFileError::Io { action: "open", path: PathBuf::from("/"), source: source.into() };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut fd = nix::fcntl::open("/", flags, Mode::empty()).map_err(at_root)?;
        let mut here = PathBuf::from("/");
        let existing: Vec<OsString> = resolved
            .components()
            .filter_map(|part| if let Component::Normal(name) = part { Some(name.to_owned()) } else { None })
            .collect();
        let count = existing.len() + missing.len();
        let steps = existing.into_iter().map(|name| (name, false)).chain(missing.into_iter().map(|name| (name, true)));
        for (index, (name, make)) in steps.enumerate() {
            here.push(&name);
            let error = |action, source: Errno| HostFileError::Io { action, path: here.clone(), source: source.into() };
            if make {
                match mkdirat(&fd, name.as_os_str(), Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(source) => return Err(error("create", source)),
                }
            }
            let next = open_beneath(&fd, &name, flags, Mode::empty()).map_err(|source| error("open", source))?;
            let stat = fstat(&next).map_err(|source| error("check", source))?;
            check_dir(&stat, &here, index + 1 == count)?;
            fd = next;
        }
        Ok(Some(Self { path: here, fd }))
    }

    /// Reads the file `name`, of at most `max` bytes; none when it is absent. It must be a regular file that only root or
    /// we can write.
    pub fn read(&self, name: &str, max: u64) -> Result<Option<Vec<u8>>, HostFileError> {
        let path = self.child(name)?;
        let error = |action, source| HostFileError::Io { action, path: path.clone(), source };
        // O_NONBLOCK: a FIFO planted under the name must not make us wait for a writer.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = match open_beneath(&self.fd, OsStr::new(name), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(source) => return Err(error("open", source.into())),
        };
        let stat = fstat(&fd).map_err(|source| error("check", source.into()))?;
        check_file(&stat, &path)?;
        if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > max {
            return Err(HostFileError::TooLarge { path, max });
        }
        let mut bytes = Vec::new();
        // One more than allowed: the file may have grown since it was looked at.
        File::from(fd).take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(|source| error("read", source))?;
        if bytes.len() as u64 > max {
            return Err(HostFileError::TooLarge { path, max });
        }
        Ok(Some(bytes))
    }

    /// Puts `bytes` under `name` with the permission bits `mode`, whole or not at all.
    pub fn write_atomic(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), HostFileError> {
        self.write(name, bytes, mode, true)
    }

    /// The same for what nobody needs after a power cut, because its writer makes it anew at every start of the machine: a
    /// reader of this boot sees the old bytes or the new ones, and no disk is waited for.
    pub fn write_for_this_boot(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), HostFileError> {
        self.write(name, bytes, mode, false)
    }

    fn write(&self, name: &str, bytes: &[u8], mode: u32, outlasts_power: bool) -> Result<(), HostFileError> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let path = self.child(name)?;
        let error = |action, source| HostFileError::Io { action, path: path.clone(), source };
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.subsec_nanos());
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = format!(".{name}.{}.{nanos:08x}.{count}.tmp", std::process::id());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode & 0o777);
        let fd = open_beneath(&self.fd, OsStr::new(&temporary), flags, mode)
            .map_err(|source| error("create", source.into()))?;
        let write = || {
            // The umask may have taken bits away.
            fchmod(&fd, mode).map_err(|source| error("write", source.into()))?;
            let mut file = File::from(fd);
            file.write_all(bytes).map_err(|source| error("write", source))?;
            if outlasts_power {
                file.sync_all().map_err(|source| error("write", source))?;
            }
            renameat(&self.fd, temporary.as_str(), &self.fd, name).map_err(|source| error("rename", source.into()))
        };
        if let Err(failure) = write() {
            let _ = unlinkat(&self.fd, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
            return Err(failure);
        }
        if !outlasts_power {
            return Ok(());
        }
        // The name itself: without this a power cut can bring the old file back. Some file systems cannot, and say EINVAL.
        match nix::unistd::fsync(&self.fd) {
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(source) => Err(error("write", source.into())),
        }
    }

    /// Removes the file `name`; tells whether there was one.
    pub fn remove(&self, name: &str) -> Result<bool, HostFileError> {
        let path = self.child(name)?;
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(source) => Err(HostFileError::Io { action: "remove", path, source: source.into() }),
        }
    }

    /// Whether there is anything under `name`.
    pub fn exists(&self, name: &str) -> Result<bool, HostFileError> {
        let path = self.child(name)?;
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(source) => Err(HostFileError::Io { action: "check", path, source: source.into() }),
        }
    }

    fn child(&self, name: &str) -> Result<PathBuf, HostFileError> {
        let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']) && name.len() <= 200;
        if plain { Ok(self.path.join(name)) } else { Err(HostFileError::Name { path: name.into(), what: "file name" }) }
    }
}

/// Opens `name` beneath `dir` without following links. Kernels before 5.6 and old seccomp profiles lack `openat2`; a
/// single plain name is as safe with `O_NOFOLLOW`.
fn open_beneath(dir: &impl AsFd, name: &OsStr, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW)
        .mode(if flags.contains(OFlag::O_CREAT) { mode } else { Mode::empty() })
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
    match openat2(dir, name, how) {
        Err(Errno::ENOSYS | Errno::EPERM) if !name.as_bytes().contains(&b'/') => {
            openat(dir, name, flags | OFlag::O_NOFOLLOW, mode)
        }
        other => other,
    }
}

/// The existing part of `path`, links resolved, and the names that are missing below it.
fn resolve(path: &Path) -> Result<(PathBuf, Vec<OsString>), HostFileError> {
    let mut existing = PathBuf::from("/");
    let mut missing = Vec::new();
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        if !missing.is_empty() {
            missing.push(name.to_owned());
            continue;
        }
        let next = existing.join(name);
        match std::fs::symlink_metadata(&next) {
            Ok(meta) if meta.file_type().is_symlink() => {
                let owner = std::os::unix::fs::MetadataExt::uid(&meta);
                if !trusted_owner(owner) {
                    let reason = format!("a symbolic link that belongs to user {owner}");
                    return Err(HostFileError::Untrusted { path: next, reason, wanted: "0755" });
                }
                existing = std::fs::canonicalize(&next).map_err(|source| HostFileError::Io {
                    action: "open",
                    path: next,
                    source,
                })?;
            }
            Ok(_) => existing = next,
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(name.to_owned()),
            Err(source) => return Err(HostFileError::Io { action: "open", path: next, source }),
        }
    }
    Ok((existing, missing))
}

fn trusted_owner(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn check_dir(stat: &FileStat, path: &Path, last: bool) -> Result<(), HostFileError> {
    let mode = stat.st_mode & 0o7777;
    let sticky = mode & 0o1000 != 0 && !last;
    let reason = if !trusted_owner(stat.st_uid) {
        format!("it belongs to user {}", stat.st_uid)
    } else if mode & 0o022 != 0 && !sticky {
        format!("its mode {mode:04o} lets others write")
    } else {
        return Ok(());
    };
    Err(HostFileError::Untrusted { path: path.to_owned(), reason, wanted: "0755" })
}

fn check_file(stat: &FileStat, path: &Path) -> Result<(), HostFileError> {
    let mode = stat.st_mode & 0o7777;
    let reason = if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        "it is not a regular file".to_owned()
    } else if !trusted_owner(stat.st_uid) {
        format!("it belongs to user {}", stat.st_uid)
    } else if mode & 0o022 != 0 {
        format!("its mode {mode:04o} lets others write")
    } else {
        return Ok(());
    };
    Err(HostFileError::Untrusted { path: path.to_owned(), reason, wanted: "0644" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_is_written_whole_read_and_removed() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path().join("run/nvidia/ccnode")).unwrap();
        assert_eq!(mode(dir.path()), 0o755);
        assert_eq!(dir.read("x.json", 100).unwrap(), None);
        dir.write_atomic("x.json", b"one", 0o644).unwrap();
        dir.write_for_this_boot("x.json", b"two", 0o600).unwrap();
        assert_eq!(dir.read("x.json", 3).unwrap().unwrap(), b"two");
        assert_eq!(mode(&dir.path().join("x.json")), 0o600);
        assert!(dir.exists("x.json").unwrap());
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["x.json"], "no temporary file stays");
        assert!(matches!(dir.read("x.json", 2), Err(HostFileError::TooLarge { max: 2, .. })));
        assert!(dir.remove("x.json").unwrap());
        assert!(!dir.remove("x.json").unwrap());
    }

    #[test]
    fn names_and_paths_that_lead_elsewhere_are_refused() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path()).unwrap();
        for name in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
            assert!(matches!(dir.read(name, 10), Err(HostFileError::Name { .. })), "{name:?}");
            assert!(dir.write_atomic(name, b"", 0o644).is_err(), "{name:?}");
        }
        for path in ["relative", "/tmp/../etc"] {
            assert!(matches!(HostDir::open(path), Err(HostFileError::Name { .. })), "{path}");
        }
    }

    #[test]
    fn links_are_not_followed_below_the_directory() {
        let here = tempfile::tempdir().unwrap();
        let dir = HostDir::open(here.path().join("state")).unwrap();
        let target = here.path().join("target");
        std::fs::write(&target, "secret").unwrap();
        symlink(&target, dir.path().join("devices.json")).unwrap();
        assert!(matches!(dir.read("devices.json", 100), Err(HostFileError::Io { action: "open", .. })));
        dir.write_atomic("devices.json", b"new", 0o644).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"secret", "the link is replaced, its target is not touched");
        assert_eq!(dir.read("devices.json", 100).unwrap().unwrap(), b"new");
    }

    #[test]
    fn our_own_links_on_the_way_are_resolved_once() {
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir(here.path().join("run")).unwrap();
        symlink(here.path().join("run"), here.path().join("var-run")).unwrap();
        let dir = HostDir::open(here.path().join("var-run/cdi")).unwrap();
        assert_eq!(dir.path(), here.path().canonicalize().unwrap().join("run/cdi"));
    }

    #[test]
    fn what_others_can_change_is_not_trusted() {
        let here = tempfile::tempdir().unwrap();
        let open = here.path().join("open");
        std::fs::create_dir(&open).unwrap();
        for bits in [0o777, 0o775, 0o1777] {
            set_mode(&open, bits);
            let text = HostDir::open(&open).unwrap_err().to_string();
            assert!(text.contains("open") && text.contains("lets others write"), "{text}");
        }
        set_mode(&open, 0o777);
        assert!(HostDir::open(open.join("below")).is_err());
        set_mode(&open, 0o1777);
        let below = HostDir::open(open.join("below")).unwrap();
        std::fs::write(below.path().join("f"), "x").unwrap();
        set_mode(&below.path().join("f"), 0o666);
        assert!(matches!(below.read("f", 10), Err(HostFileError::Untrusted { .. })));
        nix::unistd::mkfifo(&below.path().join("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
        assert!(matches!(below.read("fifo", 10), Err(HostFileError::Untrusted { .. })));
        if geteuid().is_root() {
            nix::unistd::chown(&below.path().join("f"), Some(65534.into()), None).unwrap();
            set_mode(&below.path().join("f"), 0o644);
            assert!(matches!(below.read("f", 10), Err(HostFileError::Untrusted { .. })));
        }
    }

    #[test]
    fn a_reader_makes_nothing() {
        let here = tempfile::tempdir().unwrap();
        assert!(HostDir::open_existing(here.path().join("absent")).unwrap().is_none());
        assert!(!here.path().join("absent").exists());
        assert!(HostDir::open_existing(here.path()).unwrap().is_some());
    }
}
