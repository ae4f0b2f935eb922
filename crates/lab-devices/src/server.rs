//! A fleet of virtual devices, each a vfio-user server on a Unix socket of its own, all in this process.
//!
//! QEMU connects to [`Fleet::socket`] at its start. When it closes a connection, the device is power-cycled and waits
//! for the next one; knobs and counters stay.
//!
//! Callbacks never sleep: a device that is slow is slow in model time, which here is real time.

use std::collections::BTreeSet;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Deserialize;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX, VFIO_PCI_BAR4_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::config_space;
use crate::fault::Fault;
use crate::knob_file::{KnobFile, KnobFileError};
use crate::model::{DeviceStatus, Model, ModelEvent};
use crate::spec::{DeviceSpec, SpecError};
use crate::trace::{self, Kind, Space, Trace, TraceEvent};

/// The longest socket path that the kernel takes, less its terminating zero.
const SOCKET_PATH: usize = 107;

/// How long a stopping fleet waits for connections to close. Whoever ends QEMU first never waits.
const STOP_TIME: Duration = Duration::from_secs(2);

/// What to start.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetConfig {
    /// Folder for the sockets, made if absent. Socket paths may have at most 107 bytes.
    pub socket_dir: PathBuf,
    /// The devices.
    pub devices: Vec<DeviceSpec>,
    /// Where knobs are kept between runs; what it has of a device goes before the device's own settings.
    #[serde(default)]
    pub knob_file: Option<PathBuf>,
    /// Where every access is written ([`trace`] has the format). An existing file is replaced.
    #[serde(default)]
    pub trace_file: Option<PathBuf>,
}

/// Why a fleet cannot be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A device cannot be as described.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Two devices of one name.
    #[error("Virtual device {0}: the name is taken by another device of the fleet")]
    DuplicateName(String),
    /// No device of that name.
    #[error("Virtual device {0:?} is not in the fleet")]
    UnknownDevice(String),
    /// The socket's path is too long for the kernel.
    #[error("Virtual device {name}: socket path {path} has more than 107 bytes; choose a shorter folder")]
    PathTooLong {
        /// The device.
        name: String,
        /// The path.
        path: PathBuf,
    },
    /// Something answers on the socket, or a file that is no socket is in the way.
    #[error("Virtual device {name}: {path} is in use")]
    SocketInUse {
        /// The device.
        name: String,
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("Virtual device {name}: socket {path} cannot be made")]
    Socket {
        /// The device.
        name: String,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder of the sockets cannot be made.
    #[error("Socket folder {path} cannot be made")]
    SocketDir {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The knob file is of no use.
    #[error(transparent)]
    KnobFile(#[from] KnobFileError),
    /// The trace file cannot be written.
    #[error("Trace file {path} cannot be written")]
    TraceFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("Virtual device {name}: its thread cannot be started")]
    Thread {
        /// The device.
        name: String,
        /// The cause.
        source: io::Error,
    },
}

struct Device {
    name: Arc<str>,
    socket: PathBuf,
    model: Mutex<Model>,
}

struct Shared {
    trace: Trace,
    knob_file: Option<KnobFile>,
    stopping: AtomicBool,
}

struct Worker {
    name: Arc<str>,
    /// A second handle of the listening socket; shutting it down ends the wait for a connection.
    listener: UnixStream,
    thread: JoinHandle<()>,
}

/// Running virtual devices. Dropping it stops them and removes their sockets; end QEMU first.
pub struct Fleet {
    devices: Vec<Arc<Device>>,
    shared: Arc<Shared>,
    trace_file: Option<PathBuf>,
    workers: Vec<Worker>,
}

impl Fleet {
    /// Starts all devices. When it returns, every socket takes connections.
    pub fn start(config: FleetConfig) -> Result<Fleet, FleetError> {
        let FleetConfig { socket_dir, devices: specs, knob_file, trace_file } = config;
        let mut names = BTreeSet::new();
        for spec in &specs {
            spec.validate()?;
            if !names.insert(spec.name.as_str()) {
                return Err(FleetError::DuplicateName(spec.name.clone()));
            }
        }
        std::fs::create_dir_all(&socket_dir)
            .map_err(|source| FleetError::SocketDir { path: socket_dir.clone(), source })?;
        let knob_file = knob_file.as_deref().map(KnobFile::open).transpose()?;
        let trace = Trace::new(trace_file.as_deref(), trace::MEMORY_EVENTS)
            .map_err(|source| FleetError::TraceFile { path: trace_file.clone().unwrap_or_default(), source })?;
        let shared = Arc::new(Shared { trace, knob_file, stopping: AtomicBool::new(false) });
        let mut fleet = Fleet { devices: Vec::new(), shared, trace_file, workers: Vec::new() };
        for spec in specs {
            fleet.add(&socket_dir, spec)?;
        }
        Ok(fleet)
    }

    fn add(&mut self, socket_dir: &Path, spec: DeviceSpec) -> Result<(), FleetError> {
        let name = spec.name.clone();
        let socket = socket_dir.join(format!("{name}.sock"));
        let (listener, handle) = listen(&name, &socket)?;
        let regions = regions(&spec);
        let mut model = Model::new(spec, self.shared.trace.now());
        if let Some(knobs) = self.shared.knob_file.as_ref().and_then(|file| file.knobs(&name)) {
            let unknown = model.restore_knobs(&knobs);
            if !unknown.is_empty() {
                tracing::warn!(device = name, knobs = ?unknown, "The knob file has knobs that this device lacks");
            }
        }
        let device = Arc::new(Device { name: name.as_str().into(), socket, model: Mutex::new(model) });
        // From here on the socket file is the fleet's to remove.
        self.devices.push(Arc::clone(&device));
        let shared = Arc::clone(&self.shared);
        let server = Server::from_owned_fd(OwnedFd::from(listener), true, no_irqs(), regions);
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn({
                let device = Arc::clone(&device);
                move || serve(&server, &device, &shared)
            })
            .map_err(|source| FleetError::Thread { name, source })?;
        self.workers.push(Worker { name: Arc::clone(&device.name), listener: handle, thread });
        Ok(())
    }

    /// The names of the devices, in the order in which they were given.
    pub fn names(&self) -> Vec<&str> {
        self.devices.iter().map(|device| &*device.name).collect()
    }

    /// The socket of a device.
    pub fn socket(&self, name: &str) -> Result<&Path, FleetError> {
        Ok(&self.device(name)?.socket)
    }

    /// What a device is doing. Guest writes are posted, so one that the guest has just made may not have arrived; a
    /// read by the guest from the same device settles that.
    pub fn status(&self, name: &str) -> Result<DeviceStatus, FleetError> {
        Ok(self.device(name)?.touch(&self.shared, Model::status))
    }

    /// Makes something wrong with a device, at once.
    pub fn set_fault(&self, name: &str, fault: Fault) -> Result<(), FleetError> {
        self.device(name)?.touch(&self.shared, |model, now| {
            model.spec().check_fault(&fault)?;
            model.set_fault(now, fault);
            Ok(())
        })
    }

    /// Takes all faults of a device away, at once.
    pub fn clear_faults(&self, name: &str) -> Result<(), FleetError> {
        self.device(name)?.touch(&self.shared, Model::clear_faults);
        Ok(())
    }

    /// A copy of the trace so far, brought up to now.
    pub fn trace(&self) -> Vec<TraceEvent> {
        self.catch_up();
        self.shared.trace.with(<[_]>::to_vec)
    }

    /// Lets the devices do what is due, which otherwise waits for the next access.
    fn catch_up(&self) {
        for device in &self.devices {
            device.touch(&self.shared, Model::advance);
        }
    }

    /// Time on the clock of the trace: microseconds since the fleet was started.
    pub fn micros(&self) -> u64 {
        trace::micros(self.shared.trace.now())
    }

    /// Whether events had to be left out of the trace in memory since it was last cleared.
    pub fn trace_overflowed(&self) -> bool {
        self.shared.trace.overflowed()
    }

    /// Empties the trace in memory, of what is due by now as well. The file stays.
    pub fn clear_trace(&self) {
        self.catch_up();
        self.shared.trace.clear();
    }

    /// Writes what is still buffered to the trace file.
    pub fn flush_trace(&self) -> Result<(), FleetError> {
        self.shared
            .trace
            .flush()
            .map_err(|source| FleetError::TraceFile { path: self.trace_file.clone().unwrap_or_default(), source })
    }

    fn device(&self, name: &str) -> Result<&Device, FleetError> {
        self.devices
            .iter()
            .find(|device| &*device.name == name)
            .map(Arc::as_ref)
            .ok_or_else(|| FleetError::UnknownDevice(name.chars().take(64).collect()))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in &self.workers {
            if let Err(error) = worker.listener.shutdown(Shutdown::Both) {
                tracing::debug!(device = &*worker.name, %error, "The listening socket was shut down before");
            }
        }
        let deadline = Instant::now() + STOP_TIME;
        for worker in self.workers.drain(..) {
            while !worker.thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
            if !worker.thread.is_finished() {
                // The connection is the peer's to close; the thread ends with it.
                tracing::warn!(device = &*worker.name, "A client is still connected to a fleet that is stopping");
            } else if worker.thread.join().is_err() {
                tracing::error!(device = &*worker.name, "The device's thread panicked");
            }
        }
        for device in &self.devices {
            if let Err(error) = std::fs::remove_file(&device.socket) {
                tracing::debug!(device = &*device.name, %error, "The socket was gone already");
            }
        }
        if let Err(error) = self.shared.trace.flush() {
            tracing::error!(%error, "The end of the trace was not written");
        }
    }
}

/// A listening socket and a second handle of it. A socket that nothing listens on any more is replaced.
fn listen(name: &str, socket: &Path) -> Result<(UnixListener, UnixStream), FleetError> {
    if socket.as_os_str().len() > SOCKET_PATH {
        return Err(FleetError::PathTooLong { name: name.to_owned(), path: socket.to_path_buf() });
    }
    let failed = |source| FleetError::Socket { name: name.to_owned(), path: socket.to_path_buf(), source };
    match std::fs::symlink_metadata(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(file) if !file.file_type().is_socket() || UnixStream::connect(socket).is_ok() => {
            return Err(FleetError::SocketInUse { name: name.to_owned(), path: socket.to_path_buf() });
        }
        Ok(_) => std::fs::remove_file(socket).map_err(failed)?,
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    // Only a stream has `shutdown` in std, and the call is the same for any socket.
    let handle = UnixStream::from(OwnedFd::from(listener.try_clone().map_err(failed)?));
    Ok((listener, handle))
}

/// One connection after the other, until the fleet stops.
fn serve(server: &Server, device: &Device, shared: &Shared) {
    let mut backend = Backend { device, shared };
    loop {
        // The library unwraps on a malformed greeting; that must not cost the device.
        let result = catch_unwind(AssertUnwindSafe(|| server.run(&mut backend)));
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        match result {
            Ok(Ok(())) => tracing::debug!(device = &*device.name, "The connection was closed"),
            Ok(Err(vfio_user::Error::SocketAccept(error))) => {
                tracing::error!(device = &*device.name, %error, "No more connections can be taken");
                return;
            }
            Ok(Err(error)) => tracing::warn!(device = &*device.name, %error, "The connection broke"),
            Err(_) => tracing::warn!(device = &*device.name, "The connection was given up: malformed message"),
        }
        device.touch(shared, Model::power_on);
    }
}

impl Device {
    /// Works on the model at the present time, and passes on what happened in it.
    fn touch<R>(&self, shared: &Shared, work: impl FnOnce(&mut Model, Duration) -> R) -> R {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let result = work(&mut model, shared.trace.now());
        self.publish(shared, &mut model);
        result
    }

    fn publish(&self, shared: &Shared, model: &mut Model) {
        let mut knobs_changed = false;
        for (at, event) in model.take_events() {
            let (kind, offset, value, note) = match event {
                ModelEvent::PowerOn => (Kind::PowerOn, 0, 0, None),
                ModelEvent::FunctionReset => (Kind::Flr, 0, 0, None),
                ModelEvent::BusReset => (Kind::BusReset, 0, 0, None),
                ModelEvent::Ready(status) => (Kind::Ready, 0, u64::from(status), None),
                ModelEvent::Rpc { channel, request, reply } => {
                    let code = reply.as_ref().and_then(|words| words.get(4)).copied().unwrap_or(0);
                    let note = trace::Words(&request, reply.as_deref()).to_string();
                    (Kind::Rpc, u64::from(channel), u64::from(code), Some(note.into()))
                }
                ModelEvent::KnobChanged { .. } => {
                    knobs_changed = true;
                    continue;
                }
            };
            shared.trace.record(TraceEvent {
                micros: trace::micros(at),
                device: Arc::clone(&self.name),
                kind,
                space: Space::Device,
                offset,
                width: 0,
                value,
                note,
            });
        }
        if knobs_changed
            && let Some(file) = &shared.knob_file
            && let Err(error) = file.save(&self.name, model.knobs())
        {
            tracing::error!(device = &*self.name, %error, "Knobs are not kept");
        }
    }

    /// Records an access. What the access caused comes after it in the trace, what had become due before it.
    fn access(
        &self,
        shared: &Shared,
        kind: Kind,
        space: Space,
        offset: u64,
        work: impl FnOnce(&mut Model, Duration) -> (usize, u64),
    ) {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let now = shared.trace.now();
        model.advance(now);
        self.publish(shared, &mut model);
        let (width, value) = work(&mut model, now);
        shared.trace.record(TraceEvent {
            micros: trace::micros(now),
            device: Arc::clone(&self.name),
            kind,
            space,
            offset,
            width: u32::try_from(width).unwrap_or(u32::MAX),
            value,
            note: None,
        });
        self.publish(shared, &mut model);
    }
}

/// The callbacks of one device.
struct Backend<'a> {
    device: &'a Device,
    shared: &'a Shared,
}

impl ServerBackend for Backend<'_> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let Some(space) = space(region) else {
            data.fill(0xff);
            return Ok(());
        };
        self.device.access(self.shared, Kind::Read, space, offset, |model, now| {
            model.read(now, space, offset, data);
            (data.len(), first_bytes(data))
        });
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(space) = space(region) else { return Ok(()) };
        self.device.access(self.shared, Kind::Write, space, offset, |model, now| {
            model.write(now, space, offset, data);
            (data.len(), first_bytes(data))
        });
        Ok(())
    }

    /// The devices do no DMA; the guest's IOMMU sends these all the same.
    fn dma_map(&mut self, _: DmaMapFlags, _: u64, _: u64, _: u64, _: Option<std::fs::File>) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.device.touch(self.shared, Model::bus_reset);
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<std::fs::File>) -> io::Result<()> {
        Ok(())
    }
}

/// What is behind a VFIO region.
fn space(region: u32) -> Option<Space> {
    match region {
        VFIO_PCI_BAR0_REGION_INDEX => Some(Space::Bar0),
        VFIO_PCI_BAR2_REGION_INDEX => Some(Space::Bar2),
        VFIO_PCI_BAR4_REGION_INDEX => Some(Space::Bar4),
        VFIO_PCI_CONFIG_REGION_INDEX => Some(Space::Config),
        _ => None,
    }
}

/// All nine regions by number; those that a device lacks have no size. Nothing can be mapped, so that every access
/// arrives here.
fn regions(spec: &DeviceSpec) -> Vec<ServerRegion> {
    (0..VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let size = match index {
                VFIO_PCI_CONFIG_REGION_INDEX => config_space::SIZE as u64,
                _ => spec.bar_size(index),
            };
            let flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
            let argsz = u32::try_from(size_of::<vfio_region_info>()).unwrap_or(0);
            let region_info = vfio_region_info { argsz, flags, index, size, ..Default::default() };
            ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
        })
        .collect()
}

fn no_irqs() -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS).map(|index| IrqInfo { index, flags: 0, count: 0 }).collect()
}

/// Up to eight bytes as a little-endian number.
fn first_bytes(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
