//! `cargo lab`: the laboratory's command.

#![forbid(unsafe_code)]

mod args;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    args::Cli::parse().run().unwrap_or_else(|error| {
        eprintln!("lab: {error:#}");
        ExitCode::from(125)
    })
}
