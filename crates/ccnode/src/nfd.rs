//! `ccnode probe --nfd`: a feature file for Node Feature Discovery.
//!
//! What is in it is [`agent_core::features`].

use std::path::{Path, PathBuf};

use agent_core::features;
use agent_core::hostfile::HostDir;
use anyhow::{Context as _, bail};
use hw_probe::Problem;

use crate::report::Report;

/// The folder that Node Feature Discovery reads.
pub const FOLDER: &str = "/etc/kubernetes/node-feature-discovery/features.d";

/// Name of our file in it.
pub const FILE: &str = "ccnode";

/// Writes the file, whole or not at all; says where. Where it is not known which GPUs the node has, what was said of it before stays.
pub fn write(report: &Report, folder: &Path) -> anyhow::Result<PathBuf> {
    if let Some(Problem { path, message, .. }) = report.doubts.first() {
        bail!(
            "Cannot tell which GPUs this node has: {path}: {message}; the feature file is left as it is; check that /sys is \
             mounted and readable, and the kernel's log"
        );
    }
    let folder = HostDir::open(folder).context("The folder of feature files cannot be used")?;
    folder.write_atomic(FILE, render(report).as_bytes(), 0o644).context("The feature file cannot be written")?;
    Ok(folder.path().join(FILE))
}

/// The text of the file, the same as the device plugin's.
pub fn render(report: &Report) -> String {
    features::render(report.parts().map(|part| &part.function), report.host.tee)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    #[test]
    fn what_is_not_known_is_not_written() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:01:00.0", 0x2330);
        let folder = tempfile::tempdir().unwrap();
        let written = |fake: &FakeSysfs| write(&Report::read(&fake.root()), folder.path());
        let path = written(&fake).unwrap();
        fake.gpu("0000:02:00.0", 0x2330).attr("class", "?");
        let error = written(&fake).unwrap_err().to_string();
        assert!(error.contains("0000:02:00.0/class: Is not a 24-bit class code"), "{error}");
        assert!(std::fs::read_to_string(path).unwrap().contains("gpu.count=1\n"));
    }

    #[test]
    fn the_file_is_exchanged_whole() {
        let fake = FakeSysfs::new();
        let folder = tempfile::tempdir().unwrap();
        let report = Report::read(&fake.root());
        for _ in 0..2 {
            let path = write(&report, folder.path()).unwrap();
            assert_eq!(std::fs::read_to_string(path).unwrap(), render(&report));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
