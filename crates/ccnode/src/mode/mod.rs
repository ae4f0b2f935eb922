//! `ccnode mode`: the mode of each GPU and NVSwitch, without Kubernetes.

pub mod args;
mod get;
pub mod look;
pub(crate) mod manager;
mod peek;
mod plan;
mod progress;
mod record;
mod set;
mod stop;

use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use gpu_firmware::Places;
use hw_probe::{Bdf, Inventory, PciFunction, SysRoot};
use serde::Serialize;

use crate::source::Source;
use args::{ModeCommand, NodeArgs};
use look::{Look, Records, Sight};

/// Schema of what `--json` prints. Within a schema number fields are only added.
pub const SCHEMA: u32 = 1;

/// What the process can ask and show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terminal {
    /// Reads an answer of a person; none where there is nobody to ask.
    pub ask: Option<fn() -> io::Result<String>>,
    /// Whether lines that were written can be written over.
    pub live: bool,
}

impl Terminal {
    /// That of standard input and standard error.
    pub fn of_process() -> Self {
        let answer = || {
            let mut line = String::new();
            io::stdin().read_line(&mut line).map(|_| line)
        };
        let live = io::stderr().is_terminal();
        Self { ask: (live && io::stdin().is_terminal()).then_some(answer), live }
    }

    /// Asks whether to go on; an error if not, or where there is nobody to ask.
    pub(crate) fn confirm(&self, notes: &mut impl Write) -> anyhow::Result<()> {
        let Some(ask) = self.ask else {
            bail!("There is no terminal to ask on, so nothing is changed; --yes does it without asking");
        };
        write!(notes, "Do it? [y/N] ")?;
        notes.flush()?;
        let answer = ask().context("No answer can be read")?;
        ensure!(matches!(answer.trim(), "y" | "Y" | "yes"), "Not confirmed, so nothing is changed");
        Ok(())
    }
}

/// Runs one command; the exit code.
pub fn run(
    command: &ModeCommand,
    out: &mut impl Write,
    notes: &mut (impl Write + Send),
    terminal: &Terminal,
) -> anyhow::Result<u8> {
    match command {
        ModeCommand::Get(args) => get::run(args, out, notes),
        ModeCommand::Plan(args) => plan::run(args, out, notes),
        ModeCommand::Set(args) => set::run(args, out, notes, terminal),
    }
}

/// The node, as far as its devices can be told apart.
struct Node {
    /// Keeps the tree of a bundle.
    _source: Source,
    root: SysRoot,
    inventory: Inventory,
    /// The devices that are meant, by address.
    chosen: Vec<PciFunction>,
}

impl Node {
    /// Scans the tree, and picks the devices.
    fn read(args: &NodeArgs) -> anyhow::Result<Self> {
        let NodeArgs { devices, json: _, root } = args;
        // Files of the node are opened by absolute paths.
        let source = Source::open(&root.canonicalize().unwrap_or_else(|_| root.clone()))?;
        let root = source.root().clone();
        let inventory = Inventory::scan(&root);
        let mut chosen: Vec<PciFunction> = inventory.gpus().chain(inventory.nvswitches()).cloned().collect();
        chosen.sort_by_key(|function| function.bdf);
        for bdf in devices {
            ensure!(
                chosen.iter().any(|function| function.bdf == *bdf),
                "{bdf}: There is no GPU or NVSwitch at this address; ccnode probe lists them"
            );
        }
        if !devices.is_empty() {
            chosen.retain(|function| devices.contains(&function.bdf));
        }
        Ok(Self { _source: source, root, inventory, chosen })
    }

    /// Where its devices are owned.
    fn places(&self, command: &str) -> Places {
        Places::at(self.root.clone(), format!("ccnode mode {command}"))
    }

    /// The root directory.
    fn path(&self) -> PathBuf {
        self.root.join("")
    }

    /// What is known of the chosen devices without side effects; from the records alone, or also from the registers of
    /// those that nobody uses.
    fn look(&self, sight: Sight) -> Vec<Look> {
        let path: &Path = &self.path();
        let records = Records::read(path, self.inventory.host.boot_id.as_deref());
        let holders = hw_probe::holders(&self.root);
        let look = |function: &PciFunction| look::passively(&self.root, function, &holders, &records, sight);
        self.chosen.iter().map(look).collect()
    }

    /// What could not be read so that there may be devices that are not known of.
    fn blind(&self) -> Option<String> {
        let none = self.chosen.is_empty();
        let problem = self.inventory.problems.iter().find(|problem| match problem.bdf {
            Some(bdf) => self.inventory.get(bdf).is_none(),
            None => none,
        })?;
        Some(format!("{}: {}", problem.path, problem.message))
    }
}

/// An error as data, with the words for people.
#[derive(Debug, Serialize)]
struct ErrorView<'a> {
    #[serde(flatten)]
    error: &'a gpu_firmware::Error,
    message: String,
    remedy: &'static str,
}

impl<'a> ErrorView<'a> {
    fn of(error: &'a gpu_firmware::Error) -> Self {
        Self { error, message: error.fault.to_string(), remedy: error.remedy() }
    }
}

/// The GPUs and NVSwitches among these, in words.
pub(crate) fn census<'a>(functions: impl Iterator<Item = &'a PciFunction>) -> String {
    let (gpus, switches): (Vec<_>, Vec<_>) = functions.partition(|function| function.is_gpu());
    let count = |number: usize, one, many| format!("{number} {}", if number == 1 { one } else { many });
    let (gpus, switches) = (count(gpus.len(), "GPU", "GPUs"), count(switches.len(), "NVSwitch", "NVSwitches"));
    match (gpus.starts_with("0 "), switches.starts_with("0 ")) {
        (false, true) => gpus,
        (true, false) => switches,
        _ => format!("{gpus} and {switches}"),
    }
}

/// Addresses, so many to a line.
fn addresses(bdfs: &[Bdf], indent: &str) -> String {
    let lines = bdfs.chunks(6).map(|part| {
        let words: Vec<String> = part.iter().map(ToString::to_string).collect();
        format!("{indent}{}\n", words.join(" "))
    });
    lines.collect()
}
