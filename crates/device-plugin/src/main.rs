//! Agent: VFIO-bound GPUs and NVSwitches offered to the kubelet, with CDI files for Kata.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use device_plugin::args::Args;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("The runtime cannot be built")?;
    let result = runtime.block_on(args.run());
    // A thread that is stuck in a read of sysfs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}
