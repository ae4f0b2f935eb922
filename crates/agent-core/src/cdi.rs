//! What makes a CDI file one that Kata's Go runtime refuses, and with it every pod that has devices (operator-contract
//! sections 7.7 and 10).

use std::collections::BTreeSet;

/// Versions that the CDI library of Kata's Go runtime knows.
const KNOWN: [&str; 5] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.3"];

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
