//! Programs without their debug information, which is most of them and of no use in the guest's memory.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::image::ImageError;

/// Copies of files that have changed since are kept for a while: another guest may be reading one.
const KEPT: Duration = Duration::from_mins(10);

/// A stripped copy of a program, made once for each state of it. The program itself, if there is no `strip` here.
pub(crate) fn stripped(program: &Path, cache: &Path) -> Result<PathBuf, ImageError> {
    let unreadable = |source| ImageError::Read { path: program.to_owned(), source };
    let program = program.canonicalize().map_err(unreadable)?;
    let metadata = fs::metadata(&program).map_err(unreadable)?;
    let mut hasher = DefaultHasher::new();
    program.hash(&mut hasher);
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let folder = cache.join(format!("{name}-{:016x}", hasher.finish()));
    metadata.modified().ok().hash(&mut hasher);
    metadata.len().hash(&mut hasher);
    let place = folder.join(format!("{:016x}", hasher.finish()));
    if place.is_file() {
        return Ok(place);
    }
    let unwritable = |source| ImageError::Write { path: place.clone(), source };
    fs::create_dir_all(&folder).map_err(unwritable)?;
    remove_old(&folder);
    let temporary =
        tempfile::Builder::new().prefix(".strip-").tempfile_in(&folder).map_err(unwritable)?.into_temp_path();
    let run = Command::new("strip")
        .arg("-o")
        .arg(&*temporary)
        .arg(&program)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !run.is_ok_and(|status| status.success()) {
        return Ok(program);
    }
    fs::set_permissions(&temporary, metadata.permissions()).map_err(unwritable)?;
    temporary.persist(&place).map_err(|error| unwritable(error.error))?;
    Ok(place)
}

fn remove_old(folder: &Path) {
    let now = SystemTime::now();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .map(|made| now.duration_since(made).unwrap_or_default());
        if age.is_ok_and(|age| age > KEPT) {
            // Somebody else may have been quicker.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_is_stripped_once_and_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let program = folder.path().join("program");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let first = stripped(&program, &cache).unwrap();
        if first == program.canonicalize().unwrap() {
            eprintln!("skipped: there is no strip on this host");
            return;
        }
        assert!(fs::metadata(&first).unwrap().len() < fs::metadata(&program).unwrap().len());
        assert_eq!(fs::metadata(&first).unwrap().permissions().mode() & 0o111, 0o111);
        assert_eq!(stripped(&program, &cache).unwrap(), first);
        let file = fs::File::options().append(true).open(&program).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(stripped(&program, &cache).unwrap(), first);
    }

    #[test]
    fn what_cannot_be_stripped_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        assert_eq!(stripped(&script, &folder.path().join("cache")).unwrap(), script.canonicalize().unwrap());
        assert!(stripped(&folder.path().join("absent"), folder.path()).is_err());
    }
}
