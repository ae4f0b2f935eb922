//! The program as a container starts it: environment, log lines, signal, exit code.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hw_probe::testing::FakeSysfs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_device-plugin"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Sends SIGTERM and waits for the end.
fn terminate(child: Child) -> Output {
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn the_operators_environment_is_understood_and_sigterm_ends_in_order() {
    let fake = FakeSysfs::new();
    fake.gpu("0000:41:00.0", 0x2330).group(5).driver("vfio-pci").cdev(0);
    fake.nvswitch("0000:42:00.0").group(6).driver("vfio-pci").cdev(1);
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("plugins")).unwrap();
    let child = program()
        // Set but empty: names by model.
        .env("P_GPU_ALIAS", "")
        .env("NVSWITCH_ALIAS", "switch")
        .env("DEVICE_ID_SCHEME", "iommu")
        .env("VFIO_BACKEND", "legacy")
        .env("ENABLE_GFD", "true")
        .env("NODE_NAME", "node-a")
        .env("POD_NAMESPACE", "gpu-operator")
        .env("POD_SERVICE_ACCOUNT", "nvidia-kata-sandbox-device-plugin")
        .env("LOG_FORMAT", "json")
        .env("CCNODE_ROOT", fake.path())
        .env("CCNODE_STATE_DIR", place.path().join("state"))
        .env("CDI_DIR", place.path().join("cdi"))
        .env("KUBELET_PLUGIN_DIR", place.path().join("plugins"))
        .spawn()
        .unwrap();
    let socket = place.path().join("plugins/sandbox-GH100_H100_SXM5_80GB.sock");
    let switch = place.path().join("plugins/sandbox-switch.sock");
    let patience = Instant::now() + Duration::from_secs(20);
    while !(socket.exists() && switch.exists()) && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = terminate(child);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(!socket.exists() && !switch.exists(), "{text}");
    let cdi = std::fs::read_to_string(place.path().join("cdi/nvidia.com-GH100_H100_SXM5_80GB.yaml")).unwrap();
    assert!(cdi.contains("- name: \"5\"") && cdi.contains("- path: /dev/vfio/5"), "{cdi}");

    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let event =
        |name: &str| lines.iter().find(|line| line["event"] == name).unwrap_or_else(|| panic!("{name}: {text}"));
    assert_eq!(event("started")["node"], "node-a");
    assert_eq!(event("cdi_written")["devices"], "5");
    assert!(event("cdi_written")["path"].as_str().unwrap().ends_with("nvidia.com-GH100_H100_SXM5_80GB.yaml"));
    assert_eq!(event("unit_health")["unit"], "5");
    assert_eq!(event("unit_health")["healthy"], true);
    assert!(event("stopped").is_object());
    assert!(text.contains("ENABLE_GFD is set and has no effect"), "{text}");
}

#[test]
fn a_bad_alias_ends_at_once_and_says_what_is_wrong_with_it() {
    for (name, value, words) in [
        ("P_GPU_ALIAS", "2330", "must begin with a letter"),
        ("NVSWITCH_ALIAS", "a.b", "has a dot"),
        ("VFIO_BACKEND", "group", "possible values: auto, iommufd, legacy"),
        ("CC_GATE", "maybe", "possible values: require, off"),
        ("POLL_INTERVAL", "soon", "not a unit of time"),
    ] {
        let output = program().env(name, value).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{name}: {text}");
    }
}
