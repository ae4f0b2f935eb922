//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use vfio_manager::args::Cli;

fn main() -> ExitCode {
    let cli = match Cli::from_words(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // A standard stream that is closed must not hide the exit code.
            let _ = error.print();
            // Bad usage is 1, not the parser's 2 (operator-contract section 6.4).
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    if let Err(error) = agent_core::logs::init(&cli.logs) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    vfio_manager::commands::run(cli).unwrap_or_else(|error| {
        eprintln!("vfio-manager: {error:#}");
        ExitCode::FAILURE
    })
}
