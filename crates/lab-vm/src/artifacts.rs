//! What a guest is made of, apart from our own binaries: QEMU, its firmware, busybox and kernels.
//!
//! Everything comes from Debian's archive through Debian's package client, into a cache folder outside the source tree;
//! no root rights are needed and the host's configuration is only read. An entry of the cache is complete or absent:
//! each is made in a temporary folder and renamed. Entries are found by a recipe number (what this module does, and the
//! kernel's configuration), so that a warm cache needs no network; the versions of the packages are part of their names.

mod apt;
mod kernel;
mod modules;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use modules::{LoadedModule, Stage};
pub(crate) use steps::tail;

/// Changes whenever this module makes something different from the same packages.
const RECIPE: u32 = 1;

/// How long to wait for another process that fills the same cache.
const LOCK_WAIT: Duration = Duration::from_mins(40);

/// The oldest QEMU with a `vfio-user-pci` that has been seen to work (virtual-gpu-rig section 2).
const QEMU_OLDEST: (u32, u32) = (11, 1);

/// The kernels a guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// Ours: VFIO with group files and with iommufd's device files.
    Iommufd,
    /// Ours, with iommufd's device files only.
    NoGroup,
    /// Debian's cloud kernel as it is: VFIO with group files, no iommufd.
    Stock,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Iommufd, Self::NoGroup, Self::Stock];

    /// Name in topology files, on command lines and in the cache.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iommufd => "iommufd",
            Self::NoGroup => "no-group",
            Self::Stock => "stock",
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why the artifacts are not there and could not be made.
#[derive(Debug, Error)]
pub enum ArtifactError {
    /// QEMU, compilers and packages are all for this machine type only.
    #[error("The lab needs an x86-64 host, and this is {0}")]
    Architecture(&'static str),
    /// Nowhere to put the cache.
    #[error("No cache folder: set CCNODE_LAB_CACHE or HOME")]
    NoCache,
    /// Programs that the host must have.
    #[error("The lab needs programs that are not installed: {}; install them with: apt-get install {}", programs.join(", "), packages.join(" "))]
    Tools {
        /// What was looked for.
        programs: Vec<&'static str>,
        /// Debian's and Ubuntu's packages of them.
        packages: Vec<&'static str>,
    },
    /// No Debian mirror known.
    #[error("No Debian mirror: {0}; set CCNODE_LAB_DEBIAN_MIRROR to the address of one")]
    NoMirror(String),
    /// The archive's public keys are not on this host.
    #[error(
        "Debian's archive keys are not at {0}; install the package debian-archive-keyring, or set CCNODE_LAB_DEBIAN_KEYRING"
    )]
    NoKeyring(PathBuf),
    /// No release of the archive has a package.
    #[error("Debian's archive has no package {0}")]
    NoPackage(String),
    /// A step failed.
    #[error("{step} failed: {reason}; the log {log} ends:\n{tail}")]
    Step {
        /// What was being done.
        step: String,
        /// Exit status, signal or deadline.
        reason: String,
        /// Where the whole log is.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// A program could not be started.
    #[error("Cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A file or folder of the cache cannot be read or written.
    #[error("Cannot {act} {path}")]
    File {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel's configuration came out differently.
    #[error("The kernel's configuration lacks what the lab needs: {}", .0.join(", "))]
    Options(Vec<String>),
    /// A kernel has no such module.
    #[error("The {kernel} kernel has no module {module}")]
    NoModule {
        /// Which kernel.
        kernel: Kernel,
        /// The module.
        module: String,
    },
    /// Something unpacked or built is not what it should be.
    #[error("{what} is not usable: {reason}")]
    Unusable {
        /// The thing.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process holds the cache for too long.
    #[error("Another process has been filling the cache {0} for over {min} minutes", min = LOCK_WAIT.as_secs() / 60)]
    Locked(PathBuf),
}

pub(crate) fn file_error<'a>(act: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ArtifactError + 'a {
    move |source| ArtifactError::File { act, path: path.to_owned(), source }
}

/// Which kernels are wanted. QEMU and busybox always are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The kernels.
    pub kernels: BTreeSet<Kernel>,
}

impl Wanted {
    /// What a guest of this kernel needs.
    pub fn kernel(kernel: Kernel) -> Self {
        Self { kernels: BTreeSet::from([kernel]) }
    }

    /// Everything there is.
    pub fn everything() -> Self {
        Self { kernels: Kernel::ALL.into() }
    }
}

/// Something that is not in the cache, and what getting it costs. Measured on two cores; times are rough.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// What it is.
    pub name: &'static str,
    /// To be downloaded, in megabytes.
    pub download_mb: u32,
    /// Room needed while it is made, in megabytes.
    pub build_mb: u32,
    /// Room taken afterwards, in megabytes.
    pub disk_mb: u32,
    /// Minutes until it is there.
    pub minutes: f32,
}

/// How QEMU is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// Program and leading arguments: its own loader where it is not the system's.
    pub command: Vec<PathBuf>,
    /// Folders with firmware; empty for the system's QEMU, which knows its own.
    pub data: Vec<PathBuf>,
    /// Folder of loadable parts, if not the built-in one.
    pub modules: Option<PathBuf>,
    /// As it calls itself.
    pub version: String,
}

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFiles {
    /// The bootable image.
    pub image: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// `uname -r`.
    pub release: String,
    /// Folder with what belongs to `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// What init loads, in this order.
    pub load: Vec<LoadedModule>,
}

/// Everything that a guest needs, ready for use.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The emulator.
    pub qemu: Qemu,
    /// A static busybox.
    pub busybox: PathBuf,
    /// Paths, relative to the root, under which busybox is to be found.
    pub applets: Vec<String>,
    kernels: BTreeMap<Kernel, KernelFiles>,
    cache: Cache,
}

/// The cache folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache(PathBuf);

/// What an entry says about itself; written last.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    /// `uname -r` for kernels, program version otherwise.
    version: String,
    /// Debian packages it was made of: name and version.
    packages: BTreeMap<String, String>,
    /// Sizes of the files that make it whole, by path within the entry.
    files: BTreeMap<String, u64>,
    #[serde(default)]
    applets: Vec<String>,
    #[serde(default)]
    load: Vec<LoadedModule>,
}

const MANIFEST: &str = "manifest.json";

impl Cache {
    /// `$CCNODE_LAB_CACHE`, else `$XDG_CACHE_HOME/ccnode-lab`, else `~/.cache/ccnode-lab`.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::NoCache`], if none of the three is set.
    pub fn from_env() -> Result<Self, ArtifactError> {
        Self::choose(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }

    fn choose(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, ArtifactError> {
        variable("CCNODE_LAB_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("ccnode-lab")))
            .or_else(|| Some(variable("HOME")?.join(".cache/ccnode-lab")))
            .map(Self)
            .ok_or(ArtifactError::NoCache)
    }

    /// A cache at a given folder.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The newest whole entry of a kind and recipe.
    fn find(&self, kind: &str, recipe: &str) -> Option<(PathBuf, Manifest)> {
        let prefix = format!("{kind}-{recipe}-");
        let mut entries: Vec<_> = fs::read_dir(&self.0)
            .ok()?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .filter_map(|entry| {
                let path = entry.path();
                let made = fs::metadata(path.join(MANIFEST)).and_then(|metadata| metadata.modified()).ok()?;
                Some((made, Manifest::load(&path)?, path))
            })
            .collect();
        entries.sort_by_key(|(made, ..)| *made);
        entries.pop().map(|(_, manifest, path)| (path, manifest))
    }

    /// Removes all that the lab has put there, and the folder itself if nothing else is in it.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::File`], naming what cannot be removed; [`ArtifactError::Locked`].
    pub fn clear(&self) -> Result<(), ArtifactError> {
        if !self.0.exists() {
            return Ok(());
        }
        let lock = self.lock()?;
        for entry in fs::read_dir(&self.0).map_err(file_error("read", &self.0))?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let ours = ["derived", "logs", "work"].contains(&&*name)
                || ["busybox-", "kernel-", "qemu-", "real-kube-"].iter().any(|prefix| name.starts_with(prefix));
            if ours && entry.path().is_dir() {
                fs::remove_dir_all(entry.path()).map_err(file_error("remove", &entry.path()))?;
            }
        }
        let path = self.0.join("lock");
        fs::remove_file(&path).map_err(file_error("remove", &path))?;
        drop(lock);
        // Not empty: somebody else's files are there, which stay.
        let _ = fs::remove_dir(&self.0);
        Ok(())
    }

    /// A folder for things derived from given files, such as stripped copies.
    pub(crate) fn derived(&self) -> PathBuf {
        self.0.join("derived")
    }

    fn lock(&self) -> Result<Flock<File>, ArtifactError> {
        fs::create_dir_all(&self.0).map_err(file_error("make folder", &self.0))?;
        let path = self.0.join("lock");
        let mut file = File::create(&path).map_err(file_error("open", &path))?;
        let start = Instant::now();
        let mut told = false;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EWOULDBLOCK)) if start.elapsed() < LOCK_WAIT => file = back,
                Err((_, Errno::EWOULDBLOCK)) => return Err(ArtifactError::Locked(self.0.clone())),
                Err((_, error)) => return Err(file_error("lock", &path)(error.into())),
            }
            if !told {
                eprintln!("lab: another process is filling {}; waiting for it", self.0.display());
                told = true;
            }
            thread::sleep(Duration::from_millis(300));
        }
    }
}

impl Manifest {
    /// Reads the manifest of an entry, and checks that its files are there in full.
    fn load(entry: &Path) -> Option<Self> {
        let manifest: Self = serde_json::from_slice(&fs::read(entry.join(MANIFEST)).ok()?).ok()?;
        let whole = manifest.files.iter().all(|(path, size)| {
            fs::metadata(entry.join(path)).is_ok_and(|metadata| metadata.is_file() && metadata.len() == *size)
        });
        whole.then_some(manifest)
    }

    /// Notes the sizes of `files` and writes the manifest into the entry under construction.
    fn save(mut self, entry: &Path, files: &[&str]) -> Result<(), ArtifactError> {
        for name in files {
            let path = entry.join(name);
            let size = fs::metadata(&path).map_err(file_error("read", &path))?.len();
            self.files.insert((*name).to_owned(), size);
        }
        let path = entry.join(MANIFEST);
        let text =
            serde_json::to_vec_pretty(&self).map_err(|error| file_error("write", &path)(io::Error::other(error)))?;
        fs::write(&path, text).map_err(file_error("write", &path))
    }
}

/// Puts a finished entry into its place; one that another way led there first, or a broken one, gives way.
fn publish(made: &Path, place: &Path) -> Result<(), ArtifactError> {
    if place.exists() {
        fs::remove_dir_all(place).map_err(file_error("remove", place))?;
    }
    fs::rename(made, place).map_err(file_error("rename to", place))
}

/// A short name for a recipe: 64 bits of FNV-1a, which is plenty to tell a few recipes apart.
fn recipe(parts: &[&str]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts.iter().copied().chain([RECIPE.to_string().as_str()]) {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

fn kernel_recipe(kernel: Kernel) -> String {
    match kernel {
        Kernel::Iommufd | Kernel::NoGroup => {
            let ingredients = kernel::ingredients(kernel);
            let ingredients = ingredients.iter().map(String::as_str);
            recipe(&["kernel", kernel.name()].into_iter().chain(ingredients).collect::<Vec<_>>())
        }
        Kernel::Stock => recipe(&["kernel", kernel.name()]),
    }
}

fn qemu_recipe() -> String {
    recipe(&["qemu"])
}

fn busybox_recipe() -> String {
    recipe(&["busybox"])
}

impl Artifacts {
    /// What is wanted and not there, with its cost. Empty when [`Artifacts::ensure`] would return at once.
    pub fn missing(cache: &Cache, wanted: &Wanted) -> Vec<Item> {
        let mut items = Vec::new();
        if find_qemu(cache).is_none() {
            let item = Item { name: "QEMU with firmware", download_mb: 58, build_mb: 220, disk_mb: 172, minutes: 0.3 };
            items.push(item);
        }
        if cache.find("busybox", &busybox_recipe()).is_none() {
            items.push(Item { name: "busybox", download_mb: 1, build_mb: 5, disk_mb: 2, minutes: 0.1 });
        }
        let mut source_counted = false;
        for kernel in wanted.kernels.iter().copied().filter(|kernel| find_kernel(cache, *kernel).is_none()) {
            let name = match kernel {
                Kernel::Iommufd => "kernel with iommufd",
                Kernel::NoGroup => "kernel without VFIO group files",
                Kernel::Stock => "Debian's cloud kernel",
            };
            items.push(match kernel {
                Kernel::Stock => Item { name, download_mb: 35, build_mb: 160, disk_mb: 13, minutes: 0.1 },
                // The second build finds the first one's objects.
                _ if source_counted => Item { name, download_mb: 0, build_mb: 20, disk_mb: 5, minutes: 0.4 },
                _ => Item { name, download_mb: 162, build_mb: 2400, disk_mb: 5, minutes: 8.0 },
            });
            source_counted |= kernel != Kernel::Stock;
        }
        items
    }

    /// The artifacts, if all that is wanted is in the cache. No network, no waiting.
    pub fn present(cache: &Cache, wanted: &Wanted) -> Option<Self> {
        let qemu = find_qemu(cache)?;
        let (busybox, manifest) = cache.find("busybox", &busybox_recipe())?;
        let kernels =
            wanted.kernels.iter().map(|kernel| Some((*kernel, find_kernel(cache, *kernel)?))).collect::<Option<_>>()?;
        Some(Self { qemu, busybox: busybox.join("busybox"), applets: manifest.applets, kernels, cache: cache.clone() })
    }

    /// Fetches and builds what is wanted and missing, telling each step on standard error. Minutes when cold.
    ///
    /// # Errors
    ///
    /// [`ArtifactError`]; what was finished before the error stays.
    pub fn ensure(cache: &Cache, wanted: &Wanted) -> Result<Self, ArtifactError> {
        if let Some(found) = Self::present(cache, wanted) {
            return Ok(found);
        }
        if std::env::consts::ARCH != "x86_64" {
            return Err(ArtifactError::Architecture(std::env::consts::ARCH));
        }
        let lock = cache.lock()?;
        // Another process may have been quicker.
        if let Some(found) = Self::present(cache, wanted) {
            return Ok(found);
        }
        let result = fill(cache, wanted);
        drop(lock);
        result?;
        Self::present(cache, wanted).ok_or_else(|| ArtifactError::Unusable {
            what: cache.0.display().to_string(),
            reason: "an entry just made is not whole".to_owned(),
        })
    }

    /// The files of a kernel that was wanted.
    pub fn kernel(&self, kernel: Kernel) -> Option<&KernelFiles> {
        self.kernels.get(&kernel)
    }

    /// Where they are kept.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }
}

fn fill(cache: &Cache, wanted: &Wanted) -> Result<(), ArtifactError> {
    let start = Instant::now();
    let builds: Vec<Kernel> = [Kernel::Iommufd, Kernel::NoGroup]
        .into_iter()
        .filter(|kernel| wanted.kernels.contains(kernel) && find_kernel(cache, *kernel).is_none())
        .collect();
    steps::require_tools(!builds.is_empty())?;
    // Left over from a process that was killed: the lock says nobody works there now.
    let work = cache.0.join("work");
    if work.exists() {
        fs::remove_dir_all(&work).map_err(file_error("remove", &work))?;
    }
    fs::create_dir_all(&work).map_err(file_error("make folder", &work))?;
    let logs = cache.0.join("logs");
    fs::create_dir_all(&logs).map_err(file_error("make folder", &logs))?;
    let steps = steps::Steps::new(logs);
    let apt = apt::Apt::prepare(&work.join("apt"), &steps)?;

    if find_qemu(cache).is_none() {
        make_qemu(cache, &work, &apt, &steps)?;
    }
    if cache.find("busybox", &busybox_recipe()).is_none() {
        make_busybox(cache, &work, &apt, &steps)?;
    }
    if wanted.kernels.contains(&Kernel::Stock) && find_kernel(cache, Kernel::Stock).is_none() {
        kernel::fetch_stock(cache, &work, &apt, &steps)?;
    }
    if !builds.is_empty() {
        kernel::build(&builds, cache, &work, &apt, &steps)?;
    }
    fs::remove_dir_all(&work).map_err(file_error("remove", &work))?;
    eprintln!("lab: artifacts complete in {} after {:.0?}", cache.0.display(), start.elapsed());
    Ok(())
}

fn find_kernel(cache: &Cache, kernel: Kernel) -> Option<KernelFiles> {
    let (entry, manifest) = cache.find(&format!("kernel-{}", kernel.name()), &kernel_recipe(kernel))?;
    Some(KernelFiles {
        image: entry.join("bzImage"),
        config: entry.join("config"),
        release: manifest.version,
        modules: entry.join("modules"),
        load: manifest.load,
    })
}

/// The system's QEMU if it is new enough, else the cache's.
fn find_qemu(cache: &Cache) -> Option<Qemu> {
    system_qemu().or_else(|| {
        let (entry, manifest) = cache.find("qemu", &qemu_recipe())?;
        Some(private_qemu(&entry.join("root"), manifest.version))
    })
}

fn system_qemu() -> Option<Qemu> {
    let path = steps::on_path("qemu-system-x86_64")?;
    let version = qemu_version(Command::new(&path).arg("--version"))?;
    let enough = parse_version(&version)? >= QEMU_OLDEST;
    // It can be built without.
    let able = enough && Command::new(&path).args(["-device", "vfio-user-pci,help"]).output().ok()?.status.success();
    able.then(|| Qemu { command: vec![path], data: Vec::new(), modules: None, version })
}

fn private_qemu(root: &Path, version: String) -> Qemu {
    // Made for a newer libc than the host may have: run through the loader that came with it.
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut library_path = libraries.clone().into_os_string();
    library_path.push(":");
    library_path.push(root.join("usr/lib"));
    Qemu {
        command: vec![
            libraries.join("ld-linux-x86-64.so.2"),
            "--library-path".into(),
            library_path.into(),
            root.join("usr/bin/qemu-system-x86_64"),
        ],
        // The BIOS lives in SeaBIOS' own folder.
        data: vec![root.join("usr/share/qemu"), root.join("usr/share/seabios")],
        modules: Some(libraries.join("qemu")),
        version,
    }
}

impl Qemu {
    /// A command that runs it, without the arguments of a machine.
    pub fn command(&self) -> Command {
        let mut words = self.command.iter();
        // The vector is never empty; an empty program name would fail to start with a clear error.
        let mut command = Command::new(words.next().map_or(Path::new(""), PathBuf::as_path));
        command.args(words);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        for folder in &self.data {
            command.arg("-L").arg(folder);
        }
        command
    }
}

/// "QEMU emulator version 11.1.3 (Debian …)": the number.
fn qemu_version(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_ascii_whitespace().skip_while(|word| *word != "version").nth(1).map(str::to_owned)
}

fn parse_version(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn make_qemu(cache: &Cache, work: &Path, apt: &apt::Apt, steps: &steps::Steps) -> Result<(), ArtifactError> {
    let packages = apt.download_with_dependencies("qemu-system-x86", apt::BACKPORTS, &work.join("qemu-debs"), steps)?;
    let entry = work.join("qemu");
    let root = entry.join("root");
    steps.unpack("Unpack QEMU", packages.iter().map(|package| package.file.as_path()), &root)?;
    let qemu = private_qemu(&root, String::new());
    let unusable = |reason: String| ArtifactError::Unusable { what: "QEMU".to_owned(), reason };
    let version = qemu_version(qemu.command().arg("--version"))
        .ok_or_else(|| unusable(format!("{} does not tell its version", root.display())))?;
    if parse_version(&version).is_none_or(|version| version < QEMU_OLDEST) {
        let (major, minor) = QEMU_OLDEST;
        return Err(unusable(format!("the archive has version {version}, and {major}.{minor} is needed")));
    }
    let debian =
        packages.iter().find(|package| package.name == "qemu-system-x86").map_or("0", |package| &package.version);
    let place = cache.0.join(format!("qemu-{}-{}", qemu_recipe(), file_name(debian)));
    let manifest = Manifest {
        version,
        packages: packages.iter().map(|package| (package.name.clone(), package.version.clone())).collect(),
        files: BTreeMap::new(),
        applets: Vec::new(),
        load: Vec::new(),
    };
    manifest.save(&entry, &["root/usr/bin/qemu-system-x86_64", "root/usr/share/seabios/bios-256k.bin"])?;
    publish(&entry, &place)
}

fn make_busybox(cache: &Cache, work: &Path, apt: &apt::Apt, steps: &steps::Steps) -> Result<(), ArtifactError> {
    let package = apt.download(&["busybox-static"], apt::STABLE, &work.join("busybox-debs"), steps)?;
    let unpacked = work.join("busybox-root");
    steps.unpack("Unpack busybox", [package.file.as_path()], &unpacked)?;
    let entry = work.join("busybox");
    fs::create_dir_all(&entry).map_err(file_error("make folder", &entry))?;
    let busybox = entry.join("busybox");
    let unusable = |reason: String| ArtifactError::Unusable { what: "busybox".to_owned(), reason };
    let packed = ["usr/bin/busybox", "bin/busybox"].map(|name| unpacked.join(name));
    let from =
        packed.iter().find(|path| path.exists()).ok_or_else(|| unusable("no busybox in the package".to_owned()))?;
    fs::copy(from, &busybox).map_err(file_error("write", &busybox))?;
    let output = Command::new(&busybox)
        .arg("--list-full")
        .output()
        .map_err(|source| ArtifactError::Spawn { program: busybox.display().to_string(), source })?;
    let applets: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    if !applets.iter().any(|applet| applet.ends_with("/sh")) {
        return Err(unusable(format!("it lists {} applets and no shell", applets.len())));
    }
    let manifest = Manifest {
        version: package.version.clone(),
        packages: BTreeMap::from([(package.name.clone(), package.version.clone())]),
        files: BTreeMap::new(),
        applets,
        load: Vec::new(),
    };
    manifest.save(&entry, &["busybox"])?;
    publish(&entry, &cache.0.join(format!("busybox-{}-{}", busybox_recipe(), file_name(&package.version))))
}

/// A package version as part of a file name.
fn file_name(version: &str) -> String {
    version.chars().map(|c| if c.is_ascii_alphanumeric() || "._+~".contains(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let cases = [
            (vec![("CCNODE_LAB_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], Some("/c")),
            (vec![("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], Some("/x/ccnode-lab")),
            (vec![("HOME", "/h")], Some("/h/.cache/ccnode-lab")),
            (vec![("CCNODE_LAB_CACHE", "/c")], Some("/c")),
            (Vec::new(), None),
        ];
        for (variables, expected) in cases {
            let found =
                Cache::choose(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()));
            assert_eq!(found.ok(), expected.map(Cache::at), "{variables:?}");
        }
    }

    fn entry(cache: &Cache, name: &str, version: &str) {
        let entry = cache.path().join(name);
        fs::create_dir_all(&entry).unwrap();
        fs::write(entry.join("busybox"), "12345").unwrap();
        let manifest = Manifest {
            version: version.to_owned(),
            packages: BTreeMap::new(),
            files: BTreeMap::new(),
            applets: vec!["bin/sh".to_owned()],
            load: Vec::new(),
        };
        manifest.save(&entry, &["busybox"]).unwrap();
    }

    #[test]
    fn only_a_whole_entry_of_the_same_recipe_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert!(cache.find("busybox", "aa").is_none());
        entry(&cache, "busybox-bb-1", "other recipe");
        assert!(cache.find("busybox", "aa").is_none());
        entry(&cache, "busybox-aa-1", "1");
        assert_eq!(cache.find("busybox", "aa").unwrap().1.version, "1");
        // Cut short after it was made.
        fs::write(cache.path().join("busybox-aa-1/busybox"), "123").unwrap();
        assert!(cache.find("busybox", "aa").is_none());
        for text in ["", "{", "[]", "{\"version\":1}"] {
            entry(&cache, "busybox-aa-1", "1");
            fs::write(cache.path().join("busybox-aa-1").join(MANIFEST), text).unwrap();
            assert!(cache.find("busybox", "aa").is_none(), "{text:?}");
        }
    }

    #[test]
    fn clearing_takes_only_what_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache"));
        cache.clear().unwrap();
        entry(&cache, "busybox-aa-1", "1");
        entry(&cache, "real-kube-1-v1.20.2", "1");
        fs::write(cache.path().join("kernel-notes.txt"), "mine").unwrap();
        cache.clear().unwrap();
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["kernel-notes.txt"]);
        fs::remove_file(cache.path().join("kernel-notes.txt")).unwrap();
        cache.clear().unwrap();
        assert!(!cache.path().exists());
    }

    #[test]
    fn missing_counts_the_kernel_source_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let megabytes = |kernels: &[Kernel]| -> u32 {
            let wanted = Wanted { kernels: kernels.iter().copied().collect() };
            let items = Artifacts::missing(&cache, &wanted);
            assert!(Artifacts::present(&cache, &wanted).is_none());
            items.iter().map(|item| item.download_mb).sum()
        };
        let both = megabytes(&[Kernel::Iommufd, Kernel::NoGroup]);
        assert_eq!(both, megabytes(&[Kernel::Iommufd]));
        assert_eq!(both, megabytes(&[Kernel::NoGroup]));
        assert!(both < megabytes(&Kernel::ALL));
    }

    #[test]
    fn recipes_differ_by_kernel() {
        let names: BTreeSet<_> = Kernel::ALL.into_iter().map(kernel_recipe).collect();
        assert_eq!(names.len(), 3);
        assert_ne!(recipe(&["ab", "c"]), recipe(&["a", "bc"]));
    }

    #[test]
    fn versions_compare_as_numbers() {
        for (text, enough) in
            [("11.1.3", true), ("11.10", true), ("12.0.1", true), ("10.2.0", false), ("11.0.50", false)]
        {
            assert_eq!(parse_version(text).unwrap() >= QEMU_OLDEST, enough, "{text}");
        }
        assert_eq!(parse_version("eleven"), None);
    }
}
