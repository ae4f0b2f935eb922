//! The binaries of the images under all their names.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

const CC_MANAGER: &str = env!("CARGO_BIN_EXE_image-cc-manager");
const VFIO_MANAGER: &str = env!("CARGO_BIN_EXE_image-vfio-manager");
const DEVICE_PLUGIN: &str = env!("CARGO_BIN_EXE_image-device-plugin");

/// Runs a binary under another name, without the environment of a pod.
fn run(binary: &str, name: &str, words: &[&str]) -> Output {
    Command::new(binary).arg0(name).args(words).env_clear().output().unwrap()
}

#[test]
fn the_name_says_which_program_it_is() {
    let version = |program: &str| format!("{program} {}\n", env!("CARGO_PKG_VERSION"));
    for (binary, names) in [
        (CC_MANAGER, &[("cc-manager", "cc-manager"), ("k8s-cc-manager", "cc-manager")][..]),
        (
            VFIO_MANAGER,
            &[("vfio-manager", "vfio-manager"), ("vfio-manage", "vfio-manager"), ("driver-manager", "vfio-manager")],
        ),
        (
            DEVICE_PLUGIN,
            &[
                ("device-plugin", "device-plugin"),
                ("nvidia-sandbox-device-plugin", "device-plugin"),
                ("nvidia-kubevirt-gpu-device-plugin", "device-plugin"),
            ],
        ),
    ] {
        for (name, program) in names.iter().chain(&[("ccnode", "ccnode"), ("kubectl-ccnode", "ccnode")]) {
            for path in [(*name).to_owned(), format!("/usr/bin/{name}")] {
                let output = run(binary, &path, &["--version"]);
                assert_eq!(String::from_utf8(output.stdout).unwrap(), version(program), "{binary} as {path}");
                assert!(output.status.success(), "{binary} as {path}");
            }
        }
    }
}

/// Exit codes of bad command lines: each program keeps its own.
#[test]
fn bad_usage_ends_with_the_programs_own_code() {
    for (binary, name, words, code, told) in [
        (CC_MANAGER, "k8s-cc-manager", &[][..], 1, "--node-name (NODE_NAME) is missing"),
        (CC_MANAGER, "cc-manager", &["--frob"], 2, "--frob"),
        (CC_MANAGER, "ccnode", &["frob"], 2, "frob"),
        (VFIO_MANAGER, "vfio-manage", &["bind"], 1, "--all"),
        (VFIO_MANAGER, "driver-manager", &["frob"], 1, "frob"),
        (DEVICE_PLUGIN, "nvidia-sandbox-device-plugin", &["--gpu-alias", "a.b"], 2, "has a dot"),
    ] {
        let output = run(binary, name, words);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(code), "{name} {words:?}: {text}");
        assert!(text.contains(told), "{name} {words:?}: {text}");
    }
}

/// `/bin/rm -f PATH` is what the operator runs when cc-manager's pod ends.
#[test]
fn rm_removes_files_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (file, other) = (folder.path().join(".cc-manager-ctr-ready"), folder.path().join("-f"));
    fs::write(&file, "").unwrap();
    fs::write(&other, "").unwrap();
    let rm = |words: &[&str]| run(CC_MANAGER, "/bin/rm", words).status.code();
    let path = file.to_str().unwrap();
    assert_eq!(rm(&["-f", path]), Some(0));
    assert!(!file.exists());
    assert_eq!((rm(&["-f", path]), rm(&[path])), (Some(0), Some(1)), "one that is not there");
    assert_eq!((rm(&["-f"]), rm(&[])), (Some(0), Some(1)));
    let inside = folder.path().to_str().unwrap();
    assert_eq!((rm(&["-f", inside]), rm(&["-rf", inside])), (Some(1), Some(1)), "a folder");
    assert_eq!(rm(&["-f", "--", other.to_str().unwrap()]), Some(0));
    assert!(!other.exists() && folder.path().exists());
    assert_eq!(run(DEVICE_PLUGIN, "rm", &["-f", inside]).status.code(), Some(1));
}

/// What it does where it works is seen by vfio-manager in the images' scenarios: it needs root.
#[test]
fn chroot_says_what_it_cannot_do() {
    for (words, code, told) in [
        (&["/"][..], 1, "which program"),
        (&["/nonexistent/folder", "modprobe"], 127, "modprobe in /nonexistent/folder"),
    ] {
        let output = run(VFIO_MANAGER, "chroot", words);
        let text = String::from_utf8(output.stderr).unwrap();
        // Somebody else than root is told so, whatever the folder.
        assert!([Some(code), Some(126)].contains(&output.status.code()), "{words:?}: {text}");
        assert!(text.contains(told), "{words:?}: {text}");
    }
}
