//! Whatever becomes of the kubelet, its folder and other plugins: it is told again, and what pods have stays theirs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod common;

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use common::{Dice, PGPU, World, gpu, kata_pod, until};
use device_plugin::units::IdScheme;
use kubelet_api::device_plugin as dp;
use kubelet_api::device_plugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use kubelet_api::device_plugin::registration_client::RegistrationClient;
use kubelet_api::socket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tonic::{Request, Response, Status};

const RESTARTS: u64 = 100;

#[tokio::test]
async fn a_kubelet_that_is_restarted_a_hundred_times_at_any_moment_is_told_again_and_no_pod_loses_its_gpu() {
    let mut world = World::new(4).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(4).await;
    let lasting = world.running_pod(1).await;
    let ids = world.ids(&lasting).await;
    let mut dice = Dice::new(7);
    let (mut during_allocate, mut during_change) = (0, 0);
    for round in 0..RESTARTS {
        let kubelet = world.kubelet.clone();
        let (before, down) = (Duration::from_micros(dice.below(3000)), Duration::from_millis(dice.below(20)));
        let restart = async {
            sleep(before).await;
            kubelet.restart(down).await.unwrap();
        };
        if round % 2 == 0 {
            // In the middle of pods that come. What becomes of them is the kubelet's affair: it may never answer.
            let kubelet = world.kubelet.clone();
            let pods = tokio::spawn(async move {
                for number in 0..3 {
                    let _ = kubelet.admit(kata_pod(&format!("passing-{round}-{number}"), 1)).await;
                }
            });
            restart.await;
            pods.abort();
            during_allocate += 1;
        } else {
            // In the middle of news on the stream.
            let fake = world.fake.get(gpu(3).as_str());
            fake.no_driver();
            restart.await;
            world.fake.get(gpu(3).as_str()).driver("vfio-pci").cdev(3);
            during_change += 1;
        }
        world.allocatable(4).await;
        assert_eq!(world.ids(&lasting).await, ids, "round {round}");
        for number in 0..3 {
            let _ = world.kubelet.remove("default", &format!("passing-{round}-{number}")).await;
        }
    }
    world.every_gpu_is_given_once(4, &[lasting]).await;
    agent.end().await;
    eprintln!("{during_allocate} restarts during Allocate, {during_change} during ListAndWatch; 0 failures");
}

#[tokio::test]
async fn sockets_and_folders_that_are_taken_away_streams_that_are_cut_and_a_slow_kubelet_are_lived_through() {
    let mut world = World::new(2).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(2).await;
    let pod = world.running_pod(1).await;
    let ids = world.ids(&pod).await;
    let mut counts = [0; 4];
    for _ in 0..10 {
        let registered = world.registrations();
        std::fs::remove_file(world.plugins().join("sandbox-pgpu.sock")).unwrap();
        until("registered after the socket was removed", || world.registrations() > registered).await;
        world.allocatable(2).await;
        counts[0] += 1;

        // All of the folder, checkpoint and kubelet's socket too, and with it the kubelet's end.
        world.kubelet.stop().await.unwrap();
        let kept = std::fs::read(world.plugins().join("kubelet_internal_checkpoint")).unwrap();
        std::fs::remove_dir_all(world.plugins()).unwrap();
        sleep(Duration::from_millis(5)).await;
        std::fs::create_dir(world.plugins()).unwrap();
        std::fs::write(world.plugins().join("kubelet_internal_checkpoint"), kept).unwrap();
        world.kubelet.resume().await.unwrap();
        world.allocatable(2).await;
        assert_eq!(world.ids(&pod).await, ids);
        counts[1] += 1;
    }
    for _ in 0..2 {
        let registered = world.registrations();
        world.kubelet.drop_stream(PGPU).unwrap();
        until("registered after the stream was cut", || world.registrations() > registered).await;
        world.allocatable(2).await;
        counts[2] += 1;
    }
    world.kubelet.set_register_delay(Duration::from_secs(3));
    let registered = world.registrations();
    world.kubelet.restart(Duration::ZERO).await.unwrap();
    world.allocatable(2).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.registrations(), registered + 1, "one that is slow is waited for, not asked twice");
    counts[3] += 1;
    world.kubelet.set_register_delay(Duration::ZERO);
    world.every_gpu_is_given_once(2, &[pod]).await;
    agent.end().await;
    let [socket, folder, stream, slow] = counts;
    eprintln!("socket removed {socket}, folder wiped {folder}, stream cut {stream}, slow kubelet {slow}; 0 failures");
}

#[tokio::test]
async fn two_plugins_of_one_resource_never_take_it_from_each_other() {
    let world = World::new(2).await;
    let first = world.start(world.config(IdScheme::Pci));
    world.allocatable(2).await;
    // As in an update that starts the new pod before the old one has ended.
    let second = world.start(world.config(IdScheme::Pci));
    for round in 0..10 {
        // The newcomer takes over once; two that fight never come to rest.
        let mut rests = false;
        for _ in 0..25 {
            let registered = world.registrations();
            sleep(Duration::from_millis(200)).await;
            let ready = u8::from(first.readiness.is_ready()) + u8::from(second.readiness.is_ready());
            rests = ready == 1 && world.registrations() == registered;
            if rests {
                break;
            }
        }
        assert!(rests, "round {round}: {} registrations", world.registrations());
        world.allocatable(2).await;
        world.kubelet.restart(Duration::ZERO).await.unwrap();
    }
    world.allocatable(2).await;
    second.end().await;
    until("the first is ready", || first.readiness.is_ready()).await;
    world.allocatable(2).await;
    first.end().await;
    eprintln!("10 restarts with two plugins; 0 fights");
}

#[tokio::test]
async fn the_end_of_the_plugin_that_was_replaced_does_not_take_the_resource_along() {
    let mut world = World::new(2).await;
    let mut old = world.start(world.config(IdScheme::Pci));
    world.allocatable(2).await;
    let pod = world.running_pod(1).await;
    let ids = world.ids(&pod).await;
    for round in 0..3 {
        let new = world.start(world.config(IdScheme::Pci));
        until("the new one has taken over", || new.readiness.is_ready() && !old.readiness.is_ready()).await;
        let registered = world.registrations();
        old.end().await;
        until("it is told of once more", || world.registrations() > registered).await;
        world.allocatable(2).await;
        assert_eq!(world.ids(&pod).await, ids, "round {round}");
        world.every_gpu_is_given_once(2, std::slice::from_ref(&pod)).await;
        old = new;
    }
    old.end().await;
}

#[tokio::test]
async fn after_the_end_of_a_stream_of_its_own_it_registers_once_more_with_the_same_kubelet_alone() {
    let world = World::new(1).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(1).await;
    let registered = world.registrations();
    std::fs::remove_file(world.plugins().join("sandbox-pgpu.sock")).unwrap();
    until("registered, and once more when the kubelet has heard of the end", || {
        world.registrations() == registered + 2
    })
    .await;
    world.allocatable(1).await;
    world.kubelet.restart(Duration::ZERO).await.unwrap();
    world.allocatable(1).await;
    sleep(Duration::from_secs(3)).await;
    assert_eq!(world.registrations(), registered + 3, "one that starts anew ends its streams first, and is told once");
    world.allocatable(1).await;
    agent.end().await;
}

/// NVIDIA's plugin as far as the kubelet and Kata see it: IDs are numbers of VFIO nodes, nothing is watched, and the CDI
/// file stays behind.
#[derive(Clone)]
struct Reference {
    numbers: Vec<u32>,
    stop: watch::Receiver<bool>,
}

impl Reference {
    async fn start(world: &World, numbers: &[u32]) -> (watch::Sender<bool>, JoinHandle<Result<(), socket::Error>>) {
        let devices = numbers.iter().map(|number| {
            format!(
                "    - name: \"{number}\"\n      containerEdits:\n        deviceNodes:\n            - path: /dev/vfio/devices/vfio{number}\n"
            )
        });
        let text = format!("---\ncdiVersion: 0.5.0\nkind: {PGPU}\ndevices:\n{}", devices.collect::<String>());
        std::fs::create_dir_all(world.cdi_dir()).unwrap();
        std::fs::write(world.cdi_dir().join("spec.1.tmp"), text).unwrap();
        std::fs::rename(world.cdi_dir().join("spec.1.tmp"), world.cdi_dir().join("nvidia.com-pgpu.yaml")).unwrap();

        let path = world.plugins().join("sandbox-pgpu.sock");
        let _ = std::fs::remove_file(&path);
        let listener = socket::listen(&path).unwrap();
        let (stop, stopped) = watch::channel(false);
        let service = Self { numbers: numbers.to_vec(), stop: stopped.clone() };
        let router = tonic::transport::Server::builder().add_service(DevicePluginServer::new(service));
        let mut stopped = stopped;
        let task = tokio::spawn(socket::serve(router, listener, async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));
        register(&world.plugins().join("kubelet.sock")).await;
        (stop, task)
    }
}

async fn register(kubelet: &Path) {
    let channel = socket::connect(kubelet, Duration::from_secs(5)).await.unwrap();
    let request = dp::RegisterRequest {
        version: "v1beta1".into(),
        endpoint: "sandbox-pgpu.sock".into(),
        resource_name: PGPU.into(),
        options: None,
    };
    RegistrationClient::new(channel).register(request).await.unwrap();
}

#[tonic::async_trait]
impl DevicePlugin for Reference {
    type ListAndWatchStream = Pin<Box<dyn futures::Stream<Item = Result<dp::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<dp::Empty>,
    ) -> Result<Response<dp::DevicePluginOptions>, Status> {
        Ok(Response::new(dp::DevicePluginOptions::default()))
    }

    async fn list_and_watch(&self, _: Request<dp::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let device = |number: &u32| dp::Device { id: number.to_string(), health: "Healthy".into(), topology: None };
        let list = dp::ListAndWatchResponse { devices: self.numbers.iter().map(device).collect() };
        let mut stop = self.stop.clone();
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let stream = futures::StreamExt::chain(futures::stream::iter([Ok(list)]), futures::stream::pending());
        Ok(Response::new(Box::pin(futures::StreamExt::take_until(stream, Box::pin(stopped)))))
    }

    async fn get_preferred_allocation(
        &self,
        _: Request<dp::PreferredAllocationRequest>,
    ) -> Result<Response<dp::PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented("not implemented"))
    }

    async fn allocate(&self, request: Request<dp::AllocateRequest>) -> Result<Response<dp::AllocateResponse>, Status> {
        let node = |id: &String| dp::DeviceSpec {
            container_path: format!("/dev/vfio/devices/vfio{id}"),
            host_path: format!("/dev/vfio/devices/vfio{id}"),
            permissions: "mrw".into(),
        };
        let container = |request: &dp::ContainerAllocateRequest| dp::ContainerAllocateResponse {
            devices: request.devices_ids.iter().map(node).collect(),
            ..Default::default()
        };
        let container_responses = request.into_inner().container_requests.iter().map(container).collect();
        Ok(Response::new(dp::AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        _: Request<dp::PreStartContainerRequest>,
    ) -> Result<Response<dp::PreStartContainerResponse>, Status> {
        Ok(Response::new(dp::PreStartContainerResponse {}))
    }
}

#[tokio::test]
async fn nvidias_plugin_and_ours_take_turns_under_running_pods_and_no_gpu_is_offered_twice() {
    let mut world = World::new(4).await;
    let mut pods = Vec::new();
    let mut swaps = 0;
    for turn in 0..3 {
        let (stop, task) = Reference::start(&world, &[0, 1, 2, 3]).await;
        world.allocatable(4).await;
        if turn == 0 {
            pods.push(world.running_pod(1).await);
        }
        world.every_gpu_is_given_once(4, &pods).await;
        let mut before = Vec::new();
        for pod in &pods {
            before.push(world.ids(pod).await);
        }
        stop.send_replace(true);
        task.await.unwrap().unwrap();
        swaps += 1;

        let agent = world.start(world.config(IdScheme::Iommu));
        until("ours is ready", || agent.readiness.is_ready()).await;
        world.allocatable(4).await;
        if turn == 1 {
            pods.push(world.running_pod(2).await);
            world.remove(pods.pop().unwrap().as_str()).await;
            pods.push(world.running_pod(1).await);
        }
        world.every_gpu_is_given_once(4, &pods).await;
        for (pod, ids) in pods.iter().zip(&before) {
            assert_eq!(world.ids(pod).await, *ids, "turn {turn}");
        }
        agent.end().await;
        assert!(
            world.cdi_dir().join("nvidia.com-pgpu.yaml").exists(),
            "a pod that was admitted before may start after"
        );
        swaps += 1;
    }
    eprintln!("{swaps} swaps under {} pods; no GPU given twice, no pod lost", pods.len());
}
