//! Agent: the node's label becomes the confidential-computing mode of its GPUs.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cc_manager::run(cc_manager::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {}", agent_core::text::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
