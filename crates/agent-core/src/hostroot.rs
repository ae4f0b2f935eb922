//! Where the host's root file system is mounted.

use std::path::{Path, PathBuf};

/// The host's root as this process sees it.
///
/// The operator sets `HOST_ROOT` to the path *on the host* while the mount in the container stays at `/host`
/// (operator-contract section 4, "Host root"), so a wanted root that is not usable here falls back to `/host`. With
/// nothing wanted it is `/`. Usable is a directory that holds at least one of `etc`, `lib`, `proc`, `usr`.
pub fn host_root(wanted: Option<PathBuf>) -> PathBuf {
    resolve(wanted, Path::new("/host"))
}

fn resolve(wanted: Option<PathBuf>, fallback: &Path) -> PathBuf {
    let Some(wanted) = wanted.filter(|path| !path.as_os_str().is_empty()) else {
        return PathBuf::from("/");
    };
    if usable(&wanted) {
        return wanted;
    }
    if usable(fallback) {
        tracing::warn!(
            host_root = %wanted.display(),
            used = %fallback.display(),
            "HOST_ROOT is no root file system here, the mount point is used instead"
        );
        return fallback.to_owned();
    }
    tracing::warn!(host_root = %wanted.display(), "Neither HOST_ROOT nor /host is a root file system here, / is used");
    PathBuf::from("/")
}

fn usable(path: &Path) -> bool {
    path.is_absolute() && ["etc", "lib", "proc", "usr"].iter().any(|entry| path.join(entry).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_usable_root_wins() {
        let here = tempfile::tempdir().unwrap();
        let mount = here.path().join("host");
        let other = here.path().join("other");
        std::fs::create_dir_all(mount.join("etc")).unwrap();
        std::fs::create_dir_all(other.join("usr")).unwrap();
        let absent = here.path().join("absent");
        let cases = [
            (None, mount.clone(), PathBuf::from("/")),
            (Some(PathBuf::new()), mount.clone(), PathBuf::from("/")),
            (Some(PathBuf::from("/")), mount.clone(), PathBuf::from("/")),
            (Some(other.clone()), mount.clone(), other.clone()),
            (Some(absent.clone()), mount.clone(), mount.clone()),
            (Some(PathBuf::from("relative")), mount.clone(), mount.clone()),
            (Some(absent.clone()), absent.clone(), PathBuf::from("/")),
        ];
        for (wanted, fallback, result) in cases {
            assert_eq!(resolve(wanted.clone(), &fallback), result, "{wanted:?}");
        }
    }
}
