//! Agent: VFIO-bound GPUs and NVSwitches offered to the kubelet, with CDI files for Kata.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    device_plugin::start(std::env::args_os())
}
