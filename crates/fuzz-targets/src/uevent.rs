//! Packets of the kernel's event socket.

use hw_probe::is_device_event;

/// A packet concerns us by a field of its own, wherever in the packet that is, and by nothing else.
pub fn uevent(data: &[u8]) {
    let ours = is_device_event(data);
    let has = |wanted: &[u8]| data.windows(wanted.len()).any(|window| window == wanted);
    assert!(!ours || has(b"SUBSYSTEM="), "what names no subsystem concerns nobody");
    let joined = |before: &[u8], after: &[u8]| [before, b"\0", after].concat();
    assert!(is_device_event(&joined(data, b"SUBSYSTEM=pci")), "a field at the end is heard");
    assert!(is_device_event(&joined(b"bind@/x\0SUBSYSTEM=vfio-dev", data)), "a field at the start is heard");
    for noise in [&b"SUBSYSTEM=net"[..], b"SUBSYSTEM=pci_express", b"XSUBSYSTEM=pci", b"SUBSYSTEM=", b""] {
        assert_eq!(is_device_event(&joined(data, noise)), ours, "{noise:?} changes the answer");
        assert_eq!(is_device_event(&joined(noise, data)), ours, "{noise:?} changes the answer");
    }
    // A packet that is cut off may lose a field, and gains none unless the cut makes one.
    for cut in 0..data.len().min(64) {
        let (head, whole) = (&data[..cut], data.get(cut) == Some(&0));
        assert!(!whole || !is_device_event(head) || ours, "a field that was heard is not heard any more");
    }
}
