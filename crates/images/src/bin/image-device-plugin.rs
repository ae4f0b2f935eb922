//! The binary of device-plugin's image.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    images::start(device_plugin::start)
}
