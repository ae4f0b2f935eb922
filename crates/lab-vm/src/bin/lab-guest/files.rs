//! Files in and out.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use lab_vm::wire::{Bytes, CHUNK, Event};

use crate::serve::Host;

/// A file on its way in: written beside its place and moved there when complete.
pub(crate) struct Incoming {
    path: PathBuf,
    temporary: PathBuf,
    mode: u32,
    file: File,
}

/// Why a file could not be put or read.
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) errno: Option<i32>,
}

impl Failure {
    pub(crate) fn new(what: &str, path: &Path, error: &std::io::Error) -> Self {
        Self { message: format!("{what} {}: {error}", path.display()), errno: error.raw_os_error() }
    }
}

impl Incoming {
    pub(crate) fn begin(id: u64, path: &str, mode: u32) -> Result<Self, Failure> {
        let path = PathBuf::from(path);
        let (Some(folder), Some(name), true) = (path.parent(), path.file_name(), path.is_absolute()) else {
            return Err(Failure { message: format!("Not an absolute file path: {}", path.display()), errno: None });
        };
        fs::create_dir_all(folder).map_err(|error| Failure::new("Cannot make folder", folder, &error))?;
        let temporary = folder.join(format!(".{}.{id}", name.to_string_lossy()));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|error| Failure::new("Cannot create", &temporary, &error))?;
        Ok(Self { path, temporary, mode, file })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(|error| {
            let _ = fs::remove_file(&self.temporary);
            Failure::new("Cannot write", &self.temporary, &error)
        })
    }

    pub(crate) fn end(self) -> Result<(), Failure> {
        let Self { path, temporary, mode, file } = self;
        drop(file);
        fs::set_permissions(&temporary, Permissions::from_mode(mode & 0o7777))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|error| {
                let _ = fs::remove_file(&temporary);
                Failure::new("Cannot put in place", &path, &error)
            })
    }
}

/// Sends a file to the host.
pub(crate) fn get(id: u64, path: &str, host: &Host) {
    let path = Path::new(path);
    let sent = File::open(path).and_then(|mut file| {
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => host.send(&Event::Data { id, data: Bytes(buffer[..read].to_vec()) }),
            }
        }
    });
    match sent {
        Ok(()) => host.send(&Event::Done { id }),
        Err(error) => {
            let Failure { message, errno } = Failure::new("Cannot read", path, &error);
            host.send(&Event::Failed { id, message, errno });
        }
    }
}
