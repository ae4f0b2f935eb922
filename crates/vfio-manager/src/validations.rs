//! The files by which the operator's validator tells the others what a node is for (operator-contract section 3): read under
//! the operator, written in its place without it.

use std::path::{Path, PathBuf};

use agent_core::hostfile::{HostDir, HostFileError};
use agent_core::validations::{FOLDER, READY_FILE, VM_PASSTHROUGH, WORKLOAD_FILE};
use tracing::info;

/// Longest file that is read, in bytes.
const MOST: u64 = 4096;

/// The folder below the host's root.
pub(crate) fn folder(host_root: &Path) -> PathBuf {
    host_root.join(FOLDER)
}

/// The node's workload, where it can be read and is another than virtual machines.
pub(crate) fn other_workload(folder: &Path) -> Option<String> {
    let bytes = HostDir::open_existing(folder).ok()??.read(WORKLOAD_FILE, MOST).ok()??;
    let text = String::from_utf8_lossy(&bytes);
    let workload = text.lines().next().unwrap_or_default().trim();
    (!workload.is_empty() && workload != VM_PASSTHROUGH).then(|| workload.to_owned())
}

/// The validator's files, kept in its place.
#[derive(Debug)]
pub(crate) struct StatusFiles {
    folder: PathBuf,
    said: Option<bool>,
}

impl StatusFiles {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, said: None }
    }

    /// Says whether every GPU is on VFIO. Written when it changes, and again when somebody has removed the files.
    pub(crate) fn say(&mut self, is_ready: bool) -> Result<(), HostFileError> {
        let folder = HostDir::open(&self.folder)?;
        if !folder.exists(WORKLOAD_FILE)? || self.said.is_none() {
            folder.write_atomic(WORKLOAD_FILE, format!("{VM_PASSTHROUGH}\n").as_bytes(), 0o644)?;
        }
        match (is_ready, folder.exists(READY_FILE)?) {
            (true, false) => folder.write_atomic(READY_FILE, b"", 0o644)?,
            (false, true) => {
                folder.remove(READY_FILE)?;
            }
            _ => {}
        }
        if self.said != Some(is_ready) {
            info!(event = "status_files", folder = %self.folder.display(), ready = is_ready, "status files written");
        }
        self.said = Some(is_ready);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_files_say_what_the_validator_would() {
        let place = tempfile::tempdir().unwrap();
        let folder = folder(place.path());
        let mut files = StatusFiles::new(folder.clone());
        files.say(false).unwrap();
        assert_eq!(fs::read_to_string(folder.join("workload-type")).unwrap(), "vm-passthrough\n");
        assert!(!folder.join("vfio-pci-ready").exists());
        files.say(true).unwrap();
        assert_eq!(fs::read(folder.join("vfio-pci-ready")).unwrap(), b"");
        // Somebody has cleaned up.
        fs::remove_file(folder.join("workload-type")).unwrap();
        fs::remove_file(folder.join("vfio-pci-ready")).unwrap();
        files.say(true).unwrap();
        assert!(folder.join("vfio-pci-ready").exists() && folder.join("workload-type").exists());
        files.say(false).unwrap();
        assert!(!folder.join("vfio-pci-ready").exists());
    }

    #[test]
    fn only_a_readable_workload_of_another_kind_is_one() {
        let place = tempfile::tempdir().unwrap();
        let folder = folder(place.path());
        assert_eq!(other_workload(&folder), None);
        fs::create_dir_all(&folder).unwrap();
        for (text, workload) in [
            ("vm-passthrough\n", None),
            ("", None),
            ("\n", None),
            ("container\n", Some("container")),
            ("vm-vgpu", Some("vm-vgpu")),
        ] {
            fs::write(folder.join("workload-type"), text).unwrap();
            assert_eq!(other_workload(&folder).as_deref(), workload, "{text:?}");
        }
    }
}
