//! Which program an image's binary is, by the name it is called by.
//!
//! An image has one binary: an agent with `ccnode` beside it. Its further names on PATH are links, ours and those that
//! NVIDIA's images have (operator-contract section 13).

#![forbid(unsafe_code)]

mod change_root;
mod remove;

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

/// Starts the program that the first word of the command line names: `ccnode` (also as kubectl's plugin), `rm`, `chroot`, else
/// `agent`.
pub fn start(agent: fn(Vec<OsString>) -> ExitCode) -> ExitCode {
    let words: Vec<OsString> = env::args_os().collect();
    let name = words.first().and_then(|word| Path::new(word).file_name()).and_then(OsStr::to_str);
    match name {
        Some("ccnode" | "kubectl-ccnode") => ccnode::start(words),
        Some("rm") => remove::start(&words),
        Some("chroot") => change_root::start(&words),
        _ => agent(words),
    }
}
