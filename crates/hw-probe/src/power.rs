//! Runtime power of one function at this moment, read without waking it.

use crate::sysfs::read;
use crate::{Bdf, SysRoot};

/// What the kernel says of a function's runtime power. It tells who uses a device on VFIO: one that nobody has open is
/// suspended after a moment (virtual-gpu-rig section 6, fact 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimePower {
    /// Whether it is suspended (`power/runtime_status`).
    pub suspended: bool,
    /// Whether somebody keeps it awake (`power/control` is `on`): that it is awake says nothing of its users then.
    pub kept_awake: bool,
    /// For how long it has been awake since boot, in milliseconds (`power/runtime_active_time`); none where the kernel does not
    /// count.
    pub awake_ms: Option<u64>,
}

impl RuntimePower {
    /// Reads it; none where the function is not there or its kernel has no runtime power management.
    pub fn read(root: &SysRoot, bdf: Bdf) -> Option<Self> {
        let folder = root.function(bdf).join("power");
        let word = |name: &str| {
            let text = String::from_utf8(read(&folder.join(name)).ok()?).ok()?;
            Some(text.trim_end().to_owned())
        };
        Some(Self {
            suspended: word("runtime_status")? == "suspended",
            kept_awake: word("control").as_deref() == Some("on"),
            awake_ms: word("runtime_active_time").and_then(|text| text.parse().ok()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;

    #[test]
    fn power_is_read_as_far_as_it_is_told() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        let read = || RuntimePower::read(&fake.root(), gpu.bdf());
        for (control, status, time, told) in [
            ("auto", "suspended", "41\n", (true, false, Some(41))),
            ("on", "active", "9000\n", (false, true, Some(9000))),
            ("auto", "suspending", "-1\n", (false, false, None)),
            ("auto", "unsupported", "", (false, false, None)),
        ] {
            let _ = gpu.power(control, status, "D0").attr("power/runtime_active_time", time);
            let power = read().unwrap();
            assert_eq!((power.suspended, power.kept_awake, power.awake_ms), told, "{control} {status} {time:?}");
        }
        let _ = gpu.remove_attr("power/runtime_status");
        assert_eq!(read(), None);
        assert_eq!(RuntimePower::read(&fake.root(), "0000:42:00.0".parse().unwrap()), None);
    }
}
