//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vfio_manager::commands::start(std::env::args_os())
}
