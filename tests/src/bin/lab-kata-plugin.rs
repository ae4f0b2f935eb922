//! Stand-in of NVIDIA's Kata sandbox device plugin, made from operator-contract sections 7.3 to 7.8 and 15.3.
//!
//! It looks once, when it starts, at what is bound to `vfio-pci`; names devices by numbers; writes its CDI files and registers
//! once; and offers what it has found for as long as it runs, whatever becomes of it. In its pod `/dev` is a copy, in which
//! its watch of device nodes sees nothing. It handles no signal: its socket and its CDI files stay when it ends. Two models
//! under one alias, kernels without VFIO's device nodes below iommufd, and restarts of the kubelet are not stood in for.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use lab_kube::kubelet::toy::{self, Toy};

const PCI: &str = "/sys/bus/pci/devices";
const CDI: &str = "/var/run/cdi";

/// What is offered under which name: the aliases that it has by default.
const CLASSES: [(&str, &[&str]); 2] = [("pgpu", &["0x030000", "0x030200"]), ("nvswitch", &["0x068000"])];

/// The device nodes of a device, by its number.
type Nodes = fn(&str) -> Vec<[String; 2]>;

fn at(path: String) -> [String; 2] {
    [path.clone(), path]
}

fn cdev(id: &str) -> Vec<[String; 2]> {
    vec![at(format!("/dev/vfio/devices/vfio{id}"))]
}

fn group(id: &str) -> Vec<[String; 2]> {
    vec![at("/dev/vfio/vfio".into()), at(format!("/dev/vfio/{id}"))]
}

/// The last part of where a link leads.
fn target(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// The number of a function: that of its VFIO device with iommufd, else that of its IOMMU group.
fn number(function: &Path, iommufd: bool) -> Result<u32> {
    if !iommufd {
        return target(&function.join("iommu_group")).context("no IOMMU group")?.parse().context("no number");
    }
    for entry in fs::read_dir(function.join("vfio-dev"))? {
        if let Some(number) = entry?.file_name().to_str().and_then(|name| name.strip_prefix("vfio")) {
            return number.parse().context("no number");
        }
    }
    bail!("no VFIO device, which is not stood in for")
}

/// The numbers of what is bound, by the names under which they are offered.
fn look(iommufd: bool) -> Result<BTreeMap<&'static str, Vec<u32>>> {
    let (mut found, mut models) = (BTreeMap::<_, Vec<u32>>::new(), BTreeSet::new());
    for entry in fs::read_dir(PCI)? {
        let function = entry?.path();
        let attribute = |name: &str| fs::read_to_string(function.join(name)).map(|text| text.trim().to_owned());
        let code = attribute("class")?;
        let class = CLASSES.iter().find(|(_, codes)| codes.contains(&code.as_str()));
        let Some((class, _)) = class.filter(|_| attribute("vendor").is_ok_and(|vendor| vendor == "0x10de")) else {
            continue;
        };
        match target(&function.join("driver")).as_deref() {
            Some("vfio-pci") => {
                let number = number(&function, iommufd).with_context(|| function.display().to_string())?;
                found.entry(*class).or_default().push(number);
                models.insert((*class, attribute("device")?));
            }
            driver => eprintln!("{} is skipped: its driver is {driver:?}", function.display()),
        }
    }
    ensure!(models.len() == found.len(), "two models under one alias are not stood in for: {models:?}");
    for numbers in found.values_mut() {
        numbers.sort_unstable();
    }
    Ok(found)
}

fn write_cdi(class: &str, numbers: &[u32], nodes: Nodes) -> Result<()> {
    let mut text = format!("---\ncdiVersion: 0.5.0\nkind: nvidia.com/{class}\ndevices:\n");
    for number in numbers {
        write!(text, "    - name: \"{number}\"\n      containerEdits:\n        deviceNodes:\n")?;
        for [path, _] in nodes(&number.to_string()) {
            writeln!(text, "            - path: {path}")?;
        }
    }
    fs::create_dir_all(CDI)?;
    let mut file = tempfile::Builder::new().prefix("spec.").suffix(".tmp").tempfile_in(CDI)?;
    file.write_all(text.as_bytes())?;
    file.persist(Path::new(CDI).join(format!("nvidia.com-{class}.yaml")))?;
    Ok(())
}

async fn offer(class: &str, numbers: &[u32], nodes: Nodes) -> Result<()> {
    let ids: BTreeSet<String> = numbers.iter().map(u32::to_string).collect();
    // One CDI device for each function: a group with two of them makes a file that the CDI library refuses to write.
    if ids.len() == numbers.len() {
        write_cdi(class, numbers, nodes)?;
    }
    let devices: Vec<(&str, bool)> = ids.iter().map(|id| (id.as_str(), true)).collect();
    let mut plugin = Toy::new(&devices);
    plugin.nodes = nodes;
    let (folder, socket) = (Path::new(kubelet_api::PLUGIN_DIR), format!("sandbox-{class}.sock"));
    // It is served for as long as the program runs.
    let _served = plugin.served(&folder.join(&socket))?;
    toy::register(folder, kubelet_api::VERSION, &socket, &format!("nvidia.com/{class}"), None).await?;
    std::future::pending().await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let iommufd = Path::new("/dev/iommu").exists();
    let nodes = if iommufd { cdev } else { group };
    let found = look(iommufd)?;
    println!("found {found:?}");
    let offers = found.iter().map(async |(class, numbers)| {
        if let Err(error) = offer(class, numbers, nodes).await {
            eprintln!("{class} is not offered: {error:#}");
        }
    });
    futures::future::join_all(offers).await;
    // Without anything to offer it stays, too.
    std::future::pending().await
}
