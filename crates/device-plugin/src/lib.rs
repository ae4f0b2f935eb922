//! Agent: VFIO-bound GPUs and NVSwitches offered to the kubelet, with CDI files for Kata.
//!
//! One look at the node gives the units ([`units`], pure); they are written into CDI files ([`cdi`]), and then the
//! kubelet is told of the same units ([`server`], [`plugin`]): what the kubelet allocates, Kata can resolve.

#![forbid(unsafe_code)]

pub mod args;
pub mod cdi;
pub mod checkpoint;
pub mod controller;
pub mod features;
pub mod health;
mod metrics;
pub mod names;
pub mod observe;
pub mod plugin;
pub mod pods;
mod predecessor;
pub mod preferred;
pub mod quarantine;
pub mod server;
pub mod units;
pub mod watch;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;

/// The program, with the words of its command line.
pub fn start(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = args::Args::try_parse_from(words).unwrap_or_else(|error| error.exit());
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {}", agent_core::text::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: args::Args) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("The runtime cannot be built")?;
    let result = runtime.block_on(args.run());
    // A thread that is stuck in a read of sysfs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}
