//! Runs a program as root with some of its capabilities, as a container runtime does.

#![forbid(unsafe_code)]

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{CapabilitySet, capability_is_in_bounding_set, remove_capability_from_bounding_set};

/// `lab-caps CAPABILITY,...|none PROGRAM...`
///
/// Those that are not named leave the bounding set, and so are none of the program's, though it is root's.
fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [names, program, arguments @ ..] = &words[..] else { bail!("lab-caps CAPABILITY,...|none PROGRAM...") };
    let mut kept = CapabilitySet::empty();
    for name in names.split(',').filter(|name| *name != "none") {
        kept |= CapabilitySet::from_name(name).with_context(|| format!("There is no capability {name}"))?;
    }
    for capability in CapabilitySet::all().difference(kept).iter() {
        // A kernel may not know the newest.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability)?;
        }
    }
    for capability in kept.iter() {
        ensure!(capability_is_in_bounding_set(capability)?, "{capability:?} is not there to be given");
    }
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("{program} cannot be run"))
}
