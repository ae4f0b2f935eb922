//! A feature file for Node Feature Discovery.
//!
//! Its worker reads files of the form `name=value`, one feature a line, from one folder; it skips names that begin with a dot,
//! which lets a file be exchanged whole. The names become node labels, so the values obey the rules of labels. All names are
//! ours: what GPU Feature Discovery and the operator own is left alone.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use hw_probe::{CcEnable, Inventory, Model, PciFunction, Tee};

/// Where Node Feature Discovery looks for it by default, from the host's root.
pub const FOLDER: &str = "etc/kubernetes/node-feature-discovery/features.d";
/// Its name in the folder.
pub const FILE: &str = "ccnode";

/// The first line, by which a file is known to be ours.
pub const HEADER: &str = "# Written by ccnode\n";

/// Longest value of a label.
const LONGEST: usize = 63;

/// The text of the file for a node with these GPUs and NVSwitches.
pub fn render<'a>(parts: impl IntoIterator<Item = &'a PciFunction>, tee: Tee) -> String {
    let (gpus, others): (Vec<&PciFunction>, Vec<&PciFunction>) =
        parts.into_iter().filter(|part| !part.is_virtual_function).partition(|part| part.is_gpu());
    let switches = others.iter().filter(|part| part.is_nvswitch()).count();
    let all = |says: &dyn Fn(&Model) -> bool| {
        (!gpus.is_empty() && gpus.iter().all(|gpu| gpu.model.as_ref().is_some_and(says))).to_string()
    };
    let family = |gpu: &&PciFunction| {
        let architecture = gpu.model.as_ref().map(|model| format!("{:?}", model.architecture).to_lowercase());
        architecture.unwrap_or_else(|| "unknown".into())
    };
    let tee = match tee {
        Tee::SevSnp => "sev-snp",
        Tee::Tdx => "tdx",
        Tee::None => "none",
    };
    let mut features = vec![("gpu.count", gpus.len().to_string()), ("nvswitch.count", switches.to_string())];
    if !gpus.is_empty() {
        features.push(("gpu.product", one(gpus.iter().map(|gpu| gpu.product()))));
        features.push(("gpu.family", one(gpus.iter().map(family))));
        features.push(("gpu.bar-memory", one(gpus.iter().map(|gpu| bar_memory(gpu)))));
        features.push(("gpu.cc.capable", all(&|model| model.cc_enable == CcEnable::Yes)));
        features.push(("gpu.ppcie.capable", all(&|model| model.ppcie)));
    }
    features.push(("tee", tee.to_owned()));
    let mut text = String::from(HEADER);
    for (name, value) in features {
        // A string takes any text.
        let _ = writeln!(text, "ccnode.dev/{name}={}", label_value(&value));
    }
    text
}

/// The same for all of a node; none where it has no GPU. An error where it cannot be told which GPUs it has.
pub fn of_node(inventory: &Inventory) -> Result<Option<String>, String> {
    if let Some(doubt) = inventory.doubts().next() {
        return Err(format!("{}: {}", doubt.path, doubt.message));
    }
    let parts = inventory.gpus().chain(inventory.nvswitches());
    Ok(inventory.gpus().next().map(|_| render(parts, inventory.host.tee)))
}

/// Size of the largest memory BAR: the window to the GPU's memory, which is a power of two and so not its size to the byte.
fn bar_memory(gpu: &PciFunction) -> String {
    let mebibytes = gpu.bars.iter().filter(|bar| !bar.io).map(|bar| bar.size >> 20).max().unwrap_or(0);
    match mebibytes {
        0 => "unknown".into(),
        whole if whole % 1024 == 0 => format!("{}Gi", whole / 1024),
        odd => format!("{odd}Mi"),
    }
}

/// The value that all have, or `mixed`.
fn one(values: impl Iterator<Item = String>) -> String {
    let different: BTreeSet<String> = values.collect();
    let mut different = different.into_iter();
    match (different.next(), different.next()) {
        (Some(value), None) => value,
        _ => "mixed".into(),
    }
}

/// Letters, digits, `-`, `_` and `.`, a letter or digit at both ends, at most 63.
fn label_value(text: &str) -> String {
    let mut value = String::new();
    for c in text.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_') { c } else { '-' }) {
        let doubled = c == '-' && value.ends_with('-');
        if !doubled && (c.is_ascii_alphanumeric() || !value.is_empty()) && value.len() < LONGEST {
            value.push(c);
        }
    }
    value.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    fn rendered(fake: &FakeSysfs) -> Vec<String> {
        let inventory = Inventory::scan(&fake.root());
        let text = render(&inventory.functions, inventory.host.tee);
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.replace("ccnode.dev/", "")).collect()
    }

    #[test]
    fn a_baseboard_is_told() {
        let fake = FakeSysfs::new();
        fake.hgx_h100();
        assert_eq!(
            rendered(&fake),
            [
                "gpu.count=8",
                "nvswitch.count=4",
                "gpu.product=H100-SXM",
                "gpu.family=hopper",
                "gpu.bar-memory=16Gi",
                "gpu.cc.capable=true",
                "gpu.ppcie.capable=true",
                "tee=sev-snp"
            ]
        );
    }

    #[test]
    fn mixed_and_unknown_and_absent_gpus_are_told() {
        let fake = FakeSysfs::new();
        assert_eq!(rendered(&fake), ["gpu.count=0", "nvswitch.count=0", "tee=none"]);
        fake.gpu("0000:01:00.0", 0x2b85).class(0x03_0000);
        assert!(rendered(&fake).contains(&"gpu.product=GB202-GeForce-RTX-5090".to_owned()), "{:?}", rendered(&fake));
        fake.gpu("0000:02:00.0", 0x9999).bars(&[(0, 0xe000, 32 << 20, 0x4_0200)]);
        fake.gpu("0000:02:00.4", 0x9999).virtual_function_of("0000:02:00.0");
        let found = rendered(&fake);
        for line in [
            "gpu.count=2",
            "gpu.product=mixed",
            "gpu.family=mixed",
            "gpu.bar-memory=mixed",
            "gpu.cc.capable=false",
            "gpu.ppcie.capable=false",
        ] {
            assert!(found.contains(&line.to_owned()), "{line}: {found:?}");
        }
    }

    #[test]
    fn memory_is_that_of_the_largest_window() {
        let fake = FakeSysfs::new();
        let gpu = fake.gpu("0000:01:00.0", 0x2330);
        for (bars, label) in [
            (&[][..], "unknown"),
            (&[(5, 0xe000, 128, 0x4_0101)], "unknown"),
            (&[(0, 0x1_0000_0000, 16 << 20, 0x14_220c), (2, 0x2_0000_0000, 64 << 20, 0x14_220c)], "64Mi"),
            (&[(0, 0x1_0000_0000, 16 << 20, 0x14_220c), (2, 0x80_0000_0000, 256 << 30, 0x14_220c)], "256Gi"),
        ] {
            let _ = gpu.bars(bars);
            assert!(rendered(&fake).contains(&format!("gpu.bar-memory={label}")), "{label}: {:?}", rendered(&fake));
        }
    }

    #[test]
    fn what_is_not_known_is_not_told_and_without_a_gpu_nothing_is() {
        let fake = FakeSysfs::new();
        let of_node = || of_node(&Inventory::scan(&fake.root()));
        fake.nvswitch("0000:03:00.0");
        assert_eq!(of_node(), Ok(None));
        fake.gpu("0000:01:00.0", 0x2330);
        assert!(of_node().unwrap().unwrap().contains("ccnode.dev/gpu.count=1\nccnode.dev/nvswitch.count=1\n"));
        fake.gpu("0000:02:00.0", 0x2330).attr("class", "?");
        assert!(of_node().unwrap_err().contains("0000:02:00.0/class"));
    }

    #[test]
    fn values_are_those_of_labels() {
        for (text, value) in [
            ("", ""),
            ("--", ""),
            ("H100 SXM", "H100-SXM"),
            ("GB202 [GeForce RTX 5090]", "GB202-GeForce-RTX-5090"),
            ("é!a", "a"),
            ("a.b_c", "a.b_c"),
        ] {
            assert_eq!(label_value(text), value, "{text:?}");
        }
        assert_eq!(label_value(&"x".repeat(100)).len(), 63);
        assert_eq!(label_value(&format!("{} y", "x".repeat(62))).len(), 62);
    }
}
