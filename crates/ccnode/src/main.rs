//! Command line for people: what a node is, and why it is not ready.

use std::env;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = ccnode::args::Args::parse();
    let out = io::stdout();
    let colour = out.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    ccnode::run(&args, &mut out.lock(), &mut io::stderr(), colour).into()
}
