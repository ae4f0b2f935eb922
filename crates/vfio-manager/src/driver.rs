//! The driver of a module: registered in the kernel already, or loaded with the host's own modprobe.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hw_probe::SysRoot;

/// Time in which the host's modprobe must have loaded a module.
const MODPROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Largest list of modules that is read, in bytes: a distribution's is below 1 MB.
const MAX_LIST: u64 = 8 << 20;

/// How a module is loaded; what is given back is what the loader said. The tests put a kernel in its place.
pub(crate) type Load = Arc<dyn Fn(&str) -> Result<String, String> + Send + Sync>;

/// The drivers of the running kernel.
#[derive(Clone)]
pub(crate) struct Drivers {
    root: SysRoot,
    /// Where `lib/modules` may be.
    roots: [PathBuf; 2],
    load: Load,
}

impl Drivers {
    /// Those below `root`, with modules loaded by the modprobe of `host_root`.
    pub(crate) fn new(root: SysRoot, host_root: PathBuf) -> Self {
        let roots = [root.join(""), host_root.clone()];
        Self { root, roots, load: Arc::new(move |module| modprobe(&host_root, module)) }
    }

    #[cfg(test)]
    pub(crate) fn with_load(self, load: Load) -> Self {
        Self { load, ..self }
    }

    /// The name in sysfs of the module's driver, loading the module where it is not registered; or why there is none.
    pub(crate) fn driver_of(&self, module: &str) -> Result<String, String> {
        if let Some(driver) = self.registered(module) {
            return Ok(driver);
        }
        if self.lists("modules.builtin", module) == Some(true) {
            return Err("it is part of this kernel and yet not registered: look for it in the kernel log, and for \
                        initcall_blacklist on the kernel's command line"
                .into());
        }
        match (self.load)(module) {
            Ok(said) => {
                self.registered(module).ok_or_else(|| format!("modprobe succeeded{said}, yet no such driver appeared"))
            }
            Err(_) if self.lists("modules.dep", module) == Some(false) => {
                Err("it is neither part of this kernel nor among its modules".into())
            }
            Err(error) => Err(error),
        }
    }

    /// The driver as the kernel lists it: modules say `_` where some drivers say `-`.
    fn registered(&self, module: &str) -> Option<String> {
        let names = [module.to_owned(), module.replace('_', "-"), module.replace('-', "_")];
        names.into_iter().find(|name| self.root.join("sys/bus/pci/drivers").join(name).is_dir())
    }

    /// Whether a list of the running kernel's modules has the module; none where the list cannot be read. A line begins
    /// with a path: `kernel/drivers/vfio/pci/vfio-pci.ko.xz: ...`.
    fn lists(&self, list: &str, module: &str) -> Option<bool> {
        let release = fs::read_to_string(self.root.join("proc/sys/kernel/osrelease")).ok()?;
        let paths = self.roots.iter().map(|root| root.join("lib/modules").join(release.trim()).join(list));
        let text = paths.into_iter().find_map(|path| read_bounded(&path, MAX_LIST))?;
        let wanted = module.replace('-', "_");
        let name = |line: &str| {
            let path = line.split(':').next()?;
            Some(path.rsplit('/').next()?.split_once(".ko")?.0.replace('-', "_"))
        };
        Some(text.lines().any(|line| name(line).as_deref() == Some(&wanted)))
    }
}

pub(crate) fn read_bounded(path: &Path, most: u64) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A command of the host, run on the host's root.
pub(crate) fn on_host(host_root: &Path, program: &str) -> Command {
    if host_root == Path::new("/") {
        return Command::new(program);
    }
    let mut chroot = Command::new("chroot");
    chroot.arg(host_root).arg(program);
    chroot
}

/// Loads a module with the host's own modprobe, so that it is the host's module of the host's kernel.
fn modprobe(host_root: &Path, module: &str) -> Result<String, String> {
    let mut command = on_host(host_root, "modprobe");
    let mut child = command
        .arg(module)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("modprobe cannot be started ({error})"))?;
    let deadline = Instant::now() + MODPROBE_DEADLINE;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                // Killing can only fail when it has just ended, which is as good.
                let _ = child.kill();
                return Err(format!("modprobe has not returned in {} s", MODPROBE_DEADLINE.as_secs()));
            }
            Err(error) => return Err(format!("modprobe cannot be waited for ({error})")),
        }
    }
    let output = child.wait_with_output().map_err(|error| format!("modprobe cannot be waited for ({error})"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(300).collect();
    let said = if said.is_empty() { said } else { format!(" ({said})") };
    if output.status.success() { Ok(said) } else { Err(format!("modprobe ended with {}{said}", output.status)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;
    use std::sync::Mutex;

    const RELEASE: &str = "lib/modules/6.12.0-fake";

    /// Drivers over a tree, and the modules that were asked for.
    fn drivers(fake: &Arc<FakeSysfs>, has: &'static [&'static str]) -> (Drivers, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (tree, log) = (Arc::clone(fake), Arc::clone(&asked));
        let load: Load = Arc::new(move |module| {
            log.lock().unwrap().push(module.to_owned());
            if has.contains(&module) {
                tree.load_driver(module);
                return Ok(String::new());
            }
            Err("modprobe ended with exit status: 1".into())
        });
        (Drivers::new(fake.root(), PathBuf::from("/nonexistent")).with_load(load), asked)
    }

    #[test]
    fn what_is_registered_is_not_loaded_whichever_way_it_is_spelt() {
        let fake = Arc::new(FakeSysfs::new());
        fake.load_driver("vfio-pci").load_driver("nvgrace_gpu_vfio_pci");
        let (drivers, asked) = drivers(&fake, &[]);
        for (module, driver) in [
            ("vfio_pci", "vfio-pci"),
            ("vfio-pci", "vfio-pci"),
            ("nvgrace_gpu_vfio_pci", "nvgrace_gpu_vfio_pci"),
            ("nvgrace-gpu-vfio-pci", "nvgrace_gpu_vfio_pci"),
        ] {
            assert_eq!(drivers.driver_of(module).as_deref(), Ok(driver));
        }
        assert!(asked.lock().unwrap().is_empty());
    }

    #[test]
    fn what_is_missing_is_loaded_or_said_to_be_nowhere() {
        let fake = Arc::new(FakeSysfs::new());
        let (drivers, asked) = drivers(&fake, &["nvgrace_gpu_vfio_pci"]);
        assert_eq!(drivers.driver_of("nvgrace_gpu_vfio_pci").as_deref(), Ok("nvgrace_gpu_vfio_pci"));
        assert_eq!(*asked.lock().unwrap(), ["nvgrace_gpu_vfio_pci"]);
        let why = || drivers.driver_of("vfio_pci").unwrap_err();
        assert!(why().contains("exit status: 1"), "{}", why());
        fake.file(format!("{RELEASE}/modules.dep"), "kernel/drivers/vfio/pci/vfio-pci-core.ko.xz:\n");
        assert!(why().contains("neither part of this kernel nor among its modules"), "{}", why());
        fake.file(format!("{RELEASE}/modules.dep"), "kernel/drivers/vfio/pci/vfio-pci.ko.zst: a.ko b.ko\n");
        assert!(why().contains("exit status: 1"), "{}", why());
        // Built in and not there: loading it would change nothing.
        asked.lock().unwrap().clear();
        fake.file(format!("{RELEASE}/modules.builtin"), "kernel/drivers/vfio/pci/vfio-pci.ko\n");
        assert!(why().contains("part of this kernel and yet not registered"), "{}", why());
        assert!(asked.lock().unwrap().is_empty());
    }
}
