//! The program killed at each thing it does to the outside: the next one, the kubelet and Kata agree, and pods keep theirs.

#![cfg(target_arch = "x86_64")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod common;

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{PGPU, World, gpu};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What changes something that others see: files, folders, sockets, and what is sent.
const ACTS: &[(u64, &str)] = &[
    (1, "write"),
    (20, "writev"),
    (42, "connect"),
    (44, "sendto"),
    (46, "sendmsg"),
    (49, "bind"),
    (50, "listen"),
    (74, "fsync"),
    (82, "rename"),
    (83, "mkdir"),
    (87, "unlink"),
    (90, "chmod"),
    (91, "fchmod"),
    (258, "mkdirat"),
    (263, "unlinkat"),
    (264, "renameat"),
    (268, "fchmodat"),
    (316, "renameat2"),
    (437, "openat2"),
];

fn program(world: &World) -> Command {
    let mut command = Command::new("sh");
    // Stops until the tracer is there.
    command.args(["-c", "test -z \"$TRACED\" || kill -STOP $$; exec \"$0\"", env!("CARGO_BIN_EXE_device-plugin")]);
    command
        .env("CCNODE_ROOT", world.fake.path())
        .env("CCNODE_STATE_DIR", world.state_dir())
        .env("CDI_DIR", world.cdi_dir())
        .env("CDI_STATIC_DIR", world.fake.path().join("etc/cdi"))
        .env("KUBELET_PLUGIN_DIR", world.plugins())
        .env("POLL_INTERVAL", "100ms")
        .env("RUST_LOG", "off")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Runs `child` until its act number `at`, counted from 1, and kills it there, before that act is done. Says which act
/// that was; none where `enough` was set before.
fn kill_at(child: &Child, at: usize, enough: &AtomicBool) -> Option<&'static str> {
    let main = Pid::from_raw(child.id().try_into().unwrap());
    assert!(matches!(waitpid(main, Some(WaitPidFlag::WUNTRACED)).unwrap(), WaitStatus::Stopped(..)));
    let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::PTRACE_O_TRACECLONE
        | ptrace::Options::PTRACE_O_TRACEEXEC
        | ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::seize(main, options).unwrap();
    kill(main, Signal::SIGCONT).unwrap();
    let (mut is_ours, mut acts, mut victim) = (false, 0, None);
    loop {
        let stop = match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {
                if enough.load(Ordering::Relaxed) {
                    let _ = kill(main, Signal::SIGKILL);
                }
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            Ok(stop) => stop,
            Err(Errno::ECHILD) => return victim,
            Err(error) => panic!("{error}"),
        };
        let (thread, signal) = match stop {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == main => return victim,
            WaitStatus::PtraceSyscall(thread) => {
                if let Ok(regs) = ptrace::getregs(thread)
                    // At the entry the result is not there yet.
                    && regs.rax.cast_signed() == -i64::from(Errno::ENOSYS as i32)
                    && let Some((_, name)) = ACTS.iter().find(|(number, _)| *number == regs.orig_rax)
                    // The runtime wakes itself by eight bytes.
                    && !(*name == "write" && regs.rdx == 8)
                    && is_ours
                    && victim.is_none()
                {
                    acts += 1;
                    if acts == at {
                        victim = Some(*name);
                        kill(main, Signal::SIGKILL).unwrap();
                    }
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, _, event) => {
                is_ours |= event == ptrace::Event::PTRACE_EVENT_EXEC as i32;
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            _ => continue,
        };
        let _ = ptrace::syscall(thread, signal);
    }
}

/// A node whose plugin has ended, with a pod that has a GPU; meanwhile one GPU has gone, one has come, and a whole
/// resource has.
async fn changed_node() -> (World, String, Vec<String>) {
    let mut world = World::new(3).await;
    world.fake.nvswitch("0000:81:00.0").group(30).driver("vfio-pci").cdev(30);
    let mut child = program(&world).spawn().unwrap();
    world.allocatable(3).await;
    let pod = world.running_pod(1).await;
    let ids = world.ids(&pod).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = (0..3).map(gpu).find(|bdf| !ids.contains(bdf)).unwrap();
    world.fake.remove(gone.as_str());
    world.fake.remove("0000:81:00.0");
    for number in [5, 6] {
        world.fake.gpu(gpu(number).as_str(), 0x2330).group(number + 10).numa(1).driver("vfio-pci").cdev(number);
    }
    (world, pod, ids)
}

#[tokio::test]
async fn killed_at_any_act_the_next_one_makes_kubelet_and_kata_agree_and_pods_keep_their_gpus() {
    let mut kills: BTreeMap<&str, usize> = BTreeMap::new();
    for at in 1.. {
        assert!(at < 300, "it never comes to rest: {kills:?}");
        let (mut world, pod, ids) = changed_node().await;
        let mut child = program(&world).env("TRACED", "yes").spawn().unwrap();
        let enough = Arc::new(AtomicBool::new(false));
        let until = enough.clone();
        let tracer = tokio::task::spawn_blocking(move || {
            let victim = kill_at(&child, at, &until);
            // The tracer has seen its end already.
            let _ = child.wait();
            victim
        });
        tokio::pin!(tracer);
        let victim = tokio::select! {
            victim = &mut tracer => victim.unwrap(),
            () = async {
                world.allocatable(4).await;
                // What it does when the kubelet has heard.
                tokio::time::sleep(Duration::from_secs(1)).await;
            } => {
                enough.store(true, Ordering::Relaxed);
                tracer.await.unwrap()
            }
        };
        // Whatever it left, Kata finds what the pod has.
        assert_eq!(world.ids(&pod).await, ids, "killed at act {at}, {victim:?}");
        let mut next = program(&world).spawn().unwrap();
        world.allocatable(4).await;
        assert_eq!(world.ids(&pod).await, ids, "killed at act {at}, {victim:?}");
        world.every_gpu_is_given_once(4, &[pod]).await;
        let mut files: Vec<String> = std::fs::read_dir(world.cdi_dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["nvidia.com-pgpu.yaml"], "killed at act {at}, {victim:?}");
        assert_eq!(world.kubelet.dump()["resources"][PGPU]["capacity"], 4, "killed at act {at}, {victim:?}");
        next.kill().unwrap();
        next.wait().unwrap();
        let Some(victim) = victim else { break };
        *kills.entry(victim).or_default() += 1;
    }
    eprintln!("killed {} times: {kills:?}; 0 failures", kills.values().sum::<usize>());
    assert!(kills.len() >= 6 && ["renameat", "bind", "fchmod"].iter().all(|act| kills.contains_key(act)), "{kills:?}");
}
