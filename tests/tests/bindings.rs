//! vfio-manager on a real kernel: what it binds, what it leaves alone, and what it says.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, gpu_bdfs, lab_is_here, node};
use lab::{Boot, Node};
use lab_devices::Kind;
use lab_vm::Output;
use nix::sys::signal::Signal;

/// Runs a line of shell in the guest that must succeed.
fn sh(node: &Node, script: &str) -> Result<String> {
    Ok(node.look(&["/bin/sh", "-c", script])?.text())
}

fn run(node: &Node, argv: &[&str]) -> Result<Output> {
    Ok(node.guest.run(argv, CHANGE)?)
}

/// The driver of each GPU, in the order of their addresses; `-` where there is none.
fn drivers(node: &Node) -> Result<Vec<String>> {
    let link = |bdf: &String| format!("basename $(readlink /sys/bus/pci/devices/{bdf}/driver) 2>/dev/null || echo -;");
    let script: String = gpu_bdfs(node)?.iter().map(link).collect();
    Ok(sh(node, &script)?.lines().map(ToOwned::to_owned).collect())
}

/// What the kernel and the devices have seen: the number of the kernel's last event, and the writes and resets of all
/// devices since the last time.
fn nothing_happens(node: &Node, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let events = || sh(node, "cat /sys/kernel/uevent_seqnum");
    let before = events()?;
    node.guest.fleet().clear_trace();
    act()?;
    assert_eq!(events()?, before, "{what}: events of the kernel");
    let seen: Vec<_> = node.trace().into_iter().filter(|event| event.kind != Kind::Read).collect();
    ensure!(seen.is_empty(), "{what}: {seen:?}");
    Ok(())
}

/// The command lines of the operator's pod (operator-contract section 6.1), on a node whose modules are not loaded and with
/// the host root that the operator sets when its own is customised.
#[test]
fn the_operators_command_lines_do_what_the_contract_says() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let mut node = Node::start(Boot { without_vfio_modules: true, ..Boot::new("h100x2")? }, &[])?;
    sh(&node, "test ! -e /sys/bus/pci/drivers/vfio-pci && mkdir -p /host && mount --rbind / /host")?;
    let wrong = ("HOST_ROOT", "/custom/root");
    let bdfs = gpu_bdfs(&node)?;
    node.start_agent(&["/bin/sh", "-c", "vfio-manage bind --all && while true; do sleep 86400; done"], &[wrong])?;
    let bound = node.agent("/bin/sh")?.process.wait_output(STEP, |text| bdfs.iter().all(|bdf| text.contains(bdf)));
    bound.with_context(|| node.logs())?;
    let started = Instant::now();
    while drivers(&node)? != ["vfio-pci", "vfio-pci"] {
        ensure!(started.elapsed() < STEP, "{:?}\n{}", drivers(&node)?, node.logs());
    }
    ensure!(node.logs().contains("the mount point is used instead"), "{}", node.logs());
    sh(&node, "test -s /host/run/nvidia/ccnode/bindings.json && test -s /run/nvidia/ccnode/bindings.json")?;
    // The first of the two lines may still be at work when the devices are bound.
    std::thread::sleep(Duration::from_millis(500));
    ensure!(node.agent("/bin/sh")?.is_running(), "{}", node.logs());

    nothing_happens(&node, "a second bind", || {
        let again = run(&node, &["/bin/sh", "-c", "HOST_ROOT=/custom/root vfio-manage bind --all"])?;
        ensure!(again.success() && again.text().contains("already bound to vfio-pci"), "{}", again.text());
        Ok(())
    })?;

    let own = bdfs.first().context("no GPU")?.as_str();
    for (argv, code, words) in [
        (&["vfio-manage", "bind"][..], 1, "--all"),
        (&["vfio-manage", "bind", "--all", "-d", own], 1, "cannot be used with"),
        (&["vfio-manage", "bind", "-d", "nonsense"], 1, "nonsense"),
        (&["vfio-manage", "bind", "-d", "0000:ff:1f.7"], 1, "No such PCI function"),
        (&["vfio-manage", "bind", "-d", "0000:00:00.0"], 1, "no NVIDIA GPU"),
        (&["vfio-manage", "bind", "-d", own], 0, "already bound"),
        (&["vfio-manage", "unbind", "-d", "0000:00:00.0"], 1, "no NVIDIA GPU"),
        (&["vfio-manage", "frob"], 1, "frob"),
        (&["vfio-manage", "--version"], 0, "vfio-manager"),
        (&["vfio-manage", "help"], 0, "unbind"),
        (&["vfio-manage", "bind", "--all", "--dry-run", "--bind-nvswitches"], 0, "leave"),
    ] {
        let output = run(&node, argv)?;
        let text = format!("{}{}", output.text(), output.error_text());
        assert_eq!(output.status.map(lab_vm::Status::code), Some(code), "{argv:?}: {text}");
        ensure!(text.contains(words), "{argv:?}: {text}");
    }

    let started = Instant::now();
    let hook = run(&node, &["/bin/sh", "-c", "HOST_ROOT=/custom/root vfio-manage unbind --all"])?;
    ensure!(hook.success(), "{}{}", hook.text(), hook.error_text());
    ensure!(started.elapsed() < Duration::from_secs(25), "the hook took {:?}", started.elapsed());
    assert_eq!(drivers(&node)?, ["-", "-"]);
    // The next probe of the kernel must not bring VFIO back.
    assert_eq!(sh(&node, &format!("cat /sys/bus/pci/devices/{own}/driver_override"))?.trim(), "(null)");
    Ok(())
}

#[test]
fn restarts_change_nothing_while_a_process_holds_a_group() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_vfio_manager()?;
    let bdf = node.guest.bdf("gpu1")?;
    let seen = |node: &Node| -> Result<()> {
        let events = |text: &str| text.matches("device_bound").count() + text.matches("device_seen").count();
        node.agent("vfio-manager")?.process.wait_output(STEP, |text| events(text) >= 2).with_context(|| node.logs())
    };
    seen(&node)?;
    let hold = format!(
        "exec 3<>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{bdf}/iommu_group)) && echo held && sleep 1000"
    );
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"], "a signal leaves all bindings");

    let before = sh(&node, "cat /sys/kernel/uevent_seqnum")?;
    node.guest.fleet().clear_trace();
    for round in 0..20 {
        node.start_vfio_manager()?;
        seen(&node)?;
        node.stop_agent("vfio-manager", if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM })?;
    }
    // The hook of a pod without our daemon gives the idle one back and leaves the held one exactly as it is.
    assert_eq!(sh(&node, "cat /sys/kernel/uevent_seqnum")?, before, "events of the kernel");
    let acts: Vec<_> = node.trace().into_iter().filter(|event| event.kind != Kind::Read).collect();
    ensure!(acts.is_empty(), "{acts:?}");
    nothing_happens(&node, "unbind of a held device", || {
        let unbind = run(&node, &["vfio-manage", "unbind", "-d", &bdf])?;
        ensure!(!unbind.success() && unbind.text().contains("DeviceHeld"), "{}", unbind.text());
        let kept = sh(&node, &format!("cat /sys/bus/pci/devices/{bdf}/driver_override"))?;
        ensure!(kept.trim() == "vfio-pci", "the override is {kept}");
        Ok(())
    })?;
    ensure!(node.agent("sh")?.is_running(), "the holder ended");
    Ok(())
}

#[test]
fn what_is_taken_by_hand_is_bound_again_and_other_drivers_only_when_asked() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_vfio_manager()?;
    let bdf = gpu_bdfs(&node)?.pop_first().context("no GPU")?;
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let bound = |text: &str| text.matches("device_bound").count() == 2;
    node.agent("vfio-manager")?.process.wait_output(STEP, bound).with_context(|| node.logs())?;

    // Its poll is once a minute: what comes sooner comes by the kernel's event.
    let script = format!(
        "echo {bdf} > {device}/driver/unbind; read a _ < /proc/uptime; i=0
         while ! test -e {device}/driver; do usleep 5000; i=$((i+1)); test $i -lt 4000 || exit 1; done
         read b _ < /proc/uptime; echo $a $b"
    );
    let times = sh(&node, &script).with_context(|| node.logs())?;
    let [gone, back] = times.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?[..] else {
        anyhow::bail!("{times}")
    };
    eprintln!("bound again after {:.2} s", back - gone);
    ensure!(back - gone < 5.0, "bound again after {} s\n{}", back - gone, node.logs());

    // A second daemon says who is the first.
    let pid = node.agent("vfio-manager")?.process.pid();
    let second = run(&node, &["vfio-manager", "run"])?;
    assert_eq!(second.status.map(lab_vm::Status::code), Some(1));
    ensure!(second.error_text().contains(&format!("(process {pid})")), "{}", second.error_text());
    // And the hook of its own pod changes nothing.
    nothing_happens(&node, "the hook beside the daemon", || {
        let hook = run(&node, &["vfio-manage", "unbind", "--all"])?;
        ensure!(hook.success() && hook.text().contains("left as they are"), "{}", hook.text());
        Ok(())
    })?;

    // Another driver has the device when the daemon starts.
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    sh(
        &node,
        &format!(
            "modprobe pci-stub && echo {bdf} > {device}/driver/unbind && echo pci-stub > {device}/driver_override &&
             echo {bdf} > /sys/bus/pci/drivers_probe"
        ),
    )?;
    // What the device had before the first bind is on record; this is another life of it.
    sh(&node, "rm /run/nvidia/ccnode/bindings.json")?;
    assert_eq!(drivers(&node)?, ["pci-stub", "vfio-pci"]);
    nothing_happens(&node, "a device of another driver", || {
        for (argv, code) in [
            (&["vfio-manage", "bind", "--all"][..], 0),
            (&["vfio-manage", "bind", "--all", "--strict"], 1),
            (&["vfio-manage", "bind", "-d", &bdf], 1),
            (&["vfio-manager", "run", "--once"], 1),
        ] {
            let output = run(&node, argv)?;
            assert_eq!(output.status.map(lab_vm::Status::code), Some(code), "{argv:?}: {}", output.text());
            ensure!(output.text().contains("--take-from-driver"), "{argv:?}: {}", output.text());
        }
        Ok(())
    })?;
    node.look(&["vfio-manage", "bind", "-d", &bdf, "--take-from-driver"])?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    // It is given back what it had, driver and override.
    node.look(&["vfio-manage", "unbind", "-d", &bdf])?;
    assert_eq!(drivers(&node)?, ["pci-stub", "vfio-pci"]);
    assert_eq!(sh(&node, &format!("cat {device}/driver_override"))?.trim(), "pci-stub");

    // Where it cannot be recorded what a device had, nothing is done to it.
    sh(
        &node,
        &format!("echo {bdf} > {device}/driver/unbind && mount -t tmpfs -o ro,mode=755 none /run/nvidia/ccnode"),
    )?;
    nothing_happens(&node, "a state directory that cannot be written", || {
        let output = run(&node, &["vfio-manage", "bind", "--all"])?;
        assert_eq!(output.status.map(lab_vm::Status::code), Some(1));
        let text = output.error_text();
        ensure!(text.contains("/run/nvidia/ccnode") && text.contains("Read-only file system"), "{text}");
        Ok(())
    })?;
    // A daemon stays, says so, and goes on when it can.
    node.start_vfio_manager()?;
    let says = |text: &str| text.contains("look_failed") && text.contains("Read-only file system");
    node.agent("vfio-manager")?.process.wait_output(STEP, says).with_context(|| node.logs())?;
    sh(&node, "umount /run/nvidia/ccnode")?;
    node.agent("vfio-manager")?.process.wait_output(STEP, |text| text.contains("device_bound"))?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    Ok(())
}

#[test]
fn a_host_without_iommu_is_told_the_cause_and_the_cure() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let mut node = Node::start(Boot { append: "intel_iommu=off".into(), ..Boot::new("h100x2")? }, &[])?;
    nothing_happens(&node, "a host without IOMMU", || {
        for (argv, code) in [
            (&["vfio-manage", "bind", "--all"][..], 0),
            (&["vfio-manage", "bind", "--all", "--strict"], 1),
            (&["vfio-manage", "bind", "-d", &node.guest.bdf("gpu0")?], 1),
            (&["vfio-manager", "run", "--once"], 1),
        ] {
            let output = run(&node, argv)?;
            assert_eq!(output.status.map(lab_vm::Status::code), Some(code), "{argv:?}: {}", output.text());
            for words in ["BindRefused", "no IOMMU group", "intel_iommu=on"] {
                ensure!(output.text().contains(words), "{argv:?}: {}", output.text());
            }
        }
        Ok(())
    })?;
    assert_eq!(drivers(&node)?, ["-", "-"]);
    node.start_vfio_manager()?;
    let refused = |text: &str| text.matches("BindRefused").count() == 2;
    node.agent("vfio-manager")?.process.wait_output(STEP, refused).with_context(|| node.logs())?;
    std::thread::sleep(Duration::from_secs(3));
    // It stays, and says it once.
    ensure!(node.agent("vfio-manager")?.is_running(), "{}", node.logs());
    ensure!(refused(&node.logs()), "{}", node.logs());
    Ok(())
}

/// Binds all GPUs of a node from each state that they may be in, to the driver that is theirs, and gives them back.
fn bound_from_every_state(topology: &str, driver: &str, more: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let Some(node) = node(topology, &[])? else { return Ok(()) };
    // The kernel of the lab is older than this driver's knowledge of the lab's GPUs.
    let alias = "alias vfio_pci:v000010DEd00002941sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci";
    sh(&node, &format!("echo '{alias}' >> /lib/modules/$(uname -r)/modules.alias"))?;
    let bdfs: Vec<String> = gpu_bdfs(&node)?.into_iter().collect();
    let all = |driver: &str| vec![driver.to_owned(); bdfs.len()];
    let binds = |argv: &[&str], from: &str| -> Result<()> {
        let output = run(&node, argv)?;
        ensure!(output.success(), "{from}: {}{}", output.text(), output.error_text());
        assert_eq!(drivers(&node)?, all(driver), "{from}: {}", output.text());
        Ok(())
    };
    let gives_back = |driver: &str| -> Result<()> {
        let output = run(&node, &["vfio-manage", "unbind", "--all"])?;
        ensure!(
            output.success() && output.text().contains("Left as it was: nothing"),
            "{}{}",
            output.text(),
            output.error_text()
        );
        assert_eq!(drivers(&node)?, all(driver));
        Ok(())
    };
    assert_eq!(drivers(&node)?, all("-"));
    binds(&["vfio-manager", "run", "--once"], "without driver")?;
    nothing_happens(&node, "already right", || binds(&["vfio-manager", "run", "--once"], "already right"))?;
    gives_back("-")?;

    // Killed in the middle: one is bound, of one the override is written.
    let (first, last) = (bdfs.first().context("no GPU")?, bdfs.last().context("no GPU")?);
    node.look(&["vfio-manage", "bind", "-d", first])?;
    sh(&node, &format!("echo {driver} > /sys/bus/pci/devices/{last}/driver_override"))?;
    binds(&["vfio-manager", "run", "--once"], "half bound")?;
    sh(&node, "rm /run/nvidia/ccnode/bindings.json")?;
    gives_back("-")?;

    let other: Vec<String> = bdfs
        .iter()
        .map(|bdf| {
            let device = format!("/sys/bus/pci/devices/{bdf}");
            format!("echo uio_pci_generic > {device}/driver_override && echo {bdf} > /sys/bus/pci/drivers_probe")
        })
        .collect();
    sh(&node, &format!("modprobe uio_pci_generic && {}", other.join(" && ")))?;
    assert_eq!(drivers(&node)?, all("uio_pci_generic"));
    let refused = run(&node, &["vfio-manager", "run", "--once"])?;
    ensure!(!refused.success() && refused.text().contains("--take-from-driver"), "{}", refused.text());
    assert_eq!(drivers(&node)?, all("uio_pci_generic"));
    binds(&["vfio-manager", "run", "--once", "--take-from-driver"], "on another driver")?;
    gives_back("uio_pci_generic")?;
    more(&node)
}

#[test]
fn two_h100_are_bound_from_every_state() -> Result<()> {
    bound_from_every_state("h100x2", "vfio-pci", |_| Ok(()))
}

#[test]
fn a_locked_down_host_is_bound_from_every_state() -> Result<()> {
    bound_from_every_state("lockdown", "vfio-pci", |_| Ok(()))
}

#[test]
fn gpus_of_all_ages_are_bound_from_every_state() -> Result<()> {
    bound_from_every_state("mixed", "vfio-pci", |_| Ok(()))
}

#[test]
fn grace_gpus_get_the_driver_that_the_kernel_has_for_them() -> Result<()> {
    bound_from_every_state("gb200", "nvgrace_gpu_vfio_pci", |node| {
        let plan = node.look(&["vfio-manager", "plan", "--json", "--take-from-driver"])?.text();
        let plan: serde_json::Value = serde_json::from_str(&plan)?;
        let steps = plan["steps"].as_array().context("no steps")?;
        ensure!(steps.len() == 4 && steps.iter().all(|step| step["module"] == "nvgrace_gpu_vfio_pci"), "{plan:#}");
        Ok(())
    })
}

#[test]
fn the_audio_function_of_a_board_goes_along() -> Result<()> {
    bound_from_every_state("rtx-pro-6000", "vfio-pci", |node| {
        node.look(&["vfio-manager", "run", "--once", "--take-from-driver"])?;
        for name in ["audio0", "audio1"] {
            let link = format!("basename $(readlink /sys/bus/pci/devices/{}/driver)", node.guest.bdf(name)?);
            assert_eq!(sh(node, &link)?.trim(), "vfio-pci", "{name}");
        }
        Ok(())
    })
}

#[test]
fn the_switches_of_a_baseboard_go_along_when_the_node_is_to_be_in_protected_pcie() -> Result<()> {
    bound_from_every_state("hgx-h100", "vfio-pci", |node| {
        let switches = |mode: &str| -> Result<usize> {
            let command =
                format!("echo {mode} > /run/mode && vfio-manager plan --take-from-driver --cc-mode-file /run/mode");
            let plan = sh(node, &command)?;
            Ok(plan.lines().filter(|line| line.contains("bind to")).count())
        };
        let gpus = gpu_bdfs(node)?.len();
        assert_eq!((switches("on")?, switches("ppcie")?), (gpus, gpus + 4));
        Ok(())
    })
}

#[test]
fn a_foreign_member_of_the_group_is_named() -> Result<()> {
    let Some(node) = node("acs-off", &[])? else { return Ok(()) };
    let nic = node.guest.bdf("nic0")?;
    let device = format!("/sys/bus/pci/devices/{nic}");
    sh(
        &node,
        &format!(
            "modprobe uio_pci_generic && echo uio_pci_generic > {device}/driver_override && echo {nic} > /sys/bus/pci/drivers_probe"
        ),
    )?;
    let output = run(&node, &["vfio-manager", "run", "--once"])?;
    ensure!(!output.success(), "{}", output.text());
    let named =
        |line: &str| line.contains(&nic) && line.contains("BindRefused") && line.contains("is on uio_pci_generic");
    ensure!(output.text().lines().any(named), "{}", output.text());
    assert_eq!(sh(&node, &format!("basename $(readlink {device}/driver)"))?.trim(), "uio_pci_generic");
    Ok(())
}

/// The three command lines of the operator's pod beside our daemon (operator-contract sections 6.1 and 6.10).
#[test]
fn a_pod_that_is_replaced_changes_no_binding() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_agent(&["/bin/sh", "-c", "exec vfio-manager run"], &[])?;
    let bound = |text: &str| text.matches("device_bound").count() == 2;
    node.agent("/bin/sh")?.process.wait_output(STEP, bound).with_context(|| node.logs())?;
    nothing_happens(&node, "the init container of the next pod", || {
        for word in ["preflight_check", "uninstall_driver"] {
            let output = run(&node, &["driver-manager", word])?;
            ensure!(output.success() && output.text().contains("nothing"), "{}{}", output.text(), output.error_text());
        }
        Ok(())
    })?;
    nothing_happens(&node, "the hook of this pod", || {
        let hook = run(&node, &["/bin/sh", "-c", "vfio-manage unbind --all"])?;
        ensure!(hook.success() && hook.text().contains("left as they are"), "{}", hook.text());
        Ok(())
    })?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);

    // The node is for something else from now on.
    sh(&node, "mkdir -p /run/nvidia/validations && echo container > /run/nvidia/validations/workload-type")?;
    let hook = run(&node, &["/bin/sh", "-c", "vfio-manage unbind --all"])?;
    ensure!(hook.success() && hook.text().contains("Given back: 2"), "{}{}", hook.text(), hook.error_text());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(drivers(&node)?, ["-", "-"], "the daemon binds them no more\n{}", node.logs());
    ensure!(node.agent("/bin/sh")?.is_running(), "{}", node.logs());

    // A driver of the host's own is refused at once.
    sh(
        &node,
        "mkdir -p /usr/bin && printf '#!/bin/sh\\necho 570.86.15\\n' > /usr/bin/nvidia-smi && chmod +x /usr/bin/nvidia-smi",
    )?;
    let refused = run(&node, &["driver-manager", "uninstall_driver"])?;
    ensure!(
        !refused.success() && refused.error_text().contains("its own NVIDIA driver (570.86.15)"),
        "{}",
        refused.error_text()
    );
    Ok(())
}

/// In a user namespace of its own a process is still root to the files of root, and has no capability over the machine.
#[test]
fn binding_needs_to_be_root_and_no_capability() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    sh(&node, "modprobe vfio-pci && ! unshare -r modprobe pci-stub && ! grep -q pci_stub /proc/modules")?;
    let output = run(&node, &["unshare", "-r", "vfio-manager", "run", "--once"])?;
    ensure!(output.success(), "{}{}", output.text(), output.error_text());
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    node.look(&["unshare", "-r", "vfio-manage", "unbind", "--all"])?;
    assert_eq!(drivers(&node)?, ["-", "-"]);
    Ok(())
}
