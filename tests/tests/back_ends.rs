//! The ways to a device, on real kernels: through sysfs, as an opened VFIO device, with group files and without; what is
//! held is left alone, what has no driver is left so, and whoever wants a device back gets it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{CHANGE, STEP, exchanges, gpu_bdfs, lab_is_here, node_with, registers_say};
use lab::node::CC_MODE;
use lab::{Boot, Node};
use lab_devices::{Kind, Space, TraceEvent};
use lab_vm::{Add, Command, Guest, Kernel, Topology};
use nix::sys::signal::Signal;

/// What a guest is booted as, and what is expected of the way to its devices.
struct Case {
    topology: &'static str,
    kernel: Option<Kernel>,
    /// How a device is held, as the log has it.
    hold: &'static str,
    /// The way and why, as the log has it.
    way: &'static str,
    /// Resets of each device in one change of mode.
    resets: usize,
}

const GROUP: Case = Case {
    topology: "h100x2",
    kernel: None,
    hold: "Group(",
    way: "reached through sysfs: the kernel is not locked down",
    resets: 1,
};
const LOCKED: Case = Case {
    topology: "lockdown",
    kernel: None,
    hold: "Group(",
    way: "reached through vfio: the kernel is locked down",
    resets: 3,
};
const NO_GROUP: Case = Case {
    topology: "h100x2",
    kernel: Some(Kernel::NoGroup),
    hold: "Cdev",
    way: "reached through vfio: the kernel has no VFIO group files",
    resets: 3,
};
const LOCKED_NO_GROUP: Case = Case { topology: "lockdown", ..NO_GROUP };

impl Case {
    fn boot(&self, mode: &str) -> Result<Option<Node>> {
        node_with(self.topology, &[(CC_MODE, mode)], |boot| boot.kernel = self.kernel.or(boot.kernel))
    }

    /// The way that cc-manager says it took.
    fn is_told(&self, node: &Node) -> Result<()> {
        let log = node.agent("cc-manager")?.log();
        for bdf in gpu_bdfs(node)? {
            let says = |word: &str| log.iter().any(|(_, line)| line.contains(word) && line.contains(&bdf));
            ensure!(
                says(self.way) && says(self.hold),
                "{bdf}: {} and {} is not said\n{}",
                self.way,
                self.hold,
                node.logs()
            );
        }
        Ok(())
    }
}

fn sh(node: &Node, script: &str) -> Result<String> {
    Ok(node.look(&["sh", "-c", script])?.text().trim().to_owned())
}

/// The driver and the override of each GPU.
fn drivers(node: &Node) -> Result<Vec<String>> {
    let show = |bdf: &String| {
        let device = format!("/sys/bus/pci/devices/{bdf}");
        sh(node, &format!("d=$(readlink {device}/driver) && basename $d || echo -; cat {device}/driver_override"))
    };
    gpu_bdfs(node)?.iter().map(show).collect()
}

/// What one device saw, in the pieces between its resets.
fn between_resets<'a>(events: &'a [TraceEvent], device: &str) -> Vec<Vec<&'a TraceEvent>> {
    let mut pieces = vec![Vec::new()];
    for event in events.iter().filter(|event| &*event.device == device) {
        if event.kind == Kind::Flr || event.kind == Kind::BusReset {
            pieces.push(Vec::new());
        } else if let Some(piece) = pieces.last_mut() {
            piece.push(event);
        }
    }
    pieces
}

/// Requests to the firmware and accesses to registers in a piece.
fn work(piece: &[&TraceEvent], device: &str) -> (Vec<String>, usize) {
    let owned: Vec<TraceEvent> = piece.iter().map(|event| (*event).clone()).collect();
    let registers =
        piece.iter().filter(|event| event.space == Space::Bar0 && matches!(event.kind, Kind::Read | Kind::Write));
    (exchanges(&owned, device), registers.count())
}

/// Writes of knobs among requests.
fn writes(requests: &[String]) -> Vec<&str> {
    requests.iter().map(String::as_str).filter(|request| request.get(4..8) == Some("020D")).collect()
}

/// A change to `mode`: what is written, and that the device was reset as often as the way to it takes.
fn change(node: &Node, case: &Case, mode: &str, ready: &str, knobs: &[&str]) -> Result<()> {
    node.guest.fleet().clear_trace();
    node.ask_for(mode)?;
    node.await_state(mode, ready, CHANGE).with_context(|| node.logs())?;
    registers_say(node, mode)?;
    let events = node.trace();
    for name in node.gpus() {
        let pieces = between_resets(&events, &name);
        let what = format!("{name} on the way to {mode} through {}", case.way);
        assert_eq!(pieces.len() - 1, case.resets, "{what}: resets");
        let pieces: Vec<_> = pieces.iter().map(|piece| work(piece, &name)).collect();
        // An opened device is written to between the reset of its opening and the one that activates what was written, read
        // between that and the one of its closing, and no register of it is touched before and after.
        let staging = usize::from(case.resets == 3);
        assert_eq!(writes(&pieces[staging].0), knobs, "{what}");
        for (index, (requests, registers)) in pieces.iter().enumerate() {
            assert!(index == staging || writes(requests).is_empty(), "{what}: knobs written in piece {index}");
            let is_idle = index < staging || index > staging + 1;
            assert!(!is_idle || *registers == 0, "{what}: {registers} accesses to registers in piece {index}");
        }
        ensure!(!pieces[staging + 1].0.is_empty(), "{what}: not verified after the reset");
    }
    Ok(())
}

const ON_FROM_OFF: [&str; 2] = ["000A020D 2", "0008020D 1"];
const OFF_FROM_ON: [&str; 2] = ["000A020D 0", "0008020D 0"];

fn on_and_off(case: &Case) -> Result<()> {
    let Some(mut node) = case.boot("off")? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE).with_context(|| node.logs())?;
    change(&node, case, "on", "true", &ON_FROM_OFF)?;
    change(&node, case, "off", "false", &OFF_FROM_ON)?;
    case.is_told(&node)?;
    let bound = "vfio-pci\nvfio-pci";
    assert_eq!(drivers(&node)?, [bound, bound]);
    // What was pinned for the change sleeps again, and nobody holds anything.
    for bdf in gpu_bdfs(&node)? {
        let asleep = format!(
            "cd /sys/bus/pci/devices/{bdf}/power; i=0; until grep -q suspended runtime_status; do
             i=$((i+1)); test $i -lt 200 || exit 1; usleep 20000; done; cat control"
        );
        assert_eq!(sh(&node, &asleep)?, "auto", "{bdf}");
    }
    Ok(())
}

#[test]
fn a_locked_down_kernel_changes_modes_through_groups() -> Result<()> {
    on_and_off(&LOCKED)
}

#[test]
fn a_kernel_without_group_files_changes_modes_through_character_devices() -> Result<()> {
    on_and_off(&NO_GROUP)
}

#[test]
fn a_locked_down_kernel_without_group_files_changes_modes() -> Result<()> {
    on_and_off(&LOCKED_NO_GROUP)
}

/// Without vfio-manager the GPUs have no driver.
fn driverless(case: &Case) -> Result<()> {
    let Some(mut node) = case.boot("off")? else { return Ok(()) };
    let before = drivers(&node)?;
    assert_eq!(before, ["-\n(null)", "-\n(null)"]);
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE).with_context(|| node.logs())?;
    change(&node, case, "on", "true", &ON_FROM_OFF)?;
    assert_eq!(drivers(&node)?, before);
    change(&node, case, "off", "false", &OFF_FROM_ON)?;
    case.is_told(&node)?;
    assert_eq!(drivers(&node)?, before);
    Ok(())
}

#[test]
fn a_gpu_without_driver_is_bound_for_the_change_and_left_without() -> Result<()> {
    driverless(&GROUP)
}

#[test]
fn a_gpu_without_driver_is_changed_under_lockdown() -> Result<()> {
    driverless(&LOCKED)
}

#[test]
fn a_gpu_without_driver_is_changed_without_group_files() -> Result<()> {
    driverless(&NO_GROUP)
}

#[test]
fn a_gpu_without_driver_is_changed_where_nothing_can_bind_it() -> Result<()> {
    let case = Case { topology: "no-iommu", hold: "LockOnly", ..GROUP };
    driverless(&case)
}

/// One of two GPUs is held: neither is touched, and the holder is named. It goes on when the holder is gone.
fn held(case: &Case, node_of: &str) -> Result<()> {
    let Some(mut node) = case.boot("off")? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE).with_context(|| node.logs())?;
    let bdf = node.guest.bdf("gpu1")?;
    let hold = format!("cd /sys/bus/pci/devices/{bdf}; exec 3<>/dev/vfio/{node_of}; echo held; exec sleep 1000");
    node.start_agent(&["sh", "-c", &hold], &[])?;
    node.agent("sh")?.process.wait_output(STEP, |text| text.contains("held"))?;
    let pid = node.agent("sh")?.process.pid();
    node.guest.fleet().clear_trace();
    node.ask_for("on")?;
    let named = format!("by pid {pid} (sleep)");
    let says = |text: &str| text.contains("InUse") && text.contains(&bdf) && text.contains(&named);
    node.agent("cc-manager")?.process.wait_output(CHANGE, says).with_context(|| node.logs())?;
    // Some more tries.
    std::thread::sleep(Duration::from_secs(3));
    for name in node.gpus() {
        let events = node.trace();
        let pieces = between_resets(&events, &name);
        assert_eq!(pieces.len(), 1, "{name} was reset");
        assert_eq!(work(&pieces[0], &name), (Vec::new(), 0), "{name} was touched");
    }
    registers_say(&node, "off")?;
    node.stop_agent("sh", Signal::SIGKILL)?;
    node.await_state("on", "true", CHANGE).with_context(|| node.logs())?;
    registers_say(&node, "on")
}

#[test]
fn a_held_group_is_not_touched_under_lockdown() -> Result<()> {
    held(&LOCKED, "$(basename $(readlink iommu_group))")
}

#[test]
fn a_held_character_device_is_not_touched() -> Result<()> {
    held(&NO_GROUP, "devices/$(ls vfio-dev)")
}

/// Puts the program that takes devices into the guest.
fn with_own(boot: &mut Boot) {
    boot.adds.push(Add { host: env!("CARGO_BIN_EXE_lab-own").into(), guest: "/usr/bin/lab-own".into() });
}

/// Boots a guest with that program, its GPUs bound to vfio-pci.
fn guest_with_own(case: &Case, devices: Option<&str>) -> Result<Option<Guest>> {
    if !lab_is_here()? {
        return Ok(None);
    }
    let mut boot = Boot::new(case.topology)?;
    if let Some(devices) = devices {
        boot.topology.devices = Topology::parse("devices", devices)?.devices;
    }
    boot.kernel = case.kernel.or(boot.kernel);
    with_own(&mut boot);
    let guest = boot.guest()?;
    let bound = guest.run(&["vfio-manage", "bind", "--all"], STEP)?;
    ensure!(bound.success(), "{}{}", bound.text(), bound.error_text());
    Ok(Some(guest))
}

/// Resets of a device since the trace was cleared: by function and by bus.
fn resets(guest: &Guest, device: &str) -> (usize, usize) {
    let events = guest.fleet().trace();
    let count = |kind: Kind| events.iter().filter(|event| &*event.device == device && event.kind == kind).count();
    (count(Kind::Flr), count(Kind::BusReset))
}

fn own(guest: &Guest, act: &str, access: &str, devices: &[&str]) -> Result<(bool, String)> {
    let bdfs = devices.iter().map(|name| guest.bdf(name)).collect::<Result<Vec<_>, _>>()?.join(" ");
    guest.fleet().clear_trace();
    let output = guest.shell(&format!("lab-own {act} {access} /run {bdfs}"), CHANGE)?;
    Ok((output.success(), format!("{}{}", output.text(), output.error_text())))
}

/// The last resort: a reset of the bus that the device is alone on. Nobody else is reset, and it can be spoken to again.
#[test]
fn a_bus_is_reset_for_the_device_that_is_alone_on_it() -> Result<()> {
    for case in [GROUP, LOCKED, NO_GROUP] {
        let Some(guest) = guest_with_own(&case, None)? else { return Ok(()) };
        let (done, text) = own(&guest, "bus-reset", "auto", &["gpu0"])?;
        ensure!(done && text.contains(" off"), "{}: {text}", case.way);
        // One of the bus, and those of opening and closing.
        assert_eq!(resets(&guest, "gpu0"), (case.resets - 1, 1), "{}", case.way);
        assert_eq!(resets(&guest, "gpu1"), (0, 0), "{}", case.way);
        let methods = format!("cat /sys/bus/pci/devices/{}/reset_method", guest.bdf("gpu0")?);
        assert_eq!(guest.shell(&methods, STEP)?.text().trim(), "flr bus");
    }
    Ok(())
}

/// Two functions of one slot, of which the second has no reset of its own.
const ONE_SLOT: &str = "[[device]]\nname = 'gpu0'\nmodel = 'h100'\n\
    [[device]]\nname = 'gpu1'\nmodel = 'h100'\nfunction_of = 'gpu0'\nfaults = ['no-flr']\n";

#[test]
fn a_bus_with_others_on_it_is_reset_only_if_they_are_ours() -> Result<()> {
    for case in [GROUP, NO_GROUP] {
        let Some(guest) = guest_with_own(&case, Some(ONE_SLOT))? else { return Ok(()) };
        // The kernel's reset file knows one function only; a VFIO device is reset with all that are ours.
        if case.kernel.is_none() {
            let (done, text) = own(&guest, "reset", "sysfs", &["gpu1", "gpu0"])?;
            ensure!(!done && text.contains("Cannot be reset by the kernel"), "{text}");
            assert_eq!((resets(&guest, "gpu0"), resets(&guest, "gpu1")), ((0, 0), (0, 0)));
        }
        let (done, text) = own(&guest, "reset", "vfio", &["gpu1", "gpu0"])?;
        ensure!(done, "{}: {text}", case.way);
        let (_, by_bus) = resets(&guest, "gpu1");
        ensure!(by_bus >= 1 && resets(&guest, "gpu0").1 == by_bus, "{}: {by_bus} resets of the bus", case.way);
    }
    Ok(())
}

/// Somebody has a character device open whom `/proc` does not show, as in a container: the kernel refuses, before any
/// reset, and the device that sleeps is not opened in vain.
#[test]
fn a_hidden_holder_of_a_character_device_is_refused_by_the_kernel() -> Result<()> {
    let Some(guest) = guest_with_own(&NO_GROUP, None)? else { return Ok(()) };
    let (gpu0, gpu1) = (guest.bdf("gpu0")?, guest.bdf("gpu1")?);
    let script = format!(
        "mkdir -m 755 /tmp/other && mkfifo /tmp/until && (lab-own hold auto /tmp/other {gpu1} < /tmp/until > /tmp/held &)
         exec 4> /tmp/until; i=0; until grep -q held /tmp/held; do i=$((i+1)); test $i -lt 500 || exit 1; usleep 20000; done
         for gpu in {gpu0} {gpu1}; do cat /sys/bus/pci/devices/$gpu/power/runtime_status; done; cat /tmp/held
         echo ready; sleep 1000"
    );
    let holder = guest.spawn(Command::new(["sh", "-c", &script]))?;
    holder.wait_output(STEP, |text| text.contains("ready"))?;
    guest.fleet().clear_trace();
    let (seen, hidden) = (format!("lab-own look auto /run {gpu0} {gpu1}"), "mount -t tmpfs none /proc");
    for (script, named) in [(seen.clone(), true), (format!("unshare -m sh -c '{hidden} && exec {seen}'"), false)] {
        let output = guest.shell(&script, STEP)?;
        let text = output.error_text();
        ensure!(!output.success() && text.contains(&format!("{gpu1}: In use")), "{text}");
        ensure!(text.contains("(lab-own)") == named, "{text}");
        ensure!(!text.contains(&gpu0), "{text}");
        assert_eq!((resets(&guest, "gpu0"), resets(&guest, "gpu1")), ((0, 0), (0, 0)), "{text}");
    }
    Ok(())
}

/// A container has a /dev of its own; what VFIO needs in it is made from the kernel's numbers.
#[test]
fn nodes_that_a_container_lacks_are_made() -> Result<()> {
    for (case, nodes) in [
        (LOCKED, "/dev/vfio/vfio /dev/vfio/$(basename $(readlink iommu_group))"),
        (NO_GROUP, "/dev/iommu /dev/vfio/devices/$(ls vfio-dev)"),
    ] {
        let Some(guest) = guest_with_own(&case, None)? else { return Ok(()) };
        let bdf = guest.bdf("gpu0")?;
        let script = format!(
            "mount -t tmpfs -o mode=755 none /dev && cd /sys/bus/pci/devices/{bdf} && lab-own look auto /run {bdf} &&
             for node in {nodes}; do test -c $node || exit 1; done; find /dev -name \".*\" | grep -c . "
        );
        let output = guest.shell(&format!("unshare -m sh -c '{script}'"), STEP)?;
        let text = format!("{}{}", output.text(), output.error_text());
        ensure!(text.contains(&format!("{bdf} vfio off")), "{}: {text}", case.way);
        ensure!(text.trim_end().ends_with('0'), "{}: {text}", case.way);
    }
    Ok(())
}

/// What was asked for is done or refused, never something else.
#[test]
fn a_way_can_be_forced() -> Result<()> {
    for (case, access, expected) in [
        (GROUP, "vfio", Ok("vfio off")),
        (LOCKED, "sysfs", Err("the kernel refuses direct PCI access")),
        (NO_GROUP, "sysfs", Err("has no VFIO group file")),
    ] {
        let Some(guest) = guest_with_own(&case, None)? else { return Ok(()) };
        let (done, text) = own(&guest, "look", access, &["gpu0"])?;
        let words = expected.unwrap_or_else(|words| words);
        ensure!(done == expected.is_ok() && text.contains(words), "{access} where {}: {text}", case.way);
        let flrs = if done { 2 } else { 0 };
        assert_eq!(resets(&guest, "gpu0"), (flrs, 0), "{access} where {}", case.way);
    }
    Ok(())
}

/// Somebody unbinds a GPU while it is being changed: he gets it within a moment, and what it is then is one of the modes.
#[test]
fn whoever_wants_an_opened_device_back_gets_it() -> Result<()> {
    let Some(mut node) = LOCKED.boot("off")? else { return Ok(()) };
    node.start_vfio_manager()?;
    node.start_cc_manager()?;
    node.await_state("off", "false", CHANGE).with_context(|| node.logs())?;
    node.stop_agent("vfio-manager", Signal::SIGTERM)?;
    let bdf = node.guest.bdf("gpu1")?;
    // Each answer takes its time, so that the unbind falls among the requests.
    node.guest.fleet().set_fault("gpu1", "fsp-late-reply:300".parse()?)?;
    node.guest.fleet().clear_trace();
    node.ask_for("on")?;
    let started = Instant::now();
    while exchanges(&node.trace(), "gpu1").is_empty() {
        ensure!(started.elapsed() < STEP, "no request came\n{}", node.logs());
        std::thread::sleep(Duration::from_millis(10));
    }
    let unbound = Instant::now();
    sh(&node, &format!("echo {bdf} > /sys/bus/pci/drivers/vfio-pci/unbind"))?;
    let took = unbound.elapsed();
    eprintln!("unbound after {took:?}");
    ensure!(took < Duration::from_secs(8), "the unbind took {took:?}\n{}", node.logs());
    let says = |text: &str| text.contains("ReleaseRequested") && text.contains(&bdf);
    node.agent("cc-manager")?.process.wait_output(STEP, says).with_context(|| node.logs())?;
    // Left to itself the change is made after all; the device has no driver now.
    node.guest.fleet().clear_faults("gpu1")?;
    node.await_state("on", "true", CHANGE).with_context(|| node.logs())?;
    registers_say(&node, "on")
}
