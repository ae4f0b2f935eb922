//! With the `kube` client.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use k8s_openapi::api::events::v1 as events;
use kube::api::{
    Api, DeleteParams, EvictParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde_json::{Value, json};

use super::super::{ApiServer, ApiServerConfig, Fault, FaultAction, Rule, View};

const NODE: &str = "gpu-1";
const SA: &str = "system:serviceaccount:gpu-operator:nvidia-cc-manager";

fn server() -> ApiServer {
    let server = ApiServer::start(ApiServerConfig::default()).expect("server starts");
    server.add_node(NODE, &[("nvidia.com/cc.mode", "on")]).expect("node");
    server
}

async fn client_of(server: &ApiServer, token: &str) -> Client {
    let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(token, "127.0.0.1")).expect("kubeconfig parses");
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config");
    // The client repeats 429, 503 and 504 by itself, which would hide them here.
    config.default_retry = false;
    Client::try_from(config).expect("client")
}

async fn admin(server: &ApiServer) -> Client {
    client_of(server, &server.add_identity("admin", &[], Rule::cluster_admin())).await
}

async fn cc_manager(server: &ApiServer) -> Client {
    let rules = Rule::operator_cc_manager("gpu-operator");
    client_of(server, &server.add_identity(SA, &["system:serviceaccounts"], rules)).await
}

fn status(error: kube::Error) -> (u16, String, String) {
    match error {
        kube::Error::Api(status) => (status.code, status.reason.clone(), status.message.clone()),
        other => panic!("an API error is expected, not {other}"),
    }
}

fn merge(value: Value) -> Patch<Value> {
    Patch::Merge(value)
}

async fn events_until<K>(api: &Api<K>, params: &WatchParams, from: &str, want: usize) -> Vec<(String, String)>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug + ResourceExt,
{
    let mut stream = api.watch(params, from).await.expect("watch").boxed();
    let mut seen = Vec::new();
    while seen.len() < want {
        let event = tokio::time::timeout(Duration::from_secs(10), stream.try_next()).await.expect("in time");
        match event.expect("event") {
            None => break,
            Some(WatchEvent::Added(o)) => seen.push(("ADDED".to_owned(), o.name_any())),
            Some(WatchEvent::Modified(o)) => seen.push(("MODIFIED".to_owned(), o.name_any())),
            Some(WatchEvent::Deleted(o)) => seen.push(("DELETED".to_owned(), o.name_any())),
            Some(WatchEvent::Bookmark(b)) => seen.push(("BOOKMARK".to_owned(), b.metadata.resource_version)),
            Some(WatchEvent::Error(e)) => seen.push(("ERROR".to_owned(), e.code.to_string())),
        }
    }
    seen
}

#[tokio::test]
async fn get_list_and_merge_patch_of_a_node() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let node = nodes.get(NODE).await.expect("get");
    assert_eq!(node.labels()["nvidia.com/cc.mode"], "on");
    let before = server.resource_version();
    let patch = merge(json!({"metadata": {"labels": {"nvidia.com/cc.mode.state": "on", "nvidia.com/cc.mode": null},
                                          "annotations": {"ccnode.dev/x": "{}"}},
                             "status": {"phase": "ignored here"}}));
    let node = nodes.patch(NODE, &PatchParams::default(), &patch).await.expect("patch");
    assert_eq!(node.labels().len(), 1);
    assert_eq!(server.annotations(NODE)["ccnode.dev/x"], "{}");
    assert_eq!(server.resource_version(), before + 1);
    nodes.patch(NODE, &PatchParams::default(), &patch).await.expect("the same again");
    assert_eq!(server.resource_version(), before + 1, "a write that changes nothing gets no version");
    let listed = nodes.list(&ListParams::default().fields("metadata.name=gpu-1")).await.expect("list");
    assert_eq!(listed.items.len(), 1);
    assert_eq!(listed.metadata.resource_version, Some((before + 1).to_string()));
    assert_eq!(nodes.get_opt("gpu-2").await.expect("404 is None").map(|n| n.name_any()), None);
}

#[tokio::test]
async fn refusals_use_the_real_servers_words() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let pods: Api<Pod> = Api::namespaced(cc_manager(&server).await, "default");
    let own: Api<Pod> = Api::namespaced(cc_manager(&server).await, "gpu-operator");
    let (code, reason, message) =
        status(nodes.patch_status(NODE, &PatchParams::default(), &merge(json!({}))).await.expect_err("no rule"));
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    assert_eq!(
        message,
        format!(
            "nodes \"gpu-1\" is forbidden: User \"{SA}\" cannot patch resource \"nodes/status\" in API group \"\" at the cluster scope"
        )
    );
    let (_, _, message) = status(nodes.delete(NODE, &DeleteParams::default()).await.expect_err("no rule"));
    assert_eq!(
        message,
        format!(
            "nodes \"gpu-1\" is forbidden: User \"{SA}\" cannot delete resource \"nodes\" in API group \"\" at the cluster scope"
        )
    );
    let (_, _, message) = status(pods.list(&ListParams::default()).await.expect_err("other namespace"));
    assert_eq!(
        message,
        format!(
            "pods is forbidden: User \"{SA}\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
        )
    );
    own.list(&ListParams::default()).await.expect("its own namespace");
    let events: Api<events::Event> = Api::namespaced(cc_manager(&server).await, "default");
    let (code, _, message) =
        status(events.create(&PostParams::default(), &events::Event::default()).await.expect_err("no rule"));
    assert_eq!(code, 403);
    assert!(message.starts_with("events.events.k8s.io is forbidden: User "), "{message}");
}

#[tokio::test]
async fn tokens_expire_and_anonymous_is_forbidden() {
    let server = server();
    let token = server.add_identity(SA, &[], Rule::operator_cc_manager("gpu-operator"));
    let nodes: Api<Node> = Api::all(client_of(&server, &token).await);
    nodes.get(NODE).await.expect("valid");
    server.expire_token(&token);
    let (code, reason, message) = status(nodes.get(NODE).await.expect_err("expired"));
    assert_eq!((code, reason.as_str(), message.as_str()), (401, "Unauthorized", "Unauthorized"));
    let fresh = server.reissue(&token).expect("known");
    Api::<Node>::all(client_of(&server, &fresh).await).get(NODE).await.expect("the new token works");
}

#[tokio::test]
async fn resource_names_see_the_field_selector() {
    let server = server();
    let rules = vec![Rule::new("", &["nodes"], &["get", "list", "watch"]).named(&[NODE])];
    let nodes: Api<Node> = Api::all(client_of(&server, &server.add_identity("u", &[], rules)).await);
    nodes.list(&ListParams::default().fields("metadata.name=gpu-1")).await.expect("named by the selector");
    assert_eq!(status(nodes.list(&ListParams::default()).await.expect_err("all nodes")).0, 403);
}

#[tokio::test]
async fn json_patch_tests_before_it_writes() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let patch = |text: Value| Patch::Json::<()>(serde_json::from_value(text).expect("a patch"));
    let failing = patch(json!([
        {"op": "replace", "path": "/metadata/labels/nvidia.com~1cc.mode", "value": "off"},
        {"op": "test", "path": "/metadata/labels/nvidia.com~1cc.mode", "value": "devtools"},
    ]));
    let (code, reason, message) =
        status(nodes.patch(NODE, &PatchParams::default(), &failing).await.expect_err("test fails"));
    assert_eq!((code, reason.as_str()), (422, "Invalid"));
    assert_eq!(message, "the server rejected our request due to an error in our request");
    assert_eq!(server.labels(NODE)["nvidia.com/cc.mode"], "on");
    let good = patch(json!([
        {"op": "test", "path": "/metadata/labels/nvidia.com~1cc.mode", "value": "on"},
        {"op": "add", "path": "/metadata/labels/nvidia.com~1cc.ready.state", "value": ""},
    ]));
    nodes.patch(NODE, &PatchParams::default(), &good).await.expect("test holds");
    assert_eq!(server.labels(NODE)["nvidia.com/cc.ready.state"], "");
}

#[tokio::test]
async fn versions_guard_updates_and_patches() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let mut stale = nodes.get(NODE).await.expect("get");
    server.set_label(NODE, "other", Some("1")).expect("label");
    stale.labels_mut().insert("mine".into(), "1".into());
    let (code, reason, message) = status(nodes.replace(NODE, &PostParams::default(), &stale).await.expect_err("stale"));
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    assert_eq!(
        message,
        "Operation cannot be fulfilled on nodes \"gpu-1\": the object has been modified; please apply your changes to \
         the latest version and try again"
    );
    let patch = merge(json!({"metadata": {"resourceVersion": stale.resource_version(), "labels": {"a": "b"}}}));
    assert_eq!(status(nodes.patch(NODE, &PatchParams::default(), &patch).await.expect_err("stale")).0, 409);
    stale.metadata.resource_version = None;
    stale.metadata.uid = Some("another".into());
    assert_eq!(status(nodes.replace(NODE, &PostParams::default(), &stale).await.expect_err("other uid")).0, 409);
    let patch = merge(json!({"metadata": {"uid": "another"}}));
    assert_eq!(status(nodes.patch(NODE, &PatchParams::default(), &patch).await.expect_err("immutable")).0, 422);
    let (code, reason, _) = status(
        nodes
            .create(
                &PostParams::default(),
                &Node {
                    metadata: kube::core::ObjectMeta { name: Some(NODE.into()), ..Default::default() },
                    ..Default::default()
                },
            )
            .await
            .expect_err("exists"),
    );
    assert_eq!((code, reason.as_str()), (409, "AlreadyExists"));
}

#[tokio::test]
async fn labels_are_validated_and_typed() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    for (value, part) in [
        (json!("a b"), "metadata.labels: Invalid value: \"a b\": a valid label must be an empty string"),
        (json!("x".repeat(64)), "must be no more than 63 characters"),
        (json!(true), "is invalid: patch: Invalid value"),
    ] {
        let patch = merge(json!({"metadata": {"labels": {"nvidia.com/cc.mode": value}}}));
        let (code, reason, message) =
            status(nodes.patch(NODE, &PatchParams::default(), &patch).await.expect_err("bad"));
        assert_eq!((code, reason.as_str()), (422, "Invalid"), "{value}");
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(server.labels(NODE)["nvidia.com/cc.mode"], "on");
}

#[tokio::test]
async fn status_and_metadata_keep_to_their_endpoints() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let both = merge(json!({
        "metadata": {"labels": {"via": "status"}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }));
    let node = nodes.patch_status(NODE, &PatchParams::default(), &both).await.expect("status");
    assert_eq!(node.spec.unwrap_or_default().unschedulable, None);
    assert_eq!(node.status.expect("status").conditions.expect("conditions").len(), 1);
    assert_eq!(server.labels(NODE)["via"], "status", "the status endpoint of nodes takes metadata, too");
    let main = merge(json!({"spec": {"unschedulable": true}, "status": {"conditions": null}}));
    let node = nodes.patch(NODE, &PatchParams::default(), &main).await.expect("main");
    assert_eq!(node.spec.expect("spec").unschedulable, Some(true));
    assert!(node.status.expect("status").conditions.is_some());
    let smp = Patch::Strategic(json!({"status": {"conditions": [{"type": "Disk", "status": "False"}]}}));
    let node = nodes.patch_status(NODE, &PatchParams::default(), &smp).await.expect("strategic");
    assert_eq!(node.status.expect("status").conditions.expect("conditions").len(), 2);
}

#[tokio::test]
async fn server_side_apply_keeps_owners() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let config = |value: &str| {
        Patch::Apply(json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"nvidia.com/cc.mode.state": value, "extra": "1"}}}))
    };
    nodes.patch(NODE, &PatchParams::apply("cc-manager"), &config("on")).await.expect("apply");
    server.set_label(NODE, "nvidia.com/cc.mode.state", Some("off")).expect("by another hand");
    let (code, _, message) =
        status(nodes.patch(NODE, &PatchParams::apply("cc-manager"), &config("on")).await.expect_err("conflict"));
    assert_eq!(code, 409);
    assert_eq!(
        message,
        "Apply failed with 1 conflict: conflict with \"lab\" using v1: .metadata.labels.nvidia.com/cc.mode.state"
    );
    nodes.patch(NODE, &PatchParams::apply("cc-manager").force(), &config("on")).await.expect("forced");
    let less = Patch::Apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}));
    nodes.patch(NODE, &PatchParams::apply("cc-manager"), &less).await.expect("gives up its fields");
    assert_eq!(server.labels(NODE).keys().collect::<Vec<_>>(), ["nvidia.com/cc.mode"]);
    let missing = Patch::Apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "new"}}));
    assert_eq!(
        status(nodes.patch("new", &PatchParams::apply("x"), &missing).await.expect_err("may not create")).0,
        403
    );
}

#[tokio::test]
async fn watches_follow_one_node_from_a_version() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let params = WatchParams::default().fields("metadata.name=gpu-1").timeout(20);
    assert_eq!(events_until(&nodes, &params, "0", 1).await, [("ADDED".to_owned(), NODE.to_owned())]);
    let from = server.resource_version().to_string();
    server.set_label(NODE, "a", Some("1")).expect("label");
    server.add_node("gpu-2", &[]).expect("another node");
    server.delete("nodes", "", NODE, None).expect("delete");
    let seen = events_until(&nodes, &params, &from, 2).await;
    assert_eq!(seen, [("MODIFIED".to_owned(), NODE.to_owned()), ("DELETED".to_owned(), NODE.to_owned())]);
}

#[tokio::test]
async fn selectors_turn_changes_into_added_and_deleted() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let from = server.resource_version().to_string();
    for (key, value) in [("ready", Some("true")), ("other", Some("1")), ("ready", Some("false")), ("ready", None)] {
        server.set_label(NODE, key, value).expect("label");
    }
    server.set_label(NODE, "ready", Some("true")).expect("label");
    server.delete("nodes", "", NODE, None).expect("delete");
    let params = WatchParams::default().labels("ready=true").timeout(20);
    let kinds: Vec<String> = events_until(&nodes, &params, &from, 5).await.into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"]);
}

#[tokio::test]
async fn old_versions_get_410_as_event_or_response() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let params = WatchParams::default().timeout(20);
    let old = server.resource_version().to_string();
    server.set_label(NODE, "a", Some("1")).expect("label");
    assert_eq!(events_until(&nodes, &params, &old, 1).await[0].0, "MODIFIED");
    server.compact();
    assert_eq!(events_until(&nodes, &params, &old, 2).await, [("ERROR".to_owned(), "410".to_owned())]);

    let config = ApiServerConfig { gone_as_response: true, ..ApiServerConfig::default() };
    let server = ApiServer::start(config).expect("server");
    server.add_node(NODE, &[]).expect("node");
    server.compact();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let refused = nodes.watch(&params, "1").await.err().expect("410");
    assert_eq!(status(refused).0, 410);
}

#[tokio::test]
async fn bookmarks_timeouts_and_initial_events() {
    let config = ApiServerConfig { bookmark_interval: Duration::from_millis(100), ..ApiServerConfig::default() };
    let server = ApiServer::start(config).expect("server");
    server.add_node(NODE, &[]).expect("node");
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let version = server.resource_version().to_string();
    let seen = events_until(&nodes, &WatchParams::default().timeout(20), &version, 2).await;
    assert_eq!(seen, vec![("BOOKMARK".to_owned(), version.clone()); 2]);
    let begin = Instant::now();
    let none = WatchParams::default().timeout(1).disable_bookmarks();
    assert_eq!(events_until(&nodes, &none, &version, 1).await, []);
    assert!(begin.elapsed() >= Duration::from_millis(900));
    let seen = events_until(&nodes, &WatchParams::default().initial_events().timeout(20), "0", 2).await;
    assert_eq!(seen, [("ADDED".to_owned(), NODE.to_owned()), ("BOOKMARK".to_owned(), version.clone())]);
}

#[tokio::test]
async fn metadata_only_requests() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let meta = nodes.get_metadata(NODE).await.expect("get");
    assert_eq!(meta.types.as_ref().map(|t| t.kind.as_str()), Some("PartialObjectMetadata"));
    assert_eq!(meta.labels()["nvidia.com/cc.mode"], "on");
    let list = nodes.list_metadata(&ListParams::default()).await.expect("list");
    assert_eq!((list.items.len(), list.types.kind.as_str()), (1, "PartialObjectMetadataList"));
    let mut stream = nodes.watch_metadata(&WatchParams::default().timeout(10), "0").await.expect("watch").boxed();
    match stream.try_next().await.expect("event") {
        Some(WatchEvent::Added(meta)) => assert_eq!(meta.name_any(), NODE),
        other => panic!("ADDED is expected, not {other:?}"),
    }
    let patch = merge(json!({"metadata": {"labels": {"x": "y"}}}));
    let meta = nodes.patch_metadata(NODE, &PatchParams::default(), &patch).await.expect("patch");
    assert_eq!(meta.labels()["x"], "y");
}

#[tokio::test]
async fn pods_select_by_node_die_with_grace_and_are_evicted() {
    let server = server();
    for (name, node) in [("a", NODE), ("b", NODE), ("c", "gpu-2")] {
        server.add_pod("gpu-operator", name, node, &[("app", "x")]).expect("pod");
    }
    let pods: Api<Pod> = Api::namespaced(admin(&server).await, "gpu-operator");
    let selector = ListParams::default().labels("app in (x)").fields("spec.nodeName=gpu-1,status.phase=Running");
    assert_eq!(pods.list(&selector).await.expect("list").items.len(), 2);

    pods.delete("a", &DeleteParams::default()).await.expect("marked");
    let marked = pods.get("a").await.expect("still there");
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    server.finish_pod_deletion("gpu-operator", "a").expect("the kubelet's part");
    assert_eq!(status(pods.get("a").await.expect_err("gone")).2, "pods \"a\" not found");
    let wrong = DeleteParams::default().preconditions(Preconditions { uid: Some("x".into()), resource_version: None });
    assert_eq!(status(pods.delete("b", &wrong).await.expect_err("another uid")).0, 409);

    server.block_eviction("gpu-operator", "b", Some(7), Some(1));
    let (code, reason, message) = status(pods.evict("b", &EvictParams::default()).await.expect_err("budget"));
    assert_eq!((code, reason.as_str()), (429, "TooManyRequests"));
    assert_eq!(message, "Cannot evict pod as it would violate the pod's disruption budget.");
    pods.evict("b", &EvictParams::default()).await.expect("allowed again");
    let evicted = pods.get("b").await.expect("marked");
    assert_eq!(evicted.metadata.deletion_grace_period_seconds, Some(30));
    server.finish_pod_deletion("gpu-operator", "b").expect("the kubelet's part");
    assert_eq!(status(pods.evict("b", &EvictParams::default()).await.expect_err("gone")).0, 404);
}

#[test]
fn an_imaginary_kubelet_ends_pods() {
    let config = ApiServerConfig { pods_end_after: Some(Duration::from_millis(50)), ..ApiServerConfig::default() };
    let server = ApiServer::start(config).expect("server");
    server.add_pod("ns", "p", NODE, &[]).expect("pod");
    assert!(!server.delete("pods", "ns", "p", None).expect("marked"));
    let gone = server.wait_for(Duration::from_secs(5), |view| view.get("pods", "ns", "p").is_none().then_some(()));
    assert_eq!(gone, Some(()));
}

#[tokio::test]
async fn events_come_by_both_groups() {
    let server = server();
    let client = admin(&server).await;
    let new: Api<events::Event> = Api::namespaced(client.clone(), "default");
    let event: events::Event = serde_json::from_value(json!({
        "metadata": {"generateName": "cc-"}, "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Normal",
        "reason": "ModeChanged", "action": "Change", "note": "on", "reportingController": "ccnode.dev/cc-manager",
        "reportingInstance": "gpu-1", "regarding": {"kind": "Node", "name": NODE},
    }))
    .expect("event");
    let made = new.create(&PostParams::default(), &event).await.expect("create");
    assert!(made.name_any().starts_with("cc-") && made.name_any().len() == 8);
    let old: Api<Event> = Api::namespaced(client.clone(), "default");
    let fields = ListParams::default().fields("involvedObject.name=gpu-1,involvedObject.kind=Node");
    let listed = old.list(&fields).await.expect("list");
    assert_eq!(listed.items[0].message.as_deref(), Some("on"));
    let mut bad = event;
    bad.action = None;
    bad.event_time = None;
    let (code, reason, message) = status(new.create(&PostParams::default(), &bad).await.expect_err("incomplete"));
    assert_eq!((code, reason.as_str()), (422, "Invalid"));
    assert!(message.contains("eventTime: Required value"), "{message}");
}

#[tokio::test]
async fn the_kubelets_identity_is_restricted() {
    let server = server();
    let token = server.add_identity("system:node:gpu-1", &["system:nodes"], Rule::kubelet(NODE));
    let nodes: Api<Node> = Api::all(client_of(&server, &token).await);
    let label = |key: &str| merge(json!({"metadata": {"labels": {key: "x"}}}));
    nodes.patch(NODE, &PatchParams::default(), &label("nvidia.com/x")).await.expect("vendor label");
    let (code, _, message) = status(
        nodes.patch(NODE, &PatchParams::default(), &label("node-restriction.kubernetes.io/x")).await.expect_err("no"),
    );
    assert_eq!(code, 403);
    assert_eq!(
        message,
        "nodes \"gpu-1\" is forbidden: is not allowed to modify labels: node-restriction.kubernetes.io/x"
    );
    assert_eq!(status(nodes.list(&ListParams::default()).await.expect_err("list")).0, 403);
}

#[tokio::test]
async fn lists_come_in_chunks_of_one_version() {
    let server = server();
    for i in 2..6 {
        server.add_node(&format!("gpu-{i}"), &[]).expect("node");
    }
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let first = nodes.list(&ListParams::default().limit(2)).await.expect("first");
    let token = first.metadata.continue_.clone().expect("more");
    assert_eq!((first.items.len(), first.metadata.remaining_item_count), (2, Some(3)));
    server.delete("nodes", "", "gpu-4", None).expect("delete");
    let rest = nodes.list(&ListParams::default().continue_token(&token)).await.expect("rest");
    assert_eq!(rest.items.len(), 3, "as it was at the first chunk");
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);
    server.compact();
    let late = nodes.list(&ListParams::default().continue_token(&token)).await.expect_err("too old");
    assert_eq!(status(late).0, 410);
}

#[tokio::test]
async fn faults_strike_what_they_are_for() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let patch = |value: &str| merge(json!({"metadata": {"labels": {"f": value}}}));
    let slow = server.inject(Fault::new(FaultAction::Status { code: 429, retry_after: None }).verb("patch").skip(1));
    nodes.patch(NODE, &PatchParams::default(), &patch("0")).await.expect("skipped");
    assert_eq!(status(nodes.patch(NODE, &PatchParams::default(), &patch("1")).await.expect_err("429")).0, 429);
    nodes.get(NODE).await.expect("other verbs pass");
    assert_eq!(server.fault_hits(slow), 1);
    for (action, effect) in [(FaultAction::CutBefore, "0"), (FaultAction::CutAfterCommit, "2")] {
        server.inject(Fault::new(action.clone()).verb("patch").resource("nodes").name(NODE));
        nodes.patch(NODE, &PatchParams::default(), &patch("2")).await.expect_err("cut");
        assert_eq!(server.labels(NODE)["f"], effect, "{action:?}");
    }
    server.inject(Fault::new(FaultAction::SlowBody { chunk: 50, pause: Duration::from_millis(2) }).verb("get"));
    assert_eq!(nodes.get(NODE).await.expect("slow but whole").name_any(), NODE);
    server.inject(Fault::new(FaultAction::CutBodyAfter(20)).verb("get"));
    nodes.get(NODE).await.expect_err("cut in the middle");
    server.inject(Fault::new(FaultAction::WatchGone).verb("watch"));
    let seen = events_until(&nodes, &WatchParams::default(), "0", 1).await;
    assert_eq!(seen, [("ERROR".to_owned(), "410".to_owned())]);
    server.inject(Fault::new(FaultAction::WatchCut { after_events: 1 }).verb("watch"));
    let mut stream = nodes.watch(&WatchParams::default(), "0").await.expect("watch").boxed();
    stream.try_next().await.expect("one event").expect("one event");
    assert!(!matches!(stream.try_next().await, Ok(Some(_))), "nothing whole after the cut");
    server.set_down(true);
    nodes.get(NODE).await.expect_err("down");
    server.set_down(false);
    nodes.get(NODE).await.expect("back on the same port");
}

/// The client's tasks run meanwhile.
async fn until(server: &ApiServer, is_so: impl Fn(View<'_>) -> bool) {
    let so = async {
        while !server.view(&is_so) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), so).await.expect("in time");
}

#[tokio::test]
async fn a_held_request_waits_for_its_release_and_ends_with_its_client() {
    let server = server();
    let client = admin(&server).await;
    for (value, action, while_held, is_killed, after) in [
        ("1", FaultAction::HoldBefore, None, true, None),
        ("2", FaultAction::HoldBefore, None, false, Some("2")),
        ("3", FaultAction::HoldAfterCommit, Some("3"), true, Some("3")),
        ("4", FaultAction::HoldAfterCommit, Some("4"), false, Some("4")),
    ] {
        let label = || server.labels(NODE).get(value).cloned();
        server.inject(Fault::new(action).verb("patch"));
        let (nodes, patch) = (Api::<Node>::all(client.clone()), merge(json!({"metadata": {"labels": {value: value}}})));
        let request = tokio::spawn(async move { nodes.patch(NODE, &PatchParams::default(), &patch).await.map(drop) });
        until(&server, |view| view.held() == 1).await;
        assert_eq!(label().as_deref(), while_held);
        if is_killed {
            request.abort();
            until(&server, |view| view.held() == 0).await;
            server.release();
        } else {
            server.release();
            request.await.expect("not aborted").expect("answered");
        }
        assert_eq!(label().as_deref(), after, "{value}");
    }
    assert!(server.view(|view| view.connections()) > 0);
    drop(client);
    until(&server, |view| view.connections() == 0).await;
}

#[tokio::test]
async fn a_stale_bookmark_comes_after_the_events_and_ends_the_watch() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    server.set_label(NODE, "f", Some("1")).expect("label");
    let version = server.resource_version();
    let stale = || Fault::new(FaultAction::StaleBookmark { after_events: 1, behind: 1 }).verb("watch");
    server.inject(stale());
    let seen = events_until(&nodes, &WatchParams::default(), &(version - 1).to_string(), 3).await;
    let bookmark = ("BOOKMARK".to_owned(), (version - 1).to_string());
    assert_eq!(seen, [("MODIFIED".to_owned(), NODE.to_owned()), bookmark]);
    server.inject(stale());
    let seen = events_until(&nodes, &WatchParams::default().disable_bookmarks(), &(version - 1).to_string(), 2).await;
    assert_eq!(seen.len(), 1, "and then the end: {seen:?}");
}

#[test]
fn every_write_of_a_node_is_seen_by_the_test_at_once() {
    let server = server();
    let seen = Arc::<Mutex<Vec<Option<String>>>>::default();
    let of_hook = Arc::clone(&seen);
    server.on_node_write(move |entry| of_hook.lock().expect("lock").push(entry.labels.get("f").cloned()));
    server.add_node("gpu-2", &[("f", "0")]).expect("node");
    for value in [Some("1"), Some("2"), None] {
        server.set_label(NODE, "f", value).expect("label");
    }
    server.delete("nodes", "", "gpu-2", None).expect("delete");
    let seen: Vec<_> = seen.lock().expect("lock").iter().map(|value| value.clone().unwrap_or_default()).collect();
    assert_eq!(seen, ["0", "1", "2", "", "0"]);
}

#[tokio::test]
async fn dropping_the_server_ends_running_watches_and_frees_the_port() {
    let server = server();
    let address = server.address();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let mut stream = nodes.watch(&WatchParams::default(), "0").await.expect("watch").boxed();
    stream.try_next().await.expect("added").expect("added");
    let begin = Instant::now();
    drop(server);
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(!matches!(stream.try_next().await, Ok(Some(_))));
    assert!(std::net::TcpStream::connect(address).is_err());
    ApiServer::start(ApiServerConfig { address, ..ApiServerConfig::default() }).expect("the port is free again");
}

#[tokio::test]
async fn a_guest_reaches_it_by_the_service_accounts_files() {
    let server = server();
    let token = server.add_identity(SA, &[], Rule::operator_cc_manager("gpu-operator"));
    let files = server.service_account_files(&token, "gpu-operator");
    assert!(files.ca_crt.starts_with("-----BEGIN CERTIFICATE-----"));
    assert_eq!((files.token.as_str(), files.namespace.as_str()), (token.as_str(), "gpu-operator"));
    assert!(
        server
            .kubeconfig(&token, "10.0.2.2")
            .contains(&format!("server: https://10.0.2.2:{}", server.address().port()))
    );
    let other = ApiServer::start(ApiServerConfig::default()).expect("another");
    let mut kubeconfig = server.kubeconfig(&token, "127.0.0.1");
    kubeconfig = kubeconfig.replace(&server.url("127.0.0.1"), &other.url("127.0.0.1"));
    let config = Config::from_custom_kubeconfig(
        Kubeconfig::from_yaml(&kubeconfig).expect("kubeconfig"),
        &KubeConfigOptions::default(),
    )
    .await
    .expect("config");
    let nodes: Api<Node> = Api::all(Client::try_from(config).expect("client"));
    nodes.get(NODE).await.expect_err("its certificate is from another authority");
}

#[tokio::test]
async fn watches_end_in_order_when_closed() {
    let server = server();
    let nodes: Api<Node> = Api::all(admin(&server).await);
    let mut stream = nodes.watch(&WatchParams::default(), "0").await.expect("watch").boxed();
    stream.try_next().await.expect("added").expect("added");
    server.close_watches();
    assert!(stream.try_next().await.expect("no error").is_none());
}

#[tokio::test]
async fn a_watch_is_counted_until_its_client_closes_it() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let open = || server.view(|view| view.open_watches().into_iter().cloned().collect::<Vec<_>>());
    assert_eq!(open(), []);
    let params = WatchParams::default();
    let whole = nodes.watch(&params, "0").await.expect("watch");
    let metadata = nodes.watch_metadata(&params, "0").await.expect("watch");
    let forms: Vec<bool> = open().iter().map(|watch| watch.metadata_only).collect();
    assert_eq!(forms, [false, true]);
    drop(whole);
    while open().len() != 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let left = &open()[0];
    assert!(left.metadata_only && left.resource == "nodes" && left.user.contains("cc-manager"), "{left:?}");
    drop(metadata);
    let accept: Vec<String> = server.requests().into_iter().map(|request| request.accept).collect();
    let is_metadata = |text: &&String| text.contains("as=PartialObjectMetadata;");
    assert_eq!(accept.iter().filter(is_metadata).count(), 1, "{accept:?}");
}

#[tokio::test]
async fn writers_at_once_lose_nothing() {
    let server = server();
    let client = admin(&server).await;
    let before = server.resource_version();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let nodes: Api<Node> = Api::all(client.clone());
        tasks.spawn(async move {
            for _ in 0..5 {
                loop {
                    let mut node = nodes.get(NODE).await.expect("get");
                    let count: u32 = node.labels().get("count").map_or(0, |c| c.parse().expect("number"));
                    node.labels_mut().insert("count".into(), (count + 1).to_string());
                    node.labels_mut().insert(format!("w{writer}"), "x".into());
                    match nodes.replace(NODE, &PostParams::default(), &node).await {
                        Ok(_) => break,
                        Err(error) => assert_eq!(status(error).0, 409),
                    }
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("writer");
    }
    assert_eq!(server.labels(NODE)["count"], "40");
    assert_eq!(server.resource_version(), before + 40);
    let history = server.history(NODE);
    assert!(history.windows(2).all(|pair| pair[0].resource_version < pair[1].resource_version));
    assert_eq!(history.len(), 41);
}

#[tokio::test]
async fn requests_and_history_can_be_read_back() {
    let server = server();
    let nodes: Api<Node> = Api::all(cc_manager(&server).await);
    let patch = merge(json!({"metadata": {"labels": {"nvidia.com/cc.ready.state": ""}}}));
    nodes.patch(NODE, &PatchParams::default(), &patch).await.expect("patch");
    let record = server.requests().pop().expect("recorded");
    assert_eq!((record.verb.as_str(), record.resource.as_str(), record.name.as_str()), ("patch", "nodes", NODE));
    assert_eq!((record.code, record.user.as_str()), (200, SA));
    assert_eq!(record.body["metadata"]["labels"]["nvidia.com/cc.ready.state"], "");
    assert_eq!(server.count("patch", "nodes"), 1);
    let last = server.history(NODE).pop().expect("history");
    assert_eq!(last.user, SA);
    assert!(last.labels["nvidia.com/cc.ready.state"].is_empty());
    let uid = last.uid;
    assert_ne!(server.replace_node(NODE).expect("replaced"), uid);
    assert!(server.history(NODE).iter().any(|entry| entry.deleted));
}

#[tokio::test]
async fn access_can_be_asked_for() {
    let server = server();
    let client = cc_manager(&server).await;
    for (verb, sub, allowed) in [("patch", "", true), ("patch", "status", false), ("delete", "", false)] {
        let review: Value =
            json!({"spec": {"resourceAttributes": {"verb": verb, "resource": "nodes", "subresource": sub}}});
        let request = http::Request::post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")
            .header("content-type", "application/json")
            .body(review.to_string().into_bytes())
            .expect("request");
        let answer: Value = client.request(request).await.expect("review");
        assert_eq!(answer["status"]["allowed"], allowed, "{verb} {sub}");
    }
    let version = client.apiserver_version().await.expect("version");
    assert_eq!(version.major, "1");
}
