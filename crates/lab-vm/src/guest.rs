//! A booted guest: its virtual devices in this process, its QEMU as a child, its init at the other end of a socket.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lab_devices::{Fleet, FleetConfig, FleetError};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use thiserror::Error;

use crate::agent::{Agent, AgentError, Command, Output, Process, Ready, Status};
use crate::artifacts::{Artifacts, Kernel};
use crate::image::{Add, ImageError, Tree};
use crate::qemu::{self, Machine, Qmp};
use crate::strip::stripped;
use crate::topology::{Device, Topology};
use crate::wire;

/// The longest socket path that the kernel takes.
const SOCKET_PATH: usize = 107;
/// Room for the longest name below the guest's folder: `/dev/`, a device's 32 letters, `.sock`.
const LONGEST_NAME: usize = 44;
/// How much of the console and of QEMU's messages an error shows, in bytes.
const TAIL: usize = 4000;

/// Why a guest did not come up, or something about it failed.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The kernel was not among the artifacts wanted.
    #[error("The {0} kernel is not among the artifacts at hand")]
    NoKernel(Kernel),
    /// The guest's init is not built.
    #[error("The guest's init lab-guest is not at {}; build it: cargo build -p lab-vm --bin lab-guest", .0.display())]
    NoAgent(PathBuf),
    /// A file or folder of the guest cannot be made.
    #[error("Cannot {act} {path}")]
    File {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No folder with a path short enough for sockets.
    #[error("Folder {0} is too deep for sockets; set TMPDIR to a shorter one")]
    TooDeep(PathBuf),
    /// Its image cannot be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its virtual devices cannot be started.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// QEMU cannot be started.
    #[error("Cannot run QEMU")]
    Qemu(#[source] io::Error),
    /// QEMU ended before the guest was up.
    #[error("The guest ended while booting ({reason}).\nQEMU says:\n{errors}\nIts console ends:\n{console}")]
    Ended {
        /// Exit status, or why it was ended.
        reason: String,
        /// QEMU's last messages.
        errors: String,
        /// The console's last lines.
        console: String,
    },
    /// The guest was not up in time.
    #[error("The guest did not come up within {} s.\nQEMU says:\n{errors}\nIts console ends:\n{console}", after.as_secs())]
    BootTimeout {
        /// The time it had.
        after: Duration,
        /// QEMU's last messages.
        errors: String,
        /// The console's last lines.
        console: String,
    },
    /// The guest came up without something it needs.
    #[error("The guest came up incomplete: {}", .0.join("; "))]
    Problems(Vec<String>),
    /// The guest's init is older or newer than this program.
    #[error(
        "The guest's init speaks protocol {theirs}, this program {ours}; build both: cargo build -p lab-vm --bin lab-guest"
    )]
    Protocol {
        /// Version of the init.
        theirs: u32,
        /// Version of this program.
        ours: u32,
    },
    /// The guest is off.
    #[error("The guest is off")]
    Off,
    /// Something asked of the guest failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A program of the guest did not end in time; it was killed.
    #[error("{command}: not finished after {} s, and killed; it wrote:\n{written}", after.as_secs())]
    Timeout {
        /// The command line.
        command: String,
        /// The time it had.
        after: Duration,
        /// The end of its output.
        written: String,
    },
    /// QEMU refused a command on its control connection.
    #[error("QEMU's control connection: {what}")]
    Qmp {
        /// The command.
        what: String,
        /// What it says.
        source: io::Error,
    },
    /// No such device on the guest's bus.
    #[error("Virtual device {0} is not on the guest's PCI bus")]
    NoDevice(String),
    /// The device shares its slot.
    #[error("Virtual device {0} shares its slot with others, and only a whole slot can be plugged")]
    SharedSlot(String),
    /// The guest did not power off in time; it was killed.
    #[error("The guest did not power off within {} s, and was killed; its console ends:\n{console}", after.as_secs())]
    PowerOff {
        /// The time it had.
        after: Duration,
        /// The console's last lines.
        console: String,
    },
}

/// What a guest is to be. All but artifacts and topology has a default.
#[derive(Clone, Debug)]
pub struct GuestBuilder {
    artifacts: Artifacts,
    topology: Topology,
    kernel: Kernel,
    agent: Option<PathBuf>,
    adds: Vec<Add>,
    binaries: Vec<(PathBuf, PathBuf)>,
    append: String,
    hostname: String,
    load_vfio: bool,
    knob_file: Option<PathBuf>,
    trace_file: Option<PathBuf>,
    boot_timeout: Duration,
    lifetime: Duration,
}

impl GuestBuilder {
    /// A guest of a topology, with its kernel.
    pub fn new(artifacts: Artifacts, topology: Topology) -> Self {
        let kernel = topology.vm.kernel;
        Self {
            artifacts,
            topology,
            kernel,
            agent: None,
            adds: Vec::new(),
            binaries: Vec::new(),
            append: String::new(),
            hostname: "lab".to_owned(),
            load_vfio: true,
            knob_file: None,
            trace_file: None,
            boot_timeout: Duration::from_mins(1),
            lifetime: Duration::from_mins(30),
        }
    }

    /// Another kernel than the topology's.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Where the guest's init is; by default `$CCNODE_LAB_GUEST`, else beside this program.
    #[must_use]
    pub fn agent(mut self, path: impl Into<PathBuf>) -> Self {
        self.agent = Some(path.into());
        self
    }

    /// Lays a folder of the host over the guest's root, or puts a single file.
    #[must_use]
    pub fn overlay(mut self, add: Add) -> Self {
        self.adds.push(add);
        self
    }

    /// Puts a program of ours into the guest, stripped.
    #[must_use]
    pub fn binary(mut self, host: impl Into<PathBuf>, guest: impl Into<PathBuf>) -> Self {
        self.binaries.push((host.into(), guest.into()));
        self
    }

    /// Adds to the kernel's command line.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(words);
        self
    }

    /// The guest's host name; `lab` otherwise.
    #[must_use]
    pub fn hostname(mut self, name: &str) -> Self {
        name.clone_into(&mut self.hostname);
        self
    }

    /// Leaves VFIO's modules to be loaded later, by `modprobe`.
    #[must_use]
    pub fn without_vfio_modules(mut self) -> Self {
        self.load_vfio = false;
        self
    }

    /// Where knobs are kept from one run to the next.
    #[must_use]
    pub fn knob_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.knob_file = Some(path.into());
        self
    }

    /// Where every access to the devices is written.
    #[must_use]
    pub fn trace_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.trace_file = Some(path.into());
        self
    }

    /// How long the guest may take to come up; a minute otherwise.
    #[must_use]
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }

    /// How long one boot may last before QEMU is killed; half an hour otherwise.
    #[must_use]
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Starts the devices, makes the image, boots, and waits until the guest is up.
    ///
    /// # Errors
    ///
    /// [`GuestError`], with the end of the console where that helps.
    pub fn boot(self) -> Result<Guest, GuestError> {
        Guest::boot(self)
    }
}

/// How long the parts of a boot took.
#[derive(Clone, Copy, Debug)]
pub struct BootTimes {
    /// Making the image; zero when the last one was used again.
    pub image: Duration,
    /// From QEMU's start until the guest said that it was up.
    pub boot: Duration,
    /// The guest's own clock at that moment.
    pub guest_uptime: Duration,
}

/// A running guest. Dropping it kills QEMU, stops the devices and removes its folder.
pub struct Guest {
    // In this order they are dropped: QEMU before the devices it talks to, the folder last.
    vm: Option<Vm>,
    fleet: Fleet,
    plan: Plan,
    times: BootTimes,
    kernel_release: String,
    folder: TempDir,
}

/// What is needed to boot again.
struct Plan {
    builder: GuestBuilder,
    kernel_image: PathBuf,
    initrd: PathBuf,
    memory_mib: u64,
}

impl Guest {
    fn boot(builder: GuestBuilder) -> Result<Self, GuestError> {
        let kernel = builder.artifacts.kernel(builder.kernel).ok_or(GuestError::NoKernel(builder.kernel))?;
        let kernel_image = kernel.image.clone();
        let agent = find_agent(builder.agent.as_deref())?;
        let folder = guest_folder()?;

        let start = Instant::now();
        let cache = builder.artifacts.cache().derived();
        let mut tree = Tree::base(&builder.artifacts, builder.kernel, &stripped(&agent, &cache)?, &builder.hostname)?;
        for (host, guest) in &builder.binaries {
            tree.add(&Add { host: stripped(host, &cache)?, guest: guest.clone() })?;
        }
        for add in &builder.adds {
            tree.add(add)?;
        }
        let initrd = folder.path().join("initrd");
        tree.write(&initrd)?;
        let image = start.elapsed();

        let fleet = Fleet::start(FleetConfig {
            socket_dir: folder.path().join("dev"),
            devices: builder.topology.devices.iter().map(|device| device.spec.clone()).collect(),
            knob_file: builder.knob_file.clone(),
            trace_file: builder.trace_file.clone(),
        })?;
        // The image is in memory twice while it is unpacked, and a root file system may take half of the memory.
        let image_mib = (tree.size() >> 20) + 1;
        let memory_mib = u64::from(builder.topology.vm.memory_mib).max(256 + 3 * image_mib);
        let plan = Plan { builder, kernel_image, initrd, memory_mib };
        let times = BootTimes { image, boot: Duration::ZERO, guest_uptime: Duration::ZERO };
        let mut guest = Self { vm: None, fleet, plan, times, kernel_release: String::new(), folder };
        guest.start()?;
        Ok(guest)
    }

    fn start(&mut self) -> Result<(), GuestError> {
        let builder = &self.plan.builder;
        let devices: Vec<&Path> = builder
            .topology
            .devices
            .iter()
            .map(|device| self.fleet.socket(&device.spec.name))
            .collect::<Result<_, _>>()?;
        let modules = if builder.load_vfio { "" } else { " lab.modules=none" };
        // A guest that is starved of time while it boots may not get to read its clock, and begin in 1970.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let folder = self.folder.path();
        let at = |name: &str| folder.join(name);
        let machine = Machine {
            topology: &builder.topology,
            kernel: &self.plan.kernel_image,
            initrd: &self.plan.initrd,
            memory_mib: self.plan.memory_mib,
            append: &format!("lab.hostname={}{modules}{} lab.time={now}", builder.hostname, builder.append),
            console: &at("console.log"),
            agent: &at("agent.sock"),
            qmp: &at("qmp.sock"),
            devices: &devices,
        };
        let mut command = builder.artifacts.qemu.command();
        command.args(qemu::arguments(&machine)).current_dir(folder);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let start = Instant::now();
        let (vm, ready) = Vm::start(command, &machine, builder.boot_timeout, builder.lifetime)?;
        self.times.boot = start.elapsed();
        self.times.guest_uptime = ready.uptime;
        self.kernel_release = ready.kernel;
        self.vm = Some(vm);
        Ok(())
    }

    fn vm(&self) -> Result<&Vm, GuestError> {
        self.vm.as_ref().ok_or(GuestError::Off)
    }

    /// Starts a process.
    ///
    /// # Errors
    ///
    /// [`GuestError::Agent`] with [`AgentError::Failed`], if the program cannot be run.
    pub fn spawn(&self, command: Command) -> Result<Process, GuestError> {
        Ok(self.vm()?.agent.spawn(command)?)
    }

    /// Runs a program to its end and collects its output. Its exit code is the caller's to judge.
    ///
    /// # Errors
    ///
    /// [`GuestError::Timeout`], the program's whole process group then being killed; those of [`Guest::spawn`].
    pub fn run<S: AsRef<str>>(&self, argv: &[S], timeout: Duration) -> Result<Output, GuestError> {
        let words: Vec<&str> = argv.iter().map(AsRef::as_ref).collect();
        self.finish(&words.join(" "), Command::new(words.iter().copied()), timeout)
    }

    /// Runs a shell script to its end and collects its output.
    ///
    /// # Errors
    ///
    /// As for [`Guest::run`].
    pub fn shell(&self, script: &str, timeout: Duration) -> Result<Output, GuestError> {
        self.finish(script, Command::shell(script), timeout)
    }

    fn finish(&self, name: &str, command: Command, timeout: Duration) -> Result<Output, GuestError> {
        let process = self.spawn(command)?;
        match process.wait(timeout) {
            Ok(_) => Ok(process.output()),
            Err(AgentError::Timeout { after, .. }) => {
                // It may have ended just now; then there is nothing to kill.
                let _ = process.signal(Signal::SIGKILL);
                let Output { mut stdout, stderr, .. } = process.output();
                stdout.extend_from_slice(&stderr);
                let from = stdout.len().saturating_sub(TAIL);
                let written = String::from_utf8_lossy(&stdout[from..]).into_owned();
                Err(GuestError::Timeout { command: name.to_owned(), after, written })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a file, by way of a temporary one beside it; missing folders are made.
    ///
    /// # Errors
    ///
    /// [`GuestError::Agent`].
    pub fn put_file(&self, content: &[u8], path: &str, mode: u32) -> Result<(), GuestError> {
        Ok(self.vm()?.agent.put(&mut &*content, path, mode)?)
    }

    /// Copies a file of the host into the guest, with its mode.
    ///
    /// # Errors
    ///
    /// [`GuestError::File`], if it cannot be read here; [`GuestError::Agent`].
    pub fn copy_file(&self, host: &Path, path: &str) -> Result<(), GuestError> {
        let unreadable = |source| GuestError::File { act: "read", path: host.to_owned(), source };
        let mut file = fs::File::open(host).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode();
        Ok(self.vm()?.agent.put(&mut file, path, mode)?)
    }

    /// Reads a file, which may be one of sysfs.
    ///
    /// # Errors
    ///
    /// [`GuestError::Agent`].
    pub fn get_file(&self, path: &str) -> Result<Vec<u8>, GuestError> {
        Ok(self.vm()?.agent.get(path)?)
    }

    /// The virtual devices.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The topology it was made from.
    pub fn topology(&self) -> &Topology {
        &self.plan.builder.topology
    }

    /// `uname -r` of the guest.
    pub fn kernel_release(&self) -> &str {
        &self.kernel_release
    }

    /// How long the last boot took.
    pub fn boot_times(&self) -> BootTimes {
        self.times
    }

    /// A device's address in the guest, `0000:bb:dd.f`.
    ///
    /// # Errors
    ///
    /// [`GuestError::NoDevice`], if it is not plugged in.
    pub fn bdf(&self, device: &str) -> Result<String, GuestError> {
        let answer = self.qmp(&json!({ "execute": "query-pci" }))?;
        qemu::find_address(&answer, device).ok_or_else(|| GuestError::NoDevice(device.to_owned()))
    }

    /// Sends a command to QEMU's control connection, and returns what it returns.
    ///
    /// # Errors
    ///
    /// [`GuestError::Qmp`], with QEMU's words.
    pub fn qmp(&self, command: &Value) -> Result<Value, GuestError> {
        let mut qmp = lock(&self.vm()?.qmp);
        qmp.execute(command).map_err(|source| GuestError::Qmp { what: command.to_string(), source })
    }

    /// Waits for an event on QEMU's control connection.
    ///
    /// # Errors
    ///
    /// [`GuestError::Qmp`], if it does not come in time.
    pub fn qmp_event(&self, name: &str, timeout: Duration) -> Result<Value, GuestError> {
        let mut qmp = lock(&self.vm()?.qmp);
        qmp.wait_event(name, timeout).map_err(|source| GuestError::Qmp { what: name.to_owned(), source })
    }

    /// Takes a device out through its port as if by the button there, and waits until the guest has let go of it. It keeps its
    /// knobs.
    ///
    /// # Errors
    ///
    /// [`GuestError::SharedSlot`], [`GuestError::NoDevice`] if it is none of the topology; [`GuestError::Qmp`] if it is not
    /// plugged in or not let go of in time.
    pub fn unplug(&self, device: &str, timeout: Duration) -> Result<(), GuestError> {
        self.whole_slot(device)?;
        let deadline = Instant::now() + timeout;
        self.qmp(&json!({ "execute": "device_del", "arguments": { "id": device } }))?;
        loop {
            let event = self.qmp_event("DEVICE_DELETED", deadline.saturating_duration_since(Instant::now()))?;
            if event["data"]["device"] == device {
                return Ok(());
            }
        }
    }

    /// Plugs a device in that was taken out, or was absent from the start. The guest finds it a little later.
    ///
    /// # Errors
    ///
    /// As [`Guest::unplug`]; [`GuestError::Qmp`] if it is plugged in.
    pub fn plug(&self, device: &str) -> Result<(), GuestError> {
        let found = self.whole_slot(device)?;
        let options = qemu::options(self.topology(), found, self.fleet.socket(device)?);
        self.qmp(&json!({ "execute": "device_add", "arguments": options }))?;
        Ok(())
    }

    fn whole_slot(&self, name: &str) -> Result<&Device, GuestError> {
        let devices = &self.topology().devices;
        let device = devices.iter().find(|device| device.spec.name == name);
        let device = device.ok_or_else(|| GuestError::NoDevice(name.to_owned()))?;
        if self.topology().shares_slot(device) { Err(GuestError::SharedSlot(name.to_owned())) } else { Ok(device) }
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self) -> String {
        tail(&self.console_path())
    }

    /// The whole console of the last boot; the file goes with the guest.
    pub fn console_path(&self) -> PathBuf {
        self.folder.path().join("console.log")
    }

    /// Whether QEMU runs.
    pub fn is_running(&self) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.shared.lock().ended.is_none())
    }

    /// Ends all processes in order and powers off; the devices stay, with their knobs.
    ///
    /// # Errors
    ///
    /// [`GuestError::PowerOff`], if it had to be killed.
    pub fn power_off(&mut self) -> Result<(), GuestError> {
        const GRACE: Duration = Duration::from_secs(10);
        const REST: Duration = Duration::from_secs(10);
        let Some(vm) = self.vm.take() else { return Ok(()) };
        // A guest that is gone already is as off as one that obeys.
        let _ = vm.agent.power(false, GRACE);
        let ended = vm.shared.wait_end(GRACE + REST);
        drop(vm);
        if ended { Ok(()) } else { Err(GuestError::PowerOff { after: GRACE + REST, console: self.console_tail() }) }
    }

    /// Takes the power away, as a crash does; the devices stay, with their knobs.
    pub fn power_cut(&mut self) {
        self.vm = None;
    }

    /// Boots again, with the same image, devices and knobs. Powers off first if need be.
    ///
    /// # Errors
    ///
    /// Those of [`Guest::power_off`] and of booting.
    pub fn reboot(&mut self) -> Result<(), GuestError> {
        self.power_off()?;
        self.times.image = Duration::ZERO;
        self.start()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find_agent(given: Option<&Path>) -> Result<PathBuf, GuestError> {
    const NAME: &str = "lab-guest";
    if let Some(path) = given.map(Path::to_owned).or_else(|| std::env::var_os("CCNODE_LAB_GUEST").map(PathBuf::from)) {
        return if path.is_file() { Ok(path) } else { Err(GuestError::NoAgent(path)) };
    }
    let program =
        std::env::current_exe().map_err(|source| GuestError::File { act: "find", path: NAME.into(), source })?;
    // Test programs and examples are one folder below the others.
    let mut folders = program.ancestors().skip(1).take(2);
    let beside = program.with_file_name(NAME);
    folders.find_map(|folder| Some(folder.join(NAME)).filter(|path| path.is_file())).ok_or(GuestError::NoAgent(beside))
}

/// A folder of its own, short enough for sockets.
fn guest_folder() -> Result<TempDir, GuestError> {
    let mut parents = vec![std::env::temp_dir(), PathBuf::from("/tmp")];
    parents.retain(|parent| parent.as_os_str().len() + "/ccnode-lab-123456".len() + LONGEST_NAME <= SOCKET_PATH);
    let parent = parents.first().ok_or_else(|| GuestError::TooDeep(std::env::temp_dir()))?;
    tempfile::Builder::new().prefix("ccnode-lab-").tempdir_in(parent).map_err(|source| GuestError::File {
        act: "make a folder in",
        path: parent.clone(),
        source,
    })
}

/// The end of a file as text, from the beginning of a line.
fn tail(path: &Path) -> String {
    crate::artifacts::tail(path, TAIL as u64)
}

/// One run of QEMU.
struct Vm {
    agent: Arc<Agent>,
    qmp: Mutex<Qmp>,
    shared: Arc<VmShared>,
    supervisor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct VmShared {
    state: Mutex<VmState>,
    changed: Condvar,
}

#[derive(Default)]
struct VmState {
    /// Why QEMU is no more.
    ended: Option<String>,
    kill: bool,
    /// The last of what it wrote to standard error.
    errors: VecDeque<u8>,
}

impl VmShared {
    fn lock(&self) -> MutexGuard<'_, VmState> {
        lock(&self.state)
    }

    fn wait_end(&self, timeout: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |state| state.ended.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.ended.is_some()
    }

    fn errors(&self) -> String {
        let bytes: Vec<u8> = self.lock().errors.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }
}

impl Vm {
    fn start(
        mut command: std::process::Command,
        machine: &Machine<'_>,
        boot_timeout: Duration,
        lifetime: Duration,
    ) -> Result<(Self, Ready), GuestError> {
        let listen = |path: &Path| -> Result<UnixListener, GuestError> {
            let failed = |source| GuestError::File { act: "listen on", path: path.to_owned(), source };
            // Left there by the boot before.
            let _ = fs::remove_file(path);
            let listener = UnixListener::bind(path).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Ok(listener)
        };
        let (agent, qmp) = (listen(machine.agent)?, listen(machine.qmp)?);
        let shared = Arc::new(VmShared::default());
        let (sender, started) = std::sync::mpsc::channel();
        let supervised = Arc::clone(&shared);
        // The kernel ends QEMU when the *thread* that started it ends, so that thread stays with it.
        let supervisor = thread::Builder::new().name("lab-qemu".to_owned()).spawn(move || match command.spawn() {
            Ok(child) => {
                let _ = sender.send(Ok(()));
                supervise(child, &supervised, lifetime);
            }
            Err(error) => {
                let _ = sender.send(Err(error));
            }
        });
        let supervisor = supervisor.map_err(GuestError::Qemu)?;
        started.recv().unwrap_or_else(|_| Err(io::Error::other("Its thread ended"))).map_err(GuestError::Qemu)?;
        // From here on every way out ends QEMU.
        let pending = Pending { shared: Arc::clone(&shared), supervisor: Some(supervisor) };
        let deadline = Instant::now() + boot_timeout;
        let failed = || {
            let (errors, console) = (pending.shared.errors(), tail(machine.console));
            let ended = pending.shared.lock().ended.clone();
            match ended {
                Some(reason) => GuestError::Ended { reason, errors, console },
                None => GuestError::BootTimeout { after: boot_timeout, errors, console },
            }
        };
        let accept = |listener: &UnixListener| -> Result<UnixStream, GuestError> {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).map_err(GuestError::Qemu)?;
                        return Ok(stream);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(GuestError::Qemu(error)),
                }
                if pending.shared.wait_end(Duration::from_millis(5)) || Instant::now() >= deadline {
                    return Err(failed());
                }
            }
        };
        let agent = Agent::new(accept(&agent)?).map_err(GuestError::Qemu)?;
        let qmp = accept(&qmp)?;
        let qmp = Qmp::new(qmp).map_err(|source| {
            if pending.shared.wait_end(Duration::from_millis(200)) {
                failed()
            } else {
                GuestError::Qmp { what: "greeting".to_owned(), source }
            }
        })?;
        let ready = loop {
            match agent.poll_ready(Duration::from_millis(50)) {
                Ok(Some(ready)) => break ready,
                Ok(None) if Instant::now() < deadline => {}
                Ok(None) => return Err(failed()),
                Err(_) => {
                    // The connection is closed a moment before QEMU is seen to have ended.
                    pending.shared.wait_end(Duration::from_secs(2));
                    return Err(failed());
                }
            }
        };
        if ready.version != wire::VERSION {
            return Err(GuestError::Protocol { theirs: ready.version, ours: wire::VERSION });
        }
        if !ready.problems.is_empty() {
            return Err(GuestError::Problems(ready.problems));
        }
        let mut pending = pending;
        let supervisor = pending.supervisor.take();
        Ok((Self { agent, qmp: Mutex::new(qmp), shared, supervisor }, ready))
    }
}

fn end(shared: &VmShared, supervisor: &mut Option<JoinHandle<()>>) {
    if let Some(supervisor) = supervisor.take() {
        shared.lock().kill = true;
        shared.changed.notify_all();
        let _ = supervisor.join();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        end(&self.shared, &mut self.supervisor);
    }
}

/// A QEMU whose guest is not up yet.
struct Pending {
    shared: Arc<VmShared>,
    supervisor: Option<JoinHandle<()>>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        end(&self.shared, &mut self.supervisor);
    }
}

/// Stays with QEMU until it ends, is to be killed, or has lived too long.
fn supervise(mut child: Child, shared: &Arc<VmShared>, lifetime: Duration) {
    let reader = child.stderr.take().map(|errors| {
        let shared = Arc::clone(shared);
        thread::spawn(move || keep_tail(errors, &shared))
    });
    let deadline = Instant::now() + lifetime;
    let reason = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.to_string(),
            Ok(None) => {}
            Err(error) => break error.to_string(),
        }
        let state = shared.lock();
        let kill = if state.kill {
            Some("killed by the lab".to_owned())
        } else if Instant::now() >= deadline {
            Some(format!("killed after its lifetime of {} s", lifetime.as_secs()))
        } else {
            None
        };
        if let Some(reason) = kill {
            drop(state);
            let _ = child.kill();
            let _ = child.wait();
            break reason;
        }
        drop(shared.changed.wait_timeout(state, Duration::from_millis(20)));
    };
    if let Some(reader) = reader {
        let _ = reader.join();
    }
    shared.lock().ended = Some(reason);
    shared.changed.notify_all();
}

/// Reads to the end and keeps little: with its devices gone, QEMU writes thousands of lines.
fn keep_tail(mut errors: impl Read, shared: &VmShared) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = errors.read(&mut buffer) {
        let mut state = shared.lock();
        state.errors.extend(&buffer[..read]);
        let over = state.errors.len().saturating_sub(TAIL);
        state.errors.drain(..over);
    }
}

/// For callers that turn a program's end into their own exit code.
pub fn exit_code(status: Status) -> u8 {
    u8::try_from(status.code() & 0xff).unwrap_or(255)
}
