//! Command line for people: what a node is, and why it is not ready.

use std::io;
use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = ccnode::args::Args::parse();
    match ccnode::run(&args, &mut io::stdout().lock(), &mut io::stderr().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ccnode: {error:#}");
            ExitCode::FAILURE
        }
    }
}
