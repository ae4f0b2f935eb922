//! CDI files: by what those of the device plugin are known, and what makes a file one that Kata's Go runtime refuses, and with
//! it every pod that has devices (operator-contract sections 7.7 and 10).

use std::collections::BTreeSet;

/// Versions that the CDI library of Kata's Go runtime knows.
const KNOWN: [&str; 5] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.3"];

/// Vendor part of every resource name and CDI kind (operator-contract section 7.5).
pub const VENDOR: &str = "nvidia.com";

/// Newest version that the CDI library of Kata's Go runtime knows is 0.6.0; oldest that lets a device name begin with a
/// digit is this.
pub const VERSION: &str = "0.5.0";

/// Longest file that is read to see whether it has changed or is ours, in bytes.
pub const LONGEST: u64 = 1 << 20;

/// CDI's rule for device names: letters, digits, `_`, `-`, `.` and `:`, a letter or digit at both ends.
pub fn is_device_name(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    ends(text.chars().next())
        && ends(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':'))
}

/// `nvidia.com-pgpu.yaml.rest` as `pgpu` and `.rest`.
pub fn class_and_rest(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix(VENDOR)?.strip_prefix('-')?.split_once(".yaml")
}

/// Whether a file is one that this program or the reference wrote: its shape, line by line, with nothing in it but
/// VFIO nodes. Everything else under a similar name (a container toolkit's, an administrator's) is foreign.
pub fn is_ours(kind: &str, text: &str) -> bool {
    let Some(body) = text.strip_prefix(&format!("---\ncdiVersion: {VERSION}\nkind: {kind}\ndevices:\n")) else {
        return false;
    };
    !body.is_empty()
        && body.lines().all(|line| {
            let line = line.trim_start();
            matches!(line, "containerEdits:" | "deviceNodes:")
                || line.strip_prefix("- name: ").is_some_and(|name| is_device_name(name.trim_matches('"')))
                || line.strip_prefix("- path: ").is_some_and(|path| path.starts_with("/dev/vfio/"))
        })
}

/// What is wrong with a file of this version and kind that names these devices; none when it is valid.
pub fn trouble<'a>(version: &str, kind: &str, devices: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let (mut count, mut different) = (0_usize, BTreeSet::new());
    for device in devices {
        count += 1;
        different.insert(device);
    }
    if !KNOWN.contains(&version) {
        Some(format!("Has version {version:?}, which Kata's Go runtime does not know: it knows 0.3.0 to 0.6.0"))
    } else if kind.split_once('/').is_none_or(|(vendor, class)| vendor.is_empty() || class.is_empty()) {
        Some(format!("Has kind {kind:?}, which is not of the form vendor/class"))
    } else if count == 0 {
        Some("Has no devices".into())
    } else if different.len() < count {
        Some("Names a device twice".into())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trouble_has_its_words_and_a_valid_file_has_none() {
        for (version, kind, devices, words) in [
            ("0.5.0", "a/b", &["x", "y"][..], ""),
            ("1.0.0", "a/b", &["x"], "does not know"),
            ("0.5.0", "ab", &["x"], "vendor/class"),
            ("0.5.0", "/b", &["x"], "vendor/class"),
            ("0.6.0", "a/b", &[], "no devices"),
            ("0.6.0", "a/b", &["x", "y", "x"], "twice"),
        ] {
            let found = trouble(version, kind, devices.iter().copied());
            assert_eq!(found.is_some(), !words.is_empty(), "{version} {kind} {devices:?}: {found:?}");
            assert!(found.is_none_or(|found| found.contains(words)), "{words}");
        }
    }
}
