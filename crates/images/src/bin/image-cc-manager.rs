//! The binary of cc-manager's image.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    images::start(cc_manager::start)
}
