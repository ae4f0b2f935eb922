//! The feature file by which Node Feature Discovery labels the node with its GPUs, without a virtual machine that looks.

use std::path::{Path, PathBuf};

use agent_core::features;
use agent_core::hostfile::{HostDir, HostFileError};
use agent_core::text::chain;
use hw_probe::Inventory;

/// Longest file that is read to see whether it has changed, in bytes.
const LONGEST: u64 = 64 << 10;

/// Where the file is; with an empty path there is none.
#[derive(Clone, Debug, Default)]
pub struct FeatureFile(PathBuf);

impl FeatureFile {
    /// A file whose folder need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the file say what the node is: written whole and only on change, removed where there is no GPU, and left as it is
    /// where it cannot be told which GPUs there are. Whether anything was done.
    pub fn sync(&self, inventory: &Inventory) -> Result<bool, String> {
        let (Some(folder), Some(name)) = (self.0.parent(), self.0.file_name().and_then(|name| name.to_str())) else {
            return Ok(false);
        };
        let wanted = features::of_node(inventory)?;
        put(folder, name, wanted.as_deref()).map_err(|error| chain(&error))
    }
}

fn put(folder: &Path, name: &str, wanted: Option<&str>) -> Result<bool, HostFileError> {
    let Some(text) = wanted else {
        return HostDir::open_existing(folder)?.map_or(Ok(false), |folder| folder.remove(name));
    };
    let folder = HostDir::open(folder)?;
    // A file that cannot be read or that others may write is not the one that we left.
    if folder.read(name, LONGEST).is_ok_and(|found| found.as_deref() == Some(text.as_bytes())) {
        return Ok(false);
    }
    folder.write_atomic(name, text.as_bytes(), 0o644).map(|()| true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use hw_probe::testing::FakeSysfs;

    use super::*;

    #[test]
    fn the_file_follows_the_node_and_is_written_only_on_change() {
        let fake = FakeSysfs::new();
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("features.d/ccnode");
        let file = FeatureFile::new(&path);
        let sync = || file.sync(&Inventory::scan(&fake.root()));
        fake.function("0000:00:1f.0", 0x8086, 1, 0x06_0100);
        assert_eq!(sync(), Ok(false), "no GPU, no file");
        assert!(!place.path().join("features.d").exists());

        fake.gpu("0000:01:00.0", 0x2330);
        assert_eq!(sync(), Ok(true));
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o777, sync()), (0o644, Ok(false)));
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), meta.ino());
        let text = std::fs::read_to_string(&path).unwrap();
        for line in ["ccnode.dev/gpu.count=1", "ccnode.dev/gpu.family=hopper", "ccnode.dev/gpu.cc.capable=true"] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains("nvidia.com/"), "those names are others'");

        fake.gpu("0000:02:00.0", 0x2330).attr("class", "?");
        assert!(sync().unwrap_err().contains("0000:02:00.0"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "what is not known changes nothing");

        fake.remove("0000:02:00.0");
        fake.remove("0000:01:00.0");
        assert_eq!((sync(), sync()), (Ok(true), Ok(false)));
        assert_eq!(std::fs::read_dir(place.path().join("features.d")).unwrap().count(), 0);
        assert_eq!(FeatureFile::default().sync(&Inventory::scan(&fake.root())), Ok(false));
    }
}
