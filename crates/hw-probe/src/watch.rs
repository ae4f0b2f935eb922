//! Changes as they happen.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use crate::{Change, Inventory, SysRoot};

/// Multicast group of the kernel's own events.
const KERNEL_GROUP: u32 = 1;

/// Larger than any event: the kernel's variables have 2 KiB, and the path comes before them.
const MOST_OF_AN_EVENT: usize = 8 << 10;

/// One bind makes several events: a scan waits until none has come for this long...
const SETTLE: Duration = Duration::from_millis(50);

/// ... but not longer than this, however busy the bus is.
const SETTLE_AT_MOST: Duration = Duration::from_secs(1);

/// Watches a node: by the kernel's events where it is the running machine, and by a slow poll always, since not every
/// change has an event. It opens no device.
#[derive(Debug)]
pub struct Watch {
    root: SysRoot,
    poll: Duration,
    events: Option<OwnedFd>,
    trouble: Option<io::Error>,
    last: Inventory,
}

impl Watch {
    /// Scans the node and starts to listen. Where the kernel's events cannot be heard, [`Watch::trouble`] says why, and the
    /// poll is all there is.
    pub fn new(root: SysRoot, poll: Duration) -> Self {
        // Before the scan, so that nothing falls in between.
        let (events, trouble) = match root.is_running().then(listen).transpose() {
            Ok(events) => (events, None),
            Err(error) => (None, Some(error)),
        };
        let last = Inventory::scan(&root);
        Self { root, poll, events, trouble, last }
    }

    /// The node as last scanned.
    pub fn inventory(&self) -> &Inventory {
        &self.last
    }

    /// Why the kernel's events are not heard, if they are not.
    pub fn trouble(&self) -> Option<&io::Error> {
        self.trouble.as_ref()
    }

    /// Waits for an event, or for as long as the poll's interval, scans, and tells what changed since the last scan: nothing,
    /// perhaps.
    pub fn next_changes(&mut self) -> Vec<Change> {
        self.wait();
        let now = Inventory::scan(&self.root);
        let changes = Inventory::diff(&self.last, &now);
        self.last = now;
        changes
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + self.poll;
        let Some(fd) = self.events.take() else {
            std::thread::sleep(self.poll);
            return;
        };
        match until_settled(&fd, deadline) {
            Ok(()) => self.events = Some(fd),
            Err(error) => {
                // From here on the poll alone; the rest of this interval is waited out, so that a broken socket makes no storm.
                self.trouble = Some(error);
                std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            }
        }
    }
}

fn listen() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    Ok(fd)
}

/// Returns at the deadline, or when events that concern PCI have come and no further ones follow.
fn until_settled(fd: &OwnedFd, deadline: Instant) -> io::Result<()> {
    while !heard(fd, deadline)? {
        if Instant::now() >= deadline {
            return Ok(());
        }
    }
    let end = Instant::now() + SETTLE_AT_MOST;
    loop {
        let quiet = (Instant::now() + SETTLE).min(end);
        let mut more = false;
        while Instant::now() < quiet {
            more |= heard(fd, quiet)?;
        }
        if !more || Instant::now() >= end {
            return Ok(());
        }
    }
}

/// Waits for one packet until the deadline, and says whether it concerns PCI.
fn heard(fd: &OwnedFd, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    // Rounded up, so that the last millisecond is no busy loop.
    let left = PollTimeout::try_from(left.as_millis().saturating_add(1).min(60_000)).unwrap_or(PollTimeout::ZERO);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, left) {
        Ok(0) | Err(Errno::EINTR) => return Ok(false),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let mut packet = [0; MOST_OF_AN_EVENT];
    match recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty()) {
        Ok(length) => Ok(is_device_event(packet.get(..length).unwrap_or_default())),
        // The queue overflowed, so something was missed.
        Err(Errno::ENOBUFS) => Ok(true),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether a packet from the kernel's event socket is of PCI, VFIO, the IOMMU or a module. An event is a path and then
/// `NAME=value` fields, each ended by a zero byte; what is none concerns nobody.
pub fn is_device_event(packet: &[u8]) -> bool {
    const SUBSYSTEMS: [&[u8]; 5] = [b"pci", b"vfio", b"vfio-dev", b"iommu", b"module"];
    let subsystem = |field: &[u8]| field.strip_prefix(b"SUBSYSTEM=").is_some_and(|name| SUBSYSTEMS.contains(&name));
    packet.split(|&byte| byte == 0).any(subsystem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    #[test]
    fn the_poll_finds_what_no_event_tells() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        let mut watch = Watch::new(fake.root(), Duration::from_millis(10));
        assert!(watch.trouble().is_none());
        assert_eq!(watch.next_changes(), []);
        gpu.driver("nvidia");
        let told: Vec<String> = watch.next_changes().iter().map(ToString::to_string).collect();
        assert_eq!(told, ["0000:41:00.0: Driver: none -> nvidia"]);
        assert_eq!(watch.next_changes(), []);
        assert_eq!(watch.inventory().functions[0].driver.as_deref(), Some("nvidia"));
    }

    #[test]
    fn a_socket_that_is_lost_is_told_and_the_poll_goes_on() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        let mut watch = Watch::new(fake.root(), Duration::from_millis(10));
        // Something that is readable, but no socket.
        watch.events = Some(std::fs::File::open("/dev/zero").unwrap().into());
        assert_eq!(watch.next_changes(), []);
        assert_eq!(watch.trouble().and_then(io::Error::raw_os_error), Some(Errno::ENOTSOCK as i32));
        gpu.driver("nvidia");
        assert_eq!(watch.next_changes().len(), 1);
    }

    #[test]
    fn events_end_the_wait_early_and_are_gathered() {
        let event = |subsystem: &str| {
            format!("bind@/x\0ACTION=bind\0DEVPATH=/devices/pci0000:00/0000:00:01.0\0SUBSYSTEM={subsystem}\0SEQNUM=7\0")
        };
        // A pair of sockets stands in for the kernel's.
        let pair = || {
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_NONBLOCK)
                .unwrap()
        };
        let send = |fd: &OwnedFd, text: &str| {
            nix::sys::socket::send(fd.as_raw_fd(), text.as_bytes(), MsgFlags::empty()).unwrap();
        };
        let (kernel, fd) = pair();
        let start = Instant::now();
        for _ in 0..5 {
            send(&kernel, &event("pci"));
        }
        until_settled(&fd, start + Duration::from_secs(20)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(recv(fd.as_raw_fd(), &mut [0; 16], MsgFlags::empty()), Err(Errno::EAGAIN));
        // What does not concern PCI lets it wait to the end, and neither does what is empty or larger than any event.
        let start = Instant::now();
        send(&kernel, &event("net"));
        send(&kernel, "");
        send(&kernel, &"x\0".repeat(MOST_OF_AN_EVENT));
        until_settled(&fd, start + Duration::from_millis(120)).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(120));
    }

    #[test]
    fn only_events_of_pci_and_vfio_count() {
        for packet in
            [&b"\xff\xfe"[..], b"", b"@", b"\0\0\0", b"add@/x\0ACTION=add\0SUBSYSTEM=net\0", b"SUBSYSTEM=pci-x"]
        {
            assert!(!is_device_event(packet), "{packet:?}");
        }
        for packet in [&b"bind@/x\0SUBSYSTEM=pci\0SEQNUM=1\0"[..], b"add@/x\0SUBSYSTEM=vfio-dev"] {
            assert!(is_device_event(packet), "{packet:?}");
        }
    }
}
