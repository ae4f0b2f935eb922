//! One pass over `sys/bus/pci/devices`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::function::{
    Bar, DRIVER_UNREADABLE, DeviceKind, Link, Model, PciFunction, Power, RESET_UNNAMED, Unclassified, VfioCdev,
};
use crate::sysfs::{Node, PATIENCE, Unreadable, before_access, decimal, excerpt, hex};
use crate::{Bdf, Problem, SysRoot, names, table};

pub(crate) const DEVICES: &str = "sys/bus/pci/devices";

/// Every function that is still there when its reading ends, by address: those that are known for what they are, and those
/// that are not.
pub(crate) fn functions(root: &SysRoot, problems: &mut Vec<Problem>) -> (Vec<PciFunction>, Vec<Unclassified>) {
    let mut bus = Node::new(root, DEVICES, None);
    let mut bdfs = Vec::new();
    if !bus.exists("") {
        bus.note("", "Is missing");
    }
    for name in bus.entries("") {
        match name.parse::<Bdf>() {
            Ok(bdf) if bdf.to_string() == name => bdfs.push(bdf),
            // Only the kernel's own way to write the address leads to the folder.
            Ok(bdf) => bus.note("", format!("{name:?} is not how the kernel writes {bdf}")),
            Err(error) => bus.note("", error.to_string()),
        }
    }
    problems.append(&mut bus.problems);
    bdfs.sort_unstable();
    let (mut functions, mut unclassified) = (Vec::new(), Vec::new());
    for bdf in bdfs {
        match function(root, bdf, problems) {
            Some(Ok(found)) => functions.push(found),
            Some(Err(found)) => unclassified.push(found),
            None => {}
        }
    }
    (functions, unclassified)
}

/// How often a function is read whose place another takes meanwhile.
const TRIES: usize = 3;

fn function(root: &SysRoot, bdf: Bdf, problems: &mut Vec<Problem>) -> Option<Result<PciFunction, Unclassified>> {
    let mut before = instance(root, bdf).ok();
    for _ in 0..TRIES {
        let mut node = Node::new(root, &format!("{DEVICES}/{bdf}"), Some(bdf));
        let found = read(root, bdf, before, &mut node);
        // Asked last: whatever was missing or refused on the way is no problem of a device that is no more.
        let after = match instance(root, bdf) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::debug!(%bdf, "PCI function vanished during the scan");
                return None;
            }
            after => after.ok(),
        };
        if before == after {
            problems.append(&mut node.problems);
            return Some(found);
        }
        // Facts of two devices are the facts of none.
        tracing::debug!(%bdf, "PCI function was replaced during the scan");
        before = after;
    }
    let message = format!("Was another device each of the {TRIES} times that it was read");
    problems.push(Problem { bdf: Some(bdf), path: format!("{DEVICES}/{bdf}"), message });
    Some(Err(Unclassified { bdf, vendor: None, device: None, class: None, driver: None, iommu_group: None }))
}

/// Inode of the function's folder.
fn instance(root: &SysRoot, bdf: Bdf) -> io::Result<u64> {
    before_access();
    fs::metadata(root.function(bdf)).map(|folder| folder.ino())
}

fn read(root: &SysRoot, bdf: Bdf, instance: Option<u64>, node: &mut Node) -> Result<PciFunction, Unclassified> {
    let id = |text: &str| u16::try_from(hex(text)?).ok();
    let code = |text: &str| u32::try_from(hex(text)?).ok().filter(|class| *class < 1 << 24);
    // All three are read before any is judged, so that each has its problem told.
    let (vendor, device, class) = (
        node.required("vendor", "a 16-bit id", id),
        node.required("device", "a 16-bit id", id),
        node.required("class", "a 24-bit class code", code),
    );
    let (Some(vendor), Some(device), Some(class)) = (vendor, device, class) else {
        let (driver, iommu_group) = (driver(node), iommu_group(node));
        return Err(Unclassified { bdf, vendor, device, class, driver, iommu_group });
    };
    let subsystem_device = node.parsed("subsystem_device", "a 16-bit id", id);
    let kind = table::classify(vendor, class);
    let model = Model::lookup(kind, device, subsystem_device);
    let power = Power {
        control: node.word("power/control"),
        runtime_status: node.word("power/runtime_status"),
        state: node.word("power_state"),
    };
    Ok(PciFunction {
        bdf,
        instance,
        vendor,
        device,
        subsystem_vendor: node.parsed("subsystem_vendor", "a 16-bit id", id),
        subsystem_device,
        class,
        revision: node.parsed("revision", "an 8-bit number", |text| u8::try_from(hex(text)?).ok()).unwrap_or(0),
        kind,
        name: name(vendor, device, kind, model.as_ref()),
        model,
        driver: driver(node),
        driver_override: node
            .text_within("driver_override", PATIENCE)
            .filter(|text| !matches!(text.as_str(), "" | "(null)")),
        iommu_group: iommu_group(node),
        vfio_cdev: vfio_cdev(node),
        numa_node: numa_node(node),
        bars: bars(node),
        reset_methods: reset_methods(node),
        // The kernel wakes a function in D3cold to read its link.
        link: if power.state.as_deref() == Some("D3cold") { None } else { link(node) },
        power,
        is_virtual_function: node.exists("physfn"),
        upstream: upstream(root, bdf, node),
        consumers: consumers(node),
        modalias: node.word("modalias"),
    })
}

fn name(vendor: u16, device: u16, kind: DeviceKind, model: Option<&Model>) -> Option<String> {
    let own = model.filter(|model| !model.is_generic()).map(|model| model.name.clone());
    // Names of foreign devices would be true, but nobody asks ccnode for them.
    let registered = || (kind != DeviceKind::Foreign).then(|| names::pci_ids_name(vendor, device)).flatten();
    own.or_else(|| registered().map(str::to_owned)).or_else(|| model.map(|model| model.name.clone()))
}

fn driver(node: &mut Node) -> Option<String> {
    node.link("driver").unwrap_or_else(|Unreadable| Some(DRIVER_UNREADABLE.to_owned()))
}

fn iommu_group(node: &mut Node) -> Option<u32> {
    let target = node.link("iommu_group").ok()??;
    let number = decimal(&target);
    if number.is_none() {
        node.note("iommu_group", format!("Does not point to a numbered group: {target:?}"));
    }
    number
}

fn vfio_cdev(node: &mut Node) -> Option<VfioCdev> {
    let name = node
        .entries("vfio-dev")
        .into_iter()
        .find(|name| name.strip_prefix("vfio").is_some_and(|number| decimal::<u32>(number).is_some()))?;
    let (major, minor) = node.parsed(&format!("vfio-dev/{name}/dev"), "a device number", |text| {
        let (major, minor) = text.split_once(':')?;
        Some((decimal(major)?, decimal(minor)?))
    })?;
    Some(VfioCdev { name, major, minor })
}

fn numa_node(node: &mut Node) -> Option<u32> {
    node.parsed("numa_node", "a NUMA node", |text| if text == "-1" { Some(None) } else { decimal(text).map(Some) })
        .flatten()
}

/// The first six lines are the BARs, each by its true number (gpu-cc-protocol section 1.4); after them come the
/// expansion ROM, the windows of bridges and the BARs of virtual functions.
fn bars(node: &mut Node) -> Vec<Bar> {
    let Some(text) = node.required("resource", "text", |text| Some(text.to_owned())) else { return Vec::new() };
    let mut bars = Vec::new();
    let lines = text.lines().count();
    if lines < 6 {
        node.note("resource", format!("Has only {lines} of at least 6 lines"));
    }
    for (number, line) in (0_u8..6).zip(text.lines()) {
        match bar(number, line) {
            Ok(Some(bar)) => bars.push(bar),
            Ok(None) => {}
            Err(Malformed) => {
                node.note("resource", format!("Line {number} is not a resource: {:?}", excerpt(line)));
            }
        }
    }
    bars
}

/// A line that is no resource.
struct Malformed;

/// None for a BAR that is not there or has no address.
fn bar(number: u8, line: &str) -> Result<Option<Bar>, Malformed> {
    // Flags of the kernel's include/linux/ioport.h; the low bits are those of the BAR itself.
    const IO: u64 = 0x100;
    const PREFETCH: u64 = 0x2000;
    const MEM_64: u64 = 0x10_0000;
    const UNSET: u64 = 0x2000_0000;
    let words: Option<Vec<u64>> = line.split_whitespace().map(hex).collect();
    let Some(&[start, end, flags]) = words.as_deref() else { return Err(Malformed) };
    if start == 0 || flags & UNSET != 0 {
        return Ok(None);
    }
    let size = end.checked_sub(start).and_then(|last| last.checked_add(1)).ok_or(Malformed)?;
    let io = flags & IO != 0 || flags & 1 != 0;
    Ok(Some(Bar {
        number,
        start,
        size,
        io,
        is_64bit: !io && (flags & MEM_64 != 0 || (flags >> 1) & 3 == 2),
        prefetchable: !io && flags & PREFETCH != 0,
    }))
}

fn reset_methods(node: &mut Node) -> Vec<String> {
    match node.text("reset_method") {
        Some(text) => text.split_whitespace().map(str::to_owned).collect(),
        None if node.exists("reset") => vec![RESET_UNNAMED.to_owned()],
        None => Vec::new(),
    }
}

fn link(node: &mut Node) -> Option<Link> {
    let speed = node.word("current_link_speed");
    let max_speed = node.word("max_link_speed");
    let width = node.parsed("current_link_width", "a number of lanes", decimal);
    let max_width = node.parsed("max_link_width", "a number of lanes", decimal);
    Some(Link { speed: speed?, width: width?, max_speed: max_speed?, max_width: max_width? })
}

/// The path of a function's directory runs through those of the bridges above it.
fn upstream(root: &SysRoot, bdf: Bdf, node: &mut Node) -> Vec<Bdf> {
    before_access();
    let real = match fs::canonicalize(root.function(bdf)) {
        Ok(real) => real,
        Err(error) => {
            node.note("", format!("Its place in the device tree cannot be told: {error}"));
            return Vec::new();
        }
    };
    let name = |path: &Path| path.file_name()?.to_str()?.parse().ok();
    if name(&real) != Some(bdf) {
        node.note("", format!("Leads to {}, which is another device's folder", real.display()));
    }
    real.ancestors().skip(1).map_while(name).collect()
}

fn consumers(node: &mut Node) -> Vec<Bdf> {
    let names = node.entries("");
    let mut consumers: Vec<Bdf> =
        names.iter().filter_map(|name| name.strip_prefix("consumer:pci:")?.parse().ok()).collect();
    consumers.sort_unstable();
    consumers
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::symlink;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;
    use crate::testing::{FakeSysfs, interrupted};
    use crate::{CcEnable, Inventory, IommuState};

    const GPU: &str = "0000:41:00.0";

    fn scan(fake: &FakeSysfs) -> Inventory {
        Inventory::scan(&fake.root())
    }

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    #[test]
    fn a_healthy_gpu_is_told_whole() {
        let fake = FakeSysfs::new();
        fake.bridge("0000:3e:00.0");
        fake.below("0000:3e:00.0").bridge("0000:3f:00.0");
        fake.below("0000:3f:00.0").bridge("0000:40:01.0");
        fake.load_driver("vfio-pci");
        fake.below("0000:40:01.0").gpu(GPU, 0x2330).group(5).numa(1).driver_override("vfio-pci");
        fake.bind(GPU, "vfio-pci").unwrap();

        let inventory = scan(&fake);
        assert_eq!(inventory.problems, []);
        let gpu = inventory.get(bdf(GPU)).unwrap();
        assert_eq!((gpu.vendor, gpu.device, gpu.class, gpu.revision), (0x10de, 0x2330, 0x03_0200, 0xa1));
        assert_eq!((gpu.subsystem_vendor, gpu.subsystem_device), (Some(0x10de), Some(0x16c1)));
        assert_eq!((gpu.kind, gpu.name.as_deref()), (DeviceKind::Gpu, Some("H100")));
        let model = gpu.model.as_ref().unwrap();
        assert_eq!((model.chip.as_str(), model.cc_enable, model.ppcie), ("gh100", CcEnable::Yes, true));
        assert_eq!((gpu.driver.as_deref(), gpu.driver_override.as_deref()), (Some("vfio-pci"), Some("vfio-pci")));
        assert_eq!((gpu.iommu_group, gpu.numa_node, gpu.is_virtual_function), (Some(5), Some(1), false));
        assert_eq!(gpu.vfio_cdev, Some(VfioCdev { name: "vfio0".into(), major: 511, minor: 0 }));
        assert!(gpu.is_vfio_bound());
        assert_eq!(
            gpu.bars.iter().map(|bar| (bar.number, bar.size)).collect::<Vec<_>>(),
            [(0, 16 << 20), (2, 16 << 30), (4, 32 << 20)]
        );
        assert!(gpu.bars.iter().all(|bar| bar.is_64bit && bar.prefetchable && !bar.io));
        assert_eq!(gpu.reset_methods, ["flr", "bus"]);
        assert_eq!(gpu.power.control.as_deref(), Some("auto"));
        assert_eq!(gpu.power.runtime_status.as_deref(), Some("suspended"));
        assert_eq!(gpu.power.state.as_deref(), Some("D3hot"));
        let link = gpu.link.as_ref().unwrap();
        assert_eq!((link.speed.as_str(), link.width, link.max_width), ("32.0 GT/s PCIe", 16, 16));
        assert_eq!(gpu.upstream, [bdf("0000:40:01.0"), bdf("0000:3f:00.0"), bdf("0000:3e:00.0")]);
        let modalias = "pci:v000010DEd00002330sv000010DEsd000016C1bc03sc02i00";
        assert_eq!(gpu.modalias.as_deref(), Some(modalias));
        assert_eq!(inventory.host.iommu, IommuState::On);
        assert_eq!(inventory.host.kernel_release.as_deref(), Some("6.12.0-fake"));
    }

    #[test]
    fn a_bare_gpu_has_nones_and_no_problems() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2330).power("on", "active", "D3cold");
        let inventory = scan(&fake);
        assert_eq!(inventory.problems, []);
        let gpu = inventory.get(bdf(GPU)).unwrap();
        assert_eq!((&gpu.driver, &gpu.driver_override, &gpu.vfio_cdev), (&None, &None, &None));
        assert_eq!((gpu.iommu_group, gpu.numa_node, &gpu.link), (None, None, &None));
        assert!(gpu.upstream.is_empty() && gpu.consumers.is_empty());
        assert!(!gpu.is_vfio_bound());
    }

    #[test]
    fn functions_come_by_address_and_by_kind() {
        let fake = FakeSysfs::new();
        fake.function("10000:01:00.0", 0x8086, 0x0a54, 0x01_0802);
        fake.nvswitch("0000:07:00.0");
        fake.gpu("0000:a1:00.0", 0x2335);
        fake.function("0000:0a:00.1", 0x10de, 0x22bd, 0x04_0300);
        fake.gpu("0000:0a:00.0", 0x2bb1).class(0x03_0000).consumer("0000:0a:00.1");
        fake.gpu("0000:a1:00.1", 0x2335).virtual_function_of("0000:a1:00.0");
        let inventory = scan(&fake);
        let all: Vec<String> = inventory.functions.iter().map(|function| function.bdf.to_string()).collect();
        let expected =
            ["0000:07:00.0", "0000:0a:00.0", "0000:0a:00.1", "0000:a1:00.0", "0000:a1:00.1", "10000:01:00.0"];
        assert_eq!(all, expected);
        let gpus: Vec<Bdf> = inventory.gpus().map(|function| function.bdf).collect();
        assert_eq!(gpus, [bdf("0000:0a:00.0"), bdf("0000:a1:00.0")]);
        let names: Vec<_> = inventory.functions.iter().map(|function| function.name.as_deref()).collect();
        let audio = crate::pci_ids_name(0x10de, 0x22bd);
        assert_eq!(names, [Some("NVSwitch_gen3"), Some("RTX-PRO-6000"), audio, Some("H200"), Some("H200"), None]);
        assert_eq!(inventory.get(bdf("0000:0a:00.0")).unwrap().consumers, [bdf("0000:0a:00.1")]);
        assert_eq!(inventory.nvswitches().count(), 1);
    }

    #[test]
    fn generic_names_give_way_to_registered_ones() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:01:00.0", 0x2b85);
        fake.gpu("0000:02:00.0", 0x237e);
        fake.gpu("0000:03:00.0", 0x9999);
        let inventory = scan(&fake);
        let names: Vec<_> = inventory.gpus().map(|gpu| gpu.name.as_deref()).collect();
        assert_eq!(names, [Some("GB202 [GeForce RTX 5090]"), Some("Generic-GH100"), None]);
        assert_eq!(inventory.get(bdf("0000:03:00.0")).unwrap().model, None);
    }

    #[test]
    fn bars_keep_their_true_numbers() {
        // (line, what it is)
        let real = "0x0000104002000000 0x0000104002ffffff 0x000000000014220c";
        let cases = [
            (real, Some((0x1040_0200_0000, 16 << 20, false, true))),
            ("0x0000000000000000 0x0000000000000000 0x0000000000000000", None),
            ("0x00000000f0000000 0x00000000f0ffffff 0x0000000000040200", Some((0xf000_0000, 16 << 20, false, false))),
            ("0x000000000000e000 0x000000000000e07f 0x0000000000040101", Some((0xe000, 128, true, false))),
            ("0x0000000000001000 0x0000000000001fff 0x0000000020040200", None),
            ("0x0000000000000000 0x0000000000ffffff 0x000000000014220c", None),
        ];
        let fake = FakeSysfs::new();
        let rom = "0x0000000000aa0000 0x0000000000abffff 0x0000000000046200";
        let lines: Vec<&str> = cases.iter().map(|case| case.0).chain([rom]).collect();
        fake.gpu(GPU, 0x2330).attr("resource", lines.join("\n"));
        let inventory = scan(&fake);
        assert_eq!(inventory.problems, []);
        let found: Vec<_> = inventory.functions[0]
            .bars
            .iter()
            .map(|bar| (usize::from(bar.number), (bar.start, bar.size, bar.io, bar.is_64bit)))
            .collect();
        let expected: Vec<_> = cases.iter().enumerate().filter_map(|(number, case)| Some((number, case.1?))).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn how_a_function_can_be_reset() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu(GPU, 0x2330);
        let methods = || scan(&fake).functions[0].reset_methods.clone();
        assert_eq!(methods(), ["flr", "bus"]);
        gpu.attr("reset_method", "\n");
        assert!(methods().is_empty());
        gpu.remove_attr("reset_method");
        assert_eq!(methods(), [RESET_UNNAMED]);
        gpu.reset_methods("");
        assert!(methods().is_empty());
    }

    #[test]
    fn broken_files_are_told_and_the_rest_is_kept() {
        let huge = vec![b'x'; 70 * 1024];
        let cases: [(&str, &[u8], &str); 14] = [
            ("subsystem_device", b"", "Is not a 16-bit id: \"\""),
            ("subsystem_vendor", b"0x123456\n", "Is not a 16-bit id: \"0x123456\""),
            ("revision", b"a1\n", "Is not an 8-bit number: \"a1\""),
            ("numa_node", b"-2\n", "Is not a NUMA node: \"-2\""),
            ("numa_node", b"99999999999\n", "Is not a NUMA node: \"99999999999\""),
            ("modalias", b"pci:\xff\n", "Is not text"),
            ("power_state", &huge, "Cannot be read: more than 65536 bytes"),
            ("driver_override", &huge, "Cannot be read: more than 65536 bytes"),
            (
                "resource",
                b"0x1000 0x0fff 0x200\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n",
                "Line 0 is not a resource: \"0x1000 0x0fff 0x200\"",
            ),
            (
                "resource",
                b"0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x1000 0x1f",
                "Line 5 is not a resource: \"0x1000 0x1f\"",
            ),
            ("resource", b"0x1000 0x1fff 0x200\n0x0 0x0 0x0\n", "Has only 2 of at least 6 lines"),
            ("resource", b"", "Has only 0 of at least 6 lines"),
            ("current_link_width", b"wide\n", "Is not a number of lanes: \"wide\""),
            ("vfio-dev/vfio3/dev", b"511\n", "Is not a device number: \"511\""),
        ];
        for (file, content, message) in cases {
            let fake = FakeSysfs::new();
            fake.gpu(GPU, 0x2330).group(7).attr(file, content);
            let inventory = scan(&fake);
            let path = format!("sys/bus/pci/devices/{GPU}/{file}");
            assert_eq!(inventory.problems, [Problem { bdf: Some(bdf(GPU)), path, message: message.into() }]);
            assert_eq!(inventory.functions[0].iommu_group, Some(7), "{file}");
        }
    }

    #[test]
    fn a_function_without_identity_is_told_as_such() {
        let (vendor, device, class) = (Some(0x10de), Some(0x2330), Some(0x03_0200));
        let driver = || Some("nvidia".to_owned());
        let whole = Unclassified { bdf: bdf(GPU), vendor, device, class, driver: driver(), iommu_group: Some(4) };
        for (file, expected) in [
            ("vendor", Unclassified { vendor: None, ..whole.clone() }),
            ("device", Unclassified { device: None, ..whole.clone() }),
            ("class", Unclassified { class: None, ..whole.clone() }),
        ] {
            let fake = FakeSysfs::new();
            fake.gpu(GPU, 0x2330).group(4).driver("nvidia").remove_attr(file);
            fake.gpu("0000:42:00.0", 0x2330);
            let inventory = scan(&fake);
            assert_eq!(inventory.functions.len(), 1);
            let path = format!("sys/bus/pci/devices/{GPU}/{file}");
            assert_eq!(inventory.problems, [Problem { bdf: Some(bdf(GPU)), path, message: "Is missing".into() }]);
            assert_eq!(inventory.unclassified, [expected], "{file}");
            assert!(inventory.unclassified[0].may_be_nvidia() && inventory.unclassified[0].blocks_its_group());
            assert_eq!(inventory.doubts().collect::<Vec<_>>(), [&inventory.problems[0]]);
            let text = inventory.unclassified[0].to_string();
            assert!(text.contains(&format!("{file} cannot be read")) && text.ends_with("bound to nvidia"), "{text}");
        }
        // A stranger is told, too, but leaves no doubt about GPUs; nor does any other file.
        let fake = FakeSysfs::new();
        fake.function(GPU, 0x8086, 0x1533, 0x02_0000).attr("class", "?");
        fake.gpu("0000:42:00.0", 0x2330).attr("numa_node", "?");
        let inventory = scan(&fake);
        assert!(!inventory.unclassified[0].may_be_nvidia() && !inventory.unclassified[0].blocks_its_group());
        assert_eq!((inventory.problems.len(), inventory.doubts().count()), (2, 0));
    }

    #[test]
    fn without_the_bus_there_is_doubt() {
        let fake = FakeSysfs::new();
        assert_eq!(scan(&fake).doubts().count(), 0);
        fs::remove_dir(fake.path().join(DEVICES)).unwrap();
        assert_eq!(scan(&fake).doubts().map(|problem| problem.message.as_str()).collect::<Vec<_>>(), ["Is missing"]);
    }

    #[test]
    fn links_that_lead_astray_are_told() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu(GPU, 0x2330);
        let relink = |name: &str, target: &str| {
            gpu.remove_attr(name);
            symlink(target, gpu.path().join(name)).unwrap();
        };
        relink("driver", "..");
        relink("iommu_group", "groups/many");
        relink("vendor", "vendor");
        let devices = fake.path().join("sys/bus/pci/devices");
        symlink("0000:50:00.0", devices.join("0000:50:00.0")).unwrap();
        symlink("../../../devices/gone", devices.join("0000:51:00.0")).unwrap();
        fs::create_dir(devices.join("rubbish")).unwrap();
        symlink("../../../devices/pci0000:60/0000:60:00.0", devices.join("0000:6A:00.0")).unwrap();
        symlink("../../../devices/pci0000:60/0000:60:00.0", devices.join("0000:61:00.0")).unwrap();
        let healthy = fake.gpu("0000:60:00.0", 0x2330);
        let pipe = |name: &str| {
            gpu.remove_attr(name);
            nix::unistd::mkfifo(&gpu.path().join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        };
        pipe("numa_node");

        let inventory = scan(&fake);
        let found: Vec<_> = inventory.functions.iter().map(|function| function.bdf).collect();
        assert_eq!(found, [healthy.bdf(), bdf("0000:61:00.0")]);
        let said = |text: &str| inventory.problems.iter().any(|problem| problem.message.contains(text));
        assert!(said("\"0000:6A:00.0\" is not how the kernel writes 0000:6a:00.0"), "{:?}", inventory.problems);
        assert!(said("0000:60:00.0, which is another device's folder"), "{:?}", inventory.problems);
        let about = |text: &str| inventory.problems.iter().any(|problem| problem.bdf == Some(bdf(text)));
        assert!(about(GPU) && about("0000:50:00.0") && !about("0000:51:00.0"), "{:?}", inventory.problems);
        assert!(inventory.problems.iter().any(|problem| problem.message.contains("\"rubbish\" is not a PCI address")));

        gpu.remove_attr("vendor").attr("vendor", "0x10de\n");
        let inventory = scan(&fake);
        let gpu = inventory.get(bdf(GPU)).unwrap();
        assert_eq!((gpu.driver.as_deref(), gpu.iommu_group), (Some(DRIVER_UNREADABLE), None));
        assert!(inventory.problems.iter().any(|problem| problem.message.contains("not a regular file")));
        assert!(!gpu.is_vfio_bound());
    }

    #[test]
    fn a_group_is_blocked_by_foreign_drivers_alone() {
        let fake = FakeSysfs::new();
        fake.bridge("0000:40:00.0").group(3);
        fake.below("0000:40:00.0").gpu(GPU, 0x2330).group(3).driver("vfio-pci");
        let audio = fake.below("0000:40:00.0").function("0000:41:00.1", 0x10de, 0x22bd, 0x04_0300).group(3);
        let blockers = || scan(&fake).group_blockers(3).map(|member| member.bdf).collect::<Vec<_>>();
        assert_eq!(blockers(), []);
        audio.driver("snd_hda_intel");
        assert_eq!(blockers(), [bdf("0000:41:00.1")]);
        audio.driver("vfio-pci");
        assert_eq!(blockers(), []);
        assert_eq!(scan(&fake).group_members(3).count(), 3);
    }

    #[test]
    fn a_tree_without_pci_is_a_problem_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let inventory = Inventory::scan(&SysRoot::at(dir.path()));
        assert_eq!(inventory.problems, [Problem { bdf: None, path: DEVICES.into(), message: "Is missing".into() }]);
        fs::create_dir_all(dir.path().join("sys/bus/pci")).unwrap();
        fs::write(dir.path().join(DEVICES), "").unwrap();
        let inventory = Inventory::scan(&SysRoot::at(dir.path()));
        assert!(inventory.problems[0].message.starts_with("Cannot be listed: "), "{:?}", inventory.problems);
    }

    #[test]
    fn a_device_may_vanish_or_be_replaced_between_any_two_reads() {
        // What goes on at one moment of the scan, and whether a device is there afterwards.
        type Act = fn(&FakeSysfs);
        let acts: [(&str, Act, Option<u16>); 3] = [
            ("vanishes", |fake| fake.remove(GPU), None),
            (
                "is replaced",
                |fake| {
                    fake.remove(GPU);
                    _ = fake.gpu(GPU, 0x2901).driver("nvidia");
                },
                Some(0x2901),
            ),
            ("loses its files", |fake| _ = fake.get(GPU).remove_attr("device").remove_attr("class"), Some(0x2330)),
        ];
        let fake = Rc::new(FakeSysfs::new());
        fake.gpu("0000:80:00.0", 0x2330).group(2);
        for (what, act, after) in acts {
            for moment in 0_u32.. {
                fake.gpu(GPU, 0x2330).group(3).driver("vfio-pci");
                let calm = scan(&fake);
                let (mut left, inner) = (moment, Rc::clone(&fake));
                let was_reached = Rc::new(Cell::new(false));
                let reached = Rc::clone(&was_reached);
                let interruption = move || {
                    if left == 0 {
                        act(&inner);
                        reached.set(true);
                    }
                    left = left.wrapping_sub(1);
                };
                let inventory = interrupted(interruption, || {
                    let inventory = scan(&fake);
                    for function in &inventory.functions {
                        let _ = crate::Condition::read(&fake.root(), function);
                    }
                    inventory
                });
                for healthy in calm.functions.iter().filter(|function| function.bdf != bdf(GPU)) {
                    assert_eq!(inventory.get(healthy.bdf), Some(healthy), "{what} at {moment}");
                }
                let before = calm.get(bdf(GPU)).unwrap();
                let now = scan(&fake);
                match inventory.get(bdf(GPU)) {
                    // Whole as it was or whole as it is, and nothing of both.
                    Some(seen) if seen.device == 0x2330 => assert_eq!(seen, before, "{what} at {moment}"),
                    Some(seen) => assert_eq!((Some(seen), Some(seen.device)), (now.get(bdf(GPU)), after)),
                    None if what == "loses its files" => {
                        assert!(inventory.problems.iter().any(|problem| problem.bdf == Some(bdf(GPU))), "{moment}");
                    }
                    None => assert_eq!((inventory.problems.as_slice(), after), (&[][..], None), "{what} at {moment}"),
                }
                if now.get(bdf(GPU)).is_some() || what == "loses its files" {
                    fake.remove(GPU);
                }
                if !was_reached.get() {
                    assert!(moment > 50, "{what}: the scan made only {moment} accesses");
                    break;
                }
            }
        }
    }

    #[test]
    fn a_device_that_is_another_at_each_look_is_a_problem() {
        let fake = Rc::new(FakeSysfs::new());
        fake.gpu(GPU, 0x2330);
        fake.gpu("0000:80:00.0", 0x2330);
        let inner = Rc::clone(&fake);
        let restless = move || {
            inner.remove(GPU);
            inner.gpu(GPU, 0x2330);
        };
        let inventory = interrupted(restless, || scan(&fake));
        assert_eq!(inventory.functions.iter().map(|function| function.bdf).collect::<Vec<_>>(), [bdf("0000:80:00.0")]);
        let messages: Vec<_> = inventory.problems.iter().map(|problem| problem.message.as_str()).collect();
        assert_eq!(messages, ["Was another device each of the 3 times that it was read"]);
    }

    #[test]
    fn devices_that_vanish_while_they_are_read_leave_the_others_whole() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:01:00.0", 0x2330).group(1).driver("vfio-pci");
        fake.gpu("0000:80:00.0", 0x2330).group(2);
        let calm = scan(&fake);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    fake.gpu(GPU, 0x2330).group(3).driver("nvidia");
                    fake.remove(GPU);
                }
            });
            for _ in 0..200 {
                let inventory = scan(&fake);
                for healthy in &calm.functions {
                    assert_eq!(inventory.get(healthy.bdf), Some(healthy));
                }
                assert!(inventory.problems.iter().all(|problem| problem.bdf == Some(bdf(GPU))));
            }
            done.store(true, Ordering::Relaxed);
        });
        fake.gpu("0000:02:00.0", 0x2330);
        fake.remove("0000:01:00.0");
        let left: Vec<_> = scan(&fake).functions.iter().map(|function| function.bdf.to_string()).collect();
        assert_eq!(left, ["0000:02:00.0", "0000:80:00.0"]);
    }

    #[test]
    fn binding_follows_the_kernels_rules() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu(GPU, 0x2330);
        let refused =
            |driver: &str| fake.bind(GPU, driver).unwrap_err().raw_os_error().map(nix::errno::Errno::from_raw);
        assert_eq!(refused("vfio-pci"), Some(nix::errno::Errno::ENOENT));
        fake.load_driver("vfio-pci").load_driver("nvidia");
        assert_eq!(refused("vfio-pci"), Some(nix::errno::Errno::ENODEV));
        gpu.driver_override("vfio-pci");
        assert_eq!(refused("nvidia"), Some(nix::errno::Errno::ENODEV));
        assert_eq!(refused("vfio-pci"), Some(nix::errno::Errno::EINVAL));
        gpu.group(4);
        fake.drivers_probe(GPU);
        assert_eq!(refused("vfio-pci"), Some(nix::errno::Errno::EBUSY));
        assert!(scan(&fake).functions[0].vfio_cdev.is_some());
        assert!(fake.path().join("dev/vfio/4").exists() && fake.path().join("dev/vfio/devices/vfio0").exists());
        fake.unbind(GPU).unwrap();
        assert_eq!(fake.unbind(GPU).unwrap_err().raw_os_error(), Some(nix::errno::Errno::ENODEV as i32));
        assert!(!fake.path().join("dev/vfio/4").exists() && !fake.path().join("dev/vfio/devices/vfio0").exists());
        fake.without_iommufd();
        fake.bind(GPU, "vfio-pci").unwrap();
        let inventory = scan(&fake);
        assert_eq!(inventory.functions[0].vfio_cdev, None);
        assert!(inventory.functions[0].is_vfio_bound() && !inventory.host.dev_iommu);
    }

    #[test]
    fn an_inventory_survives_json() {
        let fake = FakeSysfs::new();
        fake.gpu(GPU, 0x2901).group(1);
        fake.nvswitch("0000:07:00.0").attr("numa_node", "?");
        let mut inventory = scan(&fake);
        // All but what is of one boot alone.
        assert!(inventory.functions.iter_mut().all(|function| function.instance.take().is_some()));
        let text = serde_json::to_string(&inventory).unwrap();
        assert_eq!(serde_json::from_str::<Inventory>(&text).unwrap(), inventory);
    }

    /// Everything that a scan reads of a function.
    const READ: [&str; 22] = [
        "vendor",
        "device",
        "class",
        "revision",
        "subsystem_vendor",
        "subsystem_device",
        "power/control",
        "power/runtime_status",
        "power_state",
        "driver_override",
        "vfio-dev/vfio1/dev",
        "numa_node",
        "resource",
        "reset_method",
        "current_link_speed",
        "current_link_width",
        "max_link_speed",
        "max_link_width",
        "modalias",
        "driver",
        "iommu_group",
        "config",
    ];

    fn content() -> impl Strategy<Value = Option<Vec<u8>>> {
        prop_oneof![
            Just(None),
            Just(Some(Vec::new())),
            proptest::collection::vec(any::<u8>(), 0..200).prop_map(Some),
            "[ -~\n]{0,60}".prop_map(|text| Some(text.into_bytes())),
            "(0x[0-9a-f]{1,20}[ \n]){1,20}".prop_map(|text| Some(text.into_bytes())),
            "-?[0-9]{1,25}(:[0-9]{1,25})?".prop_map(|text| Some(text.into_bytes())),
            Just(Some(vec![b'7'; 66 * 1024])),
        ]
    }

    #[test]
    fn no_content_upsets_a_scan_or_hides_the_healthy() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:01:00.0", 0x2330).group(1);
        fake.nvswitch("0000:90:00.0").group(2);
        let calm = scan(&fake);
        let mut runner = TestRunner::new(ProptestConfig::with_cases(48));
        let files = proptest::collection::vec((0..READ.len(), content()), 1..10);
        let outcome = runner.run(&files, |files| {
            let sick = fake.gpu(GPU, 0x2330);
            for (file, content) in &files {
                sick.remove_attr(READ[*file]);
                if let Some(content) = content {
                    sick.attr(READ[*file], content);
                }
            }
            let inventory = scan(&fake);
            // A dead or garbled device may be asked, too.
            let _ = crate::config::liveness(&fake.root(), sick.bdf());
            fake.remove(GPU);
            for healthy in &calm.functions {
                prop_assert_eq!(inventory.get(healthy.bdf), Some(healthy));
            }
            prop_assert!(inventory.get(bdf(GPU)).is_some() || !inventory.problems.is_empty());
            Ok(())
        });
        outcome.unwrap();
    }
}
