//! A pod's sandbox until its virtual machine runs: Kata's shim finds the pod's devices and takes them, and as long as that
//! fails the kubelet has it tried again.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::time::sleep;

use super::resolve::{self, Resolved, below, resolve};

/// Why an attempt has failed.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error("The IOMMU group of {bdf} is not known")]
    Group { bdf: String, source: io::Error },
    #[error("Cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
}

/// Takes the pod's devices; tries again after `pauses.0`, then twice as long, up to `pauses.1`, and tells of every refusal.
pub(crate) async fn start(
    socket: &Path,
    root: &Path,
    pod: &str,
    pauses: (Duration, Duration),
    mut tell: impl FnMut(&Refused),
) -> Vec<File> {
    let mut pause = pauses.0;
    loop {
        let taken = match resolve(socket, root, pod).await {
            Ok(resolved) => take(root, &resolved),
            Err(error) => Err(error.into()),
        };
        match taken {
            Ok(files) => return files,
            Err(refused) => tell(&refused),
        }
        sleep(pause).await;
        pause = (pause * 2).min(pauses.1);
    }
}

/// Opens the file of each device's IOMMU group. A virtual machine that is handed a device by its character device binds that
/// instead; the kernel refuses both alike to all but the first who has the group, and both keep others out.
fn take(root: &Path, resolved: &Resolved) -> Result<Vec<File>, Refused> {
    let mut groups = BTreeSet::new();
    for bdf in resolved.devices.iter().flat_map(|device| &device.bdfs) {
        let link = root.join("sys/bus/pci/devices").join(bdf).join("iommu_group");
        let target = fs::read_link(&link).map_err(|source| Refused::Group { bdf: bdf.clone(), source })?;
        groups.extend(target.file_name().map(|name| format!("dev/vfio/{}", name.to_string_lossy())));
    }
    let open = |group: &String| {
        let path = below(root, group);
        OpenOptions::new().read(true).write(true).open(&path).map_err(|source| Refused::Open { path, source })
    };
    groups.iter().map(open).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::ResolvedDevice;
    use super::*;

    fn resolved(bdfs: &[&str]) -> Resolved {
        let device = |bdf: &&str| ResolvedDevice {
            container: "c".into(),
            resource: "nvidia.com/pgpu".into(),
            id: (*bdf).into(),
            cdi: format!("nvidia.com/pgpu={bdf}"),
            spec: "var/run/cdi/nvidia.com-pgpu.yaml".into(),
            nodes: Vec::new(),
            bdfs: vec![(*bdf).into()],
        };
        Resolved { pod: "n/p".into(), devices: bdfs.iter().map(device).collect() }
    }

    #[test]
    fn every_group_is_opened_once_and_what_is_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("dev/vfio")).unwrap();
        for (bdf, group) in [("0000:41:00.0", "5"), ("0000:41:00.1", "5"), ("0000:42:00.0", "6")] {
            let device = at("sys/bus/pci/devices").join(bdf);
            fs::create_dir_all(&device).unwrap();
            symlink(format!("../../../../kernel/iommu_groups/{group}"), device.join("iommu_group")).unwrap();
        }
        fs::write(at("dev/vfio/5"), "").unwrap();
        assert_eq!(take(root.path(), &resolved(&["0000:41:00.0", "0000:41:00.1"])).unwrap().len(), 1);
        let refused = take(root.path(), &resolved(&["0000:41:00.0", "0000:42:00.0"])).unwrap_err();
        assert_eq!(refused.to_string(), format!("Cannot open {}", at("dev/vfio/6").display()));
        let refused = take(root.path(), &resolved(&["0000:43:00.0"])).unwrap_err();
        assert!(refused.to_string().contains("0000:43:00.0"), "{refused}");
    }

    #[tokio::test]
    async fn a_sandbox_that_is_refused_is_tried_again_after_ever_longer_pauses() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("nobody.sock");
        let (told, mut refusals) = tokio::sync::mpsc::unbounded_channel();
        let tell = move |refused: &Refused| told.send(super::super::chain(refused)).unwrap();
        let pauses = (Duration::from_millis(1), Duration::from_millis(4));
        let task = tokio::spawn(async move {
            start(&socket, Path::new("/"), "n/p", pauses, tell).await;
        });
        for _ in 0..4 {
            let refused = refusals.recv().await.unwrap();
            assert!(refused.contains("out of reach"), "{refused}");
        }
        task.abort();
    }
}
