//! Command line for people: what a node is, and why it is not ready.
//!
//! Every command but `mode`, `cleanup` and `drain-holders` reads only: it opens no device, wakes none and resets none, so it is safe beside running virtual
//! machines. `cleanup` removes files and writes the node object, and touches no device. `drain-holders`
//! evicts pods. `mode get` and `mode plan` do so unless they are told to own the devices; `mode set` changes them.

#![forbid(unsafe_code)]

mod agents;
mod archive;
pub mod args;
pub mod bundle;
pub mod cc;
pub mod checks;
pub mod cleanup;
pub mod cluster;
pub mod doctor;
pub mod drain;
mod generate;
pub mod mode;
pub mod nfd;
pub mod node;
pub mod nvml;
pub mod pod_resources;
pub mod probe;
pub mod redact;
pub mod report;
pub mod source;
pub mod status;
mod table;
pub mod watch;

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use args::{Args, Command};
use clap::Parser as _;

/// The command did what it was asked, and nothing failed.
pub const SUCCESS: u8 = 0;

/// The command could not be carried out; of `doctor` and `mode`: a check or a device failed; of `status`: the node is not
/// ready; of `cleanup` and `drain-holders`: something is left.
pub const FAILED: u8 = 1;

/// Of `doctor`, `mode`, `status` and `cleanup`: nothing could be done or told. Wrong command lines end with this, too.
pub const COULD_NOT_RUN: u8 = 2;

/// The program, with the words of its command line.
pub fn start(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = Args::try_parse_from(words).unwrap_or_else(|error| error.exit());
    let out = io::stdout();
    let colour = out.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // Standard error itself writes a line piece by piece, and another stream's line may come between.
    let mut notes = io::LineWriter::new(io::stderr());
    run(&args, &mut out.lock(), &mut notes, colour).into()
}

/// Runs one command; its answer goes to `out`, in colour if wanted, warnings and errors go to `notes`. Returns the exit code.
pub fn run(args: &Args, out: &mut impl Write, notes: &mut (impl Write + Send), colour: bool) -> u8 {
    let Args { command } = args;
    let (result, otherwise) = match command {
        Command::Probe(args) => (probe::run(args, out, notes).map(|()| SUCCESS), FAILED),
        Command::Bundle(args) => (bundle::run(args, out, notes).map(|()| SUCCESS), FAILED),
        Command::Doctor(args) => (doctor::run(args, out, colour), COULD_NOT_RUN),
        Command::Status(args) => (status::run(args, out), COULD_NOT_RUN),
        Command::Fleet(args) => (status::fleet::run(args, out), COULD_NOT_RUN),
        Command::Cleanup(args) => (cleanup::run(args, out, notes, &mode::Terminal::of_process()), COULD_NOT_RUN),
        Command::DrainHolders(args) => (drain::run(args, out, notes), COULD_NOT_RUN),
        Command::Mode { command } => (mode::run(command, out, notes, &mode::Terminal::of_process()), COULD_NOT_RUN),
        Command::Completions { shell } => (generate::completions(*shell, out).map(|()| SUCCESS), FAILED),
        Command::Man => (generate::man(out).map(|()| SUCCESS), FAILED),
    };
    match result {
        Ok(code) => code,
        // Whoever reads the answer may stop early: `ccnode probe | head -1`.
        Err(error) if is_broken_pipe(&error) => SUCCESS,
        Err(error) => {
            // Nobody is left to tell when this fails, too.
            let _ = writeln!(notes, "ccnode: {error:#}");
            otherwise
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A file of a strange tree could hold what a terminal obeys.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
