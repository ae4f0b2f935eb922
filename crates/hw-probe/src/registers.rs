//! The few registers that say what an idle device is and in which mode it has booted.
//!
//! Only on request, and only of a device that is idle for certain: reading needs no ownership, so nobody may be disturbed by
//! it. A sleeping device is not woken. The loads happen in a short-lived process of their own.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigSpace, Liveness};
use crate::mmap::{Unread, Window};
use crate::{Condition, Fault, Holders, Model, PciFunction, SysRoot};

/// PMC_BOOT_0, which names the silicon; the same on every chip (gpu-cc-protocol section 1.5).
const BOOT_0: u32 = 0x0;

/// The boot scratch reads this when boot is complete (gpu-cc-protocol section 5.1).
const BOOTED: u32 = 0xff;

/// A few loads take microseconds; a dead link can hold each up for its timeout.
const PATIENCE: Duration = Duration::from_secs(2);

/// The mode that a device has booted with (gpu-cc-protocol section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CcMode {
    /// Neither confidential computing nor protected PCIe.
    Off,
    /// Confidential computing.
    On,
    /// Confidential computing that developers' tools can look into.
    Devtools,
    /// Protected PCIe.
    Ppcie,
    /// No mode at all: an interrupted change. Setting any mode cures it.
    Invalid,
}

/// What was read, or why nothing was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Registers {
    /// They were read.
    Read {
        /// PMC_BOOT_0.
        boot_0: u32,
        /// The boot scratch; none on chips without one.
        boot_scratch: Option<u32>,
        /// The register that shows the mode; none on chips without modes.
        mode_register: Option<u32>,
        /// The mode; none where the words do not say it for certain.
        mode: Option<CcMode>,
        /// Why there is no mode.
        reason: Option<String>,
    },
    /// They were not.
    NotRead {
        /// Why.
        reason: String,
    },
}

/// Reads the registers of a GPU or NVSwitch if it is idle, awake and answering by everything that can be seen without
/// touching it: `condition` and `holders` are of the same moment as `function`. Waits 3 seconds at most.
pub fn read(root: &SysRoot, function: &PciFunction, condition: &Condition, holders: &Holders) -> Registers {
    let not_read = |reason: String| Registers::NotRead { reason };
    let model = match idle(root, function, condition, holders) {
        Ok(model) => model,
        Err(reason) => return not_read(reason),
    };
    let mut offsets = vec![BOOT_0];
    offsets.extend(model.boot_register);
    offsets.extend(mode_offset(model));
    let path = root.function(function.bdf).join("resource0");
    let words = Window::open(&path, &offsets).map_err(Unread::from).and_then(|window| window.read(PATIENCE));
    match words {
        Ok(words) => judge(model, &words),
        Err(unread) => not_read(text(&unread)),
    }
}

/// Every reason not to touch BAR0, in the order in which they are checked.
fn idle<'a>(
    root: &SysRoot,
    function: &'a PciFunction,
    condition: &Condition,
    holders: &Holders,
) -> Result<&'a Model, String> {
    let say = |text: &str| Err(text.to_owned());
    if function.is_virtual_function {
        return say("a virtual function has no registers of its own");
    }
    let Some(model) = &function.model else { return say("the device table does not know its registers") };
    match function.driver.as_deref() {
        Some(driver) if !function.is_vfio_bound() => {
            return Err(format!("its registers are those of the driver {driver}"));
        }
        _ => {}
    }
    let power = &function.power;
    let (status, state) = (power.runtime_status.as_deref(), power.state.as_deref());
    if matches!(status, Some("suspended" | "suspending" | "resuming"))
        || matches!(state, Some("D1" | "D2" | "D3hot" | "D3cold"))
    {
        return say("asleep; use `ccnode mode get --own`");
    }
    if !matches!(status, Some("active" | "unsupported")) {
        return say("its power state is not known");
    }
    match condition.liveness {
        Some(Liveness::Answers) => {}
        _ => return say("its configuration space does not answer"),
    }
    if condition.faults.contains(&Fault::FirewallClosed) {
        return say("its BAR firewall is closed");
    }
    if function.is_vfio_bound() {
        let nodes = [
            function.iommu_group.map(|group| format!("/dev/vfio/{group}")),
            function.iommu_group.map(|group| format!("/dev/vfio/noiommu-{group}")),
            function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name)),
        ];
        if let Some(holder) = holders.list.iter().find(|holder| nodes.contains(&Some(holder.node.clone()))) {
            return Err(format!("held by {} through {}", holder.comm, holder.node));
        }
        if let Some(limit) = &holders.limit {
            return Err(format!("perhaps held by a virtual machine: {limit}"));
        }
    }
    // Memory decoding is bit 1 of COMMAND (gpu-cc-protocol section 1.2).
    let command = ConfigSpace::read(root, function.bdf).ok().and_then(|config| config.u16(4));
    if command.is_none_or(|command| command & 2 == 0) {
        return say("its memory decoding is off; use `ccnode mode get --own`");
    }
    if !function.bars.iter().any(|bar| bar.number == 0 && !bar.io) {
        return say("BAR0 has no address");
    }
    Ok(model)
}

/// The register that shows the mode: that of CC, which on Hopper shows PPCIe as well, else that of PPCIe.
fn mode_offset(model: &Model) -> Option<u32> {
    model.cc_register.or(model.ppcie_register).map(|field| field.offset)
}

/// All ones and 0xbad-something are never data (gpu-cc-protocol section 1.6).
fn is_data(word: u32) -> bool {
    word != u32::MAX && word >> 16 != 0xbadf && word != 0xbad0_0200
}

fn judge(model: &Model, words: &[u32]) -> Registers {
    let mut words = words.iter().copied();
    let Some(boot_0) = words.next() else { return Registers::NotRead { reason: "nothing was read".into() } };
    let boot_scratch = model.boot_register.and_then(|_| words.next());
    let mode_register = mode_offset(model).and_then(|_| words.next());
    let mode = mode(model, boot_0, boot_scratch, mode_register);
    let (mode, reason) = mode.map_or_else(|reason| (None, Some(reason)), |mode| (Some(mode), None));
    Registers::Read { boot_0, boot_scratch, mode_register, mode, reason }
}

fn mode(model: &Model, boot_0: u32, boot_scratch: Option<u32>, word: Option<u32>) -> Result<CcMode, String> {
    match boot_0 {
        u32::MAX => return Err("BAR0 reads all ones".into()),
        0xbadf_0200 | 0xbad0_0200 => return Err("the device has locked itself after a security fault".into()),
        0 => return Err("the firmware is in recovery".into()),
        word if !is_data(word) => return Err(format!("PMC_BOOT_0 reads {word:#010x}, a register-bus error")),
        _ => {}
    }
    if mode_offset(model).is_none() {
        return Err("a chip without such modes".into());
    }
    match boot_scratch {
        Some(scratch) if scratch != BOOTED => {
            return Err(format!("boot is not complete: the scratch reads {scratch:#x}"));
        }
        Some(_) => {}
        None => return Err("the boot scratch was not read".into()),
    }
    let Some(word) = word.filter(|word| is_data(*word)) else {
        return Err("the register of the mode does not answer".into());
    };
    let shared = model.ppcie_register.filter(|field| Some(field.offset) == mode_offset(model));
    let ppcie = shared.is_some_and(|field| field.extract(word) == 1);
    Ok(match (model.cc_register.map_or(0, |field| field.extract(word)), ppcie) {
        (0, false) => CcMode::Off,
        (0, true) => CcMode::Ppcie,
        (1, false) => CcMode::On,
        (3, false) => CcMode::Devtools,
        _ => CcMode::Invalid,
    })
}

/// What the errors mean (gpu-cc-protocol section 1.4).
fn text(unread: &Unread) -> String {
    match unread {
        Unread::Taken => "taken: another has just claimed its BAR0".into(),
        Unread::Late => "the device did not answer in time".into(),
        Unread::Lost(how) => format!("the process that was to read it was lost ({how})"),
        Unread::Refused(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPERM) => "kernel lockdown forbids the mapping of BAR0; use `ccnode mode get --own`".into(),
            Some(Errno::EINVAL | Errno::EBUSY) => "taken: its driver has claimed BAR0".into(),
            Some(Errno::EACCES) => "needs root".into(),
            _ if error.kind() == io::ErrorKind::NotFound => "there is no resource0 here".into(),
            _ => format!("BAR0 cannot be mapped: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::testing::{FakeFunction, FakeSysfs};
    use crate::{Inventory, holders};

    const GPU: &str = "0000:41:00.0";

    fn awake(fake: &FakeSysfs, device: u16) -> FakeFunction<'_> {
        let gpu = fake.gpu(GPU, device).group(5).resource_file(0, 16 << 20);
        set(gpu, BOOT_0, 0x1800_00a1);
        fake.process(1, "init", "0::/\n", &[]);
        gpu
    }

    fn set(gpu: FakeFunction<'_>, register: u32, word: u32) {
        let file = std::fs::File::options().write(true).open(gpu.path().join("resource0")).unwrap();
        file.write_all_at(&word.to_le_bytes(), register.into()).unwrap();
    }

    fn look(fake: &FakeSysfs) -> Registers {
        let root = fake.root();
        let inventory = Inventory::scan(&root);
        let function = inventory.get(GPU.parse().unwrap()).unwrap();
        read(&root, function, &Condition::read(&root, function), &holders(&root))
    }

    fn reason(fake: &FakeSysfs) -> String {
        match look(fake) {
            Registers::NotRead { reason } => reason,
            read @ Registers::Read { .. } => panic!("{read:?}"),
        }
    }

    type Case<'a> = (u16, u32, u32, &'a [(u32, CcMode)]);

    #[test]
    fn the_mode_of_an_idle_gpu_is_read() {
        // device, boot scratch, mode register, its words and what they mean (gpu-cc-protocol sections 3 and 5.1)
        let hopper = [
            (0, CcMode::Off),
            (1, CcMode::On),
            (3, CcMode::Devtools),
            (2, CcMode::Invalid),
            (0x20, CcMode::Ppcie),
            (0x21, CcMode::Invalid),
            (0x181, CcMode::On),
        ];
        let blackwell =
            [(0, CcMode::Off), (1, CcMode::On), (3, CcMode::Devtools), (2, CcMode::Invalid), (0x44, CcMode::Off)];
        let cases: [Case; 3] = [
            (0x2330, 0x2_00bc, 0x11_82cc, &hopper),
            (0x2901, 0x2_00bc, 0x590, &blackwell),
            (0x2bb5, 0xad_00bc, 0x590, &blackwell),
        ];
        for (device, scratch, register, words) in cases {
            for driver in [None, Some("vfio-pci")] {
                let fake = FakeSysfs::new();
                let gpu = awake(&fake, device);
                driver.map(|driver| gpu.driver(driver));
                for (word, mode) in words {
                    set(gpu, scratch, 0xff);
                    set(gpu, register, *word);
                    let expected = Registers::Read {
                        boot_0: 0x1800_00a1,
                        boot_scratch: Some(0xff),
                        mode_register: Some(*word),
                        mode: Some(*mode),
                        reason: None,
                    };
                    assert_eq!(look(&fake), expected, "{device:x} {word:x}");
                }
            }
        }
    }

    #[test]
    fn words_that_are_no_data_are_no_mode() {
        let fake = FakeSysfs::new();
        let gpu = awake(&fake, 0x2330);
        set(gpu, 0x11_82cc, 1);
        for (register, word, words) in [
            (0x2_00bc, 0, "boot is not complete"),
            (0x2_00bc, 0xbadf_1234, "boot is not complete"),
            (0x11_82cc, u32::MAX, "does not answer"),
            (0x11_82cc, 0xbadf_5040, "does not answer"),
            (BOOT_0, 0xbadf_0200, "security fault"),
            (BOOT_0, 0xbadf_4100, "register-bus error"),
            (BOOT_0, 0, "recovery"),
            (BOOT_0, u32::MAX, "all ones"),
        ] {
            set(gpu, BOOT_0, 0x1800_00a1);
            set(gpu, 0x2_00bc, 0xff);
            set(gpu, 0x11_82cc, 1);
            set(gpu, register, word);
            let found = look(&fake);
            let Registers::Read { mode: None, reason: Some(reason), .. } = &found else { panic!("{found:?}") };
            assert!(reason.contains(words), "{register:x}: {reason}");
        }
    }

    #[test]
    fn an_older_gpu_has_no_mode() {
        let fake = FakeSysfs::new();
        awake(&fake, 0x20b0);
        let expected = Registers::Read {
            boot_0: 0x1800_00a1,
            boot_scratch: None,
            mode_register: None,
            mode: None,
            reason: Some("a chip without such modes".into()),
        };
        assert_eq!(look(&fake), expected);
    }

    type Cause = (fn(&FakeSysfs), &'static str);

    #[test]
    fn what_is_not_idle_is_not_read() {
        let cases: [Cause; 13] = [
            (|fake| _ = fake.get(GPU).driver("nvidia"), "those of the driver nvidia"),
            (|fake| _ = fake.get(GPU).power("auto", "suspended", "D3hot"), "asleep; use `ccnode mode get --own`"),
            (|fake| _ = fake.get(GPU).power("on", "active", "D3hot"), "asleep"),
            (|fake| _ = fake.get(GPU).power("on", "error", "D0"), "power state is not known"),
            (|fake| _ = fake.get(GPU).patch_config(0, &[0xff, 0xff]), "does not answer"),
            (|fake| _ = fake.get(GPU).patch_config(4, &[0, 0]), "memory decoding is off"),
            (|fake| _ = fake.get(GPU).bars(&[]), "BAR0 has no address"),
            (|fake| _ = fake.get(GPU).remove_attr("resource0"), "no resource0"),
            (|fake| _ = fake.get(GPU).resource_file(0, 4096), "outside of the window"),
            (
                |fake| {
                    fake.get(GPU).driver("vfio-pci");
                    fake.process(7, "qemu", "0::/\n", &["/dev/vfio/5"]);
                },
                "held by qemu through /dev/vfio/5",
            ),
            (
                |fake| {
                    fake.get(GPU).driver("vfio-pci").cdev(3);
                    fake.process(7, "qemu", "0::/\n", &["/dev/vfio/devices/vfio3"]);
                },
                "held by qemu",
            ),
            (
                |fake| {
                    fake.get(GPU).driver("vfio-pci");
                    std::fs::remove_dir_all(fake.path().join("proc/1")).unwrap();
                },
                "perhaps held by a virtual machine: proc shows no process",
            ),
            (|fake| _ = fake.get(GPU).virtual_function_of("0000:42:00.0"), "virtual function"),
        ];
        for (act, words) in cases {
            let fake = FakeSysfs::new();
            awake(&fake, 0x2330);
            fake.gpu("0000:42:00.0", 0x2330);
            act(&fake);
            let reason = reason(&fake);
            assert!(reason.contains(words), "{words}: {reason}");
        }
        let fake = FakeSysfs::new();
        awake(&fake, 0x9999);
        assert!(reason(&fake).contains("device table"));
    }

    #[test]
    fn refusals_have_their_causes() {
        for (errno, words) in [
            (Errno::EPERM, "lockdown"),
            (Errno::EINVAL, "claimed BAR0"),
            (Errno::EACCES, "needs root"),
            (Errno::ENOENT, "no resource0"),
            (Errno::EIO, "cannot be mapped"),
        ] {
            let reason = text(&Unread::Refused(errno.into()));
            assert!(reason.contains(words), "{reason}");
        }
        assert!(text(&Unread::Taken).starts_with("taken"));
    }
}
