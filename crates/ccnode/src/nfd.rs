//! `ccnode probe --nfd`: a feature file for Node Feature Discovery.
//!
//! Its worker reads files of the form `name=value`, one feature a line, from one folder; it skips names that begin with a dot,
//! which lets a file be exchanged whole. The names become node labels, so the values obey the rules of labels.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use agent_core::hostfile::HostDir;
use anyhow::{Context as _, bail};
use hw_probe::{CcEnable, Problem, Tee};

use crate::report::{Device, Report};

/// The folder that Node Feature Discovery reads.
pub const FOLDER: &str = "/etc/kubernetes/node-feature-discovery/features.d";

/// Name of our file in it.
pub const FILE: &str = "ccnode";

/// Longest value of a label.
const LONGEST: usize = 63;

/// Writes the file, whole or not at all; says where. Where it is not known which GPUs the node has, what was said of it before stays.
pub fn write(report: &Report, folder: &Path) -> anyhow::Result<PathBuf> {
    if let Some(Problem { path, message, .. }) = report.doubts.first() {
        bail!(
            "Cannot tell which GPUs this node has: {path}: {message}; the feature file is left as it is; check that /sys is \
             mounted and readable, and the kernel's log"
        );
    }
    let folder = HostDir::open(folder).context("The folder of feature files cannot be used")?;
    folder.write_atomic(FILE, render(report).as_bytes(), 0o644).context("The feature file cannot be written")?;
    Ok(folder.path().join(FILE))
}

/// The text of the file. All names are ours: what GPU Feature Discovery and the operator own is left alone.
pub fn render(report: &Report) -> String {
    let gpus: Vec<&Device> = report.gpus().collect();
    let models = || gpus.iter().map(|gpu| gpu.function.model.as_ref());
    let all = |says: &dyn Fn(&hw_probe::Model) -> bool| {
        (!gpus.is_empty() && models().all(|model| model.is_some_and(says))).to_string()
    };
    let family = |gpu: &&Device| {
        let architecture = gpu.function.model.as_ref().map(|model| format!("{:?}", model.architecture).to_lowercase());
        architecture.unwrap_or_else(|| "unknown".into())
    };
    let tee = match report.host.tee {
        Tee::SevSnp => "sev-snp",
        Tee::Tdx => "tdx",
        Tee::None => "none",
    };
    let switches = report.parts().filter(|part| part.function.is_nvswitch()).count();
    let mut features = vec![("gpu.count", gpus.len().to_string()), ("nvswitch.count", switches.to_string())];
    if !gpus.is_empty() {
        features.push(("gpu.product", one(gpus.iter().map(|gpu| gpu.product()))));
        features.push(("gpu.family", one(gpus.iter().map(family))));
        features.push(("gpu.cc.capable", all(&|model| model.cc_enable == CcEnable::Yes)));
        features.push(("gpu.ppcie.capable", all(&|model| model.ppcie)));
    }
    features.push(("tee", tee.to_owned()));
    let mut text = String::from("# Written by ccnode probe --nfd\n");
    for (name, value) in features {
        // A string takes any text.
        let _ = writeln!(text, "ccnode.dev/{name}={}", label_value(&value));
    }
    text
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
        let text = render(&Report::read(&fake.root()));
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
        fake.gpu("0000:02:00.0", 0x9999);
        let found = rendered(&fake);
        for line in ["gpu.product=mixed", "gpu.family=mixed", "gpu.cc.capable=false", "gpu.ppcie.capable=false"] {
            assert!(found.contains(&line.to_owned()), "{found:?}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_written() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:01:00.0", 0x2330);
        let folder = tempfile::tempdir().unwrap();
        let written = |fake: &FakeSysfs| write(&Report::read(&fake.root()), folder.path());
        let path = written(&fake).unwrap();
        fake.gpu("0000:02:00.0", 0x2330).attr("class", "?");
        let error = written(&fake).unwrap_err().to_string();
        assert!(error.contains("0000:02:00.0/class: Is not a 24-bit class code"), "{error}");
        assert!(std::fs::read_to_string(path).unwrap().contains("gpu.count=1\n"));
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

    #[test]
    fn the_file_is_exchanged_whole() {
        let fake = FakeSysfs::new();
        let folder = tempfile::tempdir().unwrap();
        let report = Report::read(&fake.root());
        for _ in 0..2 {
            let path = write(&report, folder.path()).unwrap();
            assert_eq!(std::fs::read_to_string(path).unwrap(), render(&report));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
