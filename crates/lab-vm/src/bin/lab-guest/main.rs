//! PID 1 of the lab's guest: prepares the node, then does what the host asks over a virtio-serial port.

#![forbid(unsafe_code)]

mod files;
mod processes;
mod serve;
mod system;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("lab-guest is the init of the lab's virtual machines and does nothing anywhere else.");
        return ExitCode::from(2);
    }
    let problems = system::prepare();
    match serve::run(problems) {
        Ok(power) => system::power(&power),
        // PID 1 returning is a kernel panic, which ends the machine: the host reads the reason on the console.
        Err(error) => eprintln!("lab-guest: {error}"),
    }
    ExitCode::FAILURE
}
