//! Where the kernel's file systems are.

use std::path::{Path, PathBuf};

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

    /// Whether this is the running machine rather than a tree of files.
    pub fn is_host(&self) -> bool {
        self.0 == Path::new("/")
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
