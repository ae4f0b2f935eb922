//! From the name of a topology to a running guest with the workspace's programs in it.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use lab_vm::{Add, Artifacts, Cache, Guest, GuestBuilder, Kernel, Topology, Wanted};

use crate::programs::{self, PROGRAMS};
use crate::replay;

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct Boot {
    /// Its devices.
    pub topology: Topology,
    /// Another kernel than the topology's.
    pub kernel: Option<Kernel>,
    /// Folders and files of the host to lay over the guest's root.
    pub adds: Vec<Add>,
    /// Further programs of the host, which go in without their debug information.
    pub programs: Vec<Add>,
    /// Where knobs are kept from one run to the next.
    pub knob_file: Option<PathBuf>,
    /// Where every access to the devices is written.
    pub trace_file: Option<PathBuf>,
    /// Words for the kernel's command line.
    pub append: String,
    /// Memory in MiB, where the topology's is not enough.
    pub memory_mib: Option<u32>,
    /// Leave VFIO's modules to be loaded by whoever needs them, by `modprobe`.
    pub without_vfio_modules: bool,
    /// How long the guest may run before it is ended, whatever it does.
    pub lifetime: Duration,
}

impl Boot {
    /// A guest of a shipped topology, of the one in a file, or of one like the node that a bundle is of.
    pub fn new(topology: &str) -> anyhow::Result<Self> {
        let topology = if replay::is_bundle(topology) {
            let found = replay::topology_of(Path::new(topology))?;
            for line in &found.differences {
                tracing::warn!("Not as on the node: {line}");
            }
            Topology::parse("bundle", &found.toml)?
        } else {
            Topology::load(topology)?
        };
        Ok(Self {
            topology,
            kernel: None,
            adds: Vec::new(),
            programs: Vec::new(),
            knob_file: None,
            trace_file: None,
            append: String::new(),
            memory_mib: None,
            without_vfio_modules: false,
            lifetime: Duration::from_mins(30),
        })
    }

    /// Boots it with the workspace's programs in `/usr/bin`. What is missing of kernel and QEMU is fetched and built.
    pub fn guest(self) -> anyhow::Result<Guest> {
        let Self {
            mut topology,
            kernel,
            adds,
            programs,
            knob_file,
            trace_file,
            append,
            memory_mib,
            without_vfio_modules,
            lifetime,
        } = self;
        if let Some(memory) = memory_mib {
            topology.vm.memory_mib = memory;
        }
        let kernel = kernel.unwrap_or(topology.vm.kernel);
        let folder = programs::built()?;
        let artifacts = Artifacts::ensure(&Cache::from_env()?, &Wanted::kernel(kernel))?;
        let mut builder = GuestBuilder::new(artifacts, topology)
            .kernel(kernel)
            .append(&append)
            .hostname(crate::node::NODE)
            .lifetime(lifetime);
        if without_vfio_modules {
            builder = builder.without_vfio_modules();
        }
        builder = builder.agent(folder.join("lab-guest"));
        let names = tempfile::tempdir().context("No folder for the programs' further names")?;
        for (name, others) in PROGRAMS {
            builder = builder.binary(folder.join(name), format!("/usr/bin/{name}"));
            for other in others {
                symlink(name, names.path().join(other)).context("The programs' further names cannot be made")?;
            }
        }
        builder = builder.overlay(Add { host: names.path().to_owned(), guest: "/usr/bin".into() });
        for program in programs {
            builder = builder.binary(program.host, program.guest);
        }
        for add in adds {
            builder = builder.overlay(add);
        }
        if let Some(file) = knob_file {
            builder = builder.knob_file(file);
        }
        if let Some(file) = trace_file {
            builder = builder.trace_file(file);
        }
        Ok(builder.boot()?)
    }
}
