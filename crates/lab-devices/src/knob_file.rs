//! Knobs kept between runs: one JSON object, `{"gpu0": {"8": 1, …}, …}`, replaced as a whole on every change.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

type Contents = BTreeMap<String, BTreeMap<u16, u16>>;

/// Why a knob file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KnobFileError {
    /// The file exists and cannot be read.
    #[error("Knob file {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not what this crate writes.
    #[error("Knob file {path} is not a JSON object of devices and knobs")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The file cannot be written.
    #[error("Knob file {path} cannot be written")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

pub(crate) struct KnobFile {
    path: PathBuf,
    contents: Mutex<Contents>,
}

impl KnobFile {
    /// Reads the file; an absent one is empty.
    pub(crate) fn open(path: &Path) -> Result<KnobFile, KnobFileError> {
        let contents = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| KnobFileError::Parse { path: path.to_path_buf(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Contents::new(),
            Err(source) => return Err(KnobFileError::Read { path: path.to_path_buf(), source }),
        };
        Ok(KnobFile { path: path.to_path_buf(), contents: Mutex::new(contents) })
    }

    /// What the file says of a device.
    pub(crate) fn knobs(&self, device: &str) -> Option<BTreeMap<u16, u16>> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).get(device).cloned()
    }

    /// Replaces the knobs of a device, here and on disk.
    pub(crate) fn save(&self, device: &str, knobs: &BTreeMap<u16, u16>) -> Result<(), KnobFileError> {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        contents.insert(device.to_owned(), knobs.clone());
        let write = || -> io::Result<()> {
            let mut temporary = self.path.clone().into_os_string();
            temporary.push(".new");
            let mut file = fs::File::create(&temporary)?;
            serde_json::to_writer(&mut file, &*contents)?;
            file.write_all(b"\n")?;
            fs::rename(&temporary, &self.path)
        };
        write().map_err(|source| KnobFileError::Write { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_back_and_other_devices_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("knobs.json");
        let file = KnobFile::open(&path).unwrap();
        assert_eq!(file.knobs("gpu0"), None);
        file.save("gpu0", &[(8, 1)].into()).unwrap();
        file.save("gpu1", &[(45, 1)].into()).unwrap();
        let file = KnobFile::open(&path).unwrap();
        file.save("gpu1", &[(45, 0)].into()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"gpu0\":{\"8\":1},\"gpu1\":{\"45\":0}}\n");
        assert_eq!(KnobFile::open(&path).unwrap().knobs("gpu0"), Some([(8, 1)].into()));
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("knobs.json");
        for text in ["", "{\"gpu0\":", "[]", "{\"gpu0\":{\"x\":1}}", "{\"gpu0\":{\"8\":70000}}"] {
            fs::write(&path, text).unwrap();
            let error = KnobFile::open(&path).err().unwrap();
            assert!(error.to_string().contains("knobs.json"), "{text:?}: {error}");
        }
    }
}
