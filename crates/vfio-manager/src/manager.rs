//! What every command works with: it looks at the node, plans, keeps the record of what devices were before, and acts.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent_core::hostfile::HostDir;
use agent_core::state::{BindingRecord, BindingsFile, DevicesFile, Identity, Origin, STATE_DIR, StateError, state_dir};
use agent_core::text::chain;
use anyhow::{Context, bail};
use gpu_firmware::Places;
use hw_probe::{Inventory, PciFunction, SysRoot};
use tracing::warn;

use crate::args::HostArgs;
use crate::binding::{Action, Knowledge, Policy, Step, check, plan_bind, plan_unbind};
use crate::driver::read_bounded;
use crate::executor::{Executor, Outcome, records, without_returned};
use crate::modalias::VfioAliases;
use crate::validations;

/// How often a change of modes is looked for again.
const TRANSITION_POLL: Duration = Duration::from_millis(200);

/// Longest file with a mode, in bytes.
const MAX_MODE_FILE: u64 = 4096;

/// The node as it was seen, and what is to be done.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    pub(crate) inventory: Arc<Inventory>,
    pub(crate) knowledge: Knowledge,
    pub(crate) steps: Vec<Step>,
    /// Nothing is bound any more, because the hook of this pod has given the devices back.
    pub(crate) given_back: bool,
}

impl Look {
    fn waits(&self) -> bool {
        self.steps.iter().any(|step| step.action == Action::Wait)
    }
}

pub(crate) struct Manager {
    pub(crate) root: SysRoot,
    pub(crate) host_root: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) validations: PathBuf,
    pub(crate) mode_file: Option<PathBuf>,
    given_back: Option<PathBuf>,
    pub(crate) executor: Executor,
    /// How long devices are waited for that another agent works on.
    pub(crate) patience: Duration,
    /// Over a megabyte of text: read only when there is something to bind, and once.
    aliases: OnceLock<VfioAliases>,
    /// What was last said of a file that cannot be read.
    trouble: Mutex<Option<String>>,
}

impl Manager {
    pub(crate) fn host(args: HostArgs, mode_file: Option<PathBuf>, lock_default: Duration) -> Self {
        let HostArgs { host_root, state_dir: wanted_dir, validations_dir, lock_timeout, write_timeout } = args;
        let root = SysRoot::host();
        let host_root = agent_core::host_root(host_root);
        let mut places = Places::at(root, "vfio-manager");
        // Where the host's /run is not mounted, its place is below the host's root.
        places.run = host_root.join("run");
        let patience = lock_timeout.unwrap_or(lock_default);
        let executor = Executor::new(places.clone(), host_root.clone(), patience, write_timeout);
        let state_dir = if wanted_dir == Path::new(STATE_DIR) { state_dir(&host_root) } else { wanted_dir };
        let manager = Self::over(places, host_root, state_dir, executor, patience);
        let validations = validations_dir.unwrap_or_else(|| manager.validations.clone());
        Self { validations, mode_file, ..manager }
    }

    pub(crate) fn over(
        places: Places,
        host_root: PathBuf,
        state_dir: PathBuf,
        executor: Executor,
        patience: Duration,
    ) -> Self {
        let (aliases, trouble) = (OnceLock::new(), Mutex::default());
        let validations = validations::folder(&host_root);
        let (root, mode_file, given_back) = (places.root, None, None);
        Self { root, host_root, state_dir, validations, mode_file, given_back, executor, patience, aliases, trouble }
    }

    /// The same, binding nothing while there is this file: the hook of the pod has given the devices back.
    pub(crate) fn until_given_back(self, mark: PathBuf) -> Self {
        Self { given_back: Some(mark), ..self }
    }

    pub(crate) fn inventory(&self) -> anyhow::Result<Arc<Inventory>> {
        let inventory = Inventory::scan(&self.root);
        if inventory.functions.is_empty() {
            bail!(
                "No PCI function can be seen below {}; mount the host's /sys into this container",
                self.root.join("sys/bus/pci/devices").display()
            );
        }
        for problem in &inventory.problems {
            warn!(path = problem.path, device = problem.bdf.map(tracing::field::display), "{}", problem.message);
        }
        Ok(Arc::new(inventory))
    }

    /// What is on the node and what `bind` would do.
    pub(crate) fn look_to_bind(&self, policy: &Policy) -> anyhow::Result<Look> {
        let inventory = self.inventory()?;
        check(&inventory, policy)?;
        let knowledge = self.knowledge(&inventory);
        if self.given_back.as_ref().is_some_and(|mark| mark.exists()) {
            self.say_once("The devices were given back by the hook of this pod: nothing is bound any more");
            return Ok(Look { inventory, knowledge, steps: Vec::new(), given_back: true });
        }
        let release = inventory.host.kernel_release.as_deref().unwrap_or_default();
        let read = || VfioAliases::read(&[self.root.join(""), self.host_root.clone()], release);
        let module_for = |function: &PciFunction| self.aliases.get_or_init(read).choose(function.modalias.as_deref());
        let steps = plan_bind(&inventory, policy, &knowledge, module_for);
        Ok(Look { inventory, knowledge, steps, given_back: false })
    }

    /// What is on the node and what `unbind` would do.
    pub(crate) fn look_to_unbind(&self, policy: &Policy) -> anyhow::Result<Look> {
        let inventory = self.inventory()?;
        let knowledge = self.knowledge(&inventory);
        let steps = plan_unbind(&inventory, policy, &knowledge);
        Ok(Look { inventory, knowledge, steps, given_back: false })
    }

    /// A look for a command that is run once: what it leaves undone stays undone, so that a change of modes is waited for.
    pub(crate) fn settled(&self, look: impl Fn() -> anyhow::Result<Look>) -> anyhow::Result<Look> {
        let deadline = Instant::now() + self.patience;
        loop {
            let found = look()?;
            if !found.waits() || Instant::now() >= deadline {
                return Ok(found);
            }
            thread::sleep(TRANSITION_POLL);
        }
    }

    /// What the other agents say, as far as it can be read.
    fn knowledge(&self, inventory: &Inventory) -> Knowledge {
        let boot_id = inventory.host.boot_id.as_deref().unwrap_or_default();
        let folder = HostDir::open_existing(&self.state_dir).map_err(StateError::from);
        let load = |folder: Option<HostDir>| {
            let Some(folder) = folder else { return Ok((None, None)) };
            Ok((DevicesFile::load(&folder, boot_id)?, BindingsFile::load(&folder, boot_id)?))
        };
        let (devices, bindings) = folder.and_then(load).unwrap_or_else(|error: StateError| {
            self.say_once(&format!(
                "What the other agents say cannot be read and is left out of account: {}",
                chain(&error)
            ));
            (None, None)
        });
        let is_same = |record: &&BindingRecord| {
            inventory.get(record.bdf).is_some_and(|function| Identity::of(function) == record.identity)
        };
        let records = bindings.iter().flat_map(|file| &file.devices).filter(is_same);
        let recorded = records.map(|record| (record.bdf, record.driver.clone())).collect();
        Knowledge::from_files(devices.as_ref(), self.asked_mode().as_deref(), recorded)
    }

    fn asked_mode(&self) -> Option<String> {
        let text = read_bounded(self.mode_file.as_ref()?, MAX_MODE_FILE)?;
        let mode = text.lines().next().unwrap_or_default().trim();
        (!mode.is_empty()).then(|| mode.to_owned())
    }

    fn say_once(&self, text: &str) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if trouble.as_deref() != Some(text) {
            warn!("{text}");
            *trouble = Some(text.to_owned());
        }
    }

    /// Writes down what the devices of the steps were before: nothing is touched when that fails.
    pub(crate) fn prepare(&self, look: &Look) -> anyhow::Result<Arc<BindingsFile>> {
        let inventory = &look.inventory;
        let boot_id = inventory.host.boot_id.clone().unwrap_or_default();
        let none = || BindingsFile { origin: Origin::now(boot_id.clone(), None), devices: Vec::new() };
        if !look.steps.iter().any(|step| step.action.is_act()) {
            return Ok(Arc::new(none()));
        }
        let dir = self.folder()?;
        if boot_id.is_empty() {
            bail!("The kernel's boot id cannot be read; mount the host's /proc, or let the container have its own");
        }
        let prior = BindingsFile::load(&dir, &boot_id).unwrap_or_else(|error| {
            // Written whole or not at all, so this is somebody's hand. Without it nothing is known of former drivers, which
            // is what it would be on a new node.
            self.say_once(&format!(
                "What the devices were before cannot be read and is recorded anew: {}",
                chain(&error)
            ));
            None
        });
        let prior = prior.unwrap_or_else(none);
        let prior = match records(inventory, &look.steps, &prior, jiff::Timestamp::now()) {
            Some(file) => stored(&dir, file)?,
            None => prior,
        };
        Ok(Arc::new(prior))
    }

    fn folder(&self) -> anyhow::Result<HostDir> {
        HostDir::open(&self.state_dir)
            .with_context(|| format!("The state directory {} cannot be used", self.state_dir.display()))
    }

    /// Carries out the steps of a look and waits for them, for `patience` at most.
    pub(crate) fn act(&self, look: &Look, patience: Option<Duration>) -> anyhow::Result<Vec<Outcome>> {
        let prior = self.prepare(look)?;
        let outcomes = self.executor.run(&look.inventory, &look.steps, &prior, patience);
        if without_returned(&outcomes, &prior).is_some() {
            // Read again: a daemon may have written meanwhile.
            let dir = self.folder()?;
            let now = BindingsFile::load(&dir, &prior.origin.boot_id).ok().flatten();
            let now = now.unwrap_or_else(|| (*prior).clone());
            if let Some(file) = without_returned(&outcomes, &now) {
                stored(&dir, file)?;
            }
        }
        Ok(outcomes)
    }
}

fn stored(dir: &HostDir, mut file: BindingsFile) -> anyhow::Result<BindingsFile> {
    file.origin.written_at = jiff::Timestamp::now();
    file.store(dir).context("What the devices were before cannot be recorded, so nothing was touched")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Write;
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use hw_probe::testing::FakeSysfs;
    use nix::sys::signal::{Signal, raise};

    use super::*;
    use crate::executor::SysfsWrite;
    use crate::testing::Kernel;

    const RIGHT: &str = "0000:40:00.0";
    const HELD: &str = "0000:41:00.0";
    const DRIVERLESS: &str = "0000:42:00.0";
    const TAKEN: &str = "0000:43:00.0";
    const AUDIO: &str = "0000:43:00.1";
    const HELD_GROUP: u32 = 5;

    /// A device as the kernel shows it: its driver and its override.
    type State = BTreeMap<String, (Option<String>, Option<String>)>;

    fn node(path: &Path) -> Kernel {
        let kernel = Kernel::over(FakeSysfs::in_dir(path));
        kernel.held.lock().unwrap().insert(HELD_GROUP);
        kernel
    }

    /// One GPU that is right, one that a virtual machine holds, one without driver, and one with its audio function on the
    /// host's drivers.
    fn fill(kernel: &Kernel) {
        let fake = &kernel.fake;
        for driver in ["vfio-pci", "nouveau", "snd_hda_intel"] {
            fake.load_driver(driver);
        }
        for (bdf, group) in [(RIGHT, 4), (HELD, HELD_GROUP)] {
            fake.gpu(bdf, 0x2330).group(group).driver_override("vfio-pci");
            fake.drivers_probe(bdf);
        }
        fake.gpu(DRIVERLESS, 0x2330).group(6);
        fake.gpu(TAKEN, 0x2bb5).class(0x03_00_00).group(7).driver("nouveau");
        fake.function(AUDIO, 0x10de, 0x22e8, 0x04_03_00).group(7).driver("snd_hda_intel");
    }

    fn state(kernel: &Kernel) -> State {
        let inventory = kernel.inventory();
        let of = |function: &PciFunction| (function.driver.clone(), function.driver_override.clone());
        inventory.functions.iter().map(|function| (function.bdf.to_string(), of(function))).collect()
    }

    fn expected(rows: [(&str, Option<&str>, Option<&str>); 5]) -> State {
        let own = |text: Option<&str>| text.map(ToOwned::to_owned);
        rows.into_iter().map(|(bdf, driver, wanted)| (bdf.to_owned(), (own(driver), own(wanted)))).collect()
    }

    const VFIO: Option<&str> = Some("vfio-pci");

    fn all_bound() -> State {
        expected([RIGHT, HELD, DRIVERLESS, TAKEN, AUDIO].map(|bdf| (bdf, VFIO, VFIO)))
    }

    fn all_given_back() -> State {
        expected([
            (RIGHT, None, None),
            (HELD, VFIO, VFIO),
            (DRIVERLESS, None, None),
            (TAKEN, Some("nouveau"), None),
            (AUDIO, Some("snd_hda_intel"), None),
        ])
    }

    /// Binds or gives back all devices of the node.
    fn do_all(manager: &Manager, what: &str) -> Vec<Outcome> {
        let policy = Policy { take_from_driver: true, ..Policy::default() };
        let look = if what == "bind" { manager.look_to_bind(&policy) } else { manager.look_to_unbind(&policy) };
        manager.act(&look.unwrap(), None).unwrap()
    }

    /// The process that is killed: at a write, before it or after it.
    #[test]
    #[ignore = "run by killed_at_any_write, in a process of its own"]
    fn a_process_that_is_killed() {
        let Ok(folder) = std::env::var("CCNODE_KILLED_TREE") else { return };
        let text = |name: &str| std::env::var(name).unwrap();
        let (what, at, when) = (text("CCNODE_KILLED_ACT"), text("CCNODE_KILLED_AT"), text("CCNODE_KILLED_WHEN"));
        let at: usize = at.parse().unwrap();
        let kernel = node(Path::new(&folder));
        let (write, count) = (kernel.write(), AtomicUsize::new(0));
        let log = Path::new(&folder).join("writes");
        // A kernel ends what it has begun: nobody is killed while another write is half done.
        let whole = Mutex::new(());
        let deadly: SysfsWrite = Arc::new(move |path, value| {
            let _whole = whole.lock().unwrap();
            let number = count.fetch_add(1, Ordering::SeqCst);
            if number == at && when == "before" {
                raise(Signal::SIGKILL).unwrap();
            }
            let mut file = fs::OpenOptions::new().create(true).append(true).open(&log)?;
            file.write_all(format!("{} {value}\n", path.display()).as_bytes())?;
            let result = write(path, value);
            if number == at {
                raise(Signal::SIGKILL).unwrap();
            }
            result
        });
        do_all(&kernel.manager(kernel.executor().with_kernel(deadly)), &what);
    }

    /// Runs it; whether it was killed.
    fn killed(folder: &Path, what: &str, at: usize, when: &str) -> bool {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["manager::tests::a_process_that_is_killed", "--exact", "--ignored", "--nocapture"])
            .env("CCNODE_KILLED_TREE", folder)
            .env("CCNODE_KILLED_ACT", what)
            .env("CCNODE_KILLED_AT", at.to_string())
            .env("CCNODE_KILLED_WHEN", when)
            .output()
            .unwrap();
        let is_killed = std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(9);
        assert!(is_killed || output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        is_killed
    }

    /// Kills the act at each of its writes, and runs it again; how often.
    fn killed_everywhere(what: &str, untouched: &[&str], ends: &State) -> usize {
        let mut kills = 0;
        for when in ["before", "after"] {
            for at in 0.. {
                let place = tempfile::tempdir().unwrap();
                let kernel = node(place.path());
                fill(&kernel);
                if what == "unbind" {
                    do_all(&kernel.manager(kernel.executor()), "bind");
                    assert_eq!(state(&kernel), all_bound());
                }
                let before = state(&kernel);
                if !killed(place.path(), what, at, when) {
                    assert!(at > 5, "{what} made {at} writes only");
                    assert_eq!(state(&kernel), *ends, "{what}, not killed");
                    break;
                }
                kills += 1;
                let after = state(&kernel);
                let writes = fs::read_to_string(place.path().join("writes")).unwrap_or_default();
                for bdf in untouched {
                    assert_eq!(after[*bdf], before[*bdf], "{what} killed {when} write {at}");
                    assert!(!writes.contains(bdf), "{what} killed {when} write {at}: {writes}");
                }
                kernel.writes.lock().unwrap().clear();
                let outcomes = do_all(&kernel.manager(kernel.executor()), what);
                for outcome in &outcomes {
                    let is_held = outcome.step.bdf.to_string() == HELD && what == "unbind";
                    assert_eq!(outcome.result.is_err(), is_held, "{what} killed {when} write {at}: {outcome:?}");
                }
                assert_eq!(state(&kernel), *ends, "{what} killed {when} write {at}");
                let writes = kernel.writes.lock().unwrap().join("\n");
                assert!(untouched.iter().all(|bdf| !writes.contains(bdf)), "{what} killed {when} write {at}: {writes}");
                // And once more, which has nothing to do.
                kernel.writes.lock().unwrap().clear();
                do_all(&kernel.manager(kernel.executor()), what);
                let writes = kernel.writes.lock().unwrap().clone();
                assert!(writes.is_empty(), "{what} killed {when} write {at}: {writes:?}");
            }
        }
        kills
    }

    #[test]
    fn killed_at_any_write_of_bind_and_of_unbind_the_next_run_completes_it() {
        let bind = killed_everywhere("bind", &[RIGHT, HELD], &all_bound());
        let unbind = killed_everywhere("unbind", &[HELD], &all_given_back());
        eprintln!("killed {bind} times in bind, {unbind} times in unbind; 0 failures");
    }

    #[test]
    fn what_another_agent_changes_is_waited_for_and_then_told() {
        use agent_core::state::{DevicesFile, Transition};
        let kernel = Kernel::new();
        kernel.fake.gpu(DRIVERLESS, 0x2330).group(6);
        let manager = kernel.manager(kernel.executor());
        let folder = HostDir::open(&manager.state_dir).unwrap();
        let boot_id = kernel.inventory().host.boot_id.clone().unwrap();
        let transition =
            Transition { target: "on".into(), step: "reset".into(), started_at: jiff::Timestamp::UNIX_EPOCH };
        let mut file =
            DevicesFile { origin: Origin::now(boot_id, None), transition: Some(transition), devices: Vec::new() };
        file.store(&folder).unwrap();
        let policy = Policy::default();
        let look = manager.settled(|| manager.look_to_bind(&policy)).unwrap();
        let outcomes = manager.act(&look, None).unwrap();
        assert_eq!(outcomes[0].result.as_ref().unwrap_err().code(), "DeviceInTransition");
        assert!(kernel.writes.lock().unwrap().is_empty());
        file.transition = None;
        file.store(&folder).unwrap();
        let look = manager.settled(|| manager.look_to_bind(&policy)).unwrap();
        assert!(manager.act(&look, None).unwrap()[0].result.is_ok());
        // Of another boot it says nothing.
        file.origin.boot_id = "another".into();
        file.store(&folder).unwrap();
        assert_eq!(manager.look_to_bind(&policy).unwrap().knowledge.mode, None);
    }

    #[test]
    fn the_mode_is_asked_for_in_a_file_where_there_is_one() {
        let kernel = Kernel::new();
        kernel.fake.gpu(DRIVERLESS, 0x2330).group(6);
        let path = kernel.fake.path().join("mode");
        let manager = Manager { mode_file: Some(path.clone()), ..kernel.manager(kernel.executor()) };
        let mode = || manager.look_to_bind(&Policy::default()).unwrap().knowledge.mode;
        assert_eq!(mode(), None);
        for (text, wanted) in [("ppcie\n", Some("ppcie")), ("\n", None), (" on \nmore", Some("on"))] {
            fs::write(&path, text).unwrap();
            assert_eq!(mode().as_deref(), wanted, "{text:?}");
        }
    }

    #[test]
    fn what_cannot_be_recorded_is_not_done() {
        let kernel = Kernel::new();
        kernel.fake.gpu(DRIVERLESS, 0x2330).group(6);
        let manager = kernel.manager(kernel.executor());
        kernel.fake.file("run/nvidia/ccnode", "no folder");
        let look = manager.look_to_bind(&Policy::default()).unwrap();
        let error = manager.act(&look, None).unwrap_err();
        assert!(format!("{error:#}").contains("run/nvidia/ccnode"), "{error:#}");
        assert!(kernel.writes.lock().unwrap().is_empty());
    }
}
