//! What the kubelet is told of the devices, and why: from the file that the device plugin keeps.

use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use agent_core::state::{FileProblem, UNITS_DIR, UNITS_FILE, UnitRecord, UnitsFile};
use agent_core::text::chain;
use jiff::Timestamp;
use serde::Serialize;

use super::facts::{Host, Manager};
use crate::table;

/// The folder of `units.json` below the host's root.
pub(crate) fn folder(root: &Path) -> PathBuf {
    root.join(kubelet_api::PLUGIN_DIR.trim_start_matches('/')).join(UNITS_DIR)
}

/// `units.json` of this boot.
#[derive(Clone, Debug)]
pub(super) enum Units {
    Read(UnitsFile),
    Absent,
    Unreadable(String),
}

impl Units {
    /// Reads it below the host's root.
    pub(super) fn read(root: &Path, boot_id: Option<&str>) -> Self {
        let Some(boot_id) = boot_id else { return Self::Unreadable("The kernel's boot id cannot be read".to_owned()) };
        let read = HostDir::open_existing(folder(root)).map_err(|error| chain(&error)).and_then(|dir| match dir {
            Some(dir) => UnitsFile::load(&dir, boot_id).map_err(|error| chain(&error)),
            None => Ok(None),
        });
        match read {
            Ok(Some(file)) => Self::Read(file),
            Ok(None) => Self::Absent,
            Err(why) => Self::Unreadable(why),
        }
    }

    /// The file's content, if there is one.
    fn file(&self) -> Option<&UnitsFile> {
        if let Self::Read(file) = self { Some(file) } else { None }
    }
}

/// What `--json` has of it.
#[derive(Debug, Serialize)]
pub(super) struct View<'a> {
    /// `read`, `absent` or `unreadable`.
    answer: &'static str,
    trouble: Option<&'a str>,
    /// `runs`, `gone` or `not-seen`.
    plugin: &'static str,
    written_at: Option<Timestamp>,
    /// `pci` or `iommu`, and why.
    ids: Option<&'a str>,
    ids_reason: Option<&'a str>,
    /// Where the pods are from.
    pods: Option<&'a str>,
    /// Why it cannot be seen of some units whether they are in use.
    blind: Option<&'a str>,
    /// CDI files by which Kata may start no pod.
    cdi_problems: &'a [FileProblem],
    units: &'a [UnitRecord],
}

impl<'a> View<'a> {
    pub(super) fn of(host: &'a Host) -> Self {
        let (answer, trouble) = match &host.units {
            Units::Read(_) => ("read", None),
            Units::Absent => ("absent", None),
            Units::Unreadable(why) => ("unreadable", Some(why.as_str())),
        };
        let file = host.units.file();
        Self {
            answer,
            trouble,
            plugin: host.plugin.word(),
            written_at: file.map(|file| file.origin.written_at),
            ids: file.map(|file| file.ids.as_str()),
            ids_reason: file.map(|file| file.ids_reason.as_str()),
            pods: file.map(|file| file.pods.as_str()),
            blind: file.and_then(|file| file.blind.as_deref()),
            cdi_problems: file.map(|file| file.cdi_problems.as_slice()).unwrap_or_default(),
            units: file.map(|file| file.units.as_slice()).unwrap_or_default(),
        }
    }
}

/// A table of the units; empty where there are none.
pub(super) fn table(host: &Host) -> String {
    let units = host.units.file().map(|file| file.units.as_slice()).unwrap_or_default();
    if units.is_empty() {
        return String::new();
    }
    let mut cells = vec![["RESOURCE", "ID", "NODES", "NUMA", "HEALTH", "POD"].map(str::to_owned)];
    let joined = |list: Vec<String>| if list.is_empty() { "-".to_owned() } else { list.join(",") };
    cells.extend(units.iter().map(|unit| {
        let health = match &unit.error {
            _ if unit.healthy => "healthy".to_owned(),
            Some(error) => error.code.clone(),
            None => "unhealthy".to_owned(),
        };
        [
            unit.resource.clone(),
            unit.id.clone(),
            joined(unit.nodes.clone()),
            joined(unit.numa.iter().map(ToString::to_string).collect()),
            health,
            unit.pod.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    format!("\n{}", table::align(&cells))
}

/// Why units cannot be allocated, and what keeps Kata from starting pods with those that can, in full.
pub(super) fn errors(host: &Host) -> impl Iterator<Item = String> {
    let units = host.units.file().map(|file| file.units.as_slice()).unwrap_or_default();
    let of_units = units
        .iter()
        .filter_map(|unit| Some(format!("{} {}: {}", unit.resource, unit.id, unit.error.as_ref()?.message)));
    let files = host.units.file().map(|file| file.cdi_problems.as_slice()).unwrap_or_default();
    of_units.chain(files.iter().map(|file| format!("{}: {} ({})", file.path, file.error.message, file.error.code)))
}

/// What else is to be told of the units.
pub(super) fn remarks(host: &Host) -> Vec<String> {
    let mut remarks = Vec::new();
    match (&host.units, &host.plugin) {
        (Units::Read(_), Manager::Gone) => {
            remarks.push("device-plugin does not run here: the kubelet is told nothing, and the units are its last word".to_owned());
        }
        (Units::Absent, Manager::Runs(agent)) => remarks.push(format!(
            "What {} (pid {}) tells the kubelet is not to be seen: {}{UNITS_DIR}/{UNITS_FILE} is not there; NVIDIA's plugin writes \
             none",
            agent.name,
            agent.pid,
            kubelet_api::PLUGIN_DIR
        )),
        (Units::Unreadable(why), _) => remarks.push(format!("What the kubelet is told cannot be read: {why}")),
        _ => {}
    }
    if let Units::Read(file) = &host.units {
        let of_units =
            file.units.iter().flat_map(|unit| unit.remarks.iter().map(move |text| format!("{}: {text}", unit.bdf)));
        remarks.extend(of_units);
        if file.ids == "iommu" {
            remarks.push(format!("Units are called by numbers: {}", file.ids_reason));
        }
        remarks.extend(file.blind.iter().map(|blind| format!("It cannot be seen whether these are in use: {blind}")));
    }
    remarks
}
