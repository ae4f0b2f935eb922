//! What the node's files say of kubelet, CDI, containerd and Kata (operator-contract sections 7 and 10).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use agent_core::cdi;
use hw_probe::SysRoot;
use serde::{Deserialize, Serialize};

/// Most bytes of a file that is read.
const MOST_BYTES: u64 = 1 << 20;

/// Most files of a folder that are read.
const MOST_FILES: usize = 256;

/// The kubelet's folder, below the root.
pub const KUBELET: &str = "var/lib/kubelet";

/// What the files say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeFiles {
    /// The kubelet.
    pub kubelet: Kubelet,
    /// The two folders of CDI files: that of the system, and that of agents.
    pub cdi: Vec<CdiFolder>,
    /// Containerd and Kata.
    pub kata: Kata,
}

/// The kubelet's sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kubelet {
    /// Whether its folder is there.
    pub folder: bool,
    /// Where device plugins register.
    pub plugin_socket: Socket,
    /// Where Kata asks which devices a pod has.
    pub pod_resources_socket: Socket,
}

/// A socket file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Path on the node.
    pub path: String,
    /// Whether it is there.
    pub present: bool,
    /// What is wrong with it.
    pub trouble: Option<String>,
}

/// A folder of CDI files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdiFolder {
    /// Path on the node.
    pub path: String,
    /// Whether it is there.
    pub present: bool,
    /// Its files, by name.
    pub files: Vec<CdiFile>,
}

/// A CDI file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdiFile {
    /// File name.
    pub file: String,
    /// Vendor and class: `nvidia.com/pgpu`.
    pub cdi_kind: Option<String>,
    /// Version of the format.
    pub cdi_version: Option<String>,
    /// Names of its devices.
    pub cdi_devices: Vec<String>,
    /// What is wrong with it.
    pub trouble: Option<String>,
}

/// Containerd's configuration as far as it concerns Kata, and Kata itself. Runtime classes are objects of the cluster, which
/// no file of the node shows; the handlers that they name are `runtimes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kata {
    /// Containerd's configuration, with the files that it imports.
    pub containerd_files: Vec<String>,
    /// Handlers of Kata in it.
    pub runtimes: Vec<String>,
    /// Its CDI setting, where it says one.
    pub enable_cdi: Option<bool>,
    /// Kata's configurations for NVIDIA GPUs that are installed.
    pub gpu_configurations: Vec<String>,
    /// What could not be read.
    pub troubles: Vec<String>,
}

impl NodeFiles {
    /// Reads the files below `root`, each up to 1 MiB.
    pub fn read(root: &SysRoot) -> Self {
        let kubelet = Kubelet {
            folder: root.join(KUBELET).is_dir(),
            plugin_socket: socket(root, "var/lib/kubelet/device-plugins/kubelet.sock"),
            pod_resources_socket: socket(root, "var/lib/kubelet/pod-resources/kubelet.sock"),
        };
        let mut cdi = vec![cdi_folder(root, "etc/cdi"), cdi_folder(root, run_cdi(root))];
        for folder in &mut cdi {
            mark_conflicts(folder);
        }
        Self { kubelet, cdi, kata: Kata::read(root) }
    }
}

/// `/var/run` is a link to `/run`, mostly an absolute one, which below another root would lead out of it.
pub(crate) fn run_cdi(root: &SysRoot) -> &'static str {
    let is_link = fs::symlink_metadata(root.join("var/run")).is_ok_and(|found| found.is_symlink());
    if !root.is_host() && is_link { "run/cdi" } else { "var/run/cdi" }
}

fn socket(root: &SysRoot, path: &str) -> Socket {
    let (present, trouble) = match fs::metadata(root.join(path)) {
        Ok(found) if found.file_type().is_socket() => (true, None),
        Ok(_) => (false, Some("Is no socket".into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (false, None),
        Err(error) => (false, Some(format!("Cannot be looked at: {error}"))),
    };
    Socket { path: format!("/{path}"), present, trouble }
}

/// The text of a regular file; a pipe in its place does not make us wait.
pub(crate) fn text(path: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("Cannot be read: {error}");
    let options = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    let file = options.map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err("Is no regular file".into());
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(format!("Has more than {MOST_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "Is not text".into())
}

/// Names in a folder, sorted; none when it cannot be listed.
fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort_unstable();
    names.truncate(MOST_FILES);
    names
}

fn cdi_folder(root: &SysRoot, path: &str) -> CdiFolder {
    let here = root.join(path);
    let is_cdi = |name: &String| {
        let kind = Path::new(name).extension().and_then(|kind| kind.to_str());
        let is_folder = fs::symlink_metadata(here.join(name)).is_ok_and(|found| found.is_dir());
        matches!(kind, Some("yaml" | "json")) && !is_folder
    };
    let files = names(&here).into_iter().filter(is_cdi).map(|name| cdi_file(&here, name)).collect();
    CdiFolder { path: format!("/{path}"), present: here.is_dir(), files }
}

fn cdi_file(folder: &Path, file: String) -> CdiFile {
    let parsed = text(&folder.join(&file)).and_then(|text| {
        // JSON is YAML.
        serde_saphyr::from_str::<cdi::Spec>(&text).map_err(|error| {
            let error = error.to_string();
            format!("Is no CDI file: {}", error.lines().next().unwrap_or_default())
        })
    });
    match parsed {
        Ok(spec) => {
            let trouble = spec.trouble();
            let devices = spec.devices.into_iter().map(|device| device.name).collect();
            CdiFile {
                file,
                cdi_kind: Some(spec.kind),
                cdi_version: Some(spec.cdi_version),
                cdi_devices: devices,
                trouble,
            }
        }
        Err(trouble) => {
            CdiFile { file, cdi_kind: None, cdi_version: None, cdi_devices: Vec::new(), trouble: Some(trouble) }
        }
    }
}

/// Two files of one folder that define the same device take it from both.
fn mark_conflicts(folder: &mut CdiFolder) {
    let mut owners: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, file) in folder.files.iter().enumerate() {
        for device in &file.cdi_devices {
            let name = format!("{}={device}", file.cdi_kind.as_deref().unwrap_or_default());
            owners.entry(name).or_default().push(index);
        }
    }
    for (device, files) in owners {
        let [first, second, ..] = files.as_slice() else { continue };
        if first == second {
            continue;
        }
        let other = folder.files.get(*first).map(|file| file.file.clone()).unwrap_or_default();
        if let Some(file) = folder.files.get_mut(*second)
            && file.trouble.is_none()
        {
            file.trouble = Some(format!("Defines {device}, which {other} defines, too"));
        }
    }
}

impl Kata {
    fn read(root: &SysRoot) -> Self {
        let mut kata = Self {
            containerd_files: Vec::new(),
            runtimes: Vec::new(),
            enable_cdi: None,
            gpu_configurations: Vec::new(),
            troubles: Vec::new(),
        };
        kata.containerd(root);
        kata.runtimes.sort_unstable();
        kata.runtimes.dedup();
        let folders = ["opt/kata/share/defaults/kata-containers", "etc/kata-containers"];
        let below = ["", "runtimes", "runtime-rs", "runtime-rs/runtimes"];
        for folder in folders.iter().flat_map(|folder| below.iter().map(move |below| Path::new(folder).join(below))) {
            for name in names(&root.join(&folder)) {
                let is_toml = Path::new(&name).extension().is_some_and(|kind| kind == "toml");
                if name.starts_with("configuration-") && name.contains("nvidia-gpu") && is_toml {
                    kata.gpu_configurations.push(format!("/{}", folder.join(name).display()));
                }
            }
        }
        kata
    }

    fn containerd(&mut self, root: &SysRoot) {
        let mut waiting = vec![PathBuf::from("etc/containerd/config.toml")];
        let mut seen = BTreeSet::new();
        while let Some(path) = waiting.pop() {
            if seen.len() >= MOST_FILES || !seen.insert(path.clone()) || !root.join(&path).exists() {
                continue;
            }
            let shown = format!("/{}", path.display());
            let parsed = text(&root.join(&path)).and_then(|text| {
                text.parse::<toml::Table>().map_err(|error| format!("Is no TOML: {}", error.message()))
            });
            match parsed {
                Ok(table) => {
                    self.containerd_table(&table);
                    waiting.extend(imports(root, &path, &table));
                }
                Err(trouble) => self.troubles.push(format!("{shown}: {trouble}")),
            }
            self.containerd_files.push(shown);
        }
    }

    fn containerd_table(&mut self, table: &toml::Table) {
        let Some(plugins) = table.get("plugins").and_then(toml::Value::as_table) else { return };
        // The plugin's name up to containerd 1.7, and the two that it became in 2.0.
        for plugin in ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"] {
            let Some(plugin) = plugins.get(plugin) else { continue };
            self.enable_cdi = plugin.get("enable_cdi").and_then(toml::Value::as_bool).or(self.enable_cdi);
            let runtimes = plugin.get("containerd").and_then(|containerd| containerd.get("runtimes")?.as_table());
            let is_kata = |name: &str, runtime: &toml::Value| {
                let kind = runtime.get("runtime_type").and_then(toml::Value::as_str).unwrap_or_default();
                name.starts_with("kata") || kind.starts_with("io.containerd.kata")
            };
            let ours = runtimes.into_iter().flatten().filter(|(name, runtime)| is_kata(name, runtime));
            self.runtimes.extend(ours.map(|(name, _)| name.clone()));
        }
    }
}

/// The files that a configuration imports: absolute paths, or paths beside it, with `*` in the last part at most.
fn imports(root: &SysRoot, from: &Path, table: &toml::Table) -> Vec<PathBuf> {
    let list = table.get("imports").and_then(toml::Value::as_array);
    let mut found = Vec::new();
    for import in list.into_iter().flatten().filter_map(toml::Value::as_str) {
        let path = match import.strip_prefix('/') {
            Some(path) => PathBuf::from(path),
            None => from.parent().unwrap_or(Path::new("")).join(import),
        };
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let (Some(folder), Some(pattern)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            continue;
        };
        if !plain {
            continue;
        }
        match pattern.split_once('*') {
            None => found.push(path.clone()),
            Some((start, end)) => {
                let fits = |name: &String| {
                    name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
                };
                found.extend(names(&root.join(folder)).into_iter().filter(fits).map(|name| folder.join(name)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    const GOOD: &str = "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/vfio/devices/vfio0\n";

    fn cdi(files: &[(&str, &str)]) -> Vec<Option<String>> {
        let fake = FakeSysfs::new();
        for (name, content) in files {
            fake.file(format!("var/run/cdi/{name}"), content);
        }
        let node = NodeFiles::read(&fake.root());
        assert!(!node.cdi[0].present && node.cdi[1].present);
        node.cdi[1].files.iter().map(|file| file.trouble.clone()).collect()
    }

    #[test]
    fn cdi_files_are_judged_as_kata_would() {
        assert_eq!(
            cdi(&[("a.yaml", GOOD), ("ignored.txt", "x"), (".a.yaml.7.tmp", "x"), ("sub.yaml/b.txt", "x")]),
            [None]
        );
        let hidden = cdi(&[(".b.yaml", "x")]);
        assert!(matches!(hidden.as_slice(), [Some(text)] if text.contains("Is no CDI file")), "{hidden:?}");
        let json = r#"{"cdiVersion": "0.6.0", "kind": "a.b/c", "devices": [{"name": "x", "containerEdits": {"env": ["A=B"]}}]}"#;
        assert_eq!(cdi(&[("a.json", json)]), [None]);
        for (content, words) in [
            ("", "Is no CDI file"),
            ("{", "Is no CDI file"),
            ("kind: a/b\ndevices: []\n", "Is no CDI file"),
            ("cdiVersion: 1.0.0\nkind: a/b\ndevices: [{name: x}]\n", "does not know"),
            ("cdiVersion: 0.5.0\nkind: ab\ndevices: [{name: x}]\n", "vendor/class"),
            ("cdiVersion: 0.5.0\nkind: a/b\ndevices: [{name: x}, {name: x}]\n", "twice"),
            ("cdiVersion: 0.5.0\nkind: a/b\ndevices: [{name: x, containerEdits: {}}]\n", "nothing to give"),
            ("cdiVersion: 0.5.0\nkind: a/b\nmore: 1\ndevices: [{name: x}]\n", "Is no CDI file"),
        ] {
            let found = cdi(&[("a.yaml", content)]);
            assert!(matches!(found.as_slice(), [Some(text)] if text.contains(words)), "{content:?}: {found:?}");
        }
        let conflict = cdi(&[("a.yaml", GOOD), ("b.yaml", GOOD)]);
        assert_eq!(conflict, [None, Some("Defines nvidia.com/pgpu=0, which a.yaml defines, too".into())]);
    }

    #[test]
    fn strange_files_are_told() {
        let fake = FakeSysfs::new();
        fake.file("var/run/cdi/big.yaml", vec![b'x'; (1 << 20) + 1]);
        fake.file("var/run/cdi/binary.yaml", [0xff, 0xfe]);
        nix::unistd::mkfifo(&fake.path().join("var/run/cdi/pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let node = NodeFiles::read(&fake.root());
        let troubles: Vec<&str> = node.cdi[1].files.iter().filter_map(|file| file.trouble.as_deref()).collect();
        assert_eq!(troubles, ["Has more than 1048576 bytes", "Is not text", "Is no regular file"]);
    }

    #[test]
    fn an_absolute_link_does_not_lead_out_of_the_root() {
        let fake = FakeSysfs::new();
        fs::create_dir_all(fake.path().join("var")).unwrap();
        std::os::unix::fs::symlink("/run", fake.path().join("var/run")).unwrap();
        fake.file("run/cdi/a.yaml", GOOD);
        let node = NodeFiles::read(&fake.root());
        assert_eq!((node.cdi[1].path.as_str(), node.cdi[1].files.len()), ("/run/cdi", 1));
    }

    #[test]
    fn sockets_are_sockets() {
        let fake = FakeSysfs::new();
        let read = || NodeFiles::read(&fake.root()).kubelet;
        assert!(!read().folder && !read().plugin_socket.present);
        fake.file("var/lib/kubelet/device-plugins/kubelet.sock", "");
        assert_eq!(read().plugin_socket.trouble.as_deref(), Some("Is no socket"));
        fake.remove_file("var/lib/kubelet/device-plugins/kubelet.sock");
        let path = fake.path().join("var/lib/kubelet/device-plugins/kubelet.sock");
        let _listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        assert!(read().folder && read().plugin_socket.present);
        assert!(!read().pod_resources_socket.present);
    }

    #[test]
    fn kata_is_found_through_imports() {
        let fake = FakeSysfs::new();
        fake.file(
            "etc/containerd/config.toml",
            "version = 3\nimports = [\"/opt/kata/containerd/config.d/*.toml\", \"conf.d/x.toml\", \"../../leads/out.toml\", \"config.toml\"]\n",
        );
        fake.file(
            "opt/kata/containerd/config.d/kata-deploy.toml",
            "[plugins.\"io.containerd.cri.v1.runtime\"]\nenable_cdi = true\n\
             [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.kata-qemu-nvidia-gpu-snp]\nruntime_type = \"io.containerd.kata-qemu-nvidia-gpu-snp.v2\"\n\
             [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n",
        );
        fake.file("etc/containerd/conf.d/x.toml", "not toml");
        fake.file("opt/kata/share/defaults/kata-containers/configuration-qemu-nvidia-gpu-snp.toml", "");
        let kata = NodeFiles::read(&fake.root()).kata;
        assert_eq!(
            (kata.runtimes.as_slice(), kata.enable_cdi),
            (&["kata-qemu-nvidia-gpu-snp".to_owned()][..], Some(true))
        );
        assert_eq!(kata.containerd_files.len(), 3);
        assert_eq!(kata.troubles.len(), 1);
        assert_eq!(kata.gpu_configurations.len(), 1);
        fake.file(
            "etc/containerd/config.toml",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nenable_cdi = false\n",
        );
        let kata = NodeFiles::read(&fake.root()).kata;
        assert_eq!((kata.runtimes.len(), kata.enable_cdi), (0, Some(false)));
    }
}
