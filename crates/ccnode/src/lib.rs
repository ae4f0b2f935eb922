//! Command line for people: what a node is, and why it is not ready.
//!
//! Every command reads only: it opens no device, wakes none and resets none, so it is safe beside running virtual
//! machines.

#![forbid(unsafe_code)]

pub mod args;
pub mod probe;
mod table;

use std::io::{self, Write};

use args::{Args, Command};

/// Runs one command; its answer goes to `out`, warnings go to `notes`.
pub fn run(args: &Args, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<()> {
    let Args { command } = args;
    let result = match command {
        Command::Probe(args) => probe::run(args, out, notes),
    };
    match result {
        // Whoever reads the answer may stop early: `ccnode probe | head -1`.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
