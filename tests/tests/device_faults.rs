//! Every fault of the virtual devices, as a process in the guest sees it through the kernel.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{STEP, lab_is_here};
use lab::Boot;
use lab::control::Control;
use lab_devices::Fault;
use lab_devices::fault::FORMS;
use lab_vm::{Guest, Topology};
use serde_json::{Value, json};

/// Registers, config space, resets and firmware messages, from a shell.
const TOOLS: &str = r#"
dev=/sys/bus/pci/devices/$1
bar=$(head -n1 $dev/resource | cut -d' ' -f1)
r() { devmem $((bar + $1)) 32; }
w() { devmem $((bar + $1)) 32 $(($2)); }
# A dword of config space.
c() { dd if=$dev/config bs=4 skip=$(($1 / 4)) count=1 2>/dev/null | hexdump -e '1/4 "%08x\n"'; }
memory_on() { printf '\006' | dd of=$dev/config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null; }
reset() { echo 1 > $dev/reset; memory_on; sleep 0.1; }
# Waits for bits of a register.
await() {
    n=0
    while [ $(($(r $1) & $2)) = 0 ]; do
        n=$((n + 1)); [ $n -gt 6 ] && return 1
        sleep 0.01
    done
}
# The mailbox of gpu-cc-protocol section 4.9: takes a message.
take() {
    await 0x8f1f04 0x1000000 || { echo none; return; }
    n=$(($(r 0x8f1f04) & 0xfffff)); words=
    while [ $n -gt 0 ]; do words="$words $(r 0x8f1f08)"; n=$((n - 4)); done
    # A value is in the low half of the sixth dword.
    set -- $words
    [ $# -lt 6 ] || [ -n "$whole" ] || words="$1 $2 $3 $4 $5 $(($6 & 0xffff))"
    echo $words
}
# Sends a request of these dwords.
send() {
    await 0x8f1f84 0x1000000 || { echo not ready; return 1; }
    w 0x8f1f84 $((0x100000 + 4 * ($# + 2)))
    await 0x8f1f84 0x4000000 || { echo no credit; return 1; }
    for word in 0xC0000000 0x1310DE7E "$@"; do w 0x8f1f88 $word; done
}
rpc() { send "$@" && take; }
memory_on
"#;

/// A device of the topology, a fault, what to do, and what that prints when the device is well and when it has the fault.
type Case = (&'static str, &'static str, &'static str, &'static str, &'static str);

/// A GH100.
const HOPPER: &str = "gpu0";
/// A GB202.
const BLACKWELL: &str = "gpu1";

const READ_8: &str = "rpc 0x0008020C";
const IS_0: &str = "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 0";
const BOOT_REGISTER: &str = "reset; r 0xad00bc";
const BOOTED: &str = "0x000000FF";
const ONES: &str = "0xFFFFFFFF";
/// Begins an exchange on EMEM channel 2, first after a reset, and looks at the pointers of the reply twice.
const EMEM_POINTERS: &str = "reset; w 0x8f2ad0 0x03000800
    for word in 0xC0000000 0x1310DE7E 0x0008020C; do w 0x8f2ad4 $word; done
    w 0x8f2c14 0x808; w 0x8f2c10 0x800; sleep 0.02
    echo $(r 0x8f2c90) $(r 0x8f2c94) $(r 0x8f2c90); w 0x8f2c94 0x800";

const CASES: [Case; 34] = [
    (HOPPER, "bar-all-ones", "r 0", "0x180000A1", ONES),
    (HOPPER, "config-all-ones", "c 0", "233010de", "ffffffff"),
    (HOPPER, "off-bus:both", "r 0; c 0", "0x180000A1 233010de", "0xFFFFFFFF ffffffff"),
    (HOPPER, "off-bus:bar0:1", "r 0; r 0; c 0", "0x180000A1 0x180000A1 233010de", "0x180000A1 0xFFFFFFFF 233010de"),
    (HOPPER, "d3cold", "r 0; c 0", "0x180000A1 233010de", "0xFFFFFFFF ffffffff"),
    (HOPPER, "recovery", "r 0x20120; r 0x200bc", "0x00000000 0x000000FF", "0x40000000 0x00000000"),
    (HOPPER, "recovery:blank", "r 0", "0x180000A1", "0x00000000"),
    (HOPPER, "security-fault:0x40001000", "r 0; c 0x2b4", "0x180000A1 00000000", "0xBADF0200 40001000"),
    (
        HOPPER,
        "lost-in-reset",
        "printf '\\250' | dd of=$dev/config bs=1 seek=105 conv=notrunc 2>/dev/null; sleep 0.1; c 0; r 0",
        "233010de 0xFFFFFFFF",
        "ffffffff 0xFFFFFFFF",
    ),
    (HOPPER, "no-flr", "c 0x64", "112c8021", "012c8021"),
    (
        HOPPER,
        "fsp-split-pointers",
        EMEM_POINTERS,
        "0x00000800 0x00000814 0x00000800",
        "0x00000000 0x00000814 0x00000800",
    ),
    (
        HOPPER,
        "d3hot-at-start",
        "echo bus > $dev/reset_method; reset; c 0x44; echo default > $dev/reset_method; printf '\\000' | dd of=$dev/config bs=1 seek=68 conv=notrunc 2>/dev/null",
        "00000008",
        "0000000b",
    ),
    (BLACKWELL, "boot-never-completes", BOOT_REGISTER, BOOTED, "0x00000000"),
    (BLACKWELL, "boot-slow:60000", BOOT_REGISTER, BOOTED, "0x00000000"),
    (BLACKWELL, "pri-error-after-reset:60000", BOOT_REGISTER, BOOTED, "0xBADF0000"),
    (BLACKWELL, "firewall-stuck", "reset; r 0; c 0x2b8", "0x1B2000A1 00000000", "0xFFFFFFFF 01000000"),
    (BLACKWELL, "effective-state-2", "reset; r 0x590", "0x00000000", "0x00000002"),
    (
        BLACKWELL,
        "mode-unchanged-after-reset",
        "rpc 0x0008020D 1 >/dev/null; reset; r 0x590; rpc 0x0008020D 0 >/dev/null; reset",
        "0x00000001",
        "0x00000000",
    ),
    (BLACKWELL, "fsp-no-reply", READ_8, IS_0, "none"),
    (BLACKWELL, "fsp-late-reply:60000", READ_8, IS_0, "none"),
    (BLACKWELL, "fsp-short-reply", READ_8, IS_0, "0xC0000000 0x1510DE7E 0x00000003 0x00000013"),
    (BLACKWELL, "fsp-mistyped-reply", READ_8, IS_0, "0xC0000000 0x1410DE7E 0x00000003 0x00000013 0x00000000 0"),
    (BLACKWELL, "fsp-error-code:8:0x202", READ_8, IS_0, "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000202"),
    (BLACKWELL, "fsp-queue-stuck", "send 0x0008020C; send 0x0008020C || true; reset", "", "not ready"),
    (BLACKWELL, "fsp-stale-reply", "take", "none", "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 1"),
    (
        BLACKWELL,
        "fsp-duplicate-reply",
        "rpc 0x0008020D 0; take",
        "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 none",
        "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000",
    ),
    (
        BLACKWELL,
        "fsp-clean-high-half",
        "whole=1; set -- $(rpc 0x0007020C); [ $6 = 0x00000001 ] && echo clean || echo garbage",
        "garbage",
        "clean",
    ),
    (
        BLACKWELL,
        "knob-write-ignored",
        "rpc 0x0008020D 1 >/dev/null; rpc 0x0008020C; rpc 0x0008020D 0 >/dev/null",
        "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 1",
        IS_0,
    ),
    (
        BLACKWELL,
        "permission-knob-zero:7",
        "rpc 0x0007020C; rpc 0x0008020D 0",
        "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 1 0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000",
        "0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x00000000 0 0xC0000000 0x1510DE7E 0x00000003 0x00000013 0x0000DEAD",
    ),
    (BLACKWELL, "mnoc-receive-error", "r 0x8f1f84", "0x05000000", "0x07000000"),
    (BLACKWELL, "mnoc-send-error", "rpc 0x0007020D 0 >/dev/null; r 0x8f1f04", "0x00000000", "0x02000000"),
    (BLACKWELL, "mnoc-credit-gap:60000", "send 0x0008020C && take; reset", IS_0, "no credit"),
    (BLACKWELL, "recovery", "r 0x8aa128; r 0xad00bc", "0x00000000 0x000000FF", "0x00000002 0x00000000"),
    (BLACKWELL, "security-fault", "r 0; c 0x2b4", "0x1B2000A1 00000000", "0xBADF0200 40000000"),
];

/// What a script prints, as one line.
fn shell(guest: &Guest, bdf: &str, script: &str) -> Result<String> {
    let output = guest.shell(&format!("set -- {bdf}\n{TOOLS}\n{script}"), STEP)?;
    ensure!(output.success(), "{script}: {}{}", output.text(), output.error_text());
    Ok(output.text().split_whitespace().collect::<Vec<_>>().join(" "))
}

#[test]
fn every_fault_shows_and_goes_again() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let mut boot = Boot::new("mixed")?;
    for device in &mut boot.topology.devices {
        // The script waits 100 ms after a reset.
        device.spec.boot = Duration::from_millis(20);
        device.spec.firewall = Duration::from_millis(10);
    }
    let guest = boot.guest()?;
    for device in [HOPPER, BLACKWELL] {
        let bdf = guest.bdf(device)?;
        shell(&guest, &bdf, "echo on > $dev/power/control; echo 1 > $dev/enable; reset")?;
    }
    for (device, text, script, well, ill) in CASES {
        let bdf = guest.bdf(device)?;
        let fault: Fault = text.parse()?;
        let before = shell(&guest, &bdf, script).with_context(|| text)?;
        assert_eq!(before, well, "{device} before {text}");
        guest.fleet().set_fault(device, fault)?;
        let meanwhile = shell(&guest, &bdf, script).with_context(|| text)?;
        guest.fleet().clear_faults(device)?;
        assert_eq!(meanwhile, ill, "{device} with {text}");
        // What the fault left behind goes with a reset.
        shell(&guest, &bdf, "reset")?;
    }
    let name = |text: &str| text.split(':').next().unwrap_or_default().to_owned();
    let told: BTreeSet<String> = FORMS.iter().map(|form| name(form)).collect();
    let seen: BTreeSet<String> = CASES.iter().map(|(_, text, ..)| name(text)).collect();
    assert_eq!(told, seen, "every fault has a case");
    Ok(())
}

/// The devices that `ccnode probe` tells of.
fn devices(guest: &Guest) -> Result<Vec<Value>> {
    let output = guest.run(&["ccnode", "probe", "--json"], STEP)?;
    ensure!(output.success(), "{}", output.error_text());
    let probe: Value = serde_json::from_slice(&output.stdout)?;
    Ok(probe["devices"].as_array().context("probe tells no devices")?.clone())
}

#[test]
fn a_device_can_be_taken_out_and_put_back() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let guest = Boot::new("mixed")?.guest()?;
    let bdf = guest.bdf(HOPPER)?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("control");
    let control = Control::listen(&socket)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| control.serve(&guest, &stop));
        // As a person does it from another terminal.
        let fault = |words: &[&str]| -> Result<String> {
            let mut command = Command::new(lab::programs::built()?.join("lab"));
            let output = command.arg("fault").arg("--control").arg(&socket).arg(HOPPER).args(words).output()?;
            ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        };
        let played = play(&guest, &bdf, fault);
        stop.store(true, Ordering::Relaxed);
        played
    })
}

fn play(guest: &Guest, bdf: &str, fault: impl Fn(&[&str]) -> Result<String>) -> Result<()> {
    let there = || Ok::<_, anyhow::Error>(devices(guest)?.iter().any(|device| device["bdf"] == *bdf));
    assert!(there()?);
    fault(&["unplug"])?;
    assert!(!there()?);
    assert_eq!(devices(guest)?.len(), 3, "the others are there as before");
    ensure!(fault(&["unplug"]).is_err(), "what is out cannot be taken out");
    fault(&["plug"])?;
    await_device(guest, HOPPER)?;
    assert!(there()?);
    assert_eq!(shell(guest, bdf, "echo 1 > $dev/enable; r 0x0")?, "0x180000A1");
    // Any other fault goes the same way.
    fault(&["off-bus", "bar0", "1"])?;
    assert_eq!(shell(guest, bdf, "r 0x0; r 0x0")?, "0x180000A1 0xFFFFFFFF");
    ensure!(fault(&["status"])?.contains("off-bus:bar0:1"), "the fault is not told");
    ensure!(fault(&["off-bus", "moon"]).is_err(), "there is no such fault");
    fault(&["clear"])?;
    assert_eq!(shell(guest, bdf, "r 0x0")?, "0x180000A1");
    Ok(())
}

#[test]
fn a_run_takes_faults_without_being_told_where() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let lab = |words: &[&str]| -> Result<Command> {
        let mut command = Command::new(lab::programs::built()?.join("lab"));
        command.args(words).env("XDG_RUNTIME_DIR", folder.path());
        Ok(command)
    };
    // Ends when the first GPU is silent.
    let script = "set -- $(grep -l 0x10de /sys/bus/pci/devices/*/vendor); config=${1%/vendor}/config
        until [ \"$(hexdump -n 2 -e '1/2 \"%04x\"' $config)\" = ffff ]; do sleep 0.1; done";
    let mut run = lab(&["run", "--timeout", "60", "--", "sh", "-c", script])?.spawn()?;
    let deadline = Instant::now() + STEP;
    while !lab(&["fault", "gpu0", "config-all-ones"])?.output()?.status.success() {
        ensure!(Instant::now() < deadline, "no run listens where faults are sent");
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(run.wait()?.success(), "the fault has not reached the guest");
    Ok(())
}

/// Waits until the guest's kernel has found a device that was plugged in.
fn await_device(guest: &Guest, name: &str) -> Result<()> {
    let deadline = Instant::now() + STEP;
    loop {
        if let Ok(bdf) = guest.bdf(name)
            && devices(guest)?.iter().any(|device| device["bdf"] == *bdf)
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{name} has not come");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The kernel gives a device a minute to come back from a reset.
#[test]
fn a_reset_that_a_device_does_not_survive_fails_with_an_error_number() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let guest = Boot::new("h100x2")?.guest()?;
    let bdf = guest.bdf("gpu0")?;
    // One way to reset only, so that it does not take another minute.
    shell(&guest, &bdf, "echo flr > $dev/reset_method; echo on > $dev/power/control; echo 1 > $dev/enable; reset")?;
    guest.fleet().set_fault("gpu0", Fault::LostInReset)?;
    let script = format!("echo 1 > /sys/bus/pci/devices/{bdf}/reset");
    let output = guest.shell(&script, Duration::from_secs(150))?;
    ensure!(!output.success() && output.error_text().contains("Inappropriate ioctl"), "{}", output.error_text());
    assert_eq!(shell(&guest, &bdf, "c 0")?, "ffffffff");
    let seen = devices(&guest)?;
    let lost = seen.iter().find(|device| device["bdf"] == *bdf).context("gpu0 is not told of")?;
    assert_eq!(lost["liveness"], "silent");
    // With power the next reset goes well.
    guest.fleet().clear_faults("gpu0")?;
    assert_eq!(shell(&guest, &bdf, "reset; sleep 0.5; r 0x0")?, "0x180000A1");
    Ok(())
}

/// What is wrong from the start, and cannot come later: the kernel looks only once.
#[test]
fn a_device_can_be_without_a_reset_and_asleep_from_the_start() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let mut boot = Boot::new("mixed")?;
    // A bus with more than one function on it is not reset for one of them.
    boot.topology = Topology::parse(
        "no-reset",
        "[[device]]\nname = 'nic0'\nmodel = 'nic'\n\
         [[device]]\nname = 'gpu0'\nmodel = 'h100'\nfunction_of = 'nic0'\nfaults = ['no-flr']\n\
         [[device]]\nname = 'gpu1'\nmodel = 'h100'\nfaults = ['d3hot-at-start']\n\
         [[device]]\nname = 'gpu2'\nmodel = 'h100'\nabsent = true\n\
         [[device]]\nname = 'gpu3'\nmodel = 'h100'\nfaults = ['d3cold']\n",
    )?;
    let guest = boot.guest()?;
    let bdfs = [guest.bdf("gpu0")?, guest.bdf("gpu1")?];
    let seen = devices(&guest)?;
    assert_eq!(seen.iter().map(|device| device["bdf"].clone()).collect::<Vec<_>>(), bdfs, "the others are not there");
    assert_eq!([&seen[0]["reset_methods"], &seen[0]["name"]], [&json!([]), &json!("H100")]);
    assert_eq!(shell(&guest, &bdfs[0], "[ -e $dev/reset ] || echo none")?, "none");
    assert_eq!(seen[1]["reset_methods"], json!(["flr", "bus"]));
    assert_eq!(shell(&guest, &bdfs[1], "c 0x44")?, "0000000b", "the kernel does not wake what has no driver");
    // A driver does.
    let bind = "echo vfio-pci > $dev/driver_override; echo $1 > /sys/bus/pci/drivers_probe; \
                echo on > $dev/power/control; memory_on; c 0x44; r 0";
    assert_eq!(shell(&guest, &bdfs[1], bind)?, "00000008 0x180000A1");
    // An empty slot is filled, and what had no power gets it.
    guest.fleet().clear_faults("gpu3")?;
    for name in ["gpu2", "gpu3"] {
        guest.plug(name)?;
        await_device(&guest, name)?;
    }
    assert_eq!(devices(&guest)?.len(), 4);
    Ok(())
}
