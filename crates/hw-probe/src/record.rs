//! What the scan looks at, as files that can be carried elsewhere and scanned there with the same result.
//!
//! Reading follows the rules of the scan: no device is opened, woken or written, a function in D3cold is not asked, one that
//! does not answer is asked for two words. What identifies the machine is left behind: boot id, serial numbers, product
//! data, and all of the kernel's command line and of `/proc/cpuinfo` but what [`crate::HostDetails`] tells.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path};

use crate::config::{Liveness, ask};
use crate::details::{MODULES, PARAMETERS, cpu_facts, hints, listed, module_list};
use crate::sysfs::{PATIENCE, hex, patiently, read, read_head};
use crate::{Bdf, NVIDIA, Problem, SysRoot};

/// Most functions recorded: more than any machine has.
const MOST_FUNCTIONS: usize = 4096;

/// Most names of a folder that are recorded.
const MOST_NAMES: usize = 65_536;

/// Most bytes recorded in all.
const MOST_BYTES: usize = 48 << 20;

/// A file, folder or link of a recorded tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder, which may have nothing in it.
    Folder,
    /// A file's content.
    File(Vec<u8>),
    /// A symbolic link's text: relative, and of the form that [`stays_inside`] asks for.
    Link(String),
}

/// A recorded tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recording {
    /// By path below the root, `sys/...`. Folders above an entry need no entry of their own.
    pub entries: BTreeMap<String, Entry>,
    /// What should be here and is not, and why.
    pub left_out: Vec<Problem>,
}

/// Whether a link at the path `at` below a root stays below the root, whatever other such links are there: it goes up
/// first, not beyond the root, and then only down. Links in sysfs are like that.
pub fn stays_inside(at: &str, target: &str) -> bool {
    let mut room = at.split('/').count().saturating_sub(1);
    let mut descending = false;
    for part in Path::new(target).components() {
        match part {
            Component::ParentDir if !descending && room > 0 => room -= 1,
            Component::Normal(_) => descending = true,
            _ => return false,
        }
    }
    !target.is_empty()
}

impl Recording {
    /// Records the tree at `root`. Never fails: what cannot be read is in [`Recording::left_out`].
    pub fn of(root: &SysRoot) -> Self {
        let mut recorder = Recorder { root, recording: Self::default(), bytes: 0, full: false };
        recorder.host();
        recorder.functions();
        recorder.groups();
        recorder.modules();
        recorder.nodes();
        recorder.recording
    }

    /// Writes the tree into an empty folder.
    ///
    /// # Errors
    ///
    /// Those of the file system. An entry whose path or link leads out of the folder is `InvalidInput`.
    pub fn lay_out(&self, folder: &Path) -> io::Result<()> {
        // Links come last, so that nothing is written through one.
        let (links, others): (Vec<_>, Vec<_>) =
            self.entries.iter().partition(|(_, entry)| matches!(entry, Entry::Link(_)));
        for (at, entry) in others.into_iter().chain(links) {
            let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{at}: {what}")));
            let mut parts = Path::new(at).components();
            if at.is_empty() || !parts.all(|part| matches!(part, Component::Normal(_))) {
                return refuse("leads out of the tree");
            }
            let path = folder.join(at);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::Folder => fs::create_dir_all(&path)?,
                Entry::File(content) => fs::write(&path, content)?,
                Entry::Link(target) if stays_inside(at, target) => symlink(target, &path)?,
                Entry::Link(_) => return refuse("a link that leads out of the tree"),
            }
        }
        Ok(())
    }
}

struct Recorder<'a> {
    root: &'a SysRoot,
    recording: Recording,
    bytes: usize,
    full: bool,
}

impl Recorder<'_> {
    fn leave_out(&mut self, bdf: Option<Bdf>, path: &str, message: impl Into<String>) {
        self.recording.left_out.push(Problem { bdf, path: path.to_owned(), message: message.into() });
    }

    fn put(&mut self, at: impl Into<String>, entry: Entry) {
        let at = at.into();
        let size = at.len() + if let Entry::File(content) = &entry { content.len() } else { 0 };
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes <= MOST_BYTES {
            self.recording.entries.insert(at, entry);
        } else if !self.full {
            self.full = true;
            self.leave_out(None, &at, format!("This and more of the tree has more than {MOST_BYTES} bytes"));
        }
    }

    /// A file as it is, from `from` to `at`; nothing where there is none. `patient`: the kernel shows it only under the
    /// device's lock.
    fn file(&mut self, bdf: Option<Bdf>, from: &str, at: &str, patient: bool) {
        let path = self.root.join(from);
        let content = if patient { patiently(path.clone(), PATIENCE, move || read(&path)) } else { read(&path) };
        match content {
            Ok(content) => self.put(at, Entry::File(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => self.leave_out(bdf, from, format!("Cannot be read: {error}")),
        }
    }

    fn same(&mut self, path: &str) {
        self.file(None, path, path, false);
    }

    /// That something is there, whatever it is: it is not opened.
    fn presence(&mut self, from: &str, at: &str) {
        if fs::symlink_metadata(self.root.join(from)).is_ok() {
            self.put(at, Entry::File(Vec::new()));
        }
    }

    fn link(&mut self, bdf: Option<Bdf>, from: &str, at: &str) {
        match fs::read_link(self.root.join(from)) {
            Ok(target) => match target.to_str() {
                Some(target) if stays_inside(at, target) => self.put(at, Entry::Link(target.to_owned())),
                _ => self.leave_out(bdf, from, "Is a link that leads out of the tree"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => self.leave_out(bdf, from, format!("Cannot be read: {error}")),
        }
    }

    /// Names in a folder, sorted; none where there is no folder.
    fn names(&mut self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let listing = match fs::read_dir(self.root.join(path)) {
            Ok(listing) => listing,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    self.leave_out(None, path, format!("Cannot be listed: {error}"));
                }
                return names;
            }
        };
        for entry in listing.take(MOST_NAMES) {
            match entry {
                Ok(entry) => names.extend(entry.file_name().to_str().map(str::to_owned)),
                Err(error) => {
                    self.leave_out(None, path, format!("Cannot be listed to its end: {error}"));
                    break;
                }
            }
        }
        names.sort_unstable();
        names
    }

    fn host(&mut self) {
        self.same("proc/sys/kernel/osrelease");
        self.same("sys/kernel/security/lockdown");
        for (path, kept) in [
            ("proc/cmdline", (|text| hints(text).join(" ") + "\n") as fn(&str) -> String),
            ("proc/cpuinfo", |text| cpu_facts(text)),
        ] {
            if let Ok(content) = read_head(&self.root.join(path), 64 << 10) {
                self.put(path, Entry::File(kept(&String::from_utf8_lossy(&content)).into_bytes()));
            }
        }
    }

    fn functions(&mut self) {
        const DEVICES: &str = "sys/bus/pci/devices";
        if self.root.join(DEVICES).is_dir() {
            self.put(DEVICES, Entry::Folder);
        }
        for (number, name) in self.names(DEVICES).into_iter().enumerate() {
            let at = format!("{DEVICES}/{name}");
            match name.parse::<Bdf>() {
                _ if number >= MOST_FUNCTIONS => {
                    self.leave_out(None, DEVICES, format!("Has more than {MOST_FUNCTIONS} functions"));
                    return;
                }
                Ok(bdf) => self.function(bdf, &at),
                Err(error) => self.leave_out(None, DEVICES, error.to_string()),
            }
        }
    }

    fn function(&mut self, bdf: Bdf, at: &str) {
        let place = || {
            let real = fs::canonicalize(self.root.join(at))?;
            let root = fs::canonicalize(self.root.join(""))?;
            let inside = real.strip_prefix(root).ok().and_then(Path::to_str);
            inside.map(str::to_owned).ok_or_else(|| io::Error::other("its folder is outside of the tree"))
        };
        let folder = match place() {
            Ok(folder) => folder,
            Err(error) => return self.leave_out(Some(bdf), at, format!("Its place cannot be told: {error}")),
        };
        if folder != at {
            self.link(Some(bdf), at, at);
        }
        self.put(folder.clone(), Entry::Folder);
        self.attributes(bdf, at, &folder);
        for name in ["driver", "iommu_group", "subsystem", "physfn"] {
            self.link(Some(bdf), &format!("{at}/{name}"), &format!("{folder}/{name}"));
        }
        for name in self.names(at) {
            let links_devices = |kind: &str| name.strip_prefix(kind).is_some_and(|other| other.parse::<Bdf>().is_ok());
            if links_devices("consumer:pci:") || links_devices("supplier:pci:") {
                self.link(Some(bdf), &format!("{at}/{name}"), &format!("{folder}/{name}"));
            }
        }
        for name in self.names(&format!("{at}/vfio-dev")).into_iter().filter(|name| is_plain(name)) {
            let inner = format!("vfio-dev/{name}/dev");
            self.file(Some(bdf), &format!("{at}/{inner}"), &format!("{folder}/{inner}"), false);
        }
        self.presence(&format!("{at}/reset"), &format!("{folder}/reset"));
        self.config(bdf, at, &folder);
        if fs::metadata(self.root.join(at)).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.leave_out(Some(bdf), at, "Vanished while it was being read");
        }
    }

    fn attributes(&mut self, bdf: Bdf, at: &str, folder: &str) {
        const PLAIN: [&str; 19] = [
            "vendor",
            "device",
            "class",
            "subsystem_vendor",
            "subsystem_device",
            "revision",
            "numa_node",
            "resource",
            "reset_method",
            "modalias",
            "d3cold_allowed",
            "power/control",
            "power/runtime_status",
            "power_state",
            "aer_dev_correctable",
            "aer_dev_fatal",
            "aer_dev_nonfatal",
            // Of the secure processor.
            "bootloader_version",
            "tee_version",
        ];
        // The kernel wakes a function in D3cold to read these.
        const OF_THE_LINK: [&str; 4] = ["current_link_speed", "current_link_width", "max_link_speed", "max_link_width"];
        let awake = self.word(at, "power_state").as_deref() != Some("D3cold");
        for name in PLAIN.into_iter().chain(OF_THE_LINK.into_iter().filter(|_| awake)) {
            self.file(Some(bdf), &format!("{at}/{name}"), &format!("{folder}/{name}"), false);
        }
        self.file(Some(bdf), &format!("{at}/driver_override"), &format!("{folder}/driver_override"), true);
    }

    fn word(&self, at: &str, name: &str) -> Option<String> {
        let text = String::from_utf8(read(&self.root.join(format!("{at}/{name}"))).ok()?).ok()?;
        Some(text.trim().to_owned())
    }

    /// Configuration space of NVIDIA's functions and of bridges; nobody asks for that of others.
    fn config(&mut self, bdf: Bdf, at: &str, folder: &str) {
        let number = |name| self.word(at, name).and_then(|text| hex(&text));
        let asked =
            number("vendor") == Some(u64::from(NVIDIA)) || number("class").is_some_and(|class| class >> 8 == 0x0604);
        if !asked || !self.root.join(format!("{at}/config")).exists() {
            return;
        }
        let path = format!("{at}/config");
        let content = match ask(self.root, bdf) {
            Ok((Liveness::Answers, Some(config))) => config.without_serials().as_bytes().to_vec(),
            // What it answers is all there is: two bytes say it.
            Ok((Liveness::Silent, _)) => vec![0xff, 0xff],
            Ok((Liveness::Other(vendor), _)) => vendor.to_le_bytes().to_vec(),
            Ok((Liveness::Asleep | Liveness::Answers, _)) => {
                return self.leave_out(Some(bdf), &path, "Not read: the function is in D3cold and would be woken");
            }
            Err(error) => {
                let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                return self.leave_out(Some(bdf), &path, format!("Cannot be read: {cause}"));
            }
        };
        self.put(format!("{folder}/config"), Entry::File(content));
    }

    fn groups(&mut self) {
        const GROUPS: &str = "sys/kernel/iommu_groups";
        for group in self.names(GROUPS).into_iter().filter(|name| is_plain(name)) {
            let group = format!("{GROUPS}/{group}");
            self.put(group.clone(), Entry::Folder);
            self.same(&format!("{group}/type"));
            self.same(&format!("{group}/name"));
            for member in self.names(&format!("{group}/devices")) {
                if let Ok(bdf) = member.parse::<Bdf>() {
                    let at = format!("{group}/devices/{member}");
                    self.link(Some(bdf), &at, &at);
                }
            }
        }
    }

    fn modules(&mut self) {
        for name in MODULES {
            let folder = format!("sys/module/{name}");
            if self.root.join(&folder).is_dir() {
                self.put(folder.clone(), Entry::Folder);
                self.same(&format!("{folder}/initstate"));
            }
        }
        self.same("sys/devices/faux/tdx_host/version");
        for parameter in PARAMETERS {
            self.same(parameter);
        }
        let release = read(&self.root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
        let release = String::from_utf8_lossy(&release).trim().to_owned();
        if !is_plain(&release) {
            return;
        }
        let paths = |list: &str| {
            let ours = list.lines().filter_map(listed).filter(|(_, name)| MODULES.contains(&name.as_str()));
            ours.map(|(path, _)| path.to_owned() + ":\n").collect::<BTreeSet<_>>().into_iter().collect::<String>()
        };
        let aliases = |list: &str| {
            let ours = list.lines().filter(|line| line.starts_with("alias vfio_pci:"));
            ours.map(|line| line.to_owned() + "\n").collect::<String>()
        };
        for name in ["modules.builtin", "modules.dep", "modules.alias"] {
            if let Some(list) = module_list(self.root, &release, name) {
                let kept = if name == "modules.alias" { aliases(&list) } else { paths(&list) };
                self.put(format!("lib/modules/{release}/{name}"), Entry::File(kept.into_bytes()));
            }
        }
    }

    fn nodes(&mut self) {
        for node in ["dev/iommu", "dev/kvm", "dev/sev"] {
            self.presence(node, node);
        }
        for (folder, start) in [("dev/vfio", ""), ("dev/vfio/devices", "vfio"), ("dev", "nvidia")] {
            let ours = |name: &String| name.starts_with(start) && is_plain(name) && name != "devices";
            for name in self.names(folder).into_iter().filter(ours) {
                let node = format!("{folder}/{name}");
                if !self.root.join(&node).is_dir() {
                    self.presence(&node, &node);
                }
            }
        }
    }
}

/// A name that is no path and fits into an archive.
fn is_plain(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '~');
    (1..=100).contains(&name.len()) && !name.starts_with('.') && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeSysfs;
    use crate::{Condition, HostDetails, Inventory};

    /// What a scan tells, without what is of one boot alone.
    fn told(root: &SysRoot) -> (Inventory, HostDetails, Vec<Condition>) {
        let mut inventory = Inventory::scan(root);
        inventory.host.boot_id = None;
        for function in &mut inventory.functions {
            function.instance = None;
        }
        let details = HostDetails::read(root, &inventory);
        let nvidia = inventory.functions.iter().filter(|function| function.vendor == NVIDIA);
        let conditions = nvidia.map(|function| Condition::read(root, function)).collect();
        (inventory, details, conditions)
    }

    fn replayed(recording: &Recording) -> (tempfile::TempDir, SysRoot) {
        let folder = tempfile::tempdir().unwrap();
        recording.lay_out(folder.path()).unwrap();
        let root = SysRoot::at(folder.path());
        (folder, root)
    }

    #[test]
    fn a_recorded_tree_is_told_as_the_tree() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        fake.gpu("0000:e1:00.0", 0x2bb5).class(0x03_0000).group(90).driver("nvgrace_gpu_vfio_pci");
        fake.function("0000:e1:00.1", 0x10de, 0x22e8, 0x04_0300).group(90).driver("snd_hda_intel");
        _ = fake.get("0000:e1:00.0").consumer("0000:e1:00.1");
        fake.gpu("0000:e2:00.0", 0x2335).config(&[0xff; 4096]).reset_methods("");
        fake.gpu("0000:e3:00.0", 0x2335).patch_config(0, &[1, 0]).remove_attr("reset_method");
        fake.gpu("0000:e4:00.0", 0x2335).patch_config(0xf0, &[0xff, 0xff]).attr("numa_node", "?");
        fake.gpu("0000:e5:00.0", 0x2335).power("auto", "suspended", "D3cold");
        fake.gpu("0000:e6:00.0", 0x2335).patch_config(0x2b4, &[1]).attr("modalias", [0xff]);
        fake.gpu("0000:e6:00.1", 0x2335).virtual_function_of("0000:e6:00.0");
        fake.file("sys/kernel/iommu_groups/91/name", "vfio-noiommu\n");
        fake.module("vfio_pci", false).module("iommufd", true);
        fake.file(
            "lib/modules/6.12.0-fake/modules.dep",
            "kernel/drivers/vfio/vfio.ko.zst: kernel/x.ko\nkernel/y.ko:\n",
        );
        fake.file("lib/modules/6.12.0-fake/modules.builtin", "kernel/arch/x86/kvm/kvm-amd.ko\nkernel/y.ko\n");
        fake.file(
            "proc/cpuinfo",
            "vendor_id\t: GenuineIntel\nflags\t: a tme hypervisor\naddress sizes\t: 46 bits physical\n",
        );
        fake.file("proc/cmdline", "root=UUID=7 iommu=pt\n");
        fake.file("dev/sev", "");
        let recording = Recording::of(&fake.root());
        assert_eq!(recording.left_out.len(), 1, "{:?}", recording.left_out);
        assert!(recording.left_out[0].message.contains("D3cold"));
        let (_folder, root) = replayed(&recording);
        assert_eq!(told(&root), told(&fake.root()));
        // Recording the recording changes nothing.
        assert_eq!(Recording { left_out: vec![], ..Recording::of(&root) }, Recording { left_out: vec![], ..recording });
    }

    #[test]
    fn only_what_is_told_is_taken() {
        let fake = FakeSysfs::new();
        let secret = "TOPSECRET";
        fake.gpu("0000:41:00.0", 0x2330).attr("vpd", secret).attr("rom", secret).resource_file(0, 4096);
        fake.function("0000:42:00.0", 0x15b3, 0x1021, 0x02_0000).config(secret.as_bytes()).attr("serial", secret);
        fake.file("proc/cmdline", format!("root=UUID={secret} password={secret} iommu=pt"));
        fake.file("proc/cpuinfo", format!("model name\t: {secret}\nflags\t: sev {secret}\nserial\t: {secret}\n"));
        fake.file("dev/vfio/devices/vfio0", secret);
        fake.file("lib/modules/6.12.0-fake/modules.dep", format!("kernel/{secret}.ko: a\nkernel/vfio.ko: {secret}\n"));
        fake.process(7, "qemu", secret, &["/dev/vfio/3"]);
        let recording = Recording::of(&fake.root());
        for (path, entry) in &recording.entries {
            let text = format!(
                "{path} {}",
                if let Entry::File(content) = entry { String::from_utf8_lossy(content) } else { "".into() }
            );
            assert!(!text.contains(secret) && !text.contains("boot_id"), "{text}");
        }
        let text = |path: &str| match &recording.entries[path] {
            Entry::File(content) => String::from_utf8(content.clone()).unwrap(),
            other => panic!("{other:?}"),
        };
        assert_eq!((text("proc/cmdline").as_str(), text("proc/cpuinfo").as_str()), ("iommu=pt\n", "flags\t: sev\n"));
        assert_eq!(
            (text("dev/vfio/devices/vfio0").as_str(), text("lib/modules/6.12.0-fake/modules.dep").as_str()),
            ("", "kernel/vfio.ko:\n")
        );
        assert!(!recording.entries.keys().any(|path| path.ends_with("0000:42:00.0/config")));
    }

    #[test]
    fn what_cannot_be_taken_is_said() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:41:00.0", 0x2330);
        gpu.attr("resource", vec![b'x'; 70_000]);
        gpu.remove_attr("modalias");
        fs::create_dir(gpu.path().join("modalias")).unwrap();
        symlink("/etc/passwd", gpu.path().join("driver")).unwrap();
        symlink("/etc", fake.path().join("sys/bus/pci/devices/0000:43:00.0")).unwrap();
        symlink("nowhere", fake.path().join("sys/bus/pci/devices/0000:44:00.0")).unwrap();
        fake.file("sys/bus/pci/devices/rubbish", "");
        let said: Vec<String> = Recording::of(&fake.root())
            .left_out
            .iter()
            .map(|left| format!("{}: {}", left.path, left.message))
            .collect();
        for words in [
            "0000:41:00.0/resource: Cannot be read: more than",
            "0000:41:00.0/modalias: Cannot be read: not a regular file",
            "0000:41:00.0/driver: Is a link that leads out",
            "0000:43:00.0: Its place cannot be told",
            "0000:44:00.0: Its place cannot be told",
            "\"rubbish\" is not a PCI address",
        ] {
            assert!(said.iter().any(|line| line.contains(words)), "{words}: {said:?}");
        }
        assert_eq!(said.len(), 6, "{said:?}");
    }

    #[test]
    fn links_and_paths_stay_inside() {
        for (at, target, inside) in [
            ("a", "b", true),
            ("a/b", "../c", true),
            ("a/b/c", "../../d/e", true),
            ("a", "../b", false),
            ("a/b", "../../c", false),
            ("a/b/c", "d/../../../e", false),
            ("a/b", "/etc", false),
            ("a/b", "./c", false),
            ("a/b", "", false),
        ] {
            assert_eq!(stays_inside(at, target), inside, "{at} -> {target}");
            let folder = tempfile::tempdir().unwrap();
            let entries = BTreeMap::from([(at.to_owned(), Entry::Link(target.to_owned()))]);
            let made = Recording { entries, left_out: vec![] }.lay_out(folder.path());
            assert_eq!(made.is_ok(), inside, "{at} -> {target}");
        }
        for at in ["", "/etc/x", "../x", "a/../../x", "."] {
            let folder = tempfile::tempdir().unwrap();
            let entries = BTreeMap::from([(at.to_owned(), Entry::File(vec![]))]);
            let error = Recording { entries, left_out: vec![] }.lay_out(folder.path()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at}");
        }
    }
}
