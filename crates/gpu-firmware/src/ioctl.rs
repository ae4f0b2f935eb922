//! VFIO's system calls. Numbers and structures are the kernel's (`linux/vfio.h`), by the crate vfio-bindings.
//!
//! rust-vmm's vfio-ioctls was looked at and left: it opens the group file itself, which the kernel refuses while this
//! crate holds it as ownership, it sets up DMA for a virtual machine, and it has no device-request interrupt.

use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use hw_probe::Bdf;
use nix::Result;
use nix::errno::Errno;
use nix::libc::c_int;
use nix::sys::eventfd::EventFd;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED, VFIO_PCI_REQ_IRQ_INDEX, VFIO_TYPE1v2_IOMMU, vfio_device_bind_iommufd,
    vfio_device_info, vfio_irq_set, vfio_region_info,
};

/// The calls as the kernel has them. None of the numbers tells the size of what is passed; `argsz` in it does.
#[allow(unreachable_pub, reason = "the macros say pub")]
mod raw {
    use nix::libc::{c_char, c_int};
    use nix::{ioctl_none_bad, ioctl_readwrite_bad, ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_none};
    use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE, vfio_device_bind_iommufd, vfio_device_info};
    use vfio_bindings::bindings::vfio::{vfio_irq_set, vfio_region_info};

    ioctl_write_int_bad!(check_extension, request_code_none!(VFIO_TYPE, VFIO_BASE + 1));
    ioctl_write_int_bad!(set_iommu, request_code_none!(VFIO_TYPE, VFIO_BASE + 2));
    ioctl_write_ptr_bad!(group_set_container, request_code_none!(VFIO_TYPE, VFIO_BASE + 4), c_int);
    ioctl_write_ptr_bad!(group_get_device_fd, request_code_none!(VFIO_TYPE, VFIO_BASE + 6), c_char);
    ioctl_readwrite_bad!(device_get_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 7), vfio_device_info);
    ioctl_readwrite_bad!(device_get_region_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 8), vfio_region_info);
    ioctl_write_ptr_bad!(device_set_irqs, request_code_none!(VFIO_TYPE, VFIO_BASE + 10), vfio_irq_set);
    ioctl_none_bad!(device_reset, request_code_none!(VFIO_TYPE, VFIO_BASE + 11));
    ioctl_readwrite_bad!(device_get_hot_reset_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 12), u32);
    ioctl_write_ptr_bad!(device_hot_reset, request_code_none!(VFIO_TYPE, VFIO_BASE + 13), u32);
    ioctl_readwrite_bad!(device_bind_iommufd, request_code_none!(VFIO_TYPE, VFIO_BASE + 18), vfio_device_bind_iommufd);
}

/// Size of a structure for its `argsz`.
#[allow(clippy::cast_possible_truncation, reason = "the structures have a few dozen bytes")]
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// Makes `group` a member of `container`. `EBUSY`: a device of the group has a driver of the host.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<()> {
    let container = container.as_raw_fd();
    // SAFETY: both descriptors are open for the time of the call, and the kernel reads one int behind the pointer.
    unsafe { raw::group_set_container(group.as_raw_fd(), &raw const container) }.map(drop)
}

/// Sets a container, which must have a group, to IOMMU type 1, version 2. `ENODEV`: the kernel has no such IOMMU driver.
pub(crate) fn set_iommu(container: BorrowedFd<'_>) -> Result<()> {
    let kind = c_int::try_from(VFIO_TYPE1v2_IOMMU).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open, and the argument is a number.
    if unsafe { raw::check_extension(container.as_raw_fd(), kind) }? == 0 {
        return Err(Errno::ENODEV);
    }
    // SAFETY: as above.
    unsafe { raw::set_iommu(container.as_raw_fd(), kind) }.map(drop)
}

/// Opens a device of a group by its address; the kernel resets it for that.
pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    // SAFETY: the descriptor is open, and `name` ends with a zero, as the kernel expects.
    let device = unsafe { raw::group_get_device_fd(group.as_raw_fd(), name.as_ptr()) }?;
    // SAFETY: the kernel has just made this descriptor for us, with close-on-exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(device) })
}

/// Opens the device behind a character device in the context of `iommu`; the kernel resets it for that. `EINVAL`:
/// somebody else has bound it.
pub(crate) fn bind_iommufd(cdev: BorrowedFd<'_>, iommu: BorrowedFd<'_>) -> Result<()> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: argsz::<vfio_device_bind_iommufd>(),
        iommufd: iommu.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: both descriptors are open; `bind` lives for the call, and `argsz` is its size.
    unsafe { raw::device_bind_iommufd(cdev.as_raw_fd(), &raw mut bind) }.map(drop)
}

/// Whether the kernel can reset the opened device as a function.
pub(crate) fn can_reset(device: BorrowedFd<'_>) -> Result<bool> {
    let mut info = vfio_device_info { argsz: argsz::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the descriptor is open; `info` lives for the call, and `argsz` is its size.
    unsafe { raw::device_get_info(device.as_raw_fd(), &raw mut info) }?;
    Ok(info.flags & VFIO_DEVICE_FLAGS_RESET != 0)
}

/// Where a region of an opened device lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Offset in the file in bytes.
    pub(crate) offset: u64,
    /// Size in bytes; 0 when the device has no such region.
    pub(crate) size: u64,
}

/// Asks for a region by VFIO's number of it.
pub(crate) fn region(device: BorrowedFd<'_>, index: u32) -> Result<Region> {
    let mut info = vfio_region_info { argsz: argsz::<vfio_region_info>(), index, ..Default::default() };
    // SAFETY: the descriptor is open; `info` lives for the call, and `argsz` is its size.
    unsafe { raw::device_get_region_info(device.as_raw_fd(), &raw mut info) }?;
    Ok(Region { offset: info.offset, size: info.size })
}

/// An eventfd for one interrupt, as the kernel reads it: the descriptor follows the head.
#[repr(C)]
struct IrqEvent {
    head: vfio_irq_set,
    event: c_int,
}

/// Lets the kernel signal `event` when somebody wants the device back.
pub(crate) fn watch_requests(device: BorrowedFd<'_>, event: &EventFd) -> Result<()> {
    let request = IrqEvent {
        head: vfio_irq_set {
            argsz: argsz::<IrqEvent>(),
            flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: VFIO_PCI_REQ_IRQ_INDEX,
            start: 0,
            count: 1,
            ..Default::default()
        },
        event: event.as_fd().as_raw_fd(),
    };
    // SAFETY: both descriptors are open; `request` lives for the call, `argsz` is its size, and one event follows the
    // head, as `count` says. The pointer is one to the whole, so that what follows the head may be read through it.
    unsafe { raw::device_set_irqs(device.as_raw_fd(), (&raw const request).cast()) }.map(drop)
}

/// Resets an opened device. `EINVAL`: the kernel cannot reset it as a function; `EAGAIN`: somebody holds its lock.
pub(crate) fn reset(device: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the descriptor is open, and there is no argument.
    unsafe { raw::device_reset(device.as_raw_fd()) }.map(drop)
}

/// What a reset of the bus or slot of a device would reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResetScope {
    /// Every function concerned, with its IOMMU group where the device was opened by its group.
    pub(crate) functions: Vec<(Bdf, u32)>,
    /// Whether the kernel says that all of them are ours; it says so of character devices only.
    pub(crate) owned: bool,
}

/// Words of the head of the kernel's hot-reset structures: `argsz`, `flags`, `count`.
const HEAD: usize = 3;

/// Most functions below one bus or slot: 32 devices of 8 functions on each of a few buses.
const MOST_FUNCTIONS: usize = 4096;

/// Asks what a hot reset would reset. `ENODEV`: the kernel can reset neither slot nor bus.
pub(crate) fn reset_scope(device: BorrowedFd<'_>) -> Result<ResetScope> {
    let mut words = vec![0_u32; HEAD];
    loop {
        let size = words.len() * size_of::<u32>();
        words[0] = u32::try_from(size).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the descriptor is open; `words` lives for the call, is aligned for the kernel's structures, which are of
        // 32-bit words and smaller, and the first word is its size in bytes, beyond which the kernel does not write.
        match unsafe { raw::device_get_hot_reset_info(device.as_raw_fd(), words.as_mut_ptr()) } {
            Ok(_) => return Ok(scope(&words)),
            // Too small: the kernel says how many there are.
            Err(Errno::ENOSPC) => {
                let count = usize::try_from(words[2]).unwrap_or(usize::MAX);
                let length = HEAD + 2 * count.min(MOST_FUNCTIONS);
                if length <= words.len() {
                    return Err(Errno::ENOSPC);
                }
                words = vec![0; length];
            }
            Err(errno) => return Err(errno),
        }
    }
}

fn scope(words: &[u32]) -> ResetScope {
    let count = usize::try_from(words[2]).unwrap_or(usize::MAX);
    let functions = words[HEAD..].chunks_exact(2).take(count).map(|pair| {
        let [low, high, bus, devfn] = pair[1].to_ne_bytes();
        let domain = u16::from_ne_bytes([low, high]).into();
        (Bdf { domain, bus, device: devfn >> 3, function: devfn & 7 }, pair[0])
    });
    ResetScope { functions: functions.collect(), owned: words[1] & VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED != 0 }
}

/// Resets slot or bus of an opened device. `groups` are the group files of every function concerned; none for a device
/// opened by its character device, where the kernel goes by what is bound in the same IOMMU context.
pub(crate) fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> Result<()> {
    let number = |value: usize| u32::try_from(value).map_err(|_| Errno::EINVAL);
    let mut words = vec![number((HEAD + groups.len()) * size_of::<u32>())?, 0, number(groups.len())?];
    words.extend(groups.iter().map(|group| group.as_raw_fd().cast_unsigned()));
    // SAFETY: all descriptors are open; `words` lives for the call, and holds the head and as many descriptors as `count`
    // says, which is all that the kernel reads.
    unsafe { raw::device_hot_reset(device.as_raw_fd(), words.as_ptr()) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_scope_of_a_reset_is_read_as_the_kernel_writes_it() {
        let function = |segment: u16, bus: u8, devfn: u8| {
            let [low, high] = segment.to_ne_bytes();
            u32::from_ne_bytes([low, high, bus, devfn])
        };
        let words = [28, 2, 2, 17, function(0, 0x41, 0), 18, function(1, 0x42, 0xff), 99];
        let bdf = |text: &str| text.parse::<Bdf>().unwrap();
        let functions = vec![(bdf("0000:41:00.0"), 17), (bdf("0001:42:1f.7"), 18)];
        assert_eq!(scope(&words), ResetScope { functions, owned: true });
        // A kernel that tells of more than it has written is not followed.
        assert_eq!(scope(&[20, 1, u32::MAX, 17, function(0, 0x41, 0)]).functions.len(), 1);
        assert!(!scope(&[12, 1, 0]).owned);
    }

    #[test]
    fn what_is_no_vfio_file_is_refused_by_the_kernel() {
        let file = File::open("/dev/null").unwrap();
        let (fd, event) = (file.as_fd(), EventFd::new().unwrap());
        assert_eq!(set_container(fd, fd), Err(Errno::ENOTTY));
        assert_eq!(set_iommu(fd), Err(Errno::ENOTTY));
        assert_eq!(device_fd(fd, c"0000:41:00.0").err(), Some(Errno::ENOTTY));
        assert_eq!(bind_iommufd(fd, fd), Err(Errno::ENOTTY));
        assert_eq!(can_reset(fd), Err(Errno::ENOTTY));
        assert_eq!(region(fd, 0), Err(Errno::ENOTTY));
        assert_eq!(watch_requests(fd, &event), Err(Errno::ENOTTY));
        assert_eq!(reset(fd), Err(Errno::ENOTTY));
        assert_eq!(reset_scope(fd), Err(Errno::ENOTTY));
        assert_eq!(hot_reset(fd, &[fd, fd]), Err(Errno::ENOTTY));
    }
}
