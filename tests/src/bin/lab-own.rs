//! Takes ownership of devices inside the guest and does what a scenario asks for: what no agent does of its own accord.

#![forbid(unsafe_code)]

use std::env;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use gpu_firmware::{Access, Device, Ownership, Places};
use hw_probe::{Inventory, PciFunction, SysRoot};

/// `lab-own hold|look|reset|bus-reset auto|sysfs|vfio RUN-FOLDER BDF...`
///
/// All devices are taken. `hold` keeps them until its input ends; `look` opens and observes each; `reset` and `bus-reset`
/// reset the first and wait until each has booted.
fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [act, access, run, bdfs @ ..] = &words[..] else { bail!("lab-own ACT ACCESS RUN-FOLDER BDF...") };
    let mut places = Places::host("lab-own").with_access(access.parse::<Access>()?);
    places.run = PathBuf::from(run);
    let inventory = Inventory::scan(&SysRoot::host());
    let function = |bdf: &String| inventory.get(bdf.parse().ok()?).cloned();
    let functions: Vec<PciFunction> =
        bdfs.iter().map(|bdf| function(bdf).with_context(|| format!("There is no {bdf}"))).collect::<Result<_>>()?;
    let ownership = Ownership::take(&functions, &places)?;
    for device in ownership.devices() {
        println!("{} {:?}", device.bdf(), device.hold());
    }
    if act == "hold" {
        println!("held");
        std::io::stdin().read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    let mut devices = ownership.devices().iter().map(Device::open).collect::<Result<Vec<_>, _>>()?;
    for device in &mut devices {
        device.wait_boot()?;
    }
    let first = devices.first_mut().context("No device is named")?;
    match act.as_str() {
        "look" => {}
        "reset" => first.reset()?,
        "bus-reset" => first.bus_reset()?,
        _ => bail!("Unknown act {act:?}"),
    }
    for device in &mut devices {
        device.wait_boot()?;
        let observed = device.observe()?;
        ensure!(!observed.knobs.is_empty(), "{}: no knobs", device.bdf());
        println!("{} {} {}", device.bdf(), device.access(), observed.effective);
        device.release()?;
    }
    Ok(())
}
