//! The command line.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use lab::control::{self, Control};
use lab::{Boot, demo, replay};
use lab_vm::{
    Add, AgentError, Artifacts, Cache, Command as GuestCommand, GuestError, Kernel, Stream, Wanted, exit_code,
};
use nix::sys::signal::Signal;
use tracing_subscriber::EnvFilter;

/// Exit code when the time is over, as of timeout(1).
const TIMED_OUT: u8 = 124;

/// Virtual GPUs under a real kernel.
#[derive(Debug, Parser)]
#[command(name = "lab", bin_name = "cargo lab", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest, run one command in it as root, and exit with its exit code (124: out of time, 125: the lab failed).
    Run(Run),
    /// Fetch and build what guests need (kernels, QEMU), once; later runs find it in the cache.
    Prepare {
        /// Only what guests of this kernel need: iommufd, no-group or stock, which alone need not be built.
        #[arg(long, value_parser = kernel)]
        kernel: Option<Kernel>,
    },
    /// The road, end to end: the node label `on` becomes a pod's confidential GPU.
    Demo(Demo),
    /// Make something wrong with a device of a running guest, at once.
    Fault(FaultArgs),
    /// The topologies that come with the lab.
    Topologies,
    /// Print a topology like the node that a bundle is of (`ccnode bundle`); its comments say what cannot be played.
    TopologyOf {
        /// The bundle, or the root directory of a recorded tree.
        bundle: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// Which devices sit where: one of `cargo lab topologies`, a TOML file, or a bundle of a node (`.tar.gz`).
    #[arg(long, default_value = "h100x2")]
    topology: String,
    /// Kernel: iommufd, no-group (no VFIO group files) or stock (Debian's, without iommufd); the topology's otherwise.
    #[arg(long, value_parser = kernel)]
    kernel: Option<Kernel>,
    /// Lay a folder of this machine over the guest's root, or put a single file there; may be repeated.
    #[arg(long, value_name = "HOSTDIR:GUESTDIR", value_parser = add)]
    add: Vec<Add>,
    /// End the command and the guest when the command has run for this many seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Write every BAR0 and config access of each device to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Keep the devices' knobs in this file from one run to the next.
    #[arg(long, value_name = "FILE")]
    knobs: Option<PathBuf>,
    /// Take faults for the devices over this socket while the guest runs. Without, it is where `cargo lab fault` looks, unless
    /// another run listens there; with `default` that is an error.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Words for the kernel's command line.
    #[arg(long, default_value = "")]
    append: String,
    /// Memory of the guest in MiB, when the topology's is too little for what is added.
    #[arg(long)]
    memory: Option<u32>,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

#[derive(Debug, Args)]
struct FaultArgs {
    /// The run's control socket, as given to its --control.
    #[arg(long, value_name = "SOCKET", default_value_os_t = control::default_path())]
    control: PathBuf,
    /// The device, by its name in the topology.
    device: String,
    /// The fault (`boot-never-completes`, `bar-all-ones`, `fsp-late-reply`, ...), or `clear`, `status`, `unplug`, `plug`.
    fault: String,
    /// The fault's arguments; `fsp-late-reply 500` and `fsp-late-reply:500` are the same.
    args: Vec<String>,
}

#[derive(Debug, Args)]
struct Demo {
    /// Which devices sit where.
    #[arg(long, default_value = "h100x2")]
    topology: String,
    /// Print what happened as JSON instead.
    #[arg(long)]
    json: bool,
}

fn kernel(text: &str) -> Result<Kernel, String> {
    let found = Kernel::ALL.into_iter().find(|kernel| kernel.name() == text);
    found.ok_or_else(|| format!("one of {}", Kernel::ALL.map(Kernel::name).join(", ")))
}

fn add(text: &str) -> Result<Add, String> {
    text.parse::<Add>().map_err(|error| error.to_string())
}

impl Cli {
    /// Runs the command line.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
        match self.command {
            Command::Run(run) => run.run(),
            Command::Prepare { kernel } => {
                let wanted = kernel.map_or_else(Wanted::everything, Wanted::kernel);
                Artifacts::ensure(&Cache::from_env()?, &wanted)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Fault(FaultArgs { control, device, fault, args }) => {
                let fault = [&[fault][..], &args].concat().join(":");
                let request = match fault.as_str() {
                    "clear" | "status" | "unplug" | "plug" => format!("{fault} {device}"),
                    _ => format!("fault {device} {fault}"),
                };
                println!("{}", control::ask(&control, &request)?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Demo(Demo { topology, json }) => demo::run(&topology, json),
            Command::TopologyOf { bundle } => {
                std::io::stdout().write_all(replay::topology_of(&bundle)?.toml.as_bytes())?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Topologies => {
                for name in lab_vm::topology::shipped() {
                    println!("{name}");
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Run {
    fn run(self) -> anyhow::Result<ExitCode> {
        let Self { topology, kernel, add, timeout, trace, knobs, control, append, memory, argv } = self;
        let mut boot = Boot::new(&topology)?;
        boot.kernel = kernel;
        boot.adds = add;
        boot.trace_file = trace;
        boot.knob_file = knobs;
        boot.append = append;
        boot.memory_mib = memory;
        let timeout = Duration::from_secs(timeout);
        boot.lifetime = timeout + Duration::from_mins(5);
        let control = match control {
            Some(path) if path == Path::new("default") => Some(Control::listen(&control::default_path())?),
            Some(path) => Some(Control::listen(&path)?),
            None => Control::listen(&control::default_path())
                .inspect_err(|error| tracing::info!("this run takes no faults: {error:#}"))
                .ok(),
        };
        let mut guest = boot.guest()?;
        let command = GuestCommand::new(argv).on_output(|chunk| {
            // A closed pipe on our side must not end the command over there; its exit code still counts.
            let _ = match chunk.stream {
                Stream::Stdout => std::io::stdout().write_all(&chunk.data).and_then(|()| std::io::stdout().flush()),
                Stream::Stderr => std::io::stderr().write_all(&chunk.data),
            };
        });
        let process = match guest.spawn(command) {
            Ok(process) => process,
            Err(GuestError::Agent(error)) => {
                eprintln!("lab: {error}");
                return Ok(ExitCode::from(127));
            }
            Err(error) => return Err(error.into()),
        };
        let stop = AtomicBool::new(false);
        let ended = thread::scope(|scope| {
            if let Some(control) = &control {
                scope.spawn(|| control.serve(&guest, &stop));
            }
            let ended = process.wait(timeout);
            stop.store(true, Ordering::Relaxed);
            ended
        });
        let code = match ended {
            Ok(status) => exit_code(status),
            Err(AgentError::Timeout { .. }) => {
                eprintln!("lab: the command has not ended in {} s", timeout.as_secs());
                // It ends with the guest, whether the signal still reaches it or not.
                let _ = process.signal(Signal::SIGKILL);
                TIMED_OUT
            }
            Err(error) => return Err(error.into()),
        };
        guest.fleet().flush_trace()?;
        guest.power_cut();
        Ok(ExitCode::from(code))
    }
}
