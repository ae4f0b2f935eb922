//! Where `devices.json` is, and what it says of its origin.

use std::path::PathBuf;

use agent_core::hostfile::HostDir;
use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord};
use agent_core::text::chain;

use crate::publish::Facts;

/// Where `devices.json` is, and what it says of its origin.
pub(super) struct StateDir {
    pub(super) path: PathBuf,
    pub(super) boot_id: String,
    pub(super) node_uid: String,
}

impl StateDir {
    /// What is to be told of the node.
    pub(super) fn facts<'a>(
        &'a self,
        wanted: &'a str,
        error: Option<&'a ErrorRecord>,
        devices: &'a [DeviceRecord],
    ) -> Facts<'a> {
        Facts { node_uid: &self.node_uid, boot_id: &self.boot_id, wanted, error, holders: &[], devices }
    }

    pub(super) fn unwritable(&self, so: &str) -> ErrorRecord {
        let message = format!(
            "devices.json in {} cannot be written, {so}; the log has the cause; make it a directory of root's alone with \
             space left",
            self.path.display()
        );
        ErrorRecord { code: "StateFile".to_owned(), message }
    }

    /// What has been verified in this boot: the file's word, or what we remember of it if it is lost; and whether it was
    /// the file's.
    pub(super) fn load(&self, memory: Option<DevicesFile>) -> (Option<DevicesFile>, bool) {
        let memory = memory.filter(|file| file.origin.boot_id == self.boot_id && !self.boot_id.is_empty());
        let file = match HostDir::open_existing(&self.path) {
            Ok(Some(dir)) => DevicesFile::load(&dir, &self.boot_id),
            Ok(None) => Ok(None),
            Err(error) => Err(error.into()),
        };
        match file {
            Ok(Some(file)) => (Some(file), true),
            Ok(None) => (memory, false),
            Err(error) => {
                tracing::warn!(code = "StateFile", "What was verified cannot be read: {}", chain(&error));
                (memory, false)
            }
        }
    }
}
