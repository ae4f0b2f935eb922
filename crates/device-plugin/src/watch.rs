//! What wakes the agent up besides the kernel's device events: changes in a folder. They are only hints that it is time
//! to look; what is true is read afterwards, and a slow poll covers what is missed.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
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
    fn a_short_buffer_of_events_is_read_to_its_end_and_no_further() {
        let mut event = [0_u8; 16];
        event[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        event[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(masks(&event).collect::<Vec<_>>(), [7]);
        assert_eq!(masks(&event[..9]).count(), 0);
    }
}
