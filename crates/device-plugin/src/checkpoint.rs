//! The kubelet's own book of what it has given to pods, and by which kind of ID units are called because of it.
//!
//! The file lies in the device plugin folder, which is mounted in every setting. It is only read. Its checksum (FNV-1a, 32 bits)
//! is that of Go's dump of the values, with the names of the kubelet's own types in it, which are not the same in every
//! version, and is not verified: the kubelet exchanges the file whole, so that it is never seen half written. A kubelet that finds
//! the checksum wrong goes on without the file, and writes it anew; what we took from it meanwhile only keeps numbers longer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::text::chain;
use hw_probe::{Bdf, Inventory, pci_ids_name};
use serde::Deserialize;
use tokio::time::Instant;

use crate::names::resource_name;
use crate::units::{IdScheme, Policy};

/// Base name of the file in the device plugin folder.
pub const CHECKPOINT: &str = "kubelet_internal_checkpoint";

/// Largest file that is read, in bytes: a thousand pods with devices have less.
const LONGEST: u64 = 16 << 20;

/// How long an allocation of ours counts whatever the kubelet's book says of it: the kubelet writes it down after it has
/// our answer.
const UNWRITTEN: Duration = Duration::from_mins(1);

/// One device that the kubelet has given to a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Given {
    /// The whole name of the resource, `nvidia.com/pgpu`.
    pub resource: String,
    /// The device's ID.
    pub id: String,
    /// UID of the pod.
    pub pod: String,
}

/// What there is of the book.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Book {
    /// No file: this kubelet has never given anything away, or has forgotten it.
    Absent,
    /// It cannot be read or understood, and why.
    Unreadable(String),
    /// Its entries, of all resources.
    Read(Vec<Given>),
}

#[derive(Deserialize)]
struct File {
    #[serde(rename = "Data")]
    data: Data,
}

/// Go writes null for what is empty.
#[derive(Deserialize)]
struct Data {
    #[serde(rename = "PodDeviceEntries")]
    entries: Option<Vec<Entry>>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "PodUID")]
    pod: String,
    #[serde(rename = "ResourceName")]
    resource: String,
    #[serde(rename = "DeviceIDs")]
    ids: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    /// By NUMA node, since Kubernetes 1.20.
    ByNode(BTreeMap<String, Option<Vec<String>>>),
    /// A plain list, before.
    Plain(Vec<String>),
}

impl Book {
    /// Reads the kubelet's book in its device plugin folder.
    pub fn read(folder: &Path) -> Self {
        let bytes = HostDir::open_existing(folder).and_then(|folder| match folder {
            Some(folder) => folder.read(CHECKPOINT, LONGEST),
            None => Ok(None),
        });
        match bytes {
            Ok(Some(bytes)) => Self::parse(&bytes),
            Ok(None) => Self::Absent,
            Err(error) => Self::Unreadable(chain(&error)),
        }
    }

    /// What these bytes say.
    pub fn parse(bytes: &[u8]) -> Self {
        let file: File = match serde_json::from_slice(bytes) {
            Ok(file) => file,
            Err(error) => {
                // The error may hold whatever stands in the file.
                let cause: String = error.to_string().chars().take(200).collect();
                return Self::Unreadable(format!("{CHECKPOINT} is not the kubelet's: {cause}"));
            }
        };
        let mut given = Vec::new();
        for Entry { pod, resource, ids } in file.data.entries.unwrap_or_default() {
            let ids: Vec<String> = match ids {
                None => Vec::new(),
                Some(Ids::Plain(ids)) => ids,
                Some(Ids::ByNode(ids)) => ids.into_values().flatten().flatten().collect(),
            };
            given.extend(ids.into_iter().map(|id| Given { resource: resource.clone(), id, pod: pod.clone() }));
        }
        given.sort();
        Self::Read(given)
    }

    /// Its entries; none where it cannot be read.
    pub fn given(&self) -> &[Given] {
        if let Self::Read(given) = self { given } else { &[] }
    }
}

/// What was allocated lately, by this process, so that nothing is decided by a book that does not have it yet. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Lately(Arc<Mutex<BTreeMap<(String, String), Instant>>>);

impl Lately {
    /// Notes an allocation of `ids` of `resource`.
    pub fn note<'a>(&self, resource: &impl fmt::Display, ids: impl IntoIterator<Item = &'a str>) {
        let now = Instant::now();
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        noted.retain(|_, at| now < *at + UNWRITTEN);
        noted.extend(ids.into_iter().map(|id| ((resource.to_string(), id.to_owned()), now)));
    }

    /// Resource and ID of each.
    pub fn all(&self) -> BTreeSet<(String, String)> {
        let now = Instant::now();
        let noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        noted.iter().filter(|(_, at)| now < **at + UNWRITTEN).map(|(given, _)| given.clone()).collect()
    }
}

/// By which kind of ID units are called, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The kind.
    pub scheme: IdScheme,
    /// The reason.
    pub why: Why,
}

/// Why units are called as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing speaks against addresses.
    Free,
    /// A pod has a device under the reference's ID.
    Kept(Given),
    /// This process has just allocated a device under it.
    Lately {
        /// The resource.
        resource: String,
        /// The ID.
        id: String,
    },
    /// The kubelet's book cannot be read.
    Unreadable(String),
    /// The book cannot be read any more, or is gone: what was decided by it stays.
    Lost,
}

impl Why {
    /// A stable code for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Kept(_) => "given",
            Self::Lately { .. } => "lately",
            Self::Unreadable(_) => "unreadable",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Free => f.write_str("no pod has a device under a number"),
            Self::Kept(Given { resource, id, pod }) => {
                write!(
                    f,
                    "pod {pod} has device {id} of {resource}: under another ID the same device would be given twice"
                )
            }
            Self::Lately { resource, id } => write!(f, "device {id} of {resource} has just been allocated"),
            Self::Unreadable(cause) => {
                write!(f, "what the kubelet has given to pods cannot be read, so that they may have numbers: {cause}")
            }
            Self::Lost => f.write_str("what the kubelet has given to pods cannot be read any more"),
        }
    }
}

/// The whole names of the resources that this node's devices are offered under.
pub fn resources(policy: &Policy, inventory: &Inventory) -> BTreeSet<String> {
    let mains = inventory.gpus().chain(inventory.nvswitches());
    let name = |main| resource_name(policy.naming(main), main, pci_ids_name(main.vendor, main.device)).to_string();
    mains.map(name).collect()
}

/// Decides by which kind of ID units are called: by PCI address, unless a pod has one of `ours` under a number. Then all keep
/// their numbers until no such pod is left, so that the reference's plugin may take over again at any time, too. `before` is
/// the last decision.
pub fn decide(
    book: &Book,
    lately: &BTreeSet<(String, String)>,
    ours: &BTreeSet<String>,
    before: Option<&Decision>,
) -> Decision {
    let reference = |why| Decision { scheme: IdScheme::Iommu, why };
    match (book, before) {
        (Book::Read(given), _) => {
            if let Some(given) = given.iter().find(|given| is_number(&given.id) && ours.contains(&given.resource)) {
                return reference(Why::Kept(given.clone()));
            }
        }
        (Book::Unreadable(_) | Book::Absent, Some(before)) if before.scheme == IdScheme::Iommu => {
            // Unreadable from the start is told with its cause.
            let why = if let (Book::Unreadable(cause), Why::Unreadable(_)) = (book, &before.why) {
                Why::Unreadable(cause.clone())
            } else {
                Why::Lost
            };
            return reference(why);
        }
        (Book::Unreadable(cause), None) => return reference(Why::Unreadable(cause.clone())),
        (Book::Absent, _) | (Book::Unreadable(_), Some(_)) => {}
    }
    if let Some((resource, id)) = lately.iter().find(|(_, id)| is_number(id)) {
        return reference(Why::Lately { resource: resource.clone(), id: id.clone() });
    }
    Decision { scheme: IdScheme::Pci, why: Why::Free }
}

/// Whether an ID is of the reference's kind.
fn is_number(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit())
}

/// Of the entries of `book` and what was allocated `lately`, those of one kind that an `ours` resource has: what stands in the
/// way of the other kind.
pub fn contradiction(book: &Book, ours: &BTreeSet<String>, scheme: IdScheme) -> Option<Given> {
    let is_other = |id: &str| match scheme {
        IdScheme::Pci => is_number(id),
        IdScheme::Iommu => id.parse::<Bdf>().is_ok(),
    };
    book.given().iter().find(|given| ours.contains(&given.resource) && is_other(&given.id)).cloned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const PGPU: &str = "nvidia.com/pgpu";

    fn given(resource: &str, id: &str) -> Given {
        Given { resource: resource.into(), id: id.into(), pod: "uid".into() }
    }

    fn pairs(pairs: &[(&str, &str)]) -> BTreeSet<(String, String)> {
        pairs.iter().map(|(resource, id)| ((*resource).to_owned(), (*id).to_owned())).collect()
    }

    #[test]
    fn every_kubelets_format_is_understood() {
        let entry = |ids: &str| {
            format!(
                r#"{{"Data":{{"PodDeviceEntries":[{{"PodUID":"uid","ContainerName":"c","ResourceName":"nvidia.com/pgpu",
                "DeviceIDs":{ids},"AllocResp":"CgA="}}],"RegisteredDevices":{{"nvidia.com/pgpu":["0"]}}}},"Checksum":7}}"#
            )
        };
        let pgpu = |ids: &[&str]| Book::Read(ids.iter().map(|id| given("nvidia.com/pgpu", id)).collect());
        for (text, book) in [
            (entry(r#"{"0":["1"],"1":["0"]}"#), pgpu(&["0", "1"])),
            (entry(r#"{"-1":["0000:41:00.0"],"0":null}"#), pgpu(&["0000:41:00.0"])),
            (entry(r#"["4","5"]"#), pgpu(&["4", "5"])),
            (entry("null"), pgpu(&[])),
            (
                r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":1,"BootID":"x"}"#.into(),
                pgpu(&[]),
            ),
            (r#"{"Data":{}}"#.into(), pgpu(&[])),
        ] {
            assert_eq!(Book::parse(text.as_bytes()), book, "{text}");
        }
    }

    #[test]
    fn what_is_no_book_is_an_error_with_its_cause() {
        let deep = "[".repeat(100_000);
        for (text, words) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("null", "invalid type"),
            (r#"{"Checksum":1}"#, "missing field `Data`"),
            (r#"{"Data":{"PodDeviceEntries":[{"PodUID":1}]}}"#, "invalid type"),
            (r#"{"Data":{"PodDeviceEntries":[{"PodUID":"a","ResourceName":"b","DeviceIDs":{"0":[1]}}]}}"#, "Ids"),
            ("{\"Data\":\u{0}}", "expected value"),
            (&format!(r#"{{"Data":"{}"}}"#, "x".repeat(100_000)), "invalid type: string"),
            (&deep, "invalid type"),
            (&format!(r#"{{"Data":{{"Other":{deep}"#), "EOF"),
        ] {
            let Book::Unreadable(cause) = Book::parse(text.as_bytes()) else { panic!("{text:.80}") };
            assert!(cause.contains(words) && cause.len() < 300, "{cause}");
        }
        assert!(matches!(Book::parse(b"{\"Data\":\"\xff\xfe\"}"), Book::Unreadable(_)));
    }

    #[test]
    fn a_file_that_is_missing_too_long_or_anybodys_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CHECKPOINT);
        assert_eq!(Book::read(&folder.path().join("none")), Book::Absent);
        assert_eq!(Book::read(folder.path()), Book::Absent);
        std::fs::write(&path, r#"{"Data":{}}"#).unwrap();
        assert_eq!(Book::read(folder.path()), Book::Read(Vec::new()));
        let unreadable = |words: &str| {
            let Book::Unreadable(cause) = Book::read(folder.path()) else { panic!("{words}") };
            assert!(cause.contains(words), "{cause}");
        };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        unreadable(CHECKPOINT);
        std::fs::remove_file(&path).unwrap();
        std::fs::File::create(&path).unwrap().set_len(LONGEST + 1).unwrap();
        unreadable(CHECKPOINT);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        unreadable(CHECKPOINT);
    }

    #[test]
    fn numbers_stay_while_a_pod_has_one_and_go_when_none_is_left() {
        // Book, allocated lately, decision before -> decision
        type Case = (Book, &'static [(&'static str, &'static str)], Option<Decision>, Decision);
        let ours: BTreeSet<String> = ["nvidia.com/pgpu".to_owned(), "nvidia.com/nvswitch".to_owned()].into();
        let read = |ids: &[(&str, &str)]| Book::Read(ids.iter().map(|(resource, id)| given(resource, id)).collect());
        let broken = || Book::Unreadable("broken".into());
        let free = || Decision { scheme: IdScheme::Pci, why: Why::Free };
        let numbers = |why| Decision { scheme: IdScheme::Iommu, why };
        let kept = |resource: &str, id: &str| numbers(Why::Kept(given(resource, id)));
        let unreadable = || numbers(Why::Unreadable("broken".into()));
        let cases: Vec<Case> = vec![
            (Book::Absent, &[], None, free()),
            (broken(), &[], None, unreadable()),
            (read(&[]), &[], None, free()),
            (read(&[(PGPU, "0000:41:00.0")]), &[], None, free()),
            (read(&[(PGPU, "0")]), &[], None, kept(PGPU, "0")),
            (read(&[("nvidia.com/nvswitch", "12")]), &[], None, kept("nvidia.com/nvswitch", "12")),
            // Of both kinds: no number may be offered under an address.
            (read(&[(PGPU, "0000:41:00.0"), (PGPU, "3")]), &[], None, kept(PGPU, "3")),
            // Somebody else's numbers.
            (read(&[("example.com/nic", "0"), ("nvidia.com/gpu", "0")]), &[], None, free()),
            (read(&[(PGPU, ""), (PGPU, "vfio0"), (PGPU, "GPU-1")]), &[], None, free()),
            // Running: from numbers to addresses as soon as no pod has a number, and none was given just now.
            (read(&[]), &[], Some(kept(PGPU, "0")), free()),
            (
                read(&[]),
                &[(PGPU, "1")],
                Some(kept(PGPU, "0")),
                numbers(Why::Lately { resource: PGPU.into(), id: "1".into() }),
            ),
            (read(&[]), &[(PGPU, "0000:41:00.0")], Some(kept(PGPU, "0")), free()),
            // What is not known any more changes nothing.
            (broken(), &[], Some(kept(PGPU, "0")), numbers(Why::Lost)),
            (Book::Absent, &[], Some(kept(PGPU, "0")), numbers(Why::Lost)),
            (broken(), &[], Some(unreadable()), unreadable()),
            (Book::Absent, &[], Some(unreadable()), numbers(Why::Lost)),
            (read(&[]), &[], Some(unreadable()), free()),
            (broken(), &[], Some(free()), free()),
            (Book::Absent, &[], Some(free()), free()),
            // Another plugin was here meanwhile.
            (read(&[(PGPU, "0")]), &[], Some(free()), kept(PGPU, "0")),
        ];
        for (book, lately, before, decision) in cases {
            assert_eq!(
                decide(&book, &pairs(lately), &ours, before.as_ref()),
                decision,
                "{book:?} {lately:?} {before:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_allocation_counts_until_the_kubelet_has_written_it_down() {
        let lately = Lately::default();
        lately.note(&"nvidia.com/pgpu", ["0", "1"]);
        tokio::time::advance(UNWRITTEN / 2).await;
        lately.note(&"nvidia.com/pgpu", ["1"]);
        tokio::time::advance(UNWRITTEN / 2).await;
        assert_eq!(lately.all(), pairs(&[("nvidia.com/pgpu", "1")]));
        tokio::time::advance(UNWRITTEN / 2).await;
        assert_eq!(lately.all(), pairs(&[]));
    }

    #[test]
    fn a_choice_that_contradicts_the_book_is_seen() {
        let ours: BTreeSet<String> = ["a/b".to_owned()].into();
        let book = Book::Read(vec![given("a/b", "0000:41:00.0"), given("a/b", "3"), given("c/d", "4")]);
        assert_eq!(contradiction(&book, &ours, IdScheme::Pci), Some(given("a/b", "3")));
        assert_eq!(contradiction(&book, &ours, IdScheme::Iommu), Some(given("a/b", "0000:41:00.0")));
        assert_eq!(contradiction(&Book::Absent, &ours, IdScheme::Pci), None);
    }
}
