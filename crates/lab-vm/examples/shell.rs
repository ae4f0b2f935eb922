//! Boots a topology and runs one shell script: `cargo run -p lab-vm --example shell -- h100x2 'dmesg | tail'`.

use std::time::Duration;

use anyhow::Context as _;
use lab_vm::{Artifacts, Cache, GuestBuilder, Topology, Wanted};

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let (topology, script) = (words.next().context("No topology given")?, words.next().context("No script given")?);
    let topology = Topology::load(&topology)?;
    let artifacts = Artifacts::ensure(&Cache::from_env()?, &Wanted::kernel(topology.vm.kernel))?;
    let mut guest = GuestBuilder::new(artifacts, topology).boot()?;
    let output = guest.shell(&script, Duration::from_mins(5))?;
    println!("{}\n{}", output.text(), output.error_text());
    eprintln!("{:?} {:?}", output.status, guest.boot_times());
    guest.power_off()?;
    Ok(())
}
