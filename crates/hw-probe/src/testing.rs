//! Fake sysfs trees for tests: directories, files and links where the kernel puts them, below a temporary folder.
//!
//! ```
//! use hw_probe::testing::FakeSysfs;
//!
//! let fake = FakeSysfs::new();
//! fake.bridge("0000:40:01.0");
//! let gpu = fake.below("0000:40:01.0").gpu("0000:41:00.0", 0x2330).group(5).numa(1);
//! fake.load_driver("vfio-pci");
//! gpu.driver_override("vfio-pci");
//! fake.drivers_probe("0000:41:00.0");
//!
//! let inventory = hw_probe::Inventory::scan(&fake.root());
//! assert!(inventory.get(gpu.bdf()).is_some_and(|gpu| gpu.is_vfio_bound()));
//! ```
//!
//! Every call takes effect at once, so a test builds a tree and changes it by the same means. The files are plain files:
//! writing to `bind`, `unbind` or `reset` does what writing to a file does. What the kernel would do is a method:
//! [`FakeSysfs::bind`], [`FakeSysfs::unbind`], [`FakeSysfs::drivers_probe`], [`FakeSysfs::remove`].
//!
//! The layout follows a real tree: function directories nest under `sys/devices/pciDDDD:BB/`, `sys/bus/pci/devices` and
//! `sys/bus/pci/drivers` hold links to them, groups are under `sys/kernel/iommu_groups`, device nodes under `dev` are
//! plain files. All links are relative, so that a tree can be moved or kept in version control.
//!
//! Everything here panics when the tree cannot be written, or when a test asks for something that makes no sense.

#![allow(clippy::expect_used, clippy::panic, reason = "a fake that cannot be built must fail the test that wants it")]
#![allow(clippy::return_self_not_must_use, reason = "the methods write at once; the returned handle is for chaining")]
#![allow(clippy::missing_panics_doc, reason = "the module's documentation says it of all of them")]

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tempfile::TempDir;

use crate::{Bdf, Lockdown, NVIDIA, SysRoot, Tee};

/// Major number of the VFIO character devices of the fakes.
pub const VFIO_MAJOR: u32 = 511;

/// A fake tree. It is deleted when dropped, unless [`FakeSysfs::in_dir`] made it.
#[derive(Debug)]
pub struct FakeSysfs {
    path: PathBuf,
    cdevs: AtomicBool,
    removed: AtomicUsize,
    _temporary: Option<TempDir>,
}

/// One function of a fake tree. Its methods write at once and return it for the next call.
#[derive(Clone, Copy, Debug)]
pub struct FakeFunction<'a> {
    tree: &'a FakeSysfs,
    bdf: Bdf,
}

/// A place under a bridge, from [`FakeSysfs::below`].
#[derive(Clone, Copy, Debug)]
pub struct Below<'a> {
    tree: &'a FakeSysfs,
    parent: Bdf,
}

thread_local! {
    static BETWEEN: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
}

/// Runs `look`, and before each access that it makes to a tree `act`, which may change the tree: a device goes away between
/// two reads. An access that `look` makes on another thread, so that it can be given up, counts once, before it begins.
pub fn interrupted<T>(act: impl FnMut() + 'static, look: impl FnOnce() -> T) -> T {
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            BETWEEN.set(None);
        }
    }
    let _end = End;
    BETWEEN.set(Some(Box::new(act)));
    look()
}

pub(crate) fn interrupt() {
    // Taken out meanwhile: what it does to the tree does not interrupt itself.
    if let Some(mut act) = BETWEEN.take() {
        act();
        BETWEEN.set(Some(act));
    }
}

/// A [`Bdf`] or its text.
pub trait AsBdf: TryInto<Bdf, Error: Debug> {}
impl<T: TryInto<Bdf, Error: Debug>> AsBdf for T {}

fn bdf(text: impl AsBdf) -> Bdf {
    text.try_into().expect("Tests use valid PCI addresses")
}

/// Configuration space of a real H200 as a passed-through function in a virtual machine shows it (h200-observed): 4096
/// bytes, device 10de:2335, subsystem 10de:18bf.
pub fn h200_config() -> Vec<u8> {
    const LINES: &[(usize, &str)] = &[
        (0x000, "de10352346051000a1000203000000000c000002401000000c00000000100000"),
        (0x020, "0c0000004010000000000000de10bf18000000004000000000000000ff010000"),
        (0x040, "0148130008000000056088030000000000000000000000000000000000000000"),
        (0x060, "10b0020021802c11345100000579450000000511000000000000000000000000"),
        (0x080, "0000000013080700401000003e00800105005e00000000000000000000000000"),
        (0x0a0, "00000000000000000000000000000000110008800000b9000000ba0000000000"),
        (0x100, "0000c01200000000532600000078007800780078007800780078007800780078"),
        (0x120, "00780078007800780078007818004113000000000000811b0000000000000000"),
        (0x140, "2400c11400fc7f00210dffff2500811501000080010000802600811800000000"),
        (0x160, "000000000f000000000000000000000000000000000000008080808080808080"),
        (0x180, "80808080808080802a00811b01010000000000000f0200000000000000000000"),
        (0x1a0, "0000000000000000808080808080808080808080808080800100822400000000"),
        (0x1c0, "00001800303046000000000000000000a0000000000000000000000000000000"),
        (0x200, "2700812401000000389c0000389c0000389c0000389c0000389c0000389c0000"),
        (0x220, "389c0000389c0000389c0000389c0000389c0000389c0000389c0000389c0000"),
        (0x240, "389c0000389c000000000125000000000000412a000000000000000000000000"),
        (0x2a0, "000000000b00812b010041010200010000000000000000000400012f00000000"),
        (0x2c0, "21810700020000002e00012f1100000000000000060000000000000000000000"),
        (0x2e0, "0000000000000000000000000000000003000100000000000000000000000000"),
    ];
    let mut bytes = vec![0; crate::config::SIZE];
    for (offset, line) in LINES {
        for index in 0..line.len() / 2 {
            let digits = &line[index * 2..index * 2 + 2];
            bytes[offset + index] = u8::from_str_radix(digits, 16).expect("The dump is hexadecimal");
        }
    }
    bytes
}

impl Default for FakeSysfs {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeSysfs {
    /// A host without functions: kernel 6.12.0-fake, no TEE, lockdown `none`, `/dev/iommu` and `/dev/vfio/vfio` present.
    /// The IOMMU counts as on from the first [`FakeFunction::group`].
    pub fn new() -> Self {
        let temporary = TempDir::new().expect("A temporary directory can be made");
        Self::build(temporary.path().to_owned(), Some(temporary))
    }

    /// The same in a directory of the caller's, which stays. It is made if it is not there; its content is kept.
    pub fn in_dir(path: impl Into<PathBuf>) -> Self {
        Self::build(path.into(), None)
    }

    fn build(path: PathBuf, temporary: Option<TempDir>) -> Self {
        let fake = Self { path, cdevs: AtomicBool::new(true), removed: AtomicUsize::new(0), _temporary: temporary };
        for directory in
            ["sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/devices", "sys/kernel/iommu_groups", "dev/vfio"]
        {
            fs::create_dir_all(fake.path.join(directory)).expect("A directory of the fake tree can be made");
        }
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "6.12.0-fake\n"),
            ("proc/sys/kernel/random/boot_id", "11111111-2222-4333-8444-555555555555\n"),
            ("sys/bus/pci/rescan", ""),
            ("sys/bus/pci/drivers_probe", ""),
            ("dev/iommu", ""),
            ("dev/vfio/vfio", ""),
        ] {
            fake.file(path, text);
        }
        fake.lockdown(Lockdown::None);
        fake
    }

    /// What the code under test takes.
    pub fn root(&self) -> SysRoot {
        SysRoot::at(&self.path)
    }

    /// The directory that holds `sys`, `proc` and `dev`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    // ---- the host

    /// Writes a file of the tree, whatever was there before; `path` is relative (`sys/module/...`).
    pub fn file(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
        let path = self.path.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).expect("A directory of the fake tree can be made");
        }
        fs::write(&path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// The text of a file of the tree: what the code under test wrote there.
    pub fn read(&self, path: impl AsRef<Path>) -> String {
        let path = self.path.join(path);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Deletes a file of the tree; nothing happens when there is none.
    pub fn remove_file(&self, path: impl AsRef<Path>) {
        let path = self.path.join(path);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", path.display()),
            _ => {}
        }
    }

    /// Sets KVM's parameters.
    pub fn tee(&self, tee: Tee) -> &Self {
        for (path, its) in
            [("sys/module/kvm_amd/parameters/sev_snp", Tee::SevSnp), ("sys/module/kvm_intel/parameters/tdx", Tee::Tdx)]
        {
            if tee == its {
                self.file(path, "Y\n");
            } else {
                self.remove_file(path);
            }
        }
        self
    }

    /// Makes a process in `proc` that holds these files open.
    pub fn process(&self, pid: u32, comm: &str, cgroup: &str, open: &[&str]) -> &Self {
        self.file(format!("proc/{pid}/comm"), format!("{comm}\n"));
        self.file(format!("proc/{pid}/cgroup"), cgroup);
        let directory = self.path.join(format!("proc/{pid}/fd"));
        fs::create_dir_all(&directory).expect("A directory of the fake tree can be made");
        for (number, target) in open.iter().enumerate() {
            symlink(target, directory.join(number.to_string())).expect("A link of the fake tree can be made");
        }
        self
    }

    /// Loads a kernel module, or builds it in.
    pub fn module(&self, name: &str, built_in: bool) -> &Self {
        let directory = format!("sys/module/{name}");
        self.file(format!("{directory}/uevent"), "");
        if !built_in {
            self.file(format!("{directory}/initstate"), "live\n");
        }
        self
    }

    /// Sets the lockdown mode; `Unknown` means a kernel that has no such file.
    pub fn lockdown(&self, lockdown: Lockdown) -> &Self {
        const PATH: &str = "sys/kernel/security/lockdown";
        match lockdown {
            Lockdown::None => self.file(PATH, "[none] integrity confidentiality\n"),
            Lockdown::Integrity => self.file(PATH, "none [integrity] confidentiality\n"),
            Lockdown::Confidentiality => self.file(PATH, "none integrity [confidentiality]\n"),
            Lockdown::Unknown => self.remove_file(PATH),
        }
        self
    }

    /// A kernel without iommufd: no `/dev/iommu`, and VFIO drivers make no character devices from now on.
    pub fn without_iommufd(&self) -> &Self {
        self.remove_file("dev/iommu");
        self.cdevs.store(false, Ordering::Relaxed);
        self
    }

    /// Loads a driver that is bound to nothing yet.
    pub fn load_driver(&self, name: &str) -> &Self {
        for file in ["bind", "unbind", "new_id", "remove_id"] {
            let path = format!("sys/bus/pci/drivers/{name}/{file}");
            if !self.path.join(&path).exists() {
                self.file(path, "");
            }
        }
        self
    }

    // ---- functions

    /// An NVIDIA GPU directly under a host bridge: class 0x030200, revision 0xa1, configuration space of a real H200 with
    /// these ids, its three BARs (BAR2 of 16 GiB only), reset methods `flr bus`, awake, link up, no driver, no group, no NUMA node.
    pub fn gpu(&self, at: impl AsBdf, device: u16) -> FakeFunction<'_> {
        self.make_gpu(None, bdf(at), device)
    }

    /// An NVSwitch (10de:22a3, class 0x068000) directly under a host bridge.
    pub fn nvswitch(&self, at: impl AsBdf) -> FakeFunction<'_> {
        self.make_nvswitch(None, bdf(at))
    }

    /// A PCI bridge, bound to `pcieport`, directly under a host bridge.
    pub fn bridge(&self, at: impl AsBdf) -> FakeFunction<'_> {
        self.make_bridge(None, bdf(at))
    }

    /// Any function, directly under a host bridge.
    pub fn function(&self, at: impl AsBdf, vendor: u16, device: u16, class: u32) -> FakeFunction<'_> {
        self.make(None, bdf(at), vendor, device, class)
    }

    /// Where further functions go: under the bridge at `parent`.
    pub fn below(&self, parent: impl AsBdf) -> Below<'_> {
        let parent = bdf(parent);
        assert!(self.contains(parent), "There is no bridge {parent} in the fake tree");
        Below { tree: self, parent }
    }

    /// A function that is there already.
    pub fn get(&self, at: impl AsBdf) -> FakeFunction<'_> {
        let bdf = bdf(at);
        assert!(self.contains(bdf), "There is no function {bdf} in the fake tree");
        FakeFunction { tree: self, bdf }
    }

    fn contains(&self, bdf: Bdf) -> bool {
        self.root().function(bdf).exists()
    }

    fn make_gpu(&self, parent: Option<Bdf>, bdf: Bdf, device: u16) -> FakeFunction<'_> {
        let subsystem = match device {
            0x2330 => 0x16c1,
            0x2331 => 0x1626,
            0x2335 => 0x18bf,
            _ => 0x1234,
        };
        // One terabyte for each bus, so that no two functions overlap.
        let base = (u64::from(bdf.bus) << 40) | (u64::from(bdf.device) << 35);
        let function = self.make(parent, bdf, NVIDIA, device, 0x03_0200).config(&h200_config()).revision(0xa1);
        function
            .bars(&[
                (0, base + 0x4200_0000, 16 << 20, 0x14_220c),
                (2, base + (16 << 30), 16 << 30, 0x14_220c),
                (4, base + 0x4000_0000, 32 << 20, 0x14_220c),
            ])
            .ids(NVIDIA, device)
            .class(0x03_0200)
            .subsystem(NVIDIA, subsystem)
            .reset_methods("flr bus")
            .link("32.0 GT/s PCIe", 16)
    }

    fn make_nvswitch(&self, parent: Option<Bdf>, bdf: Bdf) -> FakeFunction<'_> {
        let base = (u64::from(bdf.bus) << 40) | (u64::from(bdf.device) << 35);
        self.make(parent, bdf, NVIDIA, 0x22a3, 0x06_8000)
            .revision(0xa1)
            .bars(&[(0, base + 0x2000_0000, 32 << 20, 0x14_220c)])
            .reset_methods("flr bus")
            .link("16.0 GT/s PCIe", 2)
    }

    fn make_bridge(&self, parent: Option<Bdf>, bdf: Bdf) -> FakeFunction<'_> {
        self.make(parent, bdf, 0x1b36, 0x000c, 0x06_0400).driver("pcieport")
    }

    fn make(&self, parent: Option<Bdf>, bdf: Bdf, vendor: u16, device: u16, class: u32) -> FakeFunction<'_> {
        assert!(!self.contains(bdf), "Function {bdf} is in the fake tree already");
        let directory = match parent {
            Some(parent) => format!("{}/{bdf}", self.real(parent)),
            None => format!("sys/devices/pci{:04x}:{:02x}/{bdf}", bdf.domain, bdf.bus),
        };
        fs::create_dir_all(self.path.join(&directory)).expect("A directory of the fake tree can be made");
        self.link(&format!("sys/bus/pci/devices/{bdf}"), &directory);
        FakeFunction { tree: self, bdf }
            .config(&[0; 256])
            .attr("driver_override", "(null)\n")
            .attr("numa_node", "-1\n")
            .attr("remove", "")
            .bars(&[])
            .ids(vendor, device)
            .class(class)
            .revision(0)
            .subsystem(vendor, 0)
            .power("on", "active", "D0")
    }

    /// Where the function's directory really is, below the root.
    fn real(&self, bdf: Bdf) -> String {
        let error = |error| panic!("{bdf}: {error}");
        let real = fs::canonicalize(self.root().function(bdf)).unwrap_or_else(error);
        let root = fs::canonicalize(&self.path).unwrap_or_else(error);
        real.strip_prefix(&root).expect("Functions are inside the tree").display().to_string()
    }

    /// A relative link at `at` to `target`, both below the root, in place of what was there.
    fn link(&self, at: &str, target: &str) {
        let shared = at.split('/').zip(target.split('/')).take_while(|(one, other)| one == other).count();
        let up = "../".repeat(at.split('/').count() - 1 - shared);
        let down: Vec<&str> = target.split('/').skip(shared).collect();
        let path = self.path.join(at);
        self.remove_file(at);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).expect("A directory of the fake tree can be made");
        }
        symlink(format!("{up}{}", down.join("/")), &path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Fills the tree with a node of the shape of an HGX H100: 8 H100 SXM GPUs bound to vfio-pci (`vfio0` to `vfio7`) and 4
    /// NVSwitches without driver, two GPUs or four switches behind each PCIe switch, on 2 NUMA nodes, every function in an
    /// IOMMU group of its own, on a host with SEV-SNP. Ids are real, addresses and group numbers plausible.
    pub fn hgx_h100(&self) -> &Self {
        // First bus, NUMA node, and whether it is the switch with the NVSwitches.
        const SWITCHES: [(u8, u32, bool); 5] =
            [(0x02, 0, true), (0x15, 0, false), (0x3f, 0, false), (0x97, 1, false), (0xbf, 1, false)];
        self.tee(Tee::SevSnp).load_driver("vfio-pci");
        let mut groups = 0..;
        let mut place = |function: FakeFunction<'_>, numa: u32| {
            function.numa(numa).group(groups.next().expect("Groups do not run out"));
            function.bdf
        };
        for (bus, numa, has_nvswitches) in SWITCHES {
            let at = |bus: u8, device: u8| Bdf { domain: 0, bus, device, function: 0 };
            let root_port = self.function(at(bus, 1), 0x1022, 0x14ab, 0x06_0400);
            let root_port = place(root_port.driver("pcieport"), numa);
            let port =
                |parent: Bdf, at: Bdf| self.below(parent).function(at, 0x1000, 0xc030, 0x06_0400).driver("pcieport");
            let upstream = place(port(root_port, at(bus + 1, 0)), numa);
            for index in 0..if has_nvswitches { 4 } else { 2 } {
                let below = self.below(place(port(upstream, at(bus + 2, index)), numa));
                let at = at(bus + 3 + index, 0);
                if has_nvswitches {
                    place(below.nvswitch(at), numa);
                } else {
                    place(below.gpu(at, 0x2330).driver_override("vfio-pci"), numa);
                    self.drivers_probe(at);
                }
            }
        }
        self
    }

    // ---- what the kernel does

    /// Takes the function off the bus, as hot-unplug or a write to `remove` does, with all functions below it. The kernel
    /// gives no folder's inode number twice, so its empty folder is kept out of sight.
    pub fn remove(&self, at: impl AsBdf) {
        let gone = self.get(at).bdf;
        let directory = self.real(gone);
        for entry in fs::read_dir(self.path.join("sys/bus/pci/devices")).expect("The bus can be listed").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(other) = Bdf::try_from(name.as_str()) else { continue };
            let inside = self.contains(other) && Path::new(&self.real(other)).starts_with(&directory);
            if inside {
                self.get(other).no_driver().no_group();
                self.remove_file(format!("sys/bus/pci/devices/{other}"));
            }
        }
        let kept = self.path.join("removed");
        fs::create_dir_all(&kept).expect("A directory of the fake tree can be made");
        let kept = kept.join(self.removed.fetch_add(1, Ordering::Relaxed).to_string());
        fs::rename(self.path.join(directory), &kept).expect("A function's directory can be moved");
        for entry in fs::read_dir(kept).expect("A directory can be listed").flatten() {
            let is_directory = entry.file_type().expect("A file has a type").is_dir();
            let removed = if is_directory { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            removed.expect("A file of the fake tree can be removed");
        }
    }

    /// Binds as a write to the driver's `bind` does, with the kernel's refusals: no such driver (`ENOENT`), bound already
    /// (`EBUSY`), an override that names another driver, or for a VFIO driver none that names it (`ENODEV`), no IOMMU group
    /// for a VFIO driver (`EINVAL`). Under a VFIO driver the group node and, unless
    /// [`FakeSysfs::without_iommufd`], the character device appear, and the idle function goes to sleep
    /// (virtual-gpu-rig section 6).
    pub fn bind(&self, at: impl AsBdf, driver: &str) -> io::Result<()> {
        let function = self.get(at);
        let refuse = |errno: nix::errno::Errno| Err(io::Error::from(errno));
        if !self.path.join(format!("sys/bus/pci/drivers/{driver}")).is_dir() {
            return refuse(nix::errno::Errno::ENOENT);
        }
        if function.current_driver().is_some() {
            return refuse(nix::errno::Errno::EBUSY);
        }
        let wanted = function.current_override();
        if wanted.as_deref().map_or_else(|| is_vfio(driver), |wanted| wanted != driver) {
            return refuse(nix::errno::Errno::ENODEV);
        }
        if is_vfio(driver) && function.current_group().is_none() {
            return refuse(nix::errno::Errno::EINVAL);
        }
        function.driver(driver);
        if is_vfio(driver) {
            if self.cdevs.load(Ordering::Relaxed) {
                let taken = |number: &u32| self.path.join(format!("dev/vfio/devices/vfio{number}")).exists();
                function.cdev((0..=u32::MAX).find(|number| !taken(number)).expect("There is always a free number"));
            }
            function.power("auto", "suspended", "D3hot");
        }
        Ok(())
    }

    /// Unbinds as a write to the driver's `unbind` does; `ENODEV` when no driver is bound.
    pub fn unbind(&self, at: impl AsBdf) -> io::Result<()> {
        let function = self.get(at);
        match function.current_driver() {
            None => Err(io::Error::from(nix::errno::Errno::ENODEV)),
            Some(driver) => {
                function.no_driver();
                if is_vfio(&driver) {
                    function.attr("power/runtime_status", "active\n").attr("power_state", "D0\n");
                }
                Ok(())
            }
        }
    }

    /// Does what a write to `drivers_probe` does to a function that has a `driver_override`: binds the named driver if it is
    /// loaded and can be bound, and succeeds silently otherwise.
    pub fn drivers_probe(&self, at: impl AsBdf) {
        let function = self.get(at);
        if let Some(driver) = function.current_override() {
            // The kernel, too, keeps a failed probe to itself.
            let _ = self.bind(function.bdf, &driver);
        }
    }
}

fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("_vfio_pci") || driver.ends_with("-vfio-pci")
}

impl<'a> Below<'a> {
    /// As [`FakeSysfs::gpu`].
    pub fn gpu(self, at: impl AsBdf, device: u16) -> FakeFunction<'a> {
        self.tree.make_gpu(Some(self.parent), bdf(at), device)
    }

    /// As [`FakeSysfs::nvswitch`].
    pub fn nvswitch(self, at: impl AsBdf) -> FakeFunction<'a> {
        self.tree.make_nvswitch(Some(self.parent), bdf(at))
    }

    /// As [`FakeSysfs::bridge`].
    pub fn bridge(self, at: impl AsBdf) -> FakeFunction<'a> {
        self.tree.make_bridge(Some(self.parent), bdf(at))
    }

    /// As [`FakeSysfs::function`].
    pub fn function(self, at: impl AsBdf, vendor: u16, device: u16, class: u32) -> FakeFunction<'a> {
        self.tree.make(Some(self.parent), bdf(at), vendor, device, class)
    }
}

impl FakeFunction<'_> {
    /// Its address.
    pub fn bdf(self) -> Bdf {
        self.bdf
    }

    /// Its directory, absolute.
    pub fn path(self) -> PathBuf {
        self.tree.root().function(self.bdf)
    }

    /// Writes one of its files, `power/control` for instance, whatever was there before.
    pub fn attr(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.tree.file(format!("{}/{name}", self.tree.real(self.bdf)), content);
        self
    }

    /// The text of one of its files: what the code under test wrote there.
    pub fn read(self, name: &str) -> String {
        self.tree.read(format!("{}/{name}", self.tree.real(self.bdf)))
    }

    /// Deletes one of its files or links.
    pub fn remove_attr(self, name: &str) -> Self {
        self.tree.remove_file(format!("{}/{name}", self.tree.real(self.bdf)));
        self
    }

    fn ids(self, vendor: u16, device: u16) -> Self {
        self.attr("vendor", format!("{vendor:#06x}\n"))
            .attr("device", format!("{device:#06x}\n"))
            .patch_config(0, &vendor.to_le_bytes())
            .patch_config(2, &device.to_le_bytes())
    }

    /// Sets the subsystem ids.
    pub fn subsystem(self, vendor: u16, device: u16) -> Self {
        self.attr("subsystem_vendor", format!("{vendor:#06x}\n"))
            .attr("subsystem_device", format!("{device:#06x}\n"))
            .patch_config(0x2c, &vendor.to_le_bytes())
            .patch_config(0x2e, &device.to_le_bytes())
            .modalias()
    }

    /// Sets the class code (24 bits).
    pub fn class(self, class: u32) -> Self {
        self.attr("class", format!("{class:#08x}\n")).patch_config(9, &class.to_le_bytes()[..3]).modalias()
    }

    /// Sets the revision id.
    pub fn revision(self, revision: u8) -> Self {
        self.attr("revision", format!("{revision:#04x}\n")).patch_config(8, &[revision])
    }

    /// `modalias` follows from ids and class.
    fn modalias(self) -> Self {
        let id = |name| fs::read_to_string(self.path().join(name)).unwrap_or_default();
        let number = |name| u32::from_str_radix(id(name).trim().trim_start_matches("0x"), 16).unwrap_or(0);
        let class = number("class");
        let text = format!(
            "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02x}sc{:02x}i{:02x}\n",
            number("vendor"),
            number("device"),
            number("subsystem_vendor"),
            number("subsystem_device"),
            class >> 16,
            (class >> 8) & 0xff,
            class & 0xff
        );
        self.attr("modalias", text)
    }

    /// Binds `driver` without asking what the kernel would say, loading it first. Only links change, and the
    /// group node for a VFIO driver; [`FakeSysfs::bind`] is the faithful way.
    pub fn driver(self, driver: &str) -> Self {
        self.no_driver();
        self.tree.load_driver(driver);
        let directory = self.tree.real(self.bdf);
        self.tree.link(&format!("{directory}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        self.tree.link(&format!("sys/bus/pci/drivers/{driver}/{}", self.bdf), &directory);
        self.group_node()
    }

    /// Leaves it without a driver, and so without character device.
    pub fn no_driver(self) -> Self {
        if let Some(driver) = self.current_driver() {
            self.tree.remove_file(format!("sys/bus/pci/drivers/{driver}/{}", self.bdf));
            self.remove_attr("driver").no_cdev();
            if let Some(group) = self.current_group()
                && !self.shares_group_with_vfio(&group)
            {
                self.tree.remove_file(format!("dev/vfio/{group}"));
            }
        }
        self
    }

    /// Sets `driver_override`; an empty text means none.
    pub fn driver_override(self, driver: &str) -> Self {
        self.attr("driver_override", format!("{}\n", if driver.is_empty() { "(null)" } else { driver }))
    }

    /// Puts it into an IOMMU group, out of the one it was in.
    pub fn group(self, number: u32) -> Self {
        self.no_group();
        let directory = self.tree.real(self.bdf);
        let group = format!("sys/kernel/iommu_groups/{number}");
        self.tree.link(&format!("{group}/devices/{}", self.bdf), &directory);
        self.tree.file(format!("{group}/type"), "DMA-FQ\n");
        self.tree.link(&format!("{directory}/iommu_group"), &group);
        self.group_node()
    }

    /// Takes it out of its IOMMU group; an empty group is dissolved.
    pub fn no_group(self) -> Self {
        if let Some(group) = self.current_group() {
            let directory = format!("sys/kernel/iommu_groups/{group}");
            self.tree.remove_file(format!("{directory}/devices/{}", self.bdf));
            self.remove_attr("iommu_group");
            if !self.shares_group_with_vfio(&group) {
                self.tree.remove_file(format!("dev/vfio/{group}"));
            }
            let path = self.tree.path.join(directory);
            if fs::read_dir(path.join("devices")).is_ok_and(|mut devices| devices.next().is_none()) {
                fs::remove_dir_all(path).expect("A group's directory can be removed");
            }
        }
        self
    }

    /// `/dev/vfio/<group>` is there while a member of the group is bound to a VFIO driver.
    fn group_node(self) -> Self {
        if let (Some(driver), Some(group)) = (self.current_driver(), self.current_group())
            && is_vfio(&driver)
        {
            self.tree.file(format!("dev/vfio/{group}"), "");
        }
        self
    }

    fn shares_group_with_vfio(self, group: &str) -> bool {
        let Ok(members) = fs::read_dir(self.tree.path.join(format!("sys/kernel/iommu_groups/{group}/devices"))) else {
            return false;
        };
        members.flatten().any(|member| {
            let driver = fs::read_link(member.path().join("driver"));
            driver.is_ok_and(|driver| driver.file_name().and_then(|name| name.to_str()).is_some_and(is_vfio))
        })
    }

    /// Gives it the character device `vfio<number>`.
    pub fn cdev(self, number: u32) -> Self {
        self.no_cdev();
        self.tree.file(format!("dev/vfio/devices/vfio{number}"), "");
        // Whoever sees it sees its number, as in the kernel's tree.
        let new = self.attr(&format!("vfio-dev.new/vfio{number}/dev"), format!("{VFIO_MAJOR}:{number}\n"));
        let path = self.path();
        fs::rename(path.join("vfio-dev.new"), path.join("vfio-dev"))
            .expect("A directory of the fake tree can be renamed");
        new
    }

    /// Takes its character device away.
    pub fn no_cdev(self) -> Self {
        let directory = self.path().join("vfio-dev");
        if let Ok(entries) = fs::read_dir(&directory) {
            for entry in entries.flatten() {
                self.tree.remove_file(format!("dev/vfio/devices/{}", entry.file_name().to_string_lossy()));
            }
            fs::remove_dir_all(directory).expect("A directory of the fake tree can be removed");
        }
        self
    }

    /// Sets the NUMA node.
    pub fn numa(self, node: u32) -> Self {
        self.attr("numa_node", format!("{node}\n"))
    }

    /// Sets `power/control`, `power/runtime_status` and `power_state`.
    pub fn power(self, control: &str, status: &str, state: &str) -> Self {
        self.attr("power/control", format!("{control}\n"))
            .attr("power/runtime_status", format!("{status}\n"))
            .attr("power_state", format!("{state}\n"))
    }

    /// Sets the words of `reset_method` and makes the `reset` file; an empty text means a function without any reset.
    pub fn reset_methods(self, words: &str) -> Self {
        if words.is_empty() {
            self.remove_attr("reset_method").remove_attr("reset")
        } else {
            self.attr("reset_method", format!("{words}\n")).attr("reset", "")
        }
    }

    /// Sets the link's speed in the kernel's words (`32.0 GT/s PCIe`) and its lanes, now and at most.
    pub fn link(self, speed: &str, width: u8) -> Self {
        self.attr("max_link_speed", format!("{speed}\n"))
            .attr("max_link_width", format!("{width}\n"))
            .attr("current_link_speed", format!("{speed}\n"))
            .attr("current_link_width", format!("{width}\n"))
    }

    /// Writes `resource` from (number, start, size, kernel flags), and the BAR registers in configuration space.
    pub fn bars(self, bars: &[(u8, u64, u64, u64)]) -> Self {
        let mut text = String::new();
        for number in 0..13_u8 {
            let found = bars.iter().find(|bar| bar.0 == number);
            let (start, end, flags) = found.map_or((0, 0, 0), |bar| (bar.1, bar.1 + bar.2 - 1, bar.3));
            writeln!(text, "{start:#018x} {end:#018x} {flags:#018x}").expect("A string takes any text");
            if let Some((_, start, ..)) = found.filter(|bar| bar.0 < 6) {
                let register = start | (flags & 0xf);
                let width = if flags & 4 == 0 { 4 } else { 8 };
                self.patch_config(0x10 + 4 * u16::from(number), &register.to_le_bytes()[..width]);
            }
        }
        self.attr("resource", text)
    }

    /// Makes `resource<number>` as a plain file of zeros, `size` bytes long (it takes no room on disk).
    pub fn resource_file(self, number: u8, size: u64) -> Self {
        let name = format!("resource{number}");
        self.attr(&name, "");
        let file = fs::File::options().write(true).open(self.path().join(name)).expect("The file was just made");
        file.set_len(size).expect("A sparse file can be made");
        self
    }

    /// Replaces configuration space.
    pub fn config(self, bytes: &[u8]) -> Self {
        self.attr("config", bytes)
    }

    /// Overwrites bytes of configuration space; beyond its end nothing is written.
    pub fn patch_config(self, offset: u16, bytes: &[u8]) -> Self {
        let file = fs::File::options().write(true).open(self.path().join("config"));
        let file = file.unwrap_or_else(|error| panic!("{}: config: {error}", self.bdf));
        let length = file.metadata().expect("An open file has metadata").len();
        if u64::from(offset) + bytes.len() as u64 <= length {
            file.write_all_at(bytes, offset.into()).expect("Configuration space can be written");
        }
        self
    }

    /// Makes it a virtual function of the function at `physical`.
    pub fn virtual_function_of(self, physical: impl AsBdf) -> Self {
        let target = self.tree.real(bdf(physical));
        self.tree.link(&format!("{}/physfn", self.tree.real(self.bdf)), &target);
        self
    }

    /// Makes the function at `consumer` depend on this one by a device link: how a GPU's audio function is found.
    pub fn consumer(self, consumer: impl AsBdf) -> Self {
        let consumer = bdf(consumer);
        let link = format!("sys/devices/virtual/devlink/pci:{}--pci:{consumer}", self.bdf);
        self.tree.file(format!("{link}/status"), "consumer probe\n");
        self.tree.link(&format!("{}/consumer:pci:{consumer}", self.tree.real(self.bdf)), &link);
        self.tree.link(&format!("{}/supplier:pci:{}", self.tree.real(consumer), self.bdf), &link);
        self
    }

    fn current_driver(self) -> Option<String> {
        let target = fs::read_link(self.path().join("driver")).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    fn current_group(self) -> Option<String> {
        let target = fs::read_link(self.path().join("iommu_group")).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    fn current_override(self) -> Option<String> {
        let text = self.read("driver_override").trim().to_owned();
        (!matches!(text.as_str(), "" | "(null)")).then_some(text)
    }
}
