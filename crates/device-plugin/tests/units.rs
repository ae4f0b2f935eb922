//! From a tree of sysfs to units: what is offered, under which name and ID, by which nodes, and why not.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail the test that calls them")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use agent_core::state::{DEVICES_FILE, DeviceRecord, DevicesFile, ErrorRecord, Identity, Origin, Transition};
use device_plugin::observe::{Places, observe};
use device_plugin::units::{Backend, BackendChoice, CcGate, IdScheme, Policy, Unit, units, withdrawn};
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;

const BOOT: &str = "11111111-2222-4333-8444-555555555555";
const GPU: &str = "0000:41:00.0";

fn policy() -> Policy {
    Policy {
        gpu: "pgpu".parse().unwrap(),
        nvswitch: "nvswitch".parse().unwrap(),
        scheme: IdScheme::Pci,
        backend: BackendChoice::Auto,
        gate: CcGate::Off,
    }
}

fn places(fake: &FakeSysfs) -> Places {
    Places { root: fake.root(), state_dir: state_dir(fake) }
}

fn state_dir(fake: &FakeSysfs) -> PathBuf {
    fake.path().join("run/nvidia/ccnode")
}

fn look(policy: &Policy, fake: &FakeSysfs, before: &[Unit]) -> Vec<Unit> {
    units(policy, &observe(&places(fake)).unwrap(), before)
}

fn ids(units: &[Unit]) -> Vec<String> {
    units.iter().map(|unit| format!("{}={}", unit.resource, unit.id)).collect()
}

/// Code of the fault of the only unit; empty when it is healthy.
fn code(units: &[Unit]) -> &'static str {
    assert_eq!(units.len(), 1, "{units:?}");
    units[0].fault.as_ref().map_or("", device_plugin::units::Fault::code)
}

/// A node with one GPU, bound to vfio-pci as vfio17, in group 5 behind a bridge, on NUMA node 1.
fn one_gpu() -> FakeSysfs {
    let fake = FakeSysfs::new();
    fake.bridge("0000:40:01.0").group(5);
    fake.below("0000:40:01.0").gpu(GPU, 0x2330).group(5).numa(1).driver("vfio-pci").cdev(17);
    fake
}

#[test]
fn a_bound_gpu_is_a_healthy_unit_with_its_node_and_without_the_bridge() {
    let units = look(&policy(), &one_gpu(), &[]);
    assert_eq!(ids(&units), ["nvidia.com/pgpu=0000:41:00.0"]);
    let unit = &units[0];
    assert_eq!(unit.fault, None);
    assert_eq!(unit.nodes, ["/dev/vfio/devices/vfio17"]);
    assert_eq!(unit.backend, Backend::Iommufd);
    assert_eq!(unit.functions, [GPU.parse().unwrap()]);
    assert_eq!(unit.numa.iter().collect::<Vec<_>>(), [&1]);
}

#[test]
fn names_follow_the_aliases_whatever_the_mix_of_models() {
    let fake = FakeSysfs::new();
    for (at, device, number) in [("0000:01:00.0", 0x2330, 1), ("0000:02:00.0", 0x2331, 2), ("0000:03:00.0", 0x2fff, 3)]
    {
        fake.gpu(at, device).group(number).driver("vfio-pci").cdev(number);
    }
    fake.nvswitch("0000:04:00.0").group(4).driver("vfio-pci").cdev(4);
    let named = |gpu: &str, nvswitch: &str| {
        let policy = Policy { gpu: gpu.parse().unwrap(), nvswitch: nvswitch.parse().unwrap(), ..policy() };
        let units = look(&policy, &fake, &[]);
        assert!(units.iter().all(Unit::is_healthy), "{units:?}");
        ids(&units)
    };
    assert_eq!(
        named("pgpu", "nvswitch"),
        [
            "nvidia.com/nvswitch=0000:04:00.0",
            "nvidia.com/pgpu=0000:01:00.0",
            "nvidia.com/pgpu=0000:02:00.0",
            "nvidia.com/pgpu=0000:03:00.0",
        ]
    );
    assert_eq!(
        named("", ""),
        [
            "nvidia.com/GH100_H100_NVSWITCH=0000:04:00.0",
            "nvidia.com/GH100_H100_PCIE=0000:02:00.0",
            "nvidia.com/GH100_H100_SXM5_80GB=0000:01:00.0",
            "nvidia.com/GPU_2FFF=0000:03:00.0",
        ]
    );
    assert_eq!(named("all", "all").len(), 4, "one name for everything is one resource");
}

#[test]
fn back_ends_and_id_schemes() {
    // iommufd on the node, a character device of the GPU, choice, scheme -> nodes, id, fault
    type Case = (bool, Option<u32>, BackendChoice, IdScheme, &'static [&'static str], &'static str, &'static str);
    let cases: &[Case] = &[
        (true, Some(17), BackendChoice::Auto, IdScheme::Iommu, &["/dev/vfio/devices/vfio17"], "17", ""),
        (true, None, BackendChoice::Auto, IdScheme::Iommu, &["/dev/vfio/vfio", "/dev/vfio/5"], "5", ""),
        (false, Some(17), BackendChoice::Auto, IdScheme::Iommu, &["/dev/vfio/vfio", "/dev/vfio/5"], "5", ""),
        (true, Some(17), BackendChoice::Legacy, IdScheme::Iommu, &["/dev/vfio/vfio", "/dev/vfio/5"], "5", ""),
        (true, Some(17), BackendChoice::Legacy, IdScheme::Pci, &["/dev/vfio/vfio", "/dev/vfio/5"], GPU, ""),
        (true, None, BackendChoice::Iommufd, IdScheme::Pci, &[], GPU, "no-vfio-node"),
        (false, Some(17), BackendChoice::Iommufd, IdScheme::Pci, &[], GPU, "no-vfio-node"),
    ];
    for &(iommufd, cdev, backend, scheme, nodes, id, fault) in cases {
        let fake = one_gpu();
        if !iommufd {
            fake.without_iommufd();
        }
        if cdev.is_none() {
            fake.get(GPU).no_cdev();
        }
        let units = look(&Policy { scheme, backend, ..policy() }, &fake, &[]);
        let case = format!("{iommufd} {cdev:?} {backend:?} {scheme:?}: {units:?}");
        assert_eq!(units[0].nodes, nodes, "{case}");
        assert_eq!(units[0].id, id, "{case}");
        assert_eq!(code(&units), fault, "{case}");
    }
}

#[test]
fn sysfs_outweighs_a_stale_dev() {
    let fake = one_gpu();
    fake.file("sys/class/misc/vfio/dev", "10:196\n");
    let units = look(&policy(), &fake, &[]);
    assert_eq!(units[0].backend, Backend::Legacy, "/dev/iommu is in /dev, but the kernel has no such device");
    assert_eq!(units[0].fault, None);
    fake.file("sys/class/vfio/5/dev", "0:0\n");
    assert_eq!(code(&look(&policy(), &fake, &[])), "no-vfio-node");
    fake.file("sys/class/vfio/5/dev", "243:0\n");
    assert_eq!(code(&look(&policy(), &fake, &[])), "");
}

#[test]
fn a_group_whose_first_gpu_cannot_be_told_what_it_is_stays_one_unit() {
    let fake = one_gpu();
    fake.gpu("0000:42:00.0", 0x2330).group(5).driver("vfio-pci");
    let before = look(&policy(), &fake, &[]);
    assert_eq!((before.len(), before[0].functions.len(), code(&before)), (1, 2, ""), "{before:?}");
    fake.get(GPU).remove_attr("device");
    let after = look(&policy(), &fake, &before);
    assert_eq!((after.len(), after[0].bdf, code(&after)), (1, before[0].bdf, "unobserved"), "{after:?}");
}

#[test]
fn each_cause_has_its_reason() {
    type Break = fn(&FakeSysfs);
    let cases: &[(&str, &str, Break)] = &[
        ("not-vfio", "bound to no driver", |fake| {
            fake.get(GPU).no_driver();
        }),
        ("not-vfio", "bound to nvidia", |fake| {
            fake.get(GPU).driver("nvidia");
        }),
        ("no-iommu-group", "turn the IOMMU on", |fake| {
            fake.get(GPU).no_group();
        }),
        ("group-not-viable", "0000:41:00.1 with driver snd_hda_intel", |fake| {
            fake.function("0000:41:00.1", 0x10de, 0x22ba, 0x04_0300).group(5).driver("snd_hda_intel");
        }),
        ("group-not-viable", "0000:42:00.0 with driver ixgbe", |fake| {
            fake.function("0000:42:00.0", 0x8086, 0x10fb, 0x02_0000).group(5).driver("ixgbe");
        }),
        ("", "", |fake| {
            fake.function("0000:42:00.0", 0x8086, 0x10fb, 0x02_0000).group(5);
        }),
        // What cannot be told what it is blocks its group as well, and is not gone.
        ("group-not-viable", "0000:42:00.0 with driver ixgbe", |fake| {
            fake.function("0000:42:00.0", 0x8086, 0x10fb, 0x02_0000).group(5).driver("ixgbe").remove_attr("class");
        }),
        ("unobserved", "device cannot be read", |fake| {
            fake.get(GPU).remove_attr("device");
        }),
        ("dead", "off the bus", |fake| {
            fake.get(GPU).config(&[0xff; 4096]);
        }),
        ("not-ready", "0x0001", |fake| {
            fake.get(GPU).patch_config(0, &[1, 0]);
        }),
        ("config-unreadable", "configuration space", |fake| {
            fake.get(GPU).config(&[]);
        }),
        ("d3cold", "lost its power", |fake| {
            fake.get(GPU).power("on", "active", "D3cold").config(&[0xff; 4096]);
        }),
        ("d3cold", "lost its power", |fake| {
            fake.get(GPU).power("auto", "error", "D3cold").config(&[0xff; 4096]);
        }),
        // Suspended by vfio-pci, and its slot powered off by the platform: idle, and woken by whoever opens it.
        ("", "", |fake| {
            fake.get(GPU).power("auto", "suspended", "D3cold").config(&[0xff; 4096]);
        }),
        ("not-vfio", "no driver", |fake| {
            fake.get(GPU).no_driver().power("auto", "suspended", "D3cold").config(&[0xff; 4096]);
        }),
        ("", "", |fake| {
            fake.get(GPU).power("auto", "suspended", "D3hot");
        }),
        ("link-down", "no lane is in use", |fake| {
            fake.get(GPU).link("32.0 GT/s PCIe", 16).power("auto", "active", "D0").attr("current_link_width", "0\n");
        }),
        // The link of a device that sleeps may rest; and what has no lanes at all has no link.
        ("", "", |fake| {
            fake.get(GPU)
                .link("32.0 GT/s PCIe", 16)
                .power("auto", "suspended", "D3hot")
                .attr("current_link_width", "0\n");
        }),
        ("", "", |fake| {
            fake.get(GPU).link("Unknown", 0).power("auto", "active", "D0");
        }),
    ];
    for (expected, words, breaks) in cases {
        let fake = one_gpu();
        let before = look(&policy(), &fake, &[]);
        breaks(&fake);
        let after = look(&policy(), &fake, &before);
        assert_eq!(code(&after), *expected, "{words}: {after:?}");
        if let Some(fault) = &after[0].fault {
            assert!(fault.to_string().contains(words), "{fault}");
        }
    }
}

#[test]
fn an_audio_function_in_the_group_goes_along() {
    let fake = one_gpu();
    fake.function("0000:41:00.1", 0x10de, 0x22ba, 0x04_0300).group(5).driver("vfio-pci").cdev(3);
    let units = look(&policy(), &fake, &[]);
    assert_eq!(code(&units), "");
    assert_eq!(units[0].nodes, ["/dev/vfio/devices/vfio17", "/dev/vfio/devices/vfio3"]);
    assert_eq!(units[0].functions, [GPU.parse().unwrap(), "0000:41:00.1".parse().unwrap()]);

    // One of the two without a character device: the unit goes as a group, not half and half.
    fake.get("0000:41:00.1").no_cdev();
    assert_eq!(look(&policy(), &fake, &[])[0].nodes, ["/dev/vfio/vfio", "/dev/vfio/5"]);
}

#[test]
fn two_gpus_in_one_group_are_one_unit() {
    let fake = one_gpu();
    fake.gpu("0000:43:00.0", 0x2330).group(5).driver("vfio-pci").cdev(18).numa(0);
    let units = look(&policy(), &fake, &[]);
    assert_eq!(code(&units), "");
    assert_eq!(units[0].nodes, ["/dev/vfio/devices/vfio17", "/dev/vfio/devices/vfio18"]);
    assert_eq!(units[0].numa.iter().collect::<Vec<_>>(), [&0, &1]);
    fake.get("0000:43:00.0").config(&[0xff; 4096]);
    assert_eq!(code(&look(&policy(), &fake, &units)), "dead", "half a group is of no use");
}

#[test]
fn a_unit_stays_listed_until_its_function_leaves() {
    let fake = one_gpu();
    fake.gpu("0000:51:00.0", 0x2330).group(6);
    let scheme = Policy { scheme: IdScheme::Iommu, ..policy() };
    let first = look(&scheme, &fake, &[]);
    assert_eq!(ids(&first), ["nvidia.com/pgpu=17"], "what was never bound was never offered");

    fake.get(GPU).no_driver();
    let unbound = look(&scheme, &fake, &first);
    assert_eq!((code(&unbound), unbound[0].id.as_str()), ("not-vfio", "17"));
    assert!(unbound[0].nodes.is_empty());

    // The number of the unbound GPU goes to the other one.
    fake.get("0000:51:00.0").driver("vfio-pci").cdev(17);
    let both = look(&scheme, &fake, &unbound);
    assert_eq!(ids(&both), ["nvidia.com/pgpu=17", "nvidia.com/pgpu=0000:41:00.0"]);
    assert!(both[0].is_healthy() && !both[1].is_healthy());
    assert_eq!(both[0].bdf, "0000:51:00.0".parse().unwrap());

    fake.remove(GPU);
    assert_eq!(ids(&look(&scheme, &fake, &both)), ["nvidia.com/pgpu=17"]);

    // Another model at the same address is another unit.
    fake.gpu(GPU, 0x2331).group(5);
    assert_eq!(look(&scheme, &fake, &both).len(), 1);
}

#[test]
fn where_units_go_by_numbers_one_that_a_pod_has_by_its_address_keeps_that() {
    let fake = one_gpu();
    fake.gpu("0000:51:00.0", 0x2330).group(6).driver("vfio-pci").cdev(18);
    let named = |given: &[(&str, &str)]| {
        let mut seen = observe(&places(&fake)).unwrap();
        seen.given = given.iter().map(|(resource, id)| ((*resource).to_owned(), (*id).to_owned())).collect();
        ids(&units(&Policy { scheme: IdScheme::Iommu, ..policy() }, &seen, &[]))
    };
    let pgpu = "nvidia.com/pgpu";
    assert_eq!(named(&[(pgpu, "18")]), ["nvidia.com/pgpu=17", "nvidia.com/pgpu=18"]);
    assert_eq!(named(&[(pgpu, "18"), (pgpu, GPU)]), ["nvidia.com/pgpu=18", "nvidia.com/pgpu=0000:41:00.0"]);
    // Given under both: one name must do.
    assert_eq!(named(&[(pgpu, "17"), (pgpu, GPU)]), ["nvidia.com/pgpu=17", "nvidia.com/pgpu=18"]);
    assert_eq!(named(&[("nvidia.com/other", GPU)]), ["nvidia.com/pgpu=17", "nvidia.com/pgpu=18"]);
}

#[test]
fn numbers_of_nodes_and_of_groups_may_meet() {
    let fake = FakeSysfs::new();
    fake.gpu("0000:01:00.0", 0x2330).group(9).driver("vfio-pci").cdev(5);
    fake.gpu("0000:02:00.0", 0x2330).group(5).driver("vfio-pci");
    let units = look(&Policy { scheme: IdScheme::Iommu, ..policy() }, &fake, &[]);
    assert_eq!(ids(&units), ["nvidia.com/pgpu=5", "nvidia.com/pgpu=0000:02:00.0"]);
    assert!(units.iter().all(Unit::is_healthy));
}

#[test]
fn virtual_functions_are_left_out_and_any_vfio_driver_counts() {
    let fake = FakeSysfs::new();
    fake.gpu(GPU, 0x2330).group(5).driver("nvidia");
    fake.gpu("0000:41:00.4", 0x2330).group(6).driver("vfio-pci").cdev(1).virtual_function_of(GPU);
    assert!(look(&policy(), &fake, &[]).is_empty());
    fake.gpu("0009:01:00.0", 0x2342).group(7).driver("nvgrace_gpu_vfio_pci").cdev(2);
    assert_eq!(ids(&look(&policy(), &fake, &[])), ["nvidia.com/pgpu=0009:01:00.0"]);
}

fn devices_file(fake: &FakeSysfs, boot: &str, change: impl FnOnce(&mut DevicesFile)) {
    let inventory = Inventory::scan(&fake.root());
    let record = DeviceRecord {
        bdf: GPU.parse().unwrap(),
        identity: Identity::of(inventory.get(GPU.parse().unwrap()).unwrap()),
        configured_mode: Some("on".into()),
        active_mode: Some("on".into()),
        verified_at: Some(jiff::Timestamp::now()),
        usable: true,
        error: None,
    };
    let mut file = DevicesFile { origin: Origin::now(boot, None), transition: None, devices: vec![record] };
    change(&mut file);
    file.store(&HostDir::open(state_dir(fake)).unwrap()).unwrap();
}

#[test]
fn cc_managers_word_counts_and_may_be_required() {
    type Change = fn(&mut DevicesFile);
    // File (boot, change), code with the gate off, code with the gate required.
    type Case = (Option<(&'static str, Change)>, &'static str, &'static str);
    let same: Change = |_| {};
    let cases: &[Case] = &[
        (None, "", "cc-not-verified"),
        (Some((BOOT, same)), "", ""),
        (Some(("another boot", same)), "", "cc-not-verified"),
        (Some((BOOT, |file| file.devices[0].usable = false)), "cc-not-usable", "cc-not-usable"),
        (Some((BOOT, |file| file.devices.clear())), "", "cc-not-verified"),
        (Some((BOOT, |file| file.devices[0].identity.ids = "10de:2331".into())), "", "cc-not-verified"),
        (
            Some((BOOT, |file| {
                file.transition =
                    Some(Transition { target: "on".into(), step: "reset".into(), started_at: jiff::Timestamp::now() });
            })),
            "in-transition",
            "in-transition",
        ),
    ];
    for (file, off, require) in cases {
        let fake = one_gpu();
        if let Some((boot, change)) = file {
            devices_file(&fake, boot, change);
        }
        for (gate, expected) in [(CcGate::Off, off), (CcGate::Require, require)] {
            let units = look(&Policy { gate, ..policy() }, &fake, &[]);
            assert_eq!(code(&units), *expected, "{gate:?} {units:?}");
            assert_eq!(units[0].nodes.len(), 1, "a pod that was admitted before can still be resolved");
        }
    }
}

#[test]
fn a_word_that_cannot_be_read_is_none_and_only_who_requires_one_misses_it() {
    type Spoil = fn(&Path);
    let spoils: &[(&str, Spoil)] = &[
        ("no JSON", |file| std::fs::write(file, "{\"origin\": ").unwrap()),
        ("no schema of ours", |file| std::fs::write(file, "[]").unwrap()),
        ("empty", |file| std::fs::write(file, "").unwrap()),
        ("no text", |file| std::fs::write(file, [0xff; 64]).unwrap()),
        ("a folder", |file| {
            std::fs::remove_file(file).unwrap();
            std::fs::create_dir(file).unwrap();
        }),
        ("a link", |file| {
            let other = file.with_file_name("other.json");
            std::fs::rename(file, &other).unwrap();
            std::os::unix::fs::symlink(other, file).unwrap();
        }),
        ("open to all", |file| std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o666)).unwrap()),
        ("in a folder that is open to all", |file| {
            std::fs::set_permissions(file.parent().unwrap(), std::fs::Permissions::from_mode(0o777)).unwrap();
        }),
    ];
    for (what, spoil) in spoils {
        let fake = one_gpu();
        // As it was written it would take the unit away under either gate.
        devices_file(&fake, BOOT, |file| file.devices[0].usable = false);
        spoil(&state_dir(&fake).join(DEVICES_FILE));
        for (gate, expected) in [(CcGate::Off, ""), (CcGate::Require, "cc-not-verified")] {
            let units = look(&Policy { gate, ..policy() }, &fake, &[]);
            assert_eq!(code(&units), expected, "{what}, {gate:?}: {units:?}");
        }
    }
}

#[test]
fn what_cc_manager_takes_away_goes_at_once_and_what_it_gives_waits_for_a_look() {
    let fake = one_gpu();
    devices_file(&fake, BOOT, |_| {});
    let mut seen = observe(&places(&fake)).unwrap();
    let offered = units(&policy(), &seen, &[]);
    assert_eq!(code(&offered), "");
    devices_file(&fake, BOOT, |file| {
        file.transition =
            Some(Transition { target: "on".into(), step: "changing".into(), started_at: jiff::Timestamp::now() });
    });
    seen.hear(&places(&fake));
    let gone = withdrawn(&policy(), &seen, &offered);
    assert_eq!(code(&gone), "in-transition");
    assert_eq!(gone[0].nodes, offered[0].nodes);
    devices_file(&fake, BOOT, |_| {});
    seen.hear(&places(&fake));
    assert_eq!(code(&withdrawn(&policy(), &seen, &gone)), "in-transition");
    assert_eq!(code(&units(&policy(), &observe(&places(&fake)).unwrap(), &gone)), "");
}

#[test]
fn the_reason_of_cc_manager_is_passed_on() {
    let fake = one_gpu();
    devices_file(&fake, BOOT, |file| {
        file.devices[0].usable = false;
        file.devices[0].error = Some(ErrorRecord { code: "boot-timeout".into(), message: "It does not boot".into() });
    });
    let units = look(&policy(), &fake, &[]);
    let text = units[0].fault.as_ref().unwrap().to_string();
    assert_eq!(text, "0000:41:00.0 is held back by cc-manager: It does not boot (boot-timeout)");

    // A file that cannot be read is no word at all.
    std::fs::write(state_dir(&fake).join("devices.json"), "{").unwrap();
    assert_eq!(code(&look(&policy(), &fake, &[])), "");
    assert_eq!(code(&look(&Policy { gate: CcGate::Require, ..policy() }, &fake, &[])), "cc-not-verified");
}

#[test]
fn a_tree_without_pci_is_an_error_and_not_an_empty_node() {
    let empty = tempfile::tempdir().unwrap();
    let places = Places { root: hw_probe::SysRoot::at(empty.path()), state_dir: empty.path().join("none") };
    let error = observe(&places).unwrap_err().to_string();
    assert!(error.contains("is /sys mounted?"), "{error}");
}
