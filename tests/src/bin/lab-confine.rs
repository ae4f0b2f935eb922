//! Runs a program inside the guest as a container without privileges would: nothing of the file system but what is named,
//! on a read-only root without devices; no capability, now or ever; no way to gain any.

#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use caps::CapSet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const ROOT: &str = "/run/confined";

/// `lab-confine ro:PATH rw:PATH... -- PROGRAM ARGUMENTS`
fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let mut parts = words.splitn(2, |word| word == "--");
    let (Some(places), Some([program, arguments @ ..])) = (parts.next(), parts.next()) else {
        bail!("lab-confine ro:PATH rw:PATH... -- PROGRAM ARGUMENTS")
    };
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    fs::create_dir_all(ROOT)?;
    mount(Some("tmpfs"), ROOT, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("tmpfs")?;
    for place in places {
        let (mode, path) = place.split_once(':').context("A place is ro:PATH or rw:PATH")?;
        let target = format!("{ROOT}{path}");
        if Path::new(path).is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::create_dir_all(Path::new(&target).parent().context("A file has a folder")?)?;
            fs::write(&target, "")?;
        }
        mount(Some(path), target.as_str(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none).context(path.to_owned())?;
        if mode == "ro" {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
            mount(none, target.as_str(), none, flags, none).context(path.to_owned())?;
        }
    }
    mount(none, ROOT, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, Some("mode=755")).context("read-only root")?;
    nix::unistd::chroot(ROOT)?;
    env::set_current_dir("/")?;
    nix::sys::prctl::set_no_new_privs()?;
    // The bounding set first: to take from it needs a capability.
    for set in [CapSet::Bounding, CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).with_context(|| format!("{set:?}"))?;
    }
    Err(Command::new(program).args(arguments).exec().into())
}
