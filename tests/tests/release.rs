//! The version, which stands in Cargo.toml and comes everywhere else by `hack/release`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

/// A version that nothing else has.
const NEW: &str = "7.77.777";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn release(folder: &Path, words: &[&str]) -> Result<Output> {
    Ok(Command::new(folder.join("hack/release")).args(words).output()?)
}

/// The project as it lies here, without what is built and ignored. Returns its files, too.
fn copy(folder: &Path) -> Result<Vec<String>> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output()?;
    let files: Vec<String> = String::from_utf8(output.stdout)?
        .split('\0')
        .filter(|file| root().join(file).is_file())
        .map(Into::into)
        .collect();
    ensure!(files.len() > 100, "git tells of {} files", files.len());
    for file in &files {
        let to = folder.join(file);
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::copy(root().join(file), to)?;
    }
    Ok(files)
}

/// Whether a text names a version, and not a longer number that has it in it.
fn names(line: &str, version: &str) -> bool {
    let is_part = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_digit() || *byte == b'.');
    line.match_indices(version).any(|(at, _)| {
        let bytes = line.as_bytes();
        !is_part(at.checked_sub(1).and_then(|before| bytes.get(before))) && !is_part(bytes.get(at + version.len()))
    })
}

#[test]
fn the_version_is_the_same_everywhere() -> Result<()> {
    let output = release(&root(), &["--versions"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn a_release_changes_every_place_that_names_the_version() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let files = copy(folder.path())?;
    let output = release(folder.path(), &["--set", NEW])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let (mut left, mut lines) = (Vec::new(), 0);
    for file in &files {
        // What is no text names no version.
        let Ok(text) = fs::read_to_string(folder.path().join(file)) else { continue };
        lines += text.lines().filter(|line| names(line, NEW)).count();
        // Crates of others have any version, and releases of the past keep theirs.
        if !file.ends_with("Cargo.lock") && file != "CHANGELOG.md" {
            let lines = text.lines().filter(|line| names(line, env!("CARGO_PKG_VERSION")));
            left.extend(lines.map(|line| format!("{file}: {}", line.trim())));
        }
    }
    // Of what hack/release does not know: it is to stand in its VERSIONED, or needs no version.
    assert_eq!(left, Vec::<String>::new());
    ensure!(lines > 40, "{lines} lines name the new version");
    for lock in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let (old, new) = (fs::read_to_string(root().join(lock))?, fs::read_to_string(folder.path().join(lock))?);
        assert_eq!(old.lines().count(), new.lines().count(), "{lock}");
        for (old, new) in old.split("[[package]]").zip(new.split("[[package]]")) {
            let is_ours = !old.contains("\nsource = ") && names(old, env!("CARGO_PKG_VERSION"));
            let wanted = if is_ours { old.replace(env!("CARGO_PKG_VERSION"), NEW) } else { old.to_owned() };
            assert_eq!(new, wanted, "{lock}");
        }
    }
    // The committed renderings are still those of the chart.
    let digests = Command::new("sha256sum")
        .args(["--check", "--quiet", "deploy/rendered/sources.sha256"])
        .current_dir(folder.path())
        .output()?;
    ensure!(digests.status.success(), "{}", String::from_utf8_lossy(&digests.stdout));
    Ok(())
}

#[test]
fn a_file_with_another_version_is_named() -> Result<()> {
    for (file, old, new) in [
        ("deploy/images.txt", format!("cc-manager:{}-", env!("CARGO_PKG_VERSION")), "cc-manager:0.0.9-".to_owned()),
        (
            "deploy/helm/ccnode/Chart.yaml",
            format!("appVersion: {}", env!("CARGO_PKG_VERSION")),
            "appVersion: 0.0.9".to_owned(),
        ),
    ] {
        let folder = tempfile::tempdir()?;
        copy(folder.path())?;
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(&old), "{file} has no {old}");
        fs::write(&path, text.replace(&old, &new))?;
        let output = release(folder.path(), &["--versions"])?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && told.contains(file) && told.contains("0.0.9"), "{told}");
    }
    // An older one is none to release.
    let folder = tempfile::tempdir()?;
    copy(folder.path())?;
    let output = release(folder.path(), &["--set", "0.0.9"])?;
    ensure!(
        !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("0.0.9 is older"),
        "{output:?}"
    );
    Ok(())
}
