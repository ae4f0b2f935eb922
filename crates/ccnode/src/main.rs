//! Command line for people: what a node is, and why it is not ready.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ccnode::start(std::env::args_os())
}
