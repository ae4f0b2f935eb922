//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use vfio_manager::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = agent_core::logs::init(&cli.logs) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    vfio_manager::controller::run(cli).unwrap_or_else(|error| {
        eprintln!("vfio-manager: {error:#}");
        ExitCode::FAILURE
    })
}
