//! `chroot FOLDER PROGRAM [WORDS]`, by which vfio-manager runs the host's modprobe: an image without a shell has no other one.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Becomes the program, in the folder as its root. Returns where it cannot.
pub(crate) fn start(words: &[OsString]) -> ExitCode {
    let [_, folder, program, words @ ..] = words else {
        eprintln!("chroot: which folder, and which program?");
        return ExitCode::FAILURE;
    };
    let error = enter(Path::new(folder)).err().unwrap_or_else(|| Command::new(program).args(words).exec());
    eprintln!("chroot: {} in {}: {error}", program.display(), folder.display());
    // As everybody's: what is not there, and what cannot be started.
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
}

fn enter(folder: &Path) -> io::Result<()> {
    nix::unistd::chroot(folder)?;
    std::env::set_current_dir("/")
}
