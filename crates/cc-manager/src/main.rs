//! Agent: the node's label becomes the confidential-computing mode of its GPUs.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cc_manager::start(std::env::args_os())
}
