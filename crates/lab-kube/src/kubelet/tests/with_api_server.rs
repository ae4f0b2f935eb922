//! The kubelet against the API-server stand-in, with a kubelet's rights.

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use super::{Lab, R, SOON, Toy, start};
use crate::api_server::{ApiServer, ApiServerConfig, Rule};
use crate::kubelet::Config;

const NODE: &str = "gpu-1";

fn quick(config: &mut Config) {
    config.node = NODE.into();
    config.node_status_frequency = Duration::from_millis(50);
}

async fn client(server: &ApiServer) -> kube::Client {
    let token = server.add_identity(&format!("system:node:{NODE}"), &["system:nodes"], Rule::kubelet(NODE));
    let file = Kubeconfig::from_yaml(&server.kubeconfig(&token, "127.0.0.1")).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}

fn create(server: &ApiServer, name: &str) {
    let container = json!({"name": "main", "image": "x", "resources": {"limits": {R: "1"}, "requests": {R: "1"}}});
    let pod = json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": NODE, "containers": [container]},
    });
    server.create("pods", pod).unwrap();
}

/// Waits off the runtime's thread, which the kubelet needs.
async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn phase(server: &ApiServer, name: &str, phase: &str) -> Value {
    eventually(&format!("{name} {phase}"), || {
        server.get("pods", "default", name).map(|pod| pod["status"].clone()).filter(|status| status["phase"] == phase)
    })
    .await
}

async fn node(server: &ApiServer, capacity: &str, allocatable: &str) {
    eventually(&format!("{capacity}/{allocatable} on the node"), || {
        let status = server.get("nodes", "", NODE)?["status"].clone();
        (status["capacity"][R] == capacity && status["allocatable"][R] == allocatable).then_some(())
    })
    .await;
}

#[tokio::test]
async fn pods_and_node_are_reported() {
    let server = ApiServer::start(ApiServerConfig::default()).unwrap();
    let lab = Lab::with_client(Some(client(&server).await), quick).await;
    let ready = eventually("the node", || {
        let node = server.get("nodes", "", NODE)?;
        node["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == "Ready").cloned()
    });
    assert_eq!(ready.await["status"], "True");
    let toy = lab.plug_in(Toy::new(&[("0", true), ("1", false)])).await;
    node(&server, "2", "1").await;

    create(&server, "a");
    let status = phase(&server, "a", "Running").await;
    let resources = &status["containerStatuses"][0]["allocatedResourcesStatus"];
    assert_eq!(*resources, json!([{"name": R, "resources": [{"resourceID": "0", "health": "Healthy"}]}]));

    create(&server, "b");
    let status = phase(&server, "b", "Failed").await;
    assert_eq!(status["reason"], "UnexpectedAdmissionError");
    assert_eq!(
        status["message"],
        "Pod was rejected: Allocate failed due to requested number of devices unavailable for nvidia.com/pgpu. Requested: 1, Available: 0, which is unexpected"
    );

    toy.has(&[("0", false), ("1", true)]);
    node(&server, "2", "1").await;
    eventually("sick device in the pod's status", || {
        let pod = server.get("pods", "default", "a")?;
        let health = &pod["status"]["containerStatuses"][0]["allocatedResourcesStatus"][0]["resources"][0]["health"];
        (health == "Unhealthy").then_some(())
    })
    .await;

    toy.has(&[("0", true)]);
    node(&server, "1", "1").await;
    server.delete("pods", "default", "a", None).unwrap();
    eventually("the end of a", || server.get("pods", "default", "a").is_none().then_some(())).await;
    create(&server, "c");
    phase(&server, "c", "Running").await;
    toy.end();
    node(&server, "1", "0").await;
    phase(&server, "c", "Running").await;
}

#[tokio::test]
async fn running_pods_and_their_devices_outlive_the_kubelets_process() {
    let server = ApiServer::start(ApiServerConfig::default()).unwrap();
    let client = client(&server).await;
    let lab = Lab::with_client(Some(client.clone()), quick).await;
    let toy = lab.plug_in(Toy::new(&[("0", true), ("1", true)])).await;
    lab.wait(2).await;
    create(&server, "a");
    phase(&server, "a", "Running").await;
    let held = lab.ids("a");
    lab.kubelet.stop().await.unwrap();

    create(&server, "b");
    let kubelet = start(lab.folder.path(), Some(client), quick).await;
    let lab = Lab { kubelet, ..lab };
    // The pod that waited meets a kubelet whose plugin is not back yet.
    let status = phase(&server, "b", "Failed").await;
    assert!(status["message"].as_str().unwrap().contains("no healthy devices present"), "{status}");
    node(&server, "0", "0").await;
    assert_eq!(lab.ids("a"), held);
    lab.serve(&toy, "p.sock");
    lab.register("v1beta1", "p.sock", R).await.unwrap();
    node(&server, "2", "2").await;
    create(&server, "c");
    phase(&server, "c", "Running").await;
    assert_ne!(lab.ids("c"), held);
    assert_eq!(lab.calls().iter().filter(|call| *call == "Allocate").count(), 1, "a was not allocated again");
}

#[tokio::test]
async fn without_a_checkpoint_old_extended_resources_are_zeroed() {
    let server = ApiServer::start(ApiServerConfig::default()).unwrap();
    server.add_node(NODE, &[]).unwrap();
    let old = json!({"status": {"capacity": {R: "8", "cpu": "4"}, "allocatable": {R: "8", "cpu": "4"}}});
    server.merge("nodes/status", "", NODE, &old).unwrap();
    let _lab = Lab::with_client(Some(client(&server).await), quick).await;
    node(&server, "0", "0").await;
    assert_eq!(server.get("nodes", "", NODE).unwrap()["status"]["capacity"]["cpu"], "4");
}
