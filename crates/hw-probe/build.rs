//! Turns `data/devices.csv` into a static table. A malformed row fails the build, so that a slip in the table is never
//! found on a node.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

const COLUMNS: [&str; 23] = [
    "vendor",
    "device",
    "subsystem_device",
    "kind",
    "name",
    "pci_ids_name",
    "arch",
    "chip",
    "is_nvswitch",
    "form_factor",
    "has_c2c",
    "module_id_bit_flip",
    "cc_query",
    "cc_enable",
    "ppcie_query",
    "uses_fsp",
    "fsp_transport",
    "boot_reg",
    "cc_reg",
    "ppcie_reg",
    "bar_firewall",
    "source",
    "notes",
];

fn main() -> Result<(), String> {
    const TABLE: &str = "data/devices.csv";
    println!("cargo::rerun-if-changed={TABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    let text = fs::read_to_string(TABLE).map_err(|error| format!("{TABLE}: {error}"))?;
    let rust = table(&text).map_err(|error| format!("{TABLE}: {error}"))?;
    put("devices.rs", &rust)?;
    #[cfg(feature = "names")]
    names()?;
    Ok(())
}

/// Writes a file for the crate to include.
fn put(name: &str, text: &str) -> Result<(), String> {
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?).join(name);
    fs::write(&out, text).map_err(|error| format!("{}: {error}", out.display()))
}

/// NVIDIA's names of the PCI ID repository as one text, with their keys, sorted, and where each ends: the library's own tables have
/// every vendor's, subsystems, and a pointer for each word, which is 3 MB of each program.
#[cfg(feature = "names")]
fn names() -> Result<(), String> {
    use pci_ids::FromId as _;

    const NVIDIA: u16 = 0x10de;
    let vendor = pci_ids::Vendor::from_id(NVIDIA).ok_or("The PCI ID repository has no NVIDIA")?;
    let mut names: Vec<(u16, &str)> = vendor.devices().map(|device| (device.id(), device.name())).collect();
    names.sort_unstable();
    let (mut text, mut keys, mut ends) = (String::new(), String::new(), String::new());
    for (key, name) in names {
        text.push_str(name);
        write!(keys, "{key:#06x},")
            .and_then(|()| write!(ends, "0x{:04x}_{:04x},", text.len() >> 16, text.len() & 0xffff))
            .map_err(|error| error.to_string())?;
    }
    put("names.txt", &text)?;
    put("name_keys.rs", &format!("&[{keys}]"))?;
    put("name_ends.rs", &format!("&[{ends}]"))
}

fn table(text: &str) -> Result<String, String> {
    let mut lines = text.lines().enumerate();
    let header = lines.next().map(|(_, line)| line).unwrap_or_default();
    if header.split(',').ne(COLUMNS) {
        return Err(format!("Columns are {header:?} instead of {:?}", COLUMNS.join(",")));
    }
    let mut rows = Vec::new();
    for (index, line) in lines {
        rows.push(Row::parse(line).map_err(|error| format!("Line {}: {error}", index + 1))?);
    }
    check_keys(&rows)?;
    let mut rust = String::from("pub(super) static ROWS: &[Row] = &[\n");
    for row in &rows {
        writeln!(rust, "    {},", row.rust).map_err(|error| error.to_string())?;
    }
    rust.push_str("];\n");
    Ok(rust)
}

/// No key twice, and no range over another, or the winner would depend on the order of lines.
fn check_keys(rows: &[Row]) -> Result<(), String> {
    let mut keys = BTreeSet::new();
    for row in rows {
        if !keys.insert((row.is_range, row.first, row.subsystem)) {
            return Err(format!("Device {:04x}, subsystem {:04x?} twice", row.first, row.subsystem));
        }
    }
    let mut ranges: Vec<_> = rows.iter().filter(|row| row.is_range).map(|row| (row.first, row.last)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].1 >= pair[1].0) {
        Some(pair) => Err(format!("Ranges from {:04x} and from {:04x} overlap", pair[0].0, pair[1].0)),
        None => Ok(()),
    }
}

struct Row {
    is_range: bool,
    first: u16,
    last: u16,
    subsystem: Option<u16>,
    rust: String,
}

impl Row {
    fn parse(line: &str) -> Result<Self, String> {
        if line.contains('"') {
            return Err("Quoted cells are not used here".into());
        }
        let cells: Vec<&str> = line.split(',').collect();
        if cells.len() != COLUMNS.len() {
            return Err(format!("{} cells instead of {}", cells.len(), COLUMNS.len()));
        }
        let cell = |name: &str| {
            let index = COLUMNS.iter().position(|column| *column == name);
            index.map(|index| cells[index]).ok_or_else(|| format!("No column {name}"))
        };
        if cell("vendor")? != "10de" {
            return Err("The table is for vendor 10de alone".into());
        }
        let kind = cell("kind")?;
        let (first, last) = match (kind, cell("device")?.split_once('-')) {
            ("range", Some((first, last))) => {
                newer_range(cell("source")?).unwrap_or_else(|| Ok((id(first)?, id(last)?)))?
            }
            ("id" | "id+ssid", None) => (id(cell("device")?)?, id(cell("device")?)?),
            _ => return Err(format!("Kind {kind:?} with device {:?}", cell("device")?)),
        };
        if first > last {
            return Err("Range ends before it begins".into());
        }
        let subsystem = match (kind, cell("subsystem_device")?) {
            ("id+ssid", text) => Some(id(text)?),
            (_, "") => None,
            (_, text) => return Err(format!("Kind {kind:?} with subsystem {text:?}")),
        };
        if cell("name")?.is_empty() || cell("chip")?.is_empty() {
            return Err("Name and chip are needed".into());
        }
        let transport = match (yes(cell("uses_fsp")?)?, cell("fsp_transport")?) {
            (true, "emem-ch2") => "Some(FspTransport::EmemChannel2)",
            (true, "mnoc-port0") => "Some(FspTransport::MnocPort0)",
            (false, "") => "None",
            (_, text) => return Err(format!("FSP transport {text:?} does not fit uses_fsp")),
        };
        let rust = format!(
            "Row {{ first: {first:#06x}, last: {last:#06x}, is_range: {}, subsystem: {subsystem:?}, kind: {}, name: {:?}, \
             pci_ids_name: {}, architecture: {}, chip: {:?}, form_factor: {}, has_c2c: {}, module_id_bit_flip: {}, \
             cc_query: {}, cc_enable: {}, ppcie: {}, fsp_transport: {transport}, boot_register: {}, cc_register: {}, \
             ppcie_register: {}, bar_firewall: {} }}",
            kind == "range",
            if yes(cell("is_nvswitch")?)? { "DeviceKind::NvSwitch" } else { "DeviceKind::Gpu" },
            cell("name")?,
            match cell("pci_ids_name")? {
                "" => "None".to_owned(),
                text => format!("Some({text:?})"),
            },
            architecture(cell("arch")?)?,
            cell("chip")?,
            match cell("form_factor")? {
                "" => "None",
                "pcie" => "Some(FormFactor::Pcie)",
                "sxm" => "Some(FormFactor::Sxm)",
                text => return Err(format!("Form factor {text:?}")),
            },
            known(cell("has_c2c")?)?,
            known(cell("module_id_bit_flip")?)?,
            yes(cell("cc_query")?)?,
            match newer(cell("cc_enable")?) {
                "yes" => "CcEnable::Yes",
                "no" => "CcEnable::No",
                "off-only" => "CcEnable::OffOnly",
                "by-ssid" => "CcEnable::BySubsystem",
                text => return Err(format!("CC enable {text:?}")),
            },
            yes(cell("ppcie_query")?)?,
            match cell("boot_reg")? {
                "" => "None".to_owned(),
                text => format!("Some({:#x})", register(text)?),
            },
            field(cell("cc_reg")?)?,
            field(cell("ppcie_reg")?)?,
            firewall(newer(cell("bar_firewall")?))?,
        );
        Ok(Self { is_range: kind == "range", first, last, subsystem, rust })
    }
}

/// A cell without the mark that says that only the newer upstream has the rule: the newer rule is ours.
fn newer(text: &str) -> &str {
    text.strip_suffix(" (UN)").unwrap_or(text)
}

/// The range of the newer upstream, where the source column says that it differs (`...; UN uses 2300-237f`).
fn newer_range(source: &str) -> Option<Result<(u16, u16), String>> {
    let (first, last) = source.split_once("UN uses ")?.1.split_once('-')?;
    Some(id(first).and_then(|first| Ok((first, id(last)?))))
}

fn id(text: &str) -> Result<u16, String> {
    if text.len() != 4 {
        return Err(format!("{text:?} is not a 4-digit id"));
    }
    u16::from_str_radix(text, 16).map_err(|error| format!("{text:?}: {error}"))
}

fn register(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0x").ok_or_else(|| format!("{text:?} is not hexadecimal"))?;
    let value = u32::from_str_radix(digits, 16).map_err(|error| format!("{text:?}: {error}"))?;
    if value.is_multiple_of(4) { Ok(value) } else { Err(format!("{text:?} is not aligned")) }
}

fn bit(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|bit| *bit < 32).ok_or_else(|| format!("{text:?} is not a bit of a 32-bit word"))
}

fn yes(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(format!("{text:?} is neither yes nor no")),
    }
}

fn known(text: &str) -> Result<&'static str, String> {
    match text {
        "" | "by-ssid" => Ok("None"),
        _ => yes(text).map(|yes| if yes { "Some(true)" } else { "Some(false)" }),
    }
}

fn architecture(text: &str) -> Result<String, String> {
    const ALL: [&str; 11] = [
        "Kepler",
        "Maxwell",
        "Pascal",
        "Volta",
        "Turing",
        "Ampere",
        "Ada",
        "Hopper",
        "Blackwell",
        "Limerock",
        "Laguna",
    ];
    let found = ALL.iter().find(|name| name.to_ascii_lowercase() == text);
    found.map(|name| format!("Architecture::{name}")).ok_or_else(|| format!("Architecture {text:?}"))
}

/// `0x1182cc[1:0]` or `0x1182cc[5]`.
fn field(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok("None".into());
    }
    let inner = text.strip_suffix(']').and_then(|text| text.split_once('['));
    let (offset, bits) = inner.ok_or_else(|| format!("{text:?} is not a register field"))?;
    let (high, low) = bits.split_once(':').unwrap_or((bits, bits));
    let (offset, high, low) = (register(offset)?, bit(high)?, bit(low)?);
    if high < low {
        return Err(format!("{text:?}: bits run upwards"));
    }
    Ok(format!("Some(BitField {{ offset: {offset:#x}, high: {high}, low: {low} }})"))
}

/// `dvsec:10de:0+0x8[20]` or `vsec:1:1+0x14[24]`.
fn firewall(text: &str) -> Result<String, String> {
    if matches!(text, "" | "none") {
        return Ok("None".into());
    }
    let parts = || {
        let (capability, place) = text.split_once('+')?;
        let (offset, bit) = place.strip_suffix(']')?.split_once('[')?;
        let mut capability = capability.split(':');
        Some((capability.next()?, capability.next()?, capability.next()?, offset, bit))
    };
    let (form, first, second, offset, number) = parts().ok_or_else(|| format!("{text:?} is not a BAR firewall"))?;
    let hex = |text: &str| u16::from_str_radix(text, 16).map_err(|error| format!("{text:?}: {error}"));
    let (offset, number) = (register(offset)?, bit(number)?);
    match form {
        "dvsec" => Ok(format!(
            "Some(BarFirewall::Dvsec {{ vendor: {:#x}, id: {}, offset: {offset:#x}, bit: {number} }})",
            hex(first)?,
            hex(second)?
        )),
        "vsec" => Ok(format!(
            "Some(BarFirewall::Vsec {{ id: {}, revision: {}, offset: {offset:#x}, bit: {number} }})",
            hex(first)?,
            hex(second)?
        )),
        _ => Err(format!("{text:?} is neither dvsec nor vsec")),
    }
}
