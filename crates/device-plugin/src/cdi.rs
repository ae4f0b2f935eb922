//! CDI files: what Kata resolves `<resource>=<id>` with (operator-contract sections 7.7 and 10).
//!
//! The file name, the version and the shape are the reference's to the letter, because two files that define one device
//! break every Kata GPU pod on the node: ours must overwrite the reference's, and the reference's ours.
//!
//! What is written is read back as Kata reads it, with everybody else's files ([`Resolver`]), before the kubelet is told.
//! The crate container-device-interface (1.1.1) has no features to leave anything out, and would bring 79 more packages into the
//! lock file for its check against a JSON schema: an HTTP client and, in C, the TLS library that `deny.toml` refuses among
//! them. So the text is written here, foreign files are read by serde ([`agent_core::cdi::Spec`]), and that what is written is
//! valid, and that nothing is missed in what others write, is tested with the kubelet stand-in's reader, which was written from
//! CDI's rules alone. By hand that crate's own programs were asked, too: `validate` takes the file of this module's first test, and
//! `cdi devices` lists its devices.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{DirEntry, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::names::{ResourceName, VENDOR};
use crate::units::Unit;
use agent_core::cdi::{Device, LONGEST, Spec, VERSION, class_and_rest, is_device_name, is_ours};
use agent_core::hostfile::{HostDir, HostFileError};
use agent_core::text::chain;

/// Mode of a file, as the reference leaves it.
const MODE: u32 = 0o600;

/// The text of the file for one resource; none when no unit has a node.
pub fn render(resource: &ResourceName, units: &[Unit]) -> Option<String> {
    let mut listed: Vec<&Unit> =
        units.iter().filter(|unit| !unit.nodes.is_empty() && is_device_name(&unit.id)).collect();
    listed.sort_by(|a, b| a.order().cmp(&b.order()));
    if listed.is_empty() {
        return None;
    }
    let mut text = format!("---\ncdiVersion: {VERSION}\nkind: {resource}\ndevices:\n");
    for unit in listed {
        // Always quoted: YAML 1.1 reads digits with colons as a number of base 60, and bare digits as a number.
        let _ = write!(text, "    - name: \"{}\"\n      containerEdits:\n        deviceNodes:\n", unit.id);
        for node in &unit.nodes {
            let _ = writeln!(text, "            - path: {node}");
        }
    }
    Some(text)
}

/// Name of the file for one resource.
fn file_name(resource: &ResourceName) -> String {
    format!("{VENDOR}-{}.yaml", resource.class())
}

/// What a call of [`CdiFolder::sync`] did.
#[derive(Debug, Default)]
pub struct Synced {
    /// Resources whose file was written, with its path.
    pub written: Vec<(ResourceName, PathBuf)>,
    /// Files that were removed.
    pub removed: Vec<PathBuf>,
    /// Resources whose file is not what it should be, and why.
    pub failed: BTreeMap<ResourceName, String>,
}

/// How long another plugin may take from its CDI file to its socket.
const TAKEOVER: Duration = Duration::from_secs(10);

/// The folder that CDI libraries read.
#[derive(Debug)]
pub struct CdiFolder {
    path: PathBuf,
    /// What this program has written last.
    written: BTreeMap<ResourceName, String>,
    /// What it has written that over, and when, where that was another plugin's.
    replaced: BTreeMap<ResourceName, (Instant, String)>,
}

impl CdiFolder {
    /// A folder that need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), written: BTreeMap::new(), replaced: BTreeMap::new() }
    }

    /// Makes the folder hold exactly `files` of ours: writes what differs, removes what is stale, leaves what is
    /// foreign. An error on one file does not keep the others from being written.
    ///
    /// The files of the resources in `aside` are those of whoever serves them now, or of the pods of before. They are left
    /// alone, but for one that was just written over: a plugin may write its file before it takes the socket.
    pub fn sync(&mut self, files: &BTreeMap<ResourceName, String>, aside: &BTreeSet<ResourceName>) -> Synced {
        let mut synced = Synced::default();
        // With nothing to write, nothing is made either; but an old file may have to go.
        let is_idle = files.keys().all(|resource| aside.contains(resource));
        let opened = if is_idle { HostDir::open_existing(&self.path) } else { HostDir::open(&self.path).map(Some) };
        let folder = match opened {
            Ok(Some(folder)) => folder,
            Ok(None) => return synced,
            Err(error) => {
                synced.failed = files.keys().map(|resource| (resource.clone(), chain(&error))).collect();
                return synced;
            }
        };
        for (resource, text) in files {
            let done = if aside.contains(resource) {
                self.give_back(&folder, resource)
            } else {
                self.write(&folder, resource, text)
            };
            match done {
                Ok(true) => synced.written.push((resource.clone(), folder.path().join(file_name(resource)))),
                Ok(false) => {}
                Err(error) => {
                    synced.failed.insert(resource.clone(), chain(&error));
                }
            }
        }
        let stays = |resource: &ResourceName| files.contains_key(resource) || aside.contains(resource);
        for name in stale(&folder, stays) {
            match folder.remove(&name) {
                Ok(true) => synced.removed.push(folder.path().join(name)),
                Ok(false) => {}
                Err(error) => tracing::warn!(error = chain(&error), "A stale CDI file cannot be removed"),
            }
        }
        synced
    }
    /// The file of a resource as it is; none where it is not there, cannot be read, or may be written by others: then it is not
    /// the one that was left.
    fn found(folder: &HostDir, resource: &ResourceName) -> Option<String> {
        String::from_utf8(folder.read(&file_name(resource), LONGEST).ok().flatten()?).ok()
    }

    /// Writes a file of ours if it is not so already; whether it was written.
    fn write(&mut self, folder: &HostDir, resource: &ResourceName, text: &str) -> Result<bool, HostFileError> {
        let found = Self::found(folder, resource);
        let is_new = found.as_deref() != Some(text);
        if is_new {
            // The folder is in memory, and what is not in it after a power cut is written before the kubelet is told.
            folder.write_for_this_boot(&file_name(resource), text.as_bytes(), MODE)?;
            let is_others =
                |found: &String| self.written.get(resource) != Some(found) && is_ours(&resource.to_string(), found);
            if let Some(theirs) = found.filter(is_others) {
                self.replaced.insert(resource.clone(), (Instant::now(), theirs));
            }
        }
        self.written.insert(resource.clone(), text.to_owned());
        Ok(is_new)
    }

    /// Puts back what another plugin wrote shortly before it took the resource's socket, if ours is in its place; whether it did.
    fn give_back(&mut self, folder: &HostDir, resource: &ResourceName) -> Result<bool, HostFileError> {
        let is_our_last = || {
            let found = Self::found(folder, resource);
            found.is_some() && found.as_ref() == self.written.get(resource)
        };
        let Some((_, theirs)) = self.replaced.get(resource).filter(|(at, _)| at.elapsed() < TAKEOVER && is_our_last())
        else {
            self.replaced.remove(resource);
            return Ok(false);
        };
        folder.write_for_this_boot(&file_name(resource), theirs.as_bytes(), MODE)?;
        self.replaced.remove(resource);
        self.written.remove(resource);
        Ok(true)
    }
}

/// Names of files that are ours and of no resource that `stays`, and of temporary files that a killed process left.
fn stale(folder: &HostDir, stays: impl Fn(&ResourceName) -> bool) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder.path()) else { return Vec::new() };
    let ours = |name: &String| {
        if let Some((class, rest)) = name.strip_prefix('.').and_then(class_and_rest) {
            return class.parse::<ResourceName>().is_ok() && rest.split('.').next_back() == Some("tmp");
        }
        let Some((class, rest)) = class_and_rest(name) else { return false };
        let Ok(resource) = class.parse::<ResourceName>() else { return false };
        rest.is_empty() && !stays(&resource) && holds_ours(folder, name, &resource).unwrap_or(false)
    };
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(ours).collect();
    names.sort();
    names
}

fn holds_ours(folder: &HostDir, name: &str, resource: &ResourceName) -> Result<bool, HostFileError> {
    let bytes = folder.read(name, LONGEST)?.unwrap_or_default();
    Ok(std::str::from_utf8(&bytes).is_ok_and(|text| is_ours(&resource.to_string(), text)))
}

/// Fully qualified names of devices, each with its nodes.
type Devices = BTreeMap<String, Vec<String>>;

/// What a file was when it was read: another file, or another content, has another one.
type Stamp = (u64, u64, u64, i64, i64);

/// What Kata will find, read as its CDI library does: all files of all folders.
#[derive(Debug)]
pub struct Resolver {
    /// Lowest priority first.
    folders: Vec<PathBuf>,
    /// What was read, and is not read again while it is the same file.
    read: BTreeMap<PathBuf, (Stamp, Result<Devices, Problem>)>,
}

/// What a look at all CDI files gave.
#[derive(Debug, Default)]
pub struct Resolved {
    /// Why a unit that has nodes does not resolve to them, by resource and ID.
    pub failed: BTreeMap<(ResourceName, String), String>,
    /// Files that may keep every Kata pod from starting, and are not ours.
    pub problems: BTreeMap<PathBuf, Problem>,
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// This agent cannot read it, who has fewer rights than Kata.
    #[error(
        "It is not known whether Kata's Go runtime starts pods with devices while this file is there: it cannot be read: {0}"
    )]
    Unread(String),
    /// It does not parse, or is not valid.
    #[error(
        "Kata's Go runtime starts no pod with devices while this file is there, which it cannot read: {0}; repair or remove it"
    )]
    Broken(String),
    /// It defines a device that another file of the same folder defines as well.
    #[error(
        "Kata's Go runtime starts no pod with devices while this file defines {device}, which {} defines, too; remove one of \
         them", .other.display()
    )]
    Conflict {
        /// The device.
        device: String,
        /// The other file.
        other: PathBuf,
    },
}

impl Problem {
    /// A stable code for logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unread(_) => "cdi-unread",
            Self::Broken(_) => "cdi-broken",
            Self::Conflict { .. } => "cdi-conflict",
        }
    }
}

impl Resolver {
    /// Reads `folders`, of which the later ones count more.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut unique: Vec<PathBuf> = Vec::new();
        for folder in folders {
            if !unique.contains(&folder) {
                unique.push(folder);
            }
        }
        Self { folders: unique, read: BTreeMap::new() }
    }

    /// Looks whether each of `units` that has nodes resolves to just these. What another process serves (`aside`) is for that
    /// to see to.
    pub fn check(&mut self, units: &[Unit], aside: &BTreeSet<ResourceName>) -> Resolved {
        let files = self.refresh();
        let mut resolved = Resolved { problems: self.conflicts(&files, units), ..Resolved::default() };
        for (path, (_, content)) in &self.read {
            if let Err(problem) = content {
                resolved.problems.insert(path.clone(), problem.clone());
            }
        }
        for unit in units.iter().filter(|unit| !unit.nodes.is_empty() && !aside.contains(&unit.resource)) {
            if let Err(reason) = self.resolve(&files, unit) {
                resolved.failed.insert((unit.resource.clone(), unit.id.clone()), reason);
            }
        }
        resolved
    }

    /// Files that define a device of another file of their folder. Of two the one that is not ours is told, else the later.
    fn conflicts(&self, files: &[Vec<PathBuf>], units: &[Unit]) -> BTreeMap<PathBuf, Problem> {
        let ours: BTreeSet<String> = units.iter().map(|unit| file_name(&unit.resource)).collect();
        let is_ours = |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| ours.contains(name));
        let mut conflicts = BTreeMap::new();
        for folder in files {
            let mut owners: BTreeMap<&str, &PathBuf> = BTreeMap::new();
            // Ours first, whatever they are called.
            let mut order: Vec<&PathBuf> = folder.iter().collect();
            order.sort_by_key(|path| !is_ours(path));
            for path in order {
                let Some((_, Ok(devices))) = self.read.get(path) else { continue };
                for device in devices.keys() {
                    if let Some(other) = owners.insert(device, path) {
                        owners.insert(device, other);
                        let conflict = Problem::Conflict { device: device.clone(), other: other.clone() };
                        conflicts.entry(path.clone()).or_insert(conflict);
                    }
                }
            }
        }
        conflicts
    }

    /// A device of a later folder is taken before one of an earlier folder; two in one folder make it no device.
    fn resolve(&self, files: &[Vec<PathBuf>], unit: &Unit) -> Result<(), String> {
        let device = format!("{}={}", unit.resource, unit.id);
        let definitions = |folder: &Vec<PathBuf>| -> Vec<(PathBuf, Vec<String>)> {
            let nodes = |path: &PathBuf| self.read.get(path)?.1.as_ref().ok()?.get(&device).cloned();
            folder.iter().filter_map(|path| Some((path.clone(), nodes(path)?))).collect()
        };
        let found = files.iter().rev().map(definitions).find(|found| !found.is_empty()).unwrap_or_default();
        let ours = file_name(&unit.resource);
        let foreign = || found.iter().map(|(path, _)| path).find(|path| !path.ends_with(&ours));
        match (found.as_slice(), foreign()) {
            ([], _) => Err(format!("No CDI file defines {device}, though it was written")),
            ([(_, nodes)], _) if *nodes == unit.nodes => Ok(()),
            ([_], None) => Err(format!("The CDI file of {device} names other nodes than the device has")),
            ([_], Some(path)) => Err(format!(
                "{} defines CDI device {device} in the place of {ours}; remove the device there",
                path.display()
            )),
            (_, path) => Err(format!(
                "{} defines CDI device {device} as well as {ours}, and Kata takes neither; remove it there",
                path.unwrap_or(&found[0].0).display()
            )),
        }
    }

    /// Reads what has changed; gives the files of each folder.
    fn refresh(&mut self) -> Vec<Vec<PathBuf>> {
        let files: Vec<Vec<PathBuf>> = self.folders.iter().map(|folder| specs(folder)).collect();
        self.read.retain(|path, _| files.iter().flatten().any(|file| file == path));
        for path in files.iter().flatten() {
            // What has gone meanwhile; or a link to where this agent's container sees nothing, and Kata may.
            let Ok(meta) = std::fs::metadata(path) else {
                self.read.remove(path);
                continue;
            };
            let stamp = stamp(&meta);
            // Why a file cannot be read may be over without a trace on the file.
            let is_known =
                |(known, content): &(Stamp, _)| *known == stamp && !matches!(content, Err(Problem::Unread(_)));
            if !self.read.get(path).is_some_and(is_known) {
                self.read.insert(path.clone(), (stamp, devices(path)));
            }
        }
        files
    }
}

fn stamp(meta: &Metadata) -> Stamp {
    (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// The files of a folder that CDI libraries read, in name order; none where it cannot be read.
fn specs(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let is_folder = |entry: &DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok().filter(|entry| !is_folder(entry))?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml" || extension == "json"))
        .collect();
    paths.sort();
    paths
}

fn devices(path: &Path) -> Result<Devices, Problem> {
    let text = match text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Devices::new()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(Problem::Broken(error.to_string())),
        Err(error) => return Err(Problem::Unread(error.to_string())),
    };
    let spec: Spec = serde_saphyr::from_str(&text).map_err(|error| Problem::Broken(first_line(&error.to_string())))?;
    if let Some(trouble) = spec.trouble() {
        return Err(Problem::Broken(trouble));
    }
    let nodes = |device: &Device| device.nodes().map(str::to_owned).collect();
    Ok(spec.devices.iter().map(|device| (format!("{}={}", spec.kind, device.name), nodes(device))).collect())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

fn text(path: &Path) -> io::Result<String> {
    // O_NONBLOCK: a FIFO under such a name must not make us wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits()).open(path)?;
    let meta = File::metadata(&file)?;
    if !meta.is_file() {
        return Err(io::Error::other("It is not a regular file"));
    }
    if meta.len() > LONGEST {
        return Err(io::Error::other(format!("It holds more than {LONGEST} bytes")));
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn unit(id: &str, nodes: &[&str]) -> Unit {
        Unit { nodes: nodes.iter().map(ToString::to_string).collect(), ..Unit::sample(id) }
    }

    fn pgpu() -> ResourceName {
        "pgpu".parse().unwrap()
    }

    fn files(texts: &[(&str, &str)]) -> BTreeMap<ResourceName, String> {
        texts.iter().map(|(name, text)| (name.parse().unwrap(), (*text).to_owned())).collect()
    }

    /// Nobody else serves a resource.
    const ALONE: BTreeSet<ResourceName> = BTreeSet::new();

    #[test]
    fn the_text_is_the_contracts() {
        let units = [
            unit("10", &["/dev/vfio/devices/vfio10"]),
            unit("9", &["/dev/vfio/vfio", "/dev/vfio/9"]),
            unit("0000:41:00.0", &["/dev/vfio/devices/vfio1", "/dev/vfio/devices/vfio2"]),
            unit("7", &[]),
        ];
        let golden = "\
---
cdiVersion: 0.5.0
kind: nvidia.com/pgpu
devices:
    - name: \"9\"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/vfio
            - path: /dev/vfio/9
    - name: \"10\"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/devices/vfio10
    - name: \"0000:41:00.0\"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/devices/vfio1
            - path: /dev/vfio/devices/vfio2
";
        assert_eq!(render(&pgpu(), &units).as_deref(), Some(golden));
        assert!(is_ours(&pgpu().to_string(), golden));
        assert_eq!(render(&pgpu(), &[unit("7", &[])]), None, "a device without edits would make the file invalid");
    }

    #[test]
    fn device_names_obey_cdi() {
        for good in ["0", "17", "0000:41:00.0", "a-b_c"] {
            assert!(is_device_name(good), "{good}");
        }
        for bad in ["", ":1", "1.", "a b", "a\"b", "a\nb", "é"] {
            assert!(!is_device_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_file_is_written_whole_private_and_only_on_change() {
        let folder = tempfile::tempdir().unwrap();
        let mut cdi = CdiFolder::new(folder.path().join("run/cdi"));
        let path = folder.path().join("run/cdi/nvidia.com-pgpu.yaml");
        let text = render(&pgpu(), &[unit("1", &["/dev/vfio/devices/vfio1"])]).unwrap();
        let wanted = files(&[("pgpu", &text)]);

        assert_eq!(cdi.sync(&wanted, &ALONE).written, [(pgpu(), path.clone())]);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o777, std::fs::read_to_string(&path).unwrap()), (0o600, text.clone()));

        assert!(cdi.sync(&wanted, &ALONE).written.is_empty());
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), meta.ino(), "nothing changed, nothing written");

        std::fs::write(&path, "---\nbroken by someone").unwrap();
        std::fs::write(folder.path().join("run/cdi/.nvidia.com-pgpu.yaml.7.0.0.tmp"), "left by a killed process")
            .unwrap();
        assert_eq!(cdi.sync(&wanted, &ALONE).written.len(), 1);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let names: Vec<_> =
            std::fs::read_dir(folder.path().join("run/cdi")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["nvidia.com-pgpu.yaml"], "no temporary file stays");
    }

    #[test]
    fn a_link_in_the_place_of_a_file_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        std::fs::write(&victim, "keep").unwrap();
        let mut cdi = CdiFolder::new(folder.path().join("cdi"));
        std::fs::create_dir(folder.path().join("cdi")).unwrap();
        std::os::unix::fs::symlink(&victim, folder.path().join("cdi/nvidia.com-pgpu.yaml")).unwrap();
        assert!(cdi.sync(&files(&[("pgpu", "text")]), &ALONE).failed.is_empty());
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "keep");
        assert!(std::fs::symlink_metadata(folder.path().join("cdi/nvidia.com-pgpu.yaml")).unwrap().is_file());
    }

    #[test]
    fn stale_files_of_ours_go_and_foreign_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let ours = |class: &str| {
            let name: ResourceName = class.parse().unwrap();
            render(&name, &[unit("1", &["/dev/vfio/1"])]).unwrap()
        };
        let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        put("nvidia.com-old.yaml", &ours("old"));
        put("nvidia.com-other.yaml", &ours("kind-of-another-name"));
        put(
            "nvidia.com-gpu.yaml",
            "---\ncdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n    - name: \"0\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/nvidia0\n",
        );
        put("nvidia.com-hooks.yaml", &(ours("hooks") + "        hooks:\n"));
        put("nvidia.yaml", &ours("pgpu"));
        put("vendor.com-x.json", "{}");
        let synced = CdiFolder::new(folder.path()).sync(&files(&[("pgpu", &ours("pgpu"))]), &ALONE);
        assert_eq!(synced.removed, [folder.path().join("nvidia.com-old.yaml")]);
        let mut left: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(
            left,
            [
                "nvidia.com-gpu.yaml",
                "nvidia.com-hooks.yaml",
                "nvidia.com-other.yaml",
                "nvidia.com-pgpu.yaml",
                "nvidia.yaml",
                "vendor.com-x.json"
            ]
        );
    }

    fn kata() -> (tempfile::TempDir, Resolver) {
        let place = tempfile::tempdir().unwrap();
        for folder in ["etc", "run"] {
            std::fs::create_dir(place.path().join(folder)).unwrap();
        }
        let resolver = Resolver::new([place.path().join("etc"), place.path().join("run"), place.path().join("run")]);
        (place, resolver)
    }

    #[test]
    fn what_kata_would_not_find_is_told_with_the_file_in_the_way() {
        // Files -> words of the fault; none where it resolves.
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
        let unit = unit("0000:41:00.0", &["/dev/vfio/devices/vfio1"]);
        let other = Unit { nodes: vec!["/dev/vfio/devices/vfio9".into()], ..unit.clone() };
        let (ours, moved) = (render(&pgpu(), std::slice::from_ref(&unit)).unwrap(), render(&pgpu(), &[other]).unwrap());
        let json = r#"{"cdiVersion":"0.6.0","kind":"nvidia.com/pgpu","devices":[{"name":"0000:41:00.0","containerEdits":{"deviceNodes":[{"path":"/dev/x"}]}}]}"#;
        let gpu = ours.replace("nvidia.com/pgpu", "nvidia.com/gpu");
        let cases: &[Case] = &[
            (&[("run/nvidia.com-pgpu.yaml", &ours)], &[]),
            (&[("run/nvidia.com-pgpu.yaml", &ours), ("etc/a.yaml", &moved)], &[]),
            (&[("run/nvidia.com-pgpu.yaml", &ours), ("run/a.yaml", &gpu)], &[]),
            (&[("run/nvidia.com-pgpu.yaml", &ours), ("run/a.yml", &moved), ("run/sub.yaml/a.yaml", &moved)], &[]),
            (&[("run/nvidia.com-pgpu.yaml", &ours), ("run/a.yaml", &ours)], &["run/a.yaml defines", "takes neither"]),
            (&[("run/nvidia.com-pgpu.yaml", &ours), ("run/z.json", json)], &["run/z.json defines", "takes neither"]),
            (&[("etc/nvidia.com-pgpu.yaml", &ours), ("run/z.json", json)], &["run/z.json defines", "in the place of"]),
            (&[("run/nvidia.com-pgpu.yaml", &moved)], &["names other nodes"]),
            (&[("run/a.yaml", &gpu)], &["No CDI file defines nvidia.com/pgpu=0000:41:00.0"]),
            (&[], &["No CDI file defines"]),
        ];
        for (files, words) in cases {
            let (place, mut resolver) = kata();
            for (name, text) in *files {
                let path = place.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let checked = resolver.check(std::slice::from_ref(&unit), &ALONE);
            let broken = checked.problems.values().find(|problem| matches!(problem, Problem::Broken(_)));
            assert!(broken.is_none(), "a folder is no file: {broken:?}");
            let reason = checked.failed.get(&(pgpu(), unit.id.clone()));
            assert_eq!(reason.is_some(), !words.is_empty(), "{files:?}: {reason:?}");
            assert!(words.iter().all(|words| reason.unwrap().contains(words)), "{files:?}: {reason:?}");
        }
    }

    #[test]
    fn files_are_read_again_only_when_they_change_and_broken_ones_are_told() {
        let unit = unit("1", &["/dev/vfio/devices/vfio1"]);
        let (place, mut resolver) = kata();
        CdiFolder::new(place.path().join("run"))
            .sync(&files(&[("pgpu", &render(&pgpu(), std::slice::from_ref(&unit)).unwrap())]), &ALONE);
        let foreign = place.path().join("etc/foreign.yaml");
        for (text, words) in [
            ("cdiVersion: 0.5.0\nkind: a.b/c\ndevices: [{name: x, containerEdits: {env: [A=B]}}]\n", ""),
            ("cdiVersion: 0.5.0\nkind: a.b/c\ndevices: [{name: x}]\n", "nothing to give"),
            ("kind: [", "repair or remove it"),
            ("a: b\n", "unknown field"),
            ("kind: a.b/c\n", "missing field"),
            ("cdiVersion: 0.7.0\nkind: a.b/c\ndevices: [{name: x}]\n", "it knows 0.3.0 to 0.6.0"),
            ("cdiVersion: 0.5.0\nkind: a.b/c\n", ""),
            ("cdiVersion: 0.5.0\nkind: a.b/cc\ndevices: [{name: x, containerEdits: {env: [A=B]}}]\n", ""),
        ] {
            std::fs::write(&foreign, text).unwrap();
            let checked = resolver.check(std::slice::from_ref(&unit), &ALONE);
            assert!(checked.failed.is_empty(), "{checked:?}");
            let problem = checked.problems.get(&foreign);
            assert_eq!(problem.is_some(), !words.is_empty(), "{text:?}: {checked:?}");
            if let Some(problem) = problem {
                assert_eq!(problem.code(), "cdi-broken");
                assert!(problem.to_string().contains(words), "{text:?}: {problem}");
            }
        }
        std::fs::remove_file(&foreign).unwrap();
        nix::unistd::mkfifo(&foreign, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let checked = resolver.check(std::slice::from_ref(&unit), &ALONE);
        let problem = &checked.problems[&foreign];
        assert!(problem.to_string().contains("not a regular file"), "{checked:?}");
        assert_eq!(problem.code(), "cdi-unread", "whoever has more rights may read what this agent cannot");
        std::fs::remove_file(&foreign).unwrap();
        assert!(resolver.check(&[unit], &ALONE).problems.is_empty());
        assert_eq!(resolver.read.len(), 1);
    }

    #[test]
    fn of_two_files_that_define_one_device_the_foreign_one_is_told() {
        // Files -> the one that is told, its device and the other.
        type Case<'a> = (&'a [(&'a str, &'a str)], Option<(&'a str, &'a str, &'a str)>);
        let unit = unit("1", &["/dev/vfio/devices/vfio1"]);
        let ours = render(&pgpu(), std::slice::from_ref(&unit)).unwrap();
        let foreign = "cdiVersion: 0.5.0\nkind: a.b/c\ndevices: [{name: x, containerEdits: {env: [A=B]}}]\n";
        let cases: &[Case] = &[
            (
                &[("run/nvidia.com-pgpu.yaml", &ours), ("run/a.yaml", &ours)],
                Some(("run/a.yaml", "nvidia.com/pgpu=1", "run/nvidia.com-pgpu.yaml")),
            ),
            (&[("run/a.yaml", foreign), ("run/b.yaml", foreign)], Some(("run/b.yaml", "a.b/c=x", "run/a.yaml"))),
            (&[("etc/a.yaml", foreign), ("run/b.yaml", foreign)], None),
        ];
        for (files, told) in cases {
            let (place, mut resolver) = kata();
            for (name, text) in *files {
                std::fs::write(place.path().join(name), text).unwrap();
            }
            let problems = resolver.check(std::slice::from_ref(&unit), &ALONE).problems;
            let expected = told.map(|(path, device, other)| {
                let problem = Problem::Conflict { device: device.into(), other: place.path().join(other) };
                assert_eq!(problem.code(), "cdi-conflict");
                (place.path().join(path), problem)
            });
            assert_eq!(problems, expected.into_iter().collect(), "{files:?}");
        }
    }

    #[test]
    fn one_file_that_cannot_be_written_fails_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("nvidia.com-pgpu.yaml/in-the-way")).unwrap();
        let synced = CdiFolder::new(folder.path()).sync(&files(&[("nvswitch", "b"), ("pgpu", "a")]), &ALONE);
        assert_eq!(synced.written.len(), 1);
        assert_eq!(synced.failed.keys().map(ToString::to_string).collect::<Vec<_>>(), ["nvidia.com/pgpu"]);

        let open_to_all = folder.path().join("open");
        std::fs::create_dir(&open_to_all).unwrap();
        std::fs::set_permissions(&open_to_all, std::fs::Permissions::from_mode(0o777)).unwrap();
        let failed = CdiFolder::new(open_to_all).sync(&files(&[("pgpu", "a")]), &ALONE).failed;
        assert!(failed[&pgpu()].contains("is not trusted"), "{failed:?}");
    }

    #[test]
    fn what_another_process_serves_is_its_own_to_write() {
        let place = tempfile::tempdir().unwrap();
        let text = |node: &str| render(&pgpu(), &[unit("0000:41:00.0", &[node])]).unwrap();
        let (ours, newer) = (text("/dev/vfio/devices/vfio1"), text("/dev/vfio/devices/vfio2"));
        let theirs = render(&pgpu(), &[unit("7", &["/dev/vfio/7"])]).unwrap();
        let path = place.path().join("nvidia.com-pgpu.yaml");
        let found = || std::fs::read_to_string(&path).ok();
        let aside: BTreeSet<ResourceName> = [pgpu()].into();
        let mut cdi = CdiFolder::new(place.path());

        // Nothing is made, nothing is changed, and nothing is removed.
        assert!(cdi.sync(&files(&[("pgpu", &ours)]), &aside).written.is_empty() && found().is_none());
        cdi.sync(&files(&[("pgpu", &ours)]), &ALONE);
        for wanted in [files(&[("pgpu", &newer)]), files(&[])] {
            let synced = cdi.sync(&wanted, &aside);
            assert!(synced.written.is_empty() && synced.removed.is_empty(), "{synced:?}");
        }
        assert_eq!(found().as_ref(), Some(&ours), "pods of before find their devices");
        std::fs::write(&path, &theirs).unwrap();
        cdi.sync(&files(&[("pgpu", &ours)]), &aside);
        assert_eq!(found().as_ref(), Some(&theirs));

        // One that writes its file before it takes the socket gets the file back, once.
        cdi.sync(&files(&[("pgpu", &ours)]), &ALONE);
        assert_eq!(found().as_ref(), Some(&ours));
        cdi.sync(&files(&[("pgpu", &ours)]), &aside);
        assert_eq!(found().as_ref(), Some(&theirs));
        cdi.sync(&files(&[("pgpu", &ours)]), &ALONE);
        cdi.sync(&files(&[("pgpu", &newer)]), &ALONE);
        std::fs::write(&path, &ours).unwrap();
        cdi.sync(&files(&[("pgpu", &newer)]), &aside);
        assert_eq!(found().as_ref(), Some(&ours), "what was written since is another's");
    }
}
