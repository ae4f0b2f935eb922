//! The binary of vfio-manager's image.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    images::start(vfio_manager::commands::start)
}
