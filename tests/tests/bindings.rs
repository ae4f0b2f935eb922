//! vfio-manager on a real kernel: what it binds, what it leaves alone, and what it says.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, await_that, gpu_bdfs, hold_group, lab_is_here, node, node_with};
use lab::{Boot, Node};
use lab_devices::Kind;
use lab_vm::{Add, Kernel, Output};
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

/// How often the agent is started again.
const RESTARTS: usize = 20;

/// The daemon has looked at two devices.
fn has_looked(node: &Node) -> Result<()> {
    let looks = |text: &str| text.matches("device_bound").count() + text.matches("device_seen").count();
    node.agent("vfio-manager")?.process.wait_output(STEP, |text| looks(text) >= 2).with_context(|| node.logs())
}

/// Restarts the daemon, killed and asked to end in turns: no event of the kernel, no access to a device.
fn restarts_touch_nothing(node: &mut Node, what: &str) -> Result<()> {
    let before = sh(node, "cat /sys/kernel/uevent_seqnum")?;
    node.guest.fleet().clear_trace();
    let mut kills = 0;
    for round in 0..RESTARTS {
        node.start_vfio_manager()?;
        has_looked(node)?;
        let signal = if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
        kills += usize::from(signal == Signal::SIGKILL);
        node.stop_agent("vfio-manager", signal)?;
    }
    assert_eq!(sh(node, "cat /sys/kernel/uevent_seqnum")?, before, "{what}: events of the kernel");
    // One that its holder has opened, and so reset, may end its boot meanwhile.
    let is_act = |kind: Kind| !matches!(kind, Kind::Read | Kind::Ready);
    let acts: Vec<_> = node.trace().into_iter().filter(|event| is_act(event.kind)).collect();
    ensure!(acts.is_empty(), "{what}: {acts:?}");
    eprintln!(
        "{what}: {RESTARTS} restarts, {kills} of them kills; 0 writes and resets of devices, 0 events of the kernel"
    );
    Ok(())
}

/// What is held is not given back, and keeps its override; its holder is named.
fn a_held_device_is_not_given_back(node: &Node, bdf: &str) -> Result<()> {
    nothing_happens(node, "unbind of a held device", || {
        let unbind = run(node, &["vfio-manage", "unbind", "-d", bdf])?;
        ensure!(!unbind.success() && unbind.text().contains("DeviceHeld"), "{}", unbind.text());
        ensure!(unbind.text().contains("held by pid "), "{}", unbind.text());
        let kept = sh(node, &format!("cat /sys/bus/pci/devices/{bdf}/driver_override"))?;
        ensure!(kept.trim() == "vfio-pci", "the override is {kept}");
        Ok(())
    })
}

#[test]
fn restarts_change_nothing_while_processes_hold_a_group_and_a_character_device() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_vfio_manager()?;
    let [by_cdev, by_group] = [node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?];
    has_looked(&node)?;
    hold_group(&mut node, "gpu1")?;
    let hold =
        format!("exec 3<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/{by_cdev}/vfio-dev) && echo held && sleep 1000");
    node.start_agent(&["/bin/sh", "-c", &hold], &[])?;
    node.agent("/bin/sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"], "a signal leaves all bindings");
    restarts_touch_nothing(&mut node, "held by its group, and by its character device")?;
    for bdf in [&by_cdev, &by_group] {
        a_held_device_is_not_given_back(&node, bdf)?;
    }
    for holder in ["sh", "/bin/sh"] {
        ensure!(node.agent(holder)?.is_running(), "the holder {holder} ended");
    }
    Ok(())
}

#[test]
fn restarts_change_nothing_while_a_process_has_a_device_bound_by_its_character_device() -> Result<()> {
    let with_own = |boot: &mut Boot| {
        boot.kernel = Some(Kernel::NoGroup);
        boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-own").into(), guest: "/usr/bin/lab-own".into() });
    };
    let Some(mut node) = node_with("h100x2", &[], with_own)? else { return Ok(()) };
    node.start_vfio_manager()?;
    has_looked(&node)?;
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    let bdf = node.guest.bdf("gpu1")?;
    let hold = format!("mkdir -m 755 /tmp/other; sleep 1000 | exec lab-own hold auto /tmp/other {bdf}");
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held")).with_context(|| node.logs())?;
    restarts_touch_nothing(&mut node, "bound to an IOMMU by its character device")?;
    a_held_device_is_not_given_back(&node, &bdf)?;
    ensure!(node.agent("sh")?.is_running(), "the holder ended");
    Ok(())
}

/// Kills the command at more and more moments of its work; how many of them were in time.
fn kills(node: &Node, command: &str, wanted: &str, settle: &str) -> Result<usize> {
    let script = format!(
        "k=0; for ms in $(seq 0 {KILL_STEP} {KILL_LAST}); do
             {command} > /tmp/out 2>&1 & p=$!; usleep $((ms * 1000)); kill -9 $p 2> /dev/null
             wait $p 2> /dev/null; [ $? = 137 ] && k=$((k + 1))
             {command} > /tmp/out 2>&1 || {{ echo after a kill at $ms ms; cat /tmp/out; exit 1; }}
             [ \"$({wanted})\" = yes ] || {{ echo not as wanted after a kill at $ms ms; cat /tmp/out; exit 1; }}
             {settle} > /tmp/out 2>&1 || {{ cat /tmp/out; exit 1; }}
         done; echo kills $k"
    );
    let output = node.guest.shell(&script, Duration::from_mins(5))?;
    ensure!(output.success(), "{command}: {}{}", output.text(), output.error_text());
    let count = output.text().lines().find_map(|line| line.strip_prefix("kills ").map(str::to_owned));
    count.with_context(|| output.text())?.parse().context("no number")
}

/// Moments of kills, in milliseconds after the start.
const KILL_STEP: u64 = 10;
const KILL_LAST: u64 = 300;

#[test]
fn killed_at_any_moment_the_next_run_completes_and_what_is_held_is_never_touched() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.look(&["vfio-manager", "run", "--once"])?;
    hold_group(&mut node, "gpu1")?;
    let (bdf, held) = (node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?);
    let state = format!(
        "cd /sys/bus/pci/devices/{held} && readlink driver && readlink iommu_group && cat driver_override && ls vfio-dev"
    );
    let before = sh(&node, &state)?;
    node.guest.fleet().clear_trace();
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let (bind, unbind) = ("vfio-manager run --once", format!("vfio-manage unbind -d {bdf}"));
    let is_bound = format!("[ -e {device}/driver ] && echo yes");
    let is_free = format!("[ -e {device}/driver ] || grep -q vfio {device}/driver_override || echo yes");
    let in_unbind = kills(&node, &unbind, &is_free, bind)?;
    node.look(&["sh", "-c", &unbind])?;
    let in_bind = kills(&node, bind, &is_bound, &unbind)?;
    // Its configuration space may be read; nothing is written, and it is not opened: that would be a reset.
    let touched: Vec<_> =
        node.trace().into_iter().filter(|event| &*event.device == "gpu1" && event.kind != Kind::Read).collect();
    ensure!(touched.is_empty(), "{touched:?}");
    assert_eq!(sh(&node, &state)?, before);
    ensure!(node.agent("sh")?.is_running(), "the holder ended");
    ensure!(in_bind > 5 && in_unbind > 5, "killed {in_bind} and {in_unbind} times only");
    eprintln!("killed {in_bind} times in bind, {in_unbind} times in unbind; 0 failures, the held device untouched");
    Ok(())
}

/// A driver that takes half a minute to let go of a device.
#[test]
fn a_driver_that_lets_go_slowly_holds_up_nothing_but_its_device() -> Result<()> {
    const SLOW: Duration = Duration::from_secs(30);
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    let (slow, other) = (node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?);
    let device = |bdf: &str| format!("/sys/bus/pci/devices/{bdf}");
    on_nouveau(&node, &slow)?;
    sh(&node, &format!("echo {} > /sys/module/nouveau/parameters/unbind_ms", SLOW.as_millis()))?;
    let begun = Instant::now();
    node.start_agent(
        &["vfio-manager", "run", "--take-from-driver", "--write-timeout", "1s"],
        &[("HEALTH_ADDR", "127.0.0.1:9400")],
    )?;
    let says = |text: &str| text.contains("SysfsWriteBlocked") && text.contains("device_bound");
    node.agent("vfio-manager")?.process.wait_output(STEP, says).with_context(|| node.logs())?;
    let metrics = |line: &str| -> Result<bool> {
        Ok(node.look(&["wget", "-q", "-O", "-", "http://127.0.0.1:9400/metrics"])?.text().contains(line))
    };
    await_that("told", &node, || metrics("ccnode_vfio_blocked_writes 1\n"))?;
    for (path, words) in [("healthz", ""), ("readyz", ""), ("state", "driver/unbind")] {
        let answer = node.look(&["wget", "-q", "-O", "-", &format!("http://127.0.0.1:9400/{path}")])?.text();
        ensure!(answer.contains(words), "{path}: {answer}");
    }
    // The other one is looked after meanwhile.
    let again = format!(
        "echo {other} > {0}/driver/unbind; i=0; while ! test -e {0}/driver; do usleep 5000; i=$((i+1)); test $i -lt 4000 || exit 1; done",
        device(&other)
    );
    sh(&node, &again).with_context(|| node.logs())?;
    let blocked = sh(&node, &format!("basename $(readlink {}/driver) || echo let go of", device(&slow)))?;
    await_that("nothing else under way", &node, || metrics("ccnode_vfio_blocked_writes 1\n"))?;
    ensure!(
        blocked.trim() == "let go of" && begun.elapsed() < SLOW,
        "{blocked}, {:?} after the start",
        begun.elapsed()
    );
    await_that("bound in the end", &node, || Ok(drivers(&node)? == ["vfio-pci", "vfio-pci"]))?;
    let took = begun.elapsed();
    ensure!(took >= SLOW, "{took:?}");
    await_that("nothing blocked", &node, || metrics("ccnode_vfio_blocked_writes 0\n"))?;
    let kernel = sh(&node, "dmesg | grep 'let go after'")?;
    assert_eq!(kernel.lines().count(), 1, "{kernel}");
    eprintln!(
        "blocked for 30 s: told, the other device bound and bound again meanwhile; bound {took:?} after the start"
    );
    Ok(())
}

/// Gives a device to the stand-in for nouveau.
fn on_nouveau(node: &Node, bdf: &str) -> Result<()> {
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let script = format!(
        "modprobe nouveau && echo nouveau > {device}/driver_override && echo {bdf} > /sys/bus/pci/drivers_probe &&
         echo > {device}/driver_override && basename $(readlink {device}/driver)"
    );
    ensure!(sh(node, &script)?.trim() == "nouveau", "{bdf} is not on nouveau");
    Ok(())
}

/// The init container, on a node on which a driver container and nouveau have been.
#[test]
fn drivers_are_unloaded_and_what_a_driver_container_left_is_cleared_away() -> Result<()> {
    let Some(node) = node("h100x2", &[])? else { return Ok(()) };
    let (nouveaus, bound) = (node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?);
    node.look(&["vfio-manage", "bind", "-d", &bound])?;
    on_nouveau(&node, &nouveaus)?;
    sh(
        &node,
        "modprobe nvidia-uvm && mkdir -p /run/nvidia/driver && mount -t tmpfs none /run/nvidia/driver &&
         mkdir /run/nvidia/driver/dev && mount -t tmpfs none /run/nvidia/driver/dev && echo 123 > /run/nvidia/nvidia-driver.pid",
    )?;
    let left = || {
        sh(
            &node,
            "cut -d' ' -f1 /proc/modules | grep -E '^(nouveau|nvidia)'; grep -c /run/nvidia/driver /proc/mounts; ls /run/nvidia",
        )
    };
    let before = left()?;
    for words in ["nouveau", "nvidia_uvm", "nvidia\n", "2\n", "nvidia-driver.pid"] {
        ensure!(before.contains(words), "{words}: {before}");
    }
    let acts = "unload nvidia_uvm; unload nvidia; unload nouveau; unmount /run/nvidia/driver/dev; unmount /run/nvidia/driver; \
                remove /run/nvidia/nvidia-driver.pid";
    nothing_happens(&node, "preflight_check", || {
        let told = node.look(&["driver-manager", "preflight_check"])?.text();
        ensure!(told.trim_end() == format!("To be done: {acts}"), "{told:?}");
        Ok(())
    })?;
    assert_eq!(left()?, before);
    let (link, seen) = (format!("readlink /sys/bus/pci/devices/{bound}/driver"), node.guest.fleet());
    seen.clear_trace();
    let told = node.look(&["driver-manager", "uninstall_driver"])?.text();
    ensure!(told.contains(&format!("Done: {acts}. All bindings are as they were")), "{told}");
    let after = left()?;
    ensure!(!["nouveau", "nvidia_uvm", "nvidia\n", "pid"].iter().any(|words| after.contains(words)), "{after}");
    ensure!(after.lines().any(|line| line == "0"), "mounts are left: {after}");
    ensure!(sh(&node, &link)?.trim().ends_with("vfio-pci"), "the binding changed");
    let touched: Vec<_> =
        node.trace().into_iter().filter(|event| &*event.device == "gpu1" && event.kind != Kind::Read).collect();
    ensure!(touched.is_empty(), "{touched:?}");
    // And the pod's main command line then binds the other.
    node.look(&["vfio-manage", "bind", "--all", "--strict"])?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    Ok(())
}

/// Seconds between the moment at which the kernel shows a device and the one at which it is bound, both seen by a process of
/// the guest while `act` brings the device.
fn comes_back(node: &mut Node, bdf: &str, act: impl FnOnce(&Node) -> Result<()>) -> Result<f64> {
    let script = format!(
        "cd /sys/bus/pci/devices; echo waits; while ! test -e {bdf}; do usleep 2000; done; read a _ < /proc/uptime
         while ! test -e {bdf}/driver; do usleep 2000; done; read b _ < /proc/uptime; echo times $a $b"
    );
    node.start_agent(&["/bin/sh", "-c", &script], &[])?;
    node.agent("/bin/sh")?.process.wait_output(STEP, |text| text.contains("waits"))?;
    act(node)?;
    let process = &node.agent("/bin/sh")?.process;
    process.wait_output(STEP, |text| text.contains("times ")).with_context(|| node.logs())?;
    let text = process.output().text();
    let times: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("times "))
        .flat_map(str::split_whitespace)
        .flat_map(str::parse)
        .collect();
    let [shown, bound] = times[..] else { anyhow::bail!("{text}") };
    Ok(bound - shown)
}

#[test]
fn what_is_plugged_in_or_found_again_is_bound() -> Result<()> {
    let Some(mut node) = node("h100x2", &[])? else { return Ok(()) };
    node.start_vfio_manager()?;
    has_looked(&node)?;
    let (first, bdf) = (node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?);
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let group = |node: &Node, bdf: &str| -> Result<String> {
        Ok(sh(node, &format!("basename $(readlink /sys/bus/pci/devices/{bdf}/iommu_group)"))?.trim().to_owned())
    };
    let ports =
        [&first, &bdf].map(|bdf| sh(&node, &format!("basename $(dirname $(readlink -f /sys/bus/pci/devices/{bdf}))")));
    let [first_port, port] = ports;
    let (first_port, port) = (first_port?.trim().to_owned(), port?.trim().to_owned());
    let mut told = Vec::new();

    for round in 0..3 {
        node.guest.unplug("gpu1", STEP)?;
        ensure!(sh(&node, &format!("test ! -e {device} && echo gone"))?.contains("gone"));
        told.push((format!("plugged in, {round}"), comes_back(&mut node, &bdf, |node| Ok(node.guest.plug("gpu1")?))?));
    }
    let slot = sh(&node, &format!("grep -l {} /sys/bus/pci/slots/*/address", bdf.trim_end_matches(".0")))?;
    let power = format!("{}/power", slot.trim().trim_end_matches("/address"));
    // The port gives its device out when its power is turned off, and has none to turn on.
    sh(&node, &format!("echo 0 > {power}; while test -e {device}; do usleep 10000; done"))?;
    node.guest.qmp_event("DEVICE_DELETED", STEP)?;
    told.push(("after its slot was off".into(), comes_back(&mut node, &bdf, |node| Ok(node.guest.plug("gpu1")?))?));
    for round in 0..3 {
        sh(&node, &format!("echo 1 > {device}/remove"))?;
        let rescan = |node: &Node| sh(node, "echo 1 > /sys/bus/pci/rescan").map(drop);
        told.push((format!("removed and found, {round}"), comes_back(&mut node, &bdf, rescan)?));
    }

    // Both go, and come back in the other order: each gets the number that is free.
    let before = [group(&node, &first)?, group(&node, &bdf)?];
    sh(&node, &format!("echo 1 > /sys/bus/pci/devices/{first}/remove; echo 1 > {device}/remove"))?;
    for (bdf, port) in [(&bdf, &port), (&first, &first_port)] {
        let rescan = |node: &Node| {
            sh(node, &format!("for bus in /sys/bus/pci/devices/{port}/pci_bus/*; do echo 1 > $bus/rescan; done"))
                .map(drop)
        };
        told.push(("in another group".into(), comes_back(&mut node, bdf, rescan)?));
    }
    let after = [group(&node, &first)?, group(&node, &bdf)?];
    assert_eq!([&after[1], &after[0]], [&before[0], &before[1]], "the groups are the same");
    await_that("both bound", &node, || Ok(drivers(&node)? == ["vfio-pci", "vfio-pci"]))?;
    sh(&node, &format!("test -e /dev/vfio/{} && test -e /dev/vfio/{}", after[0], after[1]))?;
    for (what, seconds) in &told {
        eprintln!("{what}: bound {seconds:.2} s after the kernel showed it");
    }
    for (what, seconds) in &told {
        ensure!(*seconds < 5.0, "{what}: {seconds} s\n{}", node.logs());
    }
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

/// From each state that GPUs may be in without an IOMMU, of a machine that has none: refused, and nothing is touched.
#[test]
fn a_machine_without_iommu_is_left_as_it_is_from_every_state() -> Result<()> {
    let Some(node) = node("no-iommu", &[])? else { return Ok(()) };
    let bdfs = gpu_bdfs(&node)?;
    let each = |script: &str| -> String { bdfs.iter().map(|bdf| script.replace("BDF", bdf) + "; ").collect() };
    let device = "/sys/bus/pci/devices/BDF";
    let other = format!("echo uio_pci_generic > {device}/driver_override; echo BDF > /sys/bus/pci/drivers_probe");
    let other = format!("modprobe uio_pci_generic; {}", each(&other));
    let half = format!("echo vfio-pci > {device}/driver_override");
    // What VFIO's driver does with such a device: it refuses it.
    let probed = format!("{half}; echo BDF > /sys/bus/pci/drivers_probe; true");
    let freed = format!("[ -e {device}/driver ] && echo BDF > {device}/driver/unbind; echo > {device}/driver_override");
    for (state, script, driver) in [
        ("without driver", "true".to_owned(), "-"),
        ("half bound", each(&half), "-"),
        ("probed by VFIO", format!("modprobe vfio-pci; {}", each(&probed)), "-"),
        ("on another driver", other, "uio_pci_generic"),
    ] {
        sh(&node, &script)?;
        assert_eq!(drivers(&node)?, vec![driver; bdfs.len()], "{state}");
        nothing_happens(&node, state, || {
            for argv in
                [&["vfio-manager", "run", "--once"][..], &["vfio-manager", "run", "--once", "--take-from-driver"]]
            {
                let output = run(&node, argv)?;
                ensure!(!output.success(), "{state}: {}", output.text());
                let refusals = output.text().matches("BindRefused").count();
                ensure!(
                    refusals == bdfs.len() && output.text().contains("intel_iommu=on"),
                    "{state}: {}",
                    output.text()
                );
            }
            Ok(())
        })?;
        assert_eq!(drivers(&node)?, vec![driver; bdfs.len()], "{state}");
        sh(&node, &each(&freed))?;
    }
    Ok(())
}

/// Binds all GPUs of a node from each state that they may be in, to the driver that is theirs, and gives them back.
fn bound_from_every_state(topology: &str, driver: &str, more: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let Some(node) = node(topology, &[])? else { return Ok(()) };
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
fn a_group_without_isolation_is_bound_from_every_state_and_its_foreign_member_is_named_when_it_is_in_the_way()
-> Result<()> {
    bound_from_every_state("acs-off", "vfio-pci", |node| {
        let nic = node.guest.bdf("nic0")?;
        let device = format!("/sys/bus/pci/devices/{nic}");
        sh(
            node,
            &format!("echo uio_pci_generic > {device}/driver_override && echo {nic} > /sys/bus/pci/drivers_probe"),
        )?;
        // From other drivers, half bound, and from none; and when the GPUs are as they should be.
        let gpu = gpu_bdfs(node)?.pop_first().context("no GPU")?;
        for (state, before) in [
            ("on another driver", "true".to_owned()),
            ("already right", "true".to_owned()),
            ("half bound", format!("echo {gpu} > /sys/bus/pci/devices/{gpu}/driver/unbind")),
            ("without driver", "rm /run/nvidia/ccnode/bindings.json; vfio-manage unbind --all".to_owned()),
        ] {
            sh(node, &before)?;
            let output = run(node, &["vfio-manager", "run", "--once", "--take-from-driver"])?;
            ensure!(!output.success(), "{state}: {}", output.text());
            let named = |line: &str| {
                line.contains(&nic) && line.contains("BindRefused") && line.contains("is on uio_pci_generic")
            };
            ensure!(output.text().lines().any(named), "{state}: {}", output.text());
            assert_eq!(
                sh(node, &format!("basename $(readlink {device}/driver)"))?.trim(),
                "uio_pci_generic",
                "{state}"
            );
            assert!(drivers(node)?.iter().all(|driver| driver == "vfio-pci"), "{state}: {:?}", drivers(node)?);
        }
        Ok(())
    })
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

/// The rows of the table of capabilities in docs/operations.md: what each command needs, what is mounted for it, and what it
/// says when one of the capabilities is missing.
#[test]
fn each_command_needs_the_capabilities_that_the_table_names_and_no_others() -> Result<()> {
    let with_caps = |boot: &mut Boot| {
        boot.without_vfio_modules = true;
        boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-caps").into(), guest: "/usr/bin/lab-caps".into() });
    };
    let Some(mut node) = node_with("h100x2", &[], with_caps)? else { return Ok(()) };
    sh(&node, "mkdir -p /host && mount --rbind / /host")?;
    let (bdf, held) = (node.guest.bdf("gpu0")?, node.guest.bdf("gpu1")?);
    let with = |node: &Node, capabilities: &[&str], command: &str| -> Result<(bool, String)> {
        let names = if capabilities.is_empty() { "none".to_owned() } else { capabilities.join(",") };
        let output = node.guest.run(&["lab-caps", &names, "sh", "-c", command], CHANGE)?;
        Ok((output.success(), format!("{}{}", output.text(), output.error_text())))
    };
    let mut runs = 0;
    // Without any one of them it fails, and says so; with all of them, and no other, it works.
    let mut row = |node: &Node, needs: &[&str], command: &str, lacks: &str| -> Result<()> {
        for missing in needs {
            let others: Vec<&str> = needs.iter().copied().filter(|name| name != missing).collect();
            let (_, text) = with(node, &others, command)?;
            ensure!(text.contains(lacks), "{command} without {missing}: {text}");
            runs += 1;
        }
        let (works, text) = with(node, needs, command)?;
        ensure!(works && (lacks.is_empty() || !text.contains(lacks)), "{command} with {needs:?}: {text}");
        runs += 1;
        Ok(())
    };
    // Loading the driver by the host's modprobe, and binding.
    let bind = "HOST_ROOT=/host vfio-manager run --once";
    row(&node, &["SYS_CHROOT", "SYS_MODULE"], bind, "NoVfioDriver")?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    // Giving back, and binding where the driver is there: none.
    row(&node, &[], "vfio-manage unbind --all | grep 'Given back: 2'", "")?;
    row(&node, &[], bind, "NoVfioDriver")?;
    // The names of holders.
    hold_group(&mut node, "gpu1")?;
    let unbind = format!("vfio-manage unbind -d {held} | sed 's/its VFIO group is held;/nobody is named;/'; true");
    row(&node, &["SYS_PTRACE"], &unbind, "nobody is named")?;
    // The file of the group, where the container's /dev has none.
    let own_dev = format!("mount -t tmpfs none /dev/vfio && vfio-manage unbind -d {bdf}");
    let own_dev = format!("{own_dev} && vfio-manage bind -d {bdf}");
    row(&node, &["SYS_ADMIN", "MKNOD"], &format!("unshare -m sh -c '{own_dev}' || echo refused"), "refused")?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);

    // What the init container does.
    let smi =
        "mkdir -p /usr/bin && printf '#!/bin/sh\\nexit 9\\n' > /usr/bin/nvidia-smi && chmod +x /usr/bin/nvidia-smi";
    sh(&node, smi)?;
    let leave = "modprobe nouveau; mkdir -p /run/nvidia/driver; grep -q ' /run/nvidia/driver ' /proc/mounts || mount -t tmpfs none /run/nvidia/driver";
    let left = "grep -q '^nouveau ' /proc/modules || grep -q ' /run/nvidia/driver ' /proc/mounts";
    for needs in [&["SYS_MODULE", "SYS_ADMIN"][..], &["SYS_MODULE"], &["SYS_ADMIN"]] {
        sh(&node, leave)?;
        with(&node, needs, "driver-manager uninstall_driver")?;
        let cleared = !run(&node, &["sh", "-c", left])?.success();
        ensure!(cleared == (needs.len() == 2), "uninstall_driver with {needs:?}");
        runs += 1;
    }
    // A driver of the host's own is found by its program.
    sh(&node, "printf '#!/bin/sh\\necho 570.86.15\\n' > /usr/bin/nvidia-smi")?;
    for (needs, found) in [(&["SYS_CHROOT"][..], true), (&[], false)] {
        let (_, text) = with(&node, needs, "driver-manager preflight_check")?;
        ensure!(text.contains("570.86.15") == found, "preflight_check with {needs:?}: {text}");
        runs += 1;
    }
    eprintln!("{runs} runs with capabilities dropped, each as the table says");
    Ok(())
}

/// As in a container that is not privileged: namespaces of its own, a /dev of its own without VFIO's files, two capabilities,
/// and the host's /sys mounted writable.
#[test]
fn the_daemon_works_in_a_container_that_is_not_privileged() -> Result<()> {
    let with_caps = |boot: &mut Boot| {
        boot.without_vfio_modules = true;
        boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-caps").into(), guest: "/usr/bin/lab-caps".into() });
    };
    let Some(mut node) = node_with("h100x2", &[], with_caps)? else { return Ok(()) };
    sh(&node, "mkdir -p /host && mount --rbind / /host")?;
    let inside = "mount -t proc none /proc; mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mount -o remount,ro,bind /host;
                  HOST_ROOT=/host exec lab-caps SYS_CHROOT,SYS_MODULE vfio-manager run --operator no";
    node.start_agent(&["unshare", "-m", "-p", "-n", "-i", "-u", "-f", "sh", "-c", inside], &[])?;
    let process = &node.agent("unshare")?.process;
    process.wait_output(STEP, |text| text.matches("device_bound").count() == 2).with_context(|| node.logs())?;
    assert_eq!(drivers(&node)?, ["vfio-pci", "vfio-pci"]);
    // The kernel's events come into its network namespace: its poll is once a minute.
    let bdf = node.guest.bdf("gpu1")?;
    let device = format!("/sys/bus/pci/devices/{bdf}");
    sh(&node, &format!("echo {bdf} > {device}/driver/unbind"))?;
    let begun = Instant::now();
    await_that("bound again", &node, || Ok(drivers(&node)? == ["vfio-pci", "vfio-pci"]))?;
    ensure!(begun.elapsed() < Duration::from_secs(30), "it was the poll: {:?}", begun.elapsed());
    Ok(())
}
