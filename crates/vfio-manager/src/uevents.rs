//! The kernel's own word that something on the PCI bus has changed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use kobject_uevent::UEvent;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;

/// Multicast group of the kernel's events, as opposed to those that udev sends on.
const KERNEL_GROUP: u32 = 1;

/// Largest event: the kernel's own limit is 2 KiB of variables and the path before them.
const MAX_EVENT: usize = 8 << 10;

/// After the first event, further ones within this time belong to the same change: one driver bind makes several.
const SETTLE: Duration = Duration::from_millis(50);

/// Listens to kernel events of PCI functions.
pub(crate) struct PciEvents(AsyncFd<OwnedFd>);

impl PciEvents {
    /// Opens the netlink socket. Needs no privilege, but a network namespace that the kernel sends to: the first, and
    /// those of its user namespace.
    pub(crate) fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(registered(fd)?))
    }

    /// Returns when a PCI function has changed and the changes have settled.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        while !self.next_concerns_pci().await? {}
        let settled = tokio::time::sleep(SETTLE);
        tokio::pin!(settled);
        loop {
            tokio::select! {
                () = &mut settled => return Ok(()),
                event = self.next_concerns_pci() => { event?; }
            }
        }
    }

    async fn next_concerns_pci(&self) -> io::Result<bool> {
        let mut packet = [0; MAX_EVENT];
        loop {
            let mut ready = self.0.readable().await?;
            let received =
                ready.try_io(|fd| recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty()).map_err(io::Error::from));
            match received {
                Ok(Ok(length)) => return Ok(concerns_pci(packet.get(..length).unwrap_or_default())),
                // The queue overflowed: something was missed, so look.
                Ok(Err(error)) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => return Ok(true),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

#[expect(
    deprecated,
    reason = "an OwnedFd always is the same open descriptor, which is all that the unsafe successor asks for"
)]
fn registered(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// An event that cannot be read counts: a look too many costs little.
fn concerns_pci(packet: &[u8]) -> bool {
    UEvent::from_netlink_packet(packet)
        .map_or(true, |event| matches!(event.subsystem.as_str(), "pci" | "vfio" | "vfio-dev"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pci_and_vfio_events_count_and_unreadable_ones() {
        let event = |subsystem: &str| {
            format!("bind@/x\0ACTION=bind\0DEVPATH=/devices/pci0000:00/0000:00:01.0\0SUBSYSTEM={subsystem}\0SEQNUM=7\0")
        };
        assert!(concerns_pci(event("pci").as_bytes()));
        assert!(concerns_pci(event("vfio-dev").as_bytes()));
        assert!(!concerns_pci(event("net").as_bytes()));
        assert!(concerns_pci(b"\xff\xfe"));
        assert!(concerns_pci(b""));
    }
}
