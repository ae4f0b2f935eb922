//! `rm -f PATH...`, the one tool that cc-manager's hook needs (operator-contract section 5.1).

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::process::ExitCode;

/// Removes files; with `-f` one that is not there is no failure.
pub(crate) fn start(words: &[OsString]) -> ExitCode {
    let (mut forced, mut paths) = (false, Vec::new());
    let mut words = words.iter().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("-f") => forced = true,
            Some("--") => paths.extend(words.by_ref()),
            Some(flag) if flag.starts_with('-') => {
                eprintln!("rm: {flag}: this one knows -f alone");
                return ExitCode::FAILURE;
            }
            _ => paths.push(word),
        }
    }
    if paths.is_empty() && !forced {
        eprintln!("rm: which file?");
        return ExitCode::FAILURE;
    }
    let mut code = ExitCode::SUCCESS;
    for path in paths {
        match fs::remove_file(path) {
            Err(error) if forced && error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                eprintln!("rm: {}: {error}", path.display());
                code = ExitCode::FAILURE;
            }
            Ok(()) => {}
        }
    }
    code
}
