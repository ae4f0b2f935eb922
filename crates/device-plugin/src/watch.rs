//! What wakes the agent up: changes in a folder, and the kernel's device events. Both are only hints that it is time to
//! look; what is true is read afterwards, and a slow poll covers what is missed.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;

/// Entries that appear in or vanish from a folder.
#[derive(Debug)]
pub struct FolderWatch {
    path: PathBuf,
    descriptor: Option<AsyncFd<OwnedFd>>,
}

impl FolderWatch {
    /// A watch of a folder that need not exist yet. Call it inside a tokio runtime.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let mut watch = Self { path: path.into(), descriptor: None };
        watch.arm();
        watch
    }

    /// Begins to watch if that was not possible so far; whether it is now.
    pub fn arm(&mut self) -> bool {
        if self.descriptor.is_none() {
            self.descriptor = inotify(&self.path).and_then(registered);
        }
        self.descriptor.is_some()
    }

    /// Waits for a change; for ever while the folder cannot be watched. May be dropped and called again.
    pub async fn changed(&mut self) {
        let Some(descriptor) = &self.descriptor else { return std::future::pending().await };
        let mut buffer = [0; 4096];
        let gone = loop {
            let Ok(mut ready) = descriptor.readable().await else { break true };
            let mut seen = false;
            let end = loop {
                match nix::unistd::read(descriptor.get_ref(), &mut buffer) {
                    Ok(0) => break Some(true),
                    Ok(length) => {
                        seen = true;
                        // The kernel's last word on a watch: the folder itself is gone.
                        if masks(&buffer[..length]).any(|mask| mask & AddWatchFlags::IN_IGNORED.bits() != 0) {
                            break Some(true);
                        }
                    }
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break seen.then_some(false),
                    Err(_) => break Some(true),
                }
            };
            match end {
                Some(gone) => break gone,
                None => ready.clear_ready(),
            }
        };
        if gone {
            self.descriptor = None;
        }
    }
}

/// Hands a descriptor to the runtime.
#[expect(
    deprecated,
    reason = "its successor is an unsafe function, for types that close or exchange the descriptor; an OwnedFd does neither"
)]
fn registered(fd: OwnedFd) -> Option<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd).ok()
}

fn inotify(path: &Path) -> Option<OwnedFd> {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).ok()?;
    inotify.add_watch(path, flags).ok()?;
    Some(inotify.into())
}

/// The masks of the events in a buffer (inotify(7): descriptor, mask, cookie, length of the name, name).
fn masks(mut buffer: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let word = |from: &[u8]| from.first_chunk::<4>().copied().map(u32::from_ne_bytes);
    std::iter::from_fn(move || {
        let mask = word(buffer.get(4..)?)?;
        let name = usize::try_from(word(buffer.get(12..)?)?).ok()?;
        buffer = buffer.get(16 + name..).unwrap_or_default();
        Some(mask)
    })
}

/// Device events of the kernel for PCI and VFIO (a GPU that is plugged, bound, lost).
#[derive(Debug)]
pub struct DeviceEvents(Option<AsyncFd<OwnedFd>>);

impl DeviceEvents {
    /// Subscribes, where the kernel allows it. Call it inside a tokio runtime.
    pub fn subscribe() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let opened = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)
            // Group 1 is the kernel's own; group 2 would be udev's.
            .and_then(|fd| bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1)).map(|()| fd));
        match opened {
            Ok(fd) => Self(registered(fd)),
            Err(error) => {
                tracing::info!(%error, "The kernel's device events are not available; the poll alone will see changes");
                Self(None)
            }
        }
    }

    /// Waits for an event that may concern a unit; for ever where there are none. May be dropped and called again.
    pub async fn changed(&mut self) {
        let Self(Some(descriptor)) = self else { return std::future::pending().await };
        let mut buffer = [0; 8192];
        let failed = loop {
            let Ok(mut ready) = descriptor.readable().await else { break true };
            match recv(descriptor.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) if concerns(&buffer[..length]) => break false,
                // Events were lost: any of them may have been one of ours.
                Err(Errno::ENOBUFS) => break false,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(_) => break true,
            }
        };
        if failed {
            self.0 = None;
        }
    }
}

/// Whether an event is of the PCI bus or of VFIO.
fn concerns(event: &[u8]) -> bool {
    event
        .split(|&byte| byte == 0)
        .any(|field| matches!(field, b"SUBSYSTEM=pci" | b"SUBSYSTEM=vfio" | b"SUBSYSTEM=vfio-dev"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn hears(watch: &mut FolderWatch) -> bool {
        tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_folder_is_watched_across_its_own_removal() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("plugins");
        let mut watch = FolderWatch::new(&folder);
        assert!(!watch.arm(), "there is no folder yet");

        for _ in 0..2 {
            std::fs::create_dir(&folder).unwrap();
            assert!(watch.arm());
            std::fs::write(folder.join("a"), "").unwrap();
            assert!(hears(&mut watch).await);
            std::fs::remove_dir_all(&folder).unwrap();
            while watch.descriptor.is_some() {
                assert!(hears(&mut watch).await);
            }
        }
    }

    #[test]
    fn only_events_of_pci_and_vfio_count() {
        assert!(concerns(b"bind@/devices/pci0000:00/0000:00:01.0\0ACTION=bind\0SUBSYSTEM=pci\0"));
        assert!(concerns(b"add@/x\0SUBSYSTEM=vfio-dev\0DEVNAME=vfio/devices/vfio0\0"));
        assert!(!concerns(b"change@/devices/pci0000:00/x\0SUBSYSTEM=block\0"));
        assert!(!concerns(b""));
    }

    #[test]
    fn a_short_buffer_of_events_is_read_to_its_end_and_no_further() {
        let mut event = [0_u8; 16];
        event[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        event[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(masks(&event).collect::<Vec<_>>(), [7]);
        assert_eq!(masks(&event[..9]).count(), 0);
    }
}
