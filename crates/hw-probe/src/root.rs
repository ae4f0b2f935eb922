//! Where the kernel's file systems are.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{SYSFS_MAGIC, statfs};

/// The root below which `sys`, `proc`, `dev` and `run` are read: `/` on a node, a recorded or fake tree elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysRoot(PathBuf);

impl SysRoot {
    /// The machine this process runs on.
    pub fn host() -> Self {
        Self(PathBuf::from("/"))
    }

    /// A tree that holds `sys` (and perhaps `proc`, `dev`, `run`) below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// Whether this is the root of the machine that this process runs on, as it sees it.
    pub fn is_host(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// Whether `sys` below this root is that of the running kernel: on the machine itself, and where its root is mounted into a
    /// container. A file system of type sysfs is always the running kernel's, and a recorded tree is of another type.
    pub fn is_running(&self) -> bool {
        self.is_host() || statfs(&self.join("sys")).is_ok_and(|found| found.filesystem_type() == SYSFS_MAGIC)
    }

    /// The path of `relative` (without a leading slash) below the root.
    pub fn join(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.0.join(relative)
    }

    /// `sys/bus/pci/devices/<bdf>`.
    pub fn function(&self, bdf: crate::Bdf) -> PathBuf {
        self.join(format!("sys/bus/pci/devices/{bdf}"))
    }
}
