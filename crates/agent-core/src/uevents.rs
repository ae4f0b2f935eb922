//! The kernel's own word that something on the PCI bus or in VFIO has changed.
//!
//! Events are only a hint that it is time to look: what is true is read afterwards, and a slow poll covers what is missed.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;

/// Multicast group of the kernel's events, as opposed to those that udev sends on.
const KERNEL_GROUP: u32 = 1;

/// Largest event: the kernel's own limit is 2 KiB of variables and the path before them.
const MAX_EVENT: usize = 8 << 10;

/// Device events of the kernel for PCI and VFIO (a GPU that is plugged, bound, lost).
#[derive(Debug)]
pub struct DeviceEvents(Option<AsyncFd<OwnedFd>>);

impl DeviceEvents {
    /// Subscribes, where the kernel allows it; says so in the log where it does not. Call it inside a tokio runtime.
    ///
    /// Needs no privilege, but a network namespace that the kernel sends to: the first, and those of its user namespace.
    pub fn subscribe() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let opened = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)
            .and_then(|fd| bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP)).map(|()| fd));
        match opened {
            Ok(fd) => Self(registered(fd)),
            Err(error) => {
                tracing::info!(%error, "The kernel's device events are not available; the poll alone will see changes");
                Self(None)
            }
        }
    }

    /// Waits for an event of the PCI bus or of VFIO; for ever where there are none. May be dropped and called again.
    pub async fn changed(&mut self) {
        loop {
            let Self(Some(descriptor)) = self else { return std::future::pending().await };
            let ready = descriptor.readable().await;
            match ready.map(|mut ready| {
                let next = next(descriptor);
                if next == Next::Nothing {
                    ready.clear_ready();
                }
                next
            }) {
                Ok(Next::Ours) => return,
                Ok(Next::Foreign | Next::Nothing) => {}
                Ok(Next::Broken) | Err(_) => self.0 = None,
            }
        }
    }

    /// Forgets the events that have come so far: changes come in bursts (a rebind is four), and one look serves them all.
    pub fn drain(&mut self) {
        let Self(Some(descriptor)) = self else { return };
        // More events than any burst has: a storm must not keep us here.
        for _ in 0..1024 {
            match next(descriptor) {
                Next::Ours | Next::Foreign => {}
                Next::Nothing | Next::Broken => return,
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Ours,
    Foreign,
    Nothing,
    Broken,
}

fn next(descriptor: &AsyncFd<OwnedFd>) -> Next {
    let mut buffer = [0; MAX_EVENT];
    loop {
        match recv(descriptor.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) if hw_probe::is_device_event(buffer.get(..length).unwrap_or_default()) => return Next::Ours,
            Ok(_) => return Next::Foreign,
            // Events were lost: any of them may have been one of ours.
            Err(Errno::ENOBUFS) => return Next::Ours,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Next::Nothing,
            Err(_) => return Next::Broken,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_there_are_no_events_none_is_waited_for() {
        DeviceEvents::subscribe().drain();
        let mut none = DeviceEvents(None);
        none.drain();
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), none.changed()).await.is_err());
    }
}
