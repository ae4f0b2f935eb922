//! What goes over the wire, and what becomes of every answer.

use std::time::Duration;

use http::Method;
use node_object::testing::FakeApi;
use node_object::{Change, NodeClient, NodeError, NodeView, Timing, annotations, labels};
use serde_json::json;

fn node(api: &FakeApi) -> NodeClient {
    NodeClient::new(api.client(), "n1", "test").with_timing(Timing {
        request: Duration::from_secs(2),
        first_delay: Duration::from_millis(5),
        last_delay: Duration::from_millis(20),
        relist_spread: Duration::from_millis(5),
        ..Timing::default()
    })
}

#[expect(clippy::panic, reason = "a test that waits in vain has failed")]
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 5 s: {what}");
}

const META: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

#[tokio::test]
async fn one_list_and_one_watch_by_name() {
    let api = FakeApi::new("n1");
    let node = node(&api);
    let watcher = node.clone();
    let watching = tokio::spawn(async move { watcher.watch().await });
    until("watch is open", || api.open_watches() == 1).await;
    api.set_label(labels::CC_MODE, Some("on"));
    until("label is seen", || node.view().node().is_some_and(|node| node.label(labels::CC_MODE) == Some("on"))).await;
    let requests = api.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert_eq!(requests[0].uri, "/api/v1/nodes?&fieldSelector=metadata.name%3Dn1");
    assert!(requests[0].accept.contains("PartialObjectMetadataList"), "{}", requests[0].accept);
    assert!(
        requests[1].uri.contains("watch=true") && requests[1].uri.contains("resourceVersion=100"),
        "{}",
        requests[1].uri
    );
    assert!(requests[1].uri.contains("allowWatchBookmarks=true") && requests[1].uri.contains("timeoutSeconds=290"));
    assert_eq!(requests[1].accept, META);
    watching.abort();
}

#[tokio::test]
async fn the_watch_outlives_every_failure() {
    let api = FakeApi::new("n1");
    for status in [401, 403, 429, 500, 503] {
        api.fail_next(Method::GET, status);
    }
    let node = node(&api);
    let watcher = node.clone();
    let watching = tokio::spawn(async move { watcher.watch().await });
    let sees = |value: &str| node.view().node().is_some_and(|node| node.label("x") == Some(value));

    until("watch is open", || api.open_watches() == 1).await;
    api.close_watches();
    api.set_label("x", Some("while-closed"));
    until("change during the gap", || sees("while-closed")).await;

    until("watch is open", || api.open_watches() == 1).await;
    let lists = || api.requests().iter().filter(|request| !request.uri.contains("watch=true")).count();
    let before = lists();
    api.send_watch_line(r#"{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}"#);
    until("list after 410", || lists() == before + 1).await;

    until("watch is open", || api.open_watches() == 1).await;
    api.send_watch_line("nonsense");
    api.send_watch_line(
        r#"{"type":"BOOKMARK","object":{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"777"}}}"#,
    );
    until("watch after nonsense", || api.open_watches() == 1).await;
    api.set_label("x", Some("after"));
    until("change after nonsense", || sees("after")).await;

    until("watch is open", || api.open_watches() == 1).await;
    api.delete_node();
    until("node is gone", || node.view() == NodeView::Absent).await;
    api.create_node("uid-2");
    until("node is back", || node.view().node().is_some_and(|node| node.uid == "uid-2")).await;
    assert!(!watching.is_finished());
    watching.abort();
}

#[tokio::test]
async fn a_bookmark_moves_the_version_to_resume_from() {
    let api = FakeApi::new("n1");
    let node = node(&api);
    let watching = tokio::spawn(async move { node.watch().await });
    until("watch is open", || api.open_watches() == 1).await;
    api.send_watch_line(
        r#"{"type":"BOOKMARK","object":{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"777"}}}"#,
    );
    api.close_watches();
    until("resumed", || api.requests().last().is_some_and(|request| request.uri.contains("resourceVersion=777"))).await;
    watching.abort();
}

#[tokio::test]
async fn a_merge_patch_carries_only_what_differs() {
    let api = FakeApi::new("n1");
    api.set_label(labels::CC_MODE_STATE, Some("off"));
    let node = node(&api);
    node.get().await.unwrap();
    let change = Change::new()
        .label(labels::CC_MODE_STATE, "off")
        .label(labels::CC_READY_STATE, "false")
        .annotation(annotations::CC_STATUS, "{}");
    node.merge(&change).await.unwrap().unwrap();
    let patches = api.patches();
    assert_eq!(patches.len(), 1);
    assert_eq!(patches[0].uri, "/api/v1/nodes/n1?&fieldManager=test");
    assert_eq!(patches[0].content_type, "application/merge-patch+json");
    assert_eq!(patches[0].accept, META);
    assert_eq!(
        patches[0].body,
        json!({"metadata": {"labels": {"nvidia.com/cc.ready.state": "false"}, "annotations": {"ccnode.dev/cc-status": "{}"}}})
    );
    assert_eq!(node.merge(&change).await.unwrap(), None, "nothing is written twice");
    assert_eq!(api.patches().len(), 1);
}

#[tokio::test]
async fn a_json_patch_is_computed_anew_when_its_grounds_change() {
    let api = FakeApi::new("n1");
    api.set_label("deploy", Some("true"));
    let node = node(&api);
    node.get().await.unwrap();
    api.set_label("deploy", Some("other"));
    let state = node
        .update((&[], &[]), |state| Change::new().label("deploy", format!("{}_paused", state.label("deploy").unwrap())))
        .await
        .unwrap();
    assert_eq!(state.label("deploy"), Some("other_paused"));
    let patches = api.patches();
    assert_eq!(patches.len(), 2);
    assert_eq!(patches[0].content_type, "application/json-patch+json");
    assert_eq!(
        patches[1].body,
        json!([
            {"op": "test", "path": "/metadata/uid", "value": "uid-1"},
            {"op": "test", "path": "/metadata/labels/deploy", "value": "other"},
            {"op": "add", "path": "/metadata/labels/deploy", "value": "other_paused"},
        ])
    );
    node.update((&[], &[]), |_| Change::new().label("deploy", "other_paused")).await.unwrap();
    assert_eq!(api.patches().len(), 2, "nothing is written twice");
}

#[tokio::test]
async fn conflicts_are_tried_a_few_times_and_then_told() {
    let api = FakeApi::new("n1");
    for status in [409, 422, 409, 422, 409, 422] {
        api.fail_next(Method::PATCH, status);
    }
    let error = node(&api).update((&[], &[]), |_| Change::new().label("a", "b")).await.unwrap_err();
    assert_eq!(error.code(), "ApiConflict");
    assert_eq!(api.patches().len(), 6);
}

#[tokio::test]
async fn errors_have_codes() {
    for (status, code) in [
        (400, "ApiRejected"),
        (401, "ApiUnauthorized"),
        (403, "ApiForbidden"),
        (404, "NodeAbsent"),
        (429, "ApiThrottled"),
        (500, "ApiUnavailable"),
        (503, "ApiUnavailable"),
    ] {
        let api = FakeApi::new("n1");
        api.fail_next(Method::PATCH, status);
        let error = node(&api).merge(&Change::new().label("a", "b")).await.unwrap_err();
        assert_eq!((error.code(), error.status()), (code, Some(status)));
        assert!(error.line().contains("n1"), "{}", error.line());
    }
    let api = FakeApi::new("n1");
    api.delete_node();
    let error = node(&api).get().await.unwrap_err();
    assert!(matches!(error, NodeError::Absent { .. }) && error.to_string().contains("NODE_NAME"), "{error}");
}

#[tokio::test]
async fn an_answer_that_never_comes_is_a_timeout() {
    let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
        std::future::pending::<Result<http::Response<kube::client::Body>, std::convert::Infallible>>()
    });
    let timing = Timing { request: Duration::from_millis(20), ..Timing::default() };
    let node = NodeClient::new(kube::Client::new(silent, "default"), "n1", "test").with_timing(timing);
    assert_eq!(node.get().await.unwrap_err().code(), "ApiTimeout");
}

#[tokio::test]
async fn an_unusable_kubeconfig_is_named() {
    let path = std::path::Path::new("/absent/kubeconfig");
    let error = node_object::connect(Some(path)).await.map(drop).unwrap_err();
    assert_eq!(error.code(), "ApiConfig");
    assert!(error.line().contains("/absent/kubeconfig"), "{}", error.line());
}

#[tokio::test]
async fn pods_are_waited_for_with_one_list_and_one_watch() {
    let api = FakeApi::new("n1");
    api.add_pod("gpu-operator", "vfio-1", &[("name", "nvidia-vfio-manager")]);
    api.add_pod("gpu-operator", "other", &[("app", "something-else")]);
    api.add_pod("elsewhere", "vfio-2", &[("name", "nvidia-vfio-manager")]);
    let (seen, told) = tokio::sync::mpsc::unbounded_channel();
    let waiting = tokio::spawn({
        let node = node(&api);
        async move {
            let is_one = |labels: &std::collections::BTreeMap<String, String>| labels.contains_key("name");
            node.pods_gone("gpu-operator", is_one, &mut |left| drop(seen.send(left))).await
        }
    });
    let mut told = told;
    assert_eq!(told.recv().await.unwrap(), ["vfio-1"]);
    until("watch is open", || api.requests().len() == 2).await;
    // The DaemonSet makes another one before the first is gone.
    api.add_pod("gpu-operator", "vfio-3", &[("name", "nvidia-vfio-manager")]);
    api.delete_pod("gpu-operator", "vfio-1");
    assert_eq!(told.recv().await.unwrap(), ["vfio-1", "vfio-3"]);
    assert_eq!(told.recv().await.unwrap(), ["vfio-3"]);
    api.delete_pod("gpu-operator", "vfio-3");
    waiting.await.unwrap().unwrap();
    let requests = api.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert_eq!(requests[0].uri, "/api/v1/namespaces/gpu-operator/pods?&fieldSelector=spec.nodeName%3Dn1");
    assert!(requests.iter().all(|request| request.accept.contains("PartialObjectMetadata")));
    assert!(requests[1].uri.contains("watch=true") && requests[1].uri.contains("fieldSelector=spec.nodeName%3Dn1"));
}

#[tokio::test]
async fn a_refused_list_of_pods_ends_the_wait_and_a_failed_one_does_not() {
    let api = FakeApi::new("n1");
    let node = node(&api);
    for status in [500, 410, 429] {
        api.fail_next(Method::GET, status);
    }
    node.pods_gone("ns", |_| true, &mut drop).await.unwrap();
    api.fail_next(Method::GET, 403);
    let error = node.pods_gone("ns", |_| true, &mut drop).await.unwrap_err();
    assert!(error.code() == "ApiForbidden" && error.line().contains("pods"), "{}", error.line());
}

#[tokio::test]
async fn resources_are_waited_for_until_none_is_allocatable() {
    let api = FakeApi::new("n1");
    api.set_allocatable("nvidia.com/pgpu", "2");
    api.set_allocatable("cpu", "8");
    let (seen, told) = tokio::sync::mpsc::unbounded_channel();
    let waiting = tokio::spawn({
        let node = node(&api);
        let is_one = |name: &str| name.starts_with("nvidia.com/");
        async move { node.none_allocatable(is_one, &mut |left| drop(seen.send(left))).await }
    });
    let mut told = told;
    assert_eq!(told.recv().await.unwrap(), ["nvidia.com/pgpu: 2"]);
    until("watch is open", || api.open_watches() == 1).await;
    api.set_allocatable("nvidia.com/pgpu", "1");
    assert_eq!(told.recv().await.unwrap(), ["nvidia.com/pgpu: 1"]);
    api.set_allocatable("nvidia.com/pgpu", "0");
    waiting.await.unwrap().unwrap();
    assert!(api.requests().iter().all(|request| !request.accept.contains("PartialObjectMetadata")));
}

#[tokio::test]
async fn a_node_object_that_goes_away_offers_nothing_and_says_nothing() {
    let api = FakeApi::new("n1");
    api.set_allocatable("nvidia.com/pgpu", "2");
    let (seen, mut told) = tokio::sync::mpsc::unbounded_channel();
    let node = node(&api);
    node.get().await.unwrap();
    let waiting = tokio::spawn(async move {
        node.none_allocatable(|name| name.starts_with("nvidia.com/"), &mut |left| drop(seen.send(left))).await
    });
    assert_eq!(told.recv().await.unwrap(), ["nvidia.com/pgpu: 2"]);
    until("watch is open", || api.open_watches() == 1).await;
    api.delete_node();
    api.create_node("uid-2");
    api.set_allocatable("nvidia.com/pgpu", "0");
    for event in ["deleted", "made again", "offers none"] {
        assert_eq!(told.recv().await.expect("it waits on"), Vec::<String>::new(), "{event}");
    }
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn events_are_sent_and_refused_ones_forgotten() {
    let api = FakeApi::new("n1");
    let node = node(&api);
    node.get().await.unwrap();
    let (events, sender) = node_object::Events::new(node, "cc-manager");
    let event = |reason: &str, note: String| node_object::Event {
        is_warning: true,
        reason: reason.to_owned(),
        action: "Change",
        note,
    };
    api.fail_next(Method::POST, 403);
    api.fail_next(Method::POST, 500);
    for reason in ["Refused", "Failed", "InUse"] {
        events.tell(event(reason, "\u{e9}".repeat(1000)));
    }
    drop(events);
    sender.run().await;
    let sent = api.requests().into_iter().rfind(|request| request.method == "POST").unwrap().body;
    assert_eq!((&sent["type"], &sent["reason"]), (&json!("Warning"), &json!("InUse")));
    assert_eq!(sent["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "uid-1"}));
    assert_eq!(sent["note"].as_str().unwrap().len(), 1024, "the API server takes no more");
    let time = sent["eventTime"].as_str().unwrap();
    assert!(time.ends_with('Z') && time.split('.').nth(1).is_some_and(|rest| rest.len() == 7), "{time}");
}
