//! What the kubelet waits for, over gRPC and real Unix sockets, on a node with 16 GPUs: from the program's start until it is
//! registered and its units can be allocated, from the kubelet's start to the same, and for an Allocate.
//!
//! Compare numbers of one run only.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_precision_loss,
    reason = "a measurement that cannot go on has failed"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{World, gpu};
use device_plugin::units::IdScheme;
use kubelet_api::device_plugin::device_plugin_client::DevicePluginClient;
use kubelet_api::device_plugin::{AllocateRequest, ContainerAllocateRequest};
use kubelet_api::socket;

const GPUS: u32 = 16;
const STARTS: usize = 50;
const CALLS: usize = 20_000;

/// Prints the part of `times` that so many of a thousand stay below.
fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |permille: usize| times[(times.len() * permille / 1000).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!("{what}: p50 {:.3} ms, p99 {:.3} ms, p99.9 {:.3} ms ({} times)", at(500), at(990), at(999), times.len());
}

async fn process_to_registered() {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let world = World::new(GPUS).await;
        let begun = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_device-plugin"))
            .env("CCNODE_ROOT", world.fake.path())
            .env("CCNODE_STATE_DIR", world.state_dir())
            .env("CDI_DIR", world.cdi_dir())
            .env("CDI_STATIC_DIR", world.fake.path().join("etc/cdi"))
            .env("KUBELET_PLUGIN_DIR", world.plugins())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        world.allocatable(GPUS as usize).await;
        times.push(begun.elapsed());
        if times.len() == STARTS {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            for field in ["VmRSS", "RssAnon", "VmHWM"] {
                println!("{}", status.lines().find(|line| line.starts_with(field)).unwrap());
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    show("program started to units allocatable", times);
}

async fn kubelet_to_registered() {
    let world = World::new(GPUS).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(GPUS as usize).await;
    let mut times = Vec::new();
    for _ in 0..STARTS {
        world.kubelet.stop().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let begun = Instant::now();
        world.kubelet.resume().await.unwrap();
        world.allocatable(GPUS as usize).await;
        times.push(begun.elapsed());
    }
    show("kubelet started to units allocatable", times);
    agent.end().await;
}

async fn allocate() {
    let world = World::new(GPUS).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(GPUS as usize).await;
    let channel = socket::connect(&world.plugins().join("sandbox-pgpu.sock"), Duration::from_secs(5)).await.unwrap();
    let mut client = DevicePluginClient::new(channel);
    let mut times = Vec::new();
    for call in 0..CALLS {
        // A pod with one GPU, and one with all of them.
        let ids = if call % 2 == 0 { vec![gpu(3)] } else { (0..GPUS).map(gpu).collect() };
        let request = AllocateRequest { container_requests: vec![ContainerAllocateRequest { devices_ids: ids }] };
        let begun = Instant::now();
        client.allocate(request).await.unwrap();
        times.push(begun.elapsed());
    }
    show("Allocate, as the kubelet sees it", times);
    let text = world.metrics.encode().unwrap();
    for line in text.lines().filter(|line| line.starts_with("ccnode_plugin_allocation_seconds")) {
        println!("at the server: {line}");
    }
    agent.end().await;
}

fn main() {
    // sysfs and /run are in memory on a node. On a disk it would be the journal's time that is measured.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::env::override_temp_dir(memory).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        process_to_registered().await;
        kubelet_to_registered().await;
        allocate().await;
    });
}
