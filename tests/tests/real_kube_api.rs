//! What the agents rely on in an API server: one list, asked of a real one and of the stand-in.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::similar_names, reason = "what is patched stands at a path")]

mod real_kube;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use http::Method;
use lab_kube::api_server::{ApiServerConfig, Rule};
use real_kube::contract::{Entry, FIRST, OURS, entry, holds};
use real_kube::{Answer, Api, Cluster, JSON, MERGE, PATIENCE, STRATEGIC, budget, run};
use serde_json::{Value, json};

/// The contract.
const CONTRACT: &[Entry<Cluster>] = &[
    entry!(FIRST, what_is_not_there_is_not_found),
    entry!(FIRST, metadata_alone_can_be_asked_for),
    entry!(FIRST, a_list_by_name_has_one_node_and_a_version_to_watch_from),
    entry!(FIRST, an_unknown_field_selector_is_a_bad_request),
    entry!(FIRST, a_list_in_pieces_is_of_one_moment),
    entry!(FIRST, a_list_of_a_version_to_come_is_given_up),
    entry!(FIRST, a_watch_tells_each_change_once_and_in_order),
    entry!(FIRST, a_watch_without_a_version_begins_with_what_is_there),
    entry!(FIRST, a_node_that_leaves_a_selector_is_told_as_deleted),
    entry!(FIRST, a_watch_ends_at_its_time_after_a_bookmark),
    entry!(FIRST, a_watch_without_bookmarks_gets_none),
    entry!(FIRST, a_watch_of_metadata_alone_tells_no_content),
    entry!(FIRST, pods_of_one_node_are_listed_and_watched_alone),
    entry!(FIRST, a_watch_from_a_forgotten_version_is_told_410_in_the_stream, OURS),
    entry!(FIRST, a_merge_patch_sets_and_removes_labels_and_annotations),
    entry!(FIRST, a_strategic_patch_does_the_same),
    entry!(FIRST, a_patch_that_changes_nothing_makes_no_version),
    entry!(FIRST, a_json_patch_tests_before_it_writes),
    entry!(FIRST, a_json_patch_tests_uid_and_version),
    entry!(FIRST, a_patch_of_another_version_or_uid_refused),
    entry!(FIRST, bad_labels_are_invalid_and_say_which),
    entry!(FIRST, patches_that_cannot_be_read_are_refused),
    entry!(FIRST, writers_of_different_labels_do_not_meet),
    entry!(FIRST, of_writers_that_test_the_same_label_one_wins),
    entry!(FIRST, the_operators_rules_of_cc_manager_allow_this_and_no_more),
    entry!(FIRST, the_operators_rules_of_vfio_manager_allow_this_and_no_more),
    entry!(FIRST, a_refusal_names_user_verb_and_resource),
    entry!(FIRST, a_kubelets_identity_is_kept_to_its_own_node, OURS),
    entry!(FIRST, an_expired_or_unknown_token_is_unauthorized_and_no_token_is_forbidden, OURS),
    entry!(FIRST, events_of_a_node_are_of_the_default_namespace),
    entry!(FIRST, an_event_is_counted_up_by_a_patch),
    entry!(FIRST, a_deleted_pod_stays_until_its_time_is_over),
    entry!(FIRST..=20, an_event_of_the_newer_kind_about_a_node_is_invalid_outside_of_kube_system),
    entry!(FIRST, a_pod_that_a_budget_needs_is_not_evicted_before_it_may_be),
    entry!(FIRST, an_eviction_of_another_uid_is_a_conflict),
    entry!(22, evictions_are_of_policy_v1),
    entry!(FIRST..=22, a_json_patch_takes_a_replace_for_an_add),
    entry!(23, an_event_of_the_newer_kind_about_a_node_may_be_in_the_default_namespace),
    entry!(23, a_json_patch_replaces_only_what_is_there),
    entry!(FIRST..=24, a_broken_merge_patch_is_an_error_of_the_server),
    entry!(25, a_broken_merge_patch_is_a_bad_request),
    entry!(FIRST..=26, a_watch_does_not_begin_with_a_list),
    // Its gate is on from here on (in 1.32, too, and not in 1.33).
    entry!(34, a_watch_can_begin_with_a_list),
    entry!(FIRST..=22, strict_validation_is_not_known_of),
    entry!(27, strict_validation_refuses_unknown_fields),
];

// -- reading -----------------------------------------------------------------------------------------------------------

async fn what_is_not_there_is_not_found(cluster: &Cluster) -> Result<()> {
    let name = cluster.fresh("nobody");
    let body = cluster.admin.get(&format!("/api/v1/nodes/{name}")).await?.refused(404, "NotFound")?;
    ensure!(body["message"] == format!("nodes \"{name}\" not found"), "{body:#}");
    ensure!(body["details"] == json!({"name": name, "kind": "nodes"}), "{body:#}");
    let patch = json!({"metadata": {"labels": {"a": "b"}}});
    cluster.admin.patch(&format!("/api/v1/nodes/{name}"), MERGE, &patch).await?.refused(404, "NotFound")?;
    cluster.admin.delete(&format!("/api/v1/nodes/{name}")).await?.refused(404, "NotFound")?;
    cluster.admin.get("/api/v1/nonsense").await?.is(404)?;
    cluster.admin.get("/apis/example.com/v1/nodes").await?.is(404).map(drop)
}

const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json";

async fn metadata_alone_can_be_asked_for(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[("a", "b")]).await?;
    let node = cluster.admin.ask(Method::GET, &path, &[("accept", METADATA)], Vec::new()).await?.is(200)?;
    ensure!(node["kind"] == "PartialObjectMetadata" && node["apiVersion"] == "meta.k8s.io/v1", "{node:#}");
    ensure!(node["metadata"]["labels"]["a"] == "b" && node["spec"].is_null() && node["status"].is_null(), "{node:#}");
    let one = format!("/api/v1/nodes?fieldSelector=metadata.name%3D{name}");
    let list = cluster.admin.ask(Method::GET, &one, &[("accept", METADATA_LIST)], Vec::new()).await?.is(200)?;
    ensure!(list["kind"] == "PartialObjectMetadataList" && list["items"][0]["metadata"]["name"] == name, "{list:#}");
    let patch = json!({"metadata": {"labels": {"a": "c"}}}).to_string().into_bytes();
    let headers = [("accept", METADATA), ("content-type", MERGE)];
    let node = cluster.admin.ask(Method::PATCH, &path, &headers, patch).await?.is(200)?;
    ensure!(node["kind"] == "PartialObjectMetadata" && node["metadata"]["labels"]["a"] == "c", "{node:#}");
    Ok(())
}

/// Where nodes of this name are listed and watched.
fn only(name: &str) -> String {
    format!("/api/v1/nodes?fieldSelector=metadata.name%3D{name}")
}

fn version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"].as_str().unwrap_or_default()
}

async fn a_list_by_name_has_one_node_and_a_version_to_watch_from(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    cluster.node(&[]).await?;
    let list = cluster.admin.get(&only(&name)).await?.is(200)?;
    let items = list["items"].as_array().context("no items")?;
    ensure!(items.len() == 1 && items[0]["metadata"]["name"] == name, "{list:#}");
    let (of_list, of_node): (u64, u64) = (version(&list).parse()?, version(&items[0]).parse()?);
    ensure!(of_list >= of_node, "{list:#}");
    let none = cluster.admin.get(&only("nobody-at-all")).await?.is(200)?;
    ensure!(none["items"] == json!([]) && !version(&none).is_empty(), "{none:#}");
    Ok(())
}

async fn an_unknown_field_selector_is_a_bad_request(cluster: &Cluster) -> Result<()> {
    let path = "/api/v1/nodes?fieldSelector=spec.nonsense%3D1";
    cluster.admin.get(path).await?.refused(400, "BadRequest")?;
    cluster.admin.get("/api/v1/nodes?labelSelector=%21%21").await?.refused(400, "BadRequest").map(drop)
}

async fn a_list_in_pieces_is_of_one_moment(cluster: &Cluster) -> Result<()> {
    let label = cluster.fresh("l");
    for _ in 0..3 {
        cluster.node(&[("group", &label)]).await?;
    }
    let path = format!("/api/v1/nodes?labelSelector=group%3D{label}&limit=2");
    let first = cluster.admin.get(&path).await?.is(200)?;
    let next = first["metadata"]["continue"].as_str().context("no more pieces")?;
    ensure!(first["items"].as_array().is_some_and(|items| items.len() == 2), "{first:#}");
    cluster.node(&[("group", &label)]).await?;
    let rest = cluster.admin.get(&format!("{path}&continue={next}")).await?.is(200)?;
    ensure!(rest["items"].as_array().is_some_and(|items| items.len() == 1), "{rest:#}");
    ensure!(version(&first) == version(&rest) && rest["metadata"]["continue"].is_null(), "{first:#} {rest:#}");
    Ok(())
}

async fn a_list_of_a_version_to_come_is_given_up(cluster: &Cluster) -> Result<()> {
    let path = "/api/v1/nodes?resourceVersion=999999999999";
    let body = cluster.admin.get(path).await?.refused(504, "Timeout")?;
    ensure!(body["message"].as_str().is_some_and(|text| text.contains("Too large resource version")), "{body:#}");
    Ok(())
}

// -- watching ----------------------------------------------------------------------------------------------------------

fn step(event: &Value) -> &str {
    event["object"]["metadata"]["labels"]["step"].as_str().unwrap_or_default()
}

async fn set_step(api: &Api, path: &str, step: &str) -> Result<Value> {
    api.patch(path, MERGE, &json!({"metadata": {"labels": {"step": step}}})).await?.is(200)
}

async fn a_watch_tells_each_change_once_and_in_order(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[("step", "0")]).await?;
    let list = cluster.admin.get(&only(&name)).await?.is(200)?;
    let mut watch =
        cluster.admin.watch(&format!("{}&watch=true&resourceVersion={}", only(&name), version(&list))).await?;
    let mut versions = Vec::new();
    for number in 1..=5 {
        versions.push(version(&set_step(&cluster.admin, &path, &number.to_string()).await?).to_owned());
    }
    cluster.admin.delete(&path).await?.is(200)?;
    let (mut seen, mut last) = (Vec::new(), 0);
    // Others may write to the node, too, as the controllers do.
    loop {
        let event = watch.next().await?.context("the watch ends")?;
        let now: u64 = version(&event["object"]).parse()?;
        ensure!(now > last, "{now} after {last}");
        last = now;
        match event["type"].as_str() {
            Some("MODIFIED") if seen.last().is_none_or(|(step_before, _)| step_before != step(&event)) => {
                seen.push((step(&event).to_owned(), version(&event["object"]).to_owned()));
            }
            Some("MODIFIED") => {}
            Some("DELETED") => break,
            _ => anyhow::bail!("{event:#}"),
        }
    }
    seen.retain(|(step, _)| step != "0");
    let wanted: Vec<_> = (1..=5).map(|number| number.to_string()).zip(versions).collect();
    ensure!(seen == wanted, "{seen:?} and not {wanted:?}");
    Ok(())
}

async fn a_watch_without_a_version_begins_with_what_is_there(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[("step", "0")]).await?;
    set_step(&cluster.admin, &path, "1").await?;
    for from in ["", "&resourceVersion=0"] {
        let mut watch = cluster.admin.watch(&format!("{}&watch=true{from}", only(&name))).await?;
        let first = watch.next().await?.context("the watch ends")?;
        ensure!(first["type"] == "ADDED" && first["object"]["metadata"]["name"] == name, "{first:#}");
    }
    Ok(())
}

async fn a_node_that_leaves_a_selector_is_told_as_deleted(cluster: &Cluster) -> Result<()> {
    let label = cluster.fresh("l");
    let (path, name) = cluster.node(&[("group", &label), ("step", "0")]).await?;
    let mut watch = cluster.admin.watch(&format!("/api/v1/nodes?watch=true&labelSelector=group%3D{label}")).await?;
    watch.until(|event| event["type"] == "ADDED").await?;
    let patch = json!({"metadata": {"labels": {"group": "other", "step": "1"}}});
    let patched = cluster.admin.patch(&path, MERGE, &patch).await?.is(200)?;
    let gone = watch.until(|event| event["type"] == "DELETED").await?;
    ensure!(gone["object"]["metadata"]["name"] == name, "{gone:#}");
    // The last state that matched, under the version that ended it.
    ensure!(step(&gone) == "0" && version(&gone["object"]) == version(&patched), "{gone:#} after {patched:#}");
    Ok(())
}

async fn a_watch_ends_at_its_time_after_a_bookmark(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[]).await?;
    let query = "&watch=true&allowWatchBookmarks=true&timeoutSeconds=4";
    let mut watch = cluster.admin.watch(&format!("{}{query}", only(&name))).await?;
    watch.until(|event| event["type"] == "ADDED").await?;
    // What happens to others moves the bookmark, too.
    let (other, _) = cluster.node(&[]).await?;
    let written = set_step(&cluster.admin, &other, "1").await?;
    let bookmark = watch.until(|event| event["type"] == "BOOKMARK").await?;
    let object = &bookmark["object"];
    ensure!(object["kind"] == "Node" && object["metadata"]["name"].is_null(), "{bookmark:#}");
    let (marked, written): (u64, u64) = (version(object).parse()?, version(&written).parse()?);
    ensure!(marked >= written, "the bookmark is of {marked}, before {written}");
    while let Some(event) = watch.next().await? {
        ensure!(event["type"] != "ERROR", "{event:#}");
    }
    cluster.admin.delete(&path).await?.is(200).map(drop)
}

async fn a_watch_without_bookmarks_gets_none(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    let mut watch = cluster.admin.watch(&format!("{}&watch=true&timeoutSeconds=3", only(&name))).await?;
    while let Some(event) = watch.next().await? {
        ensure!(event["type"] != "BOOKMARK" && event["type"] != "ERROR", "{event:#}");
    }
    Ok(())
}

async fn a_watch_from_a_forgotten_version_is_told_410_in_the_stream(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[]).await?;
    set_step(&cluster.admin, &path, "1").await?;
    cluster.forget().await?;
    for form in ["application/json", METADATA] {
        let old = format!("{}&watch=true&resourceVersion=1", only(&name));
        let mut watch = cluster.admin.watch_as(&old, form).await?;
        let event = watch.next().await?.context("the watch ends")?;
        ensure!(event["type"] == "ERROR", "{event:#}");
        let status = &event["object"];
        ensure!(status["kind"] == "Status" && status["code"] == 410 && status["reason"] == "Expired", "{event:#}");
        ensure!(
            status["message"].as_str().is_some_and(|text| text.starts_with("too old resource version: 1 (")),
            "{event:#}"
        );
        ensure!(watch.next().await?.is_none(), "it goes on after the error");
    }
    Ok(())
}

/// As the agents watch their node.
async fn a_watch_of_metadata_alone_tells_no_content(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[("step", "0")]).await?;
    let list = cluster.admin.ask(Method::GET, &only(&name), &[("accept", METADATA_LIST)], Vec::new()).await?.is(200)?;
    let query = format!("&watch=true&allowWatchBookmarks=true&timeoutSeconds=4&resourceVersion={}", version(&list));
    let mut watch = cluster.admin.watch_as(&format!("{}{query}", only(&name)), METADATA).await?;
    let written = set_step(&cluster.admin, &path, "1").await?;
    let is_bare = |event: &Value| {
        let object = &event["object"];
        ensure!(object["kind"] == "PartialObjectMetadata" && object["apiVersion"] == "meta.k8s.io/v1", "{event:#}");
        ensure!(object["spec"].is_null() && object["status"].is_null(), "{event:#}");
        anyhow::Ok(())
    };
    let event = watch.until(|event| step(event) == "1").await?;
    is_bare(&event)?;
    ensure!(event["type"] == "MODIFIED" && version(&event["object"]) == version(&written), "{event:#}");
    ensure!(event["object"]["metadata"]["uid"] == written["metadata"]["uid"], "{event:#}");
    let bookmark = watch.until(|event| event["type"] == "BOOKMARK").await?;
    is_bare(&bookmark)?;
    let (marked, written): (u64, u64) = (version(&bookmark["object"]).parse()?, version(&written).parse()?);
    ensure!(marked >= written && bookmark["object"]["metadata"]["name"].is_null(), "{bookmark:#} after {written}");
    while watch.next().await?.is_some() {}
    let from = format!("{}&watch=true&resourceVersion={marked}", only(&name));
    let mut watch = cluster.admin.watch_as(&from, METADATA).await?;
    cluster.admin.delete(&path).await?.is(200)?;
    let gone = watch.until(|event| event["type"] == "DELETED").await?;
    ensure!(gone["object"]["metadata"]["name"] == name, "{gone:#}");
    is_bare(&gone)
}

/// As cc-manager waits for the end of the components of its node, and `ccnode drain-holders` looks for pods.
async fn pods_of_one_node_are_listed_and_watched_alone(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace().await?;
    await_default_account(cluster, &namespace).await?;
    let (_, node) = cluster.node(&[]).await?;
    let (_, other) = cluster.node(&[]).await?;
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let make = async |name: &str, node: &str| cluster.admin.post(&pods, &pod(name, node)).await?.is(201);
    make("here", &node).await?;
    make("there", &other).await?;
    let of_node = format!("?fieldSelector=spec.nodeName%3D{node}");
    let mut list = Value::Null;
    for place in ["/api/v1/pods", &*pods] {
        list = cluster.admin.get(&format!("{place}{of_node}")).await?.is(200)?;
        let names: Vec<_> =
            list["items"].as_array().context("no items")?.iter().map(|pod| &pod["metadata"]["name"]).collect();
        ensure!(names == ["here"], "{place}: {names:?}");
    }
    let watch = format!("{pods}{of_node}&watch=true&resourceVersion={}", version(&list));
    let mut watch = cluster.admin.watch_as(&watch, METADATA).await?;
    make("there-too", &other).await?;
    make("here-too", &node).await?;
    cluster.admin.delete_now(&format!("{pods}/there")).await?;
    cluster.admin.delete_now(&format!("{pods}/here")).await?;
    let mut told = Vec::new();
    while told.last() != Some(&"DELETED here".to_owned()) {
        let event = watch.next().await?.context("the watch ends")?;
        let word = |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        told.push(format!("{} {}", word("/type"), word("/object/metadata/name")));
    }
    // Controllers may write to a pod, and its end may be marked first.
    told.retain(|told| !told.starts_with("MODIFIED here"));
    ensure!(told == ["ADDED here-too", "DELETED here"], "{told:?}");
    Ok(())
}

/// How a watch is asked for that begins with a list.
const WITH_A_LIST: &str =
    "&watch=true&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";

async fn a_watch_does_not_begin_with_a_list(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    let refused = cluster.admin.get(&format!("{}{WITH_A_LIST}", only(&name))).await?.refused(422, "Invalid")?;
    let message = refused["message"].as_str().unwrap_or_default();
    ensure!(message.contains("resourceVersionMatch is forbidden for watch"), "{message}");
    Ok(())
}

async fn a_watch_can_begin_with_a_list(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    let mut watch = cluster.admin.watch(&format!("{}{WITH_A_LIST}", only(&name))).await?;
    let first = watch.next().await?.context("the watch ends")?;
    ensure!(first["type"] == "ADDED", "{first:#}");
    let end = watch.until(|event| event["type"] == "BOOKMARK").await?;
    ensure!(end["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true", "{end:#}");
    Ok(())
}

// -- writing -----------------------------------------------------------------------------------------------------------

async fn sets_and_removes(cluster: &Cluster, kind: &str) -> Result<()> {
    let (path, _) = cluster.node(&[("stays", "1"), ("goes", "1")]).await?;
    let patch = json!({"metadata": {
        "labels": {"goes": null, "comes": "1", "empty": "", "absent": null},
        "annotations": {"ccnode.dev/x": "{\"a\":1}"},
    }});
    let node = cluster.admin.patch(&path, kind, &patch).await?.is(200)?;
    let labels = &node["metadata"]["labels"];
    ensure!(labels == &json!({"stays": "1", "comes": "1", "empty": ""}), "{labels:#}");
    ensure!(node["metadata"]["annotations"]["ccnode.dev/x"] == "{\"a\":1}", "{node:#}");
    let patch = json!({"metadata": {"annotations": {"ccnode.dev/x": null}}});
    let node = cluster.admin.patch(&path, kind, &patch).await?.is(200)?;
    ensure!(node["metadata"]["annotations"]["ccnode.dev/x"].is_null(), "{node:#}");
    Ok(())
}

async fn a_merge_patch_sets_and_removes_labels_and_annotations(cluster: &Cluster) -> Result<()> {
    sets_and_removes(cluster, MERGE).await
}

async fn a_strategic_patch_does_the_same(cluster: &Cluster) -> Result<()> {
    sets_and_removes(cluster, STRATEGIC).await
}

async fn a_patch_that_changes_nothing_makes_no_version(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[("step", "0")]).await?;
    for _ in 0..20 {
        let before = set_step(&cluster.admin, &path, "1").await?;
        let after = set_step(&cluster.admin, &path, "1").await?;
        // A controller may have written in between, but not every time.
        if version(&before) == version(&after) {
            return Ok(());
        }
    }
    anyhow::bail!("every patch makes a new version")
}

async fn a_json_patch_tests_before_it_writes(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[("step", "0")]).await?;
    let admin = &cluster.admin;
    let patch = |was: Value, to: &str| {
        json!([{"op": "test", "path": "/metadata/labels/step", "value": was},
               {"op": "replace", "path": "/metadata/labels/step", "value": to}])
    };
    admin.patch(&path, JSON, &patch(json!("0"), "1")).await?.is(200)?;
    let refused = admin.patch(&path, JSON, &patch(json!("0"), "2")).await?.refused(422, "Invalid")?;
    ensure!(refused["details"].is_object(), "{refused:#}");
    let absent = |op: &str| json!([{"op": op, "path": "/metadata/labels/absent", "value": "x"}]);
    admin.patch(&path, JSON, &absent("remove")).await?.refused(422, "Invalid")?;
    admin.patch(&path, JSON, &absent("test")).await?.refused(422, "Invalid")?;
    // A label that is not there is null, which is how an absent one is tested for.
    let null = json!([{"op": "test", "path": "/metadata/labels/absent", "value": null},
                      {"op": "add", "path": "/metadata/labels/absent", "value": "x"}]);
    let node = admin.patch(&path, JSON, &null).await?.is(200)?;
    ensure!(node["metadata"]["labels"] == json!({"step": "1", "absent": "x"}), "{node:#}");
    admin.patch(&path, JSON, &null).await?.refused(422, "Invalid").map(drop)
}

/// What comes of the replacement of a label that is not there.
async fn replaced_label(cluster: &Cluster) -> Result<Answer> {
    let (path, _) = cluster.node(&[("step", "0")]).await?;
    let replace = json!([{"op": "replace", "path": "/metadata/labels/absent", "value": "x"}]);
    cluster.admin.patch(&path, JSON, &replace).await
}

async fn a_json_patch_takes_a_replace_for_an_add(cluster: &Cluster) -> Result<()> {
    let node = replaced_label(cluster).await?.is(200)?;
    ensure!(node["metadata"]["labels"] == json!({"step": "0", "absent": "x"}), "{node:#}");
    Ok(())
}

async fn a_json_patch_replaces_only_what_is_there(cluster: &Cluster) -> Result<()> {
    replaced_label(cluster).await?.refused(422, "Invalid").map(drop)
}

/// As the agents write what they have computed from what they read.
async fn a_json_patch_tests_uid_and_version(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[]).await?;
    let patch = |field: &str, value: &Value, to: &str| {
        json!([{"op": "test", "path": format!("/metadata/{field}"), "value": value},
               {"op": "add", "path": "/metadata/labels", "value": {"step": to}}])
    };
    let node = cluster.admin.get(&path).await?.is(200)?;
    let node = cluster.admin.patch(&path, JSON, &patch("uid", &node["metadata"]["uid"], "1")).await?.is(200)?;
    let other = json!("11111111-2222-3333-4444-555555555555");
    cluster.admin.patch(&path, JSON, &patch("uid", &other, "2")).await?.refused(422, "Invalid")?;
    set_step(&cluster.admin, &path, "3").await?;
    let old = &node["metadata"]["resourceVersion"];
    cluster.admin.patch(&path, JSON, &patch("resourceVersion", old, "4")).await?.refused(422, "Invalid")?;
    ensure!(step(&json!({"object": cluster.admin.get(&path).await?.is(200)?})) == "3", "a refused patch was made");
    // Somebody may write in between, but not every time.
    for _ in 0..20 {
        let now = cluster.admin.get(&path).await?.is(200)?;
        let now = &now["metadata"]["resourceVersion"];
        let answer = cluster.admin.patch(&path, JSON, &patch("resourceVersion", now, "5")).await?;
        if answer.code != 422 {
            return answer.is(200).map(drop);
        }
    }
    anyhow::bail!("the version that was read is never the node's")
}

async fn a_patch_of_another_version_or_uid_refused(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[("step", "0")]).await?;
    let old = cluster.admin.get(&path).await?.is(200)?;
    set_step(&cluster.admin, &path, "1").await?;
    let labels = json!({"step": "2"});
    let of_version = json!({"metadata": {"resourceVersion": version(&old), "labels": labels}});
    let refused = cluster.admin.patch(&path, MERGE, &of_version).await?.refused(409, "Conflict")?;
    ensure!(refused["details"]["name"] == name && refused["details"]["kind"] == "nodes", "{refused:#}");
    let of_uid = json!({"metadata": {"uid": "11111111-2222-3333-4444-555555555555", "labels": labels}});
    let refused = cluster.admin.patch(&path, MERGE, &of_uid).await?.refused(422, "Invalid")?;
    ensure!(refused["details"]["causes"][0]["field"] == "metadata.uid", "{refused:#}");
    let is_same = json!({"metadata": {"uid": old["metadata"]["uid"], "labels": labels}});
    cluster.admin.patch(&path, MERGE, &is_same).await?.is(200).map(drop)
}

async fn bad_labels_are_invalid_and_say_which(cluster: &Cluster) -> Result<()> {
    let (path, name) = cluster.node(&[]).await?;
    let long = "x".repeat(64);
    for (key, value) in [("a", "b c"), ("a", "-"), ("a", &*long), ("a/b/c", "d"), ("-a", "d"), ("", "d")] {
        let patch = json!({"metadata": {"labels": {key: value}}});
        let body = cluster.admin.patch(&path, MERGE, &patch).await?.refused(422, "Invalid")?;
        let details = &body["details"];
        ensure!(details["name"] == name && details["kind"] == "Node", "{key:?}={value:?}: {body:#}");
        let cause = &details["causes"][0];
        ensure!(
            cause["reason"] == "FieldValueInvalid" && cause["field"] == "metadata.labels",
            "{key:?}={value:?}: {body:#}"
        );
    }
    let huge = json!({"metadata": {"annotations": {"a": "x".repeat(300_000)}}});
    let body = cluster.admin.patch(&path, MERGE, &huge).await?.refused(422, "Invalid")?;
    ensure!(
        body["details"]["causes"][0]["reason"] == "FieldValueTooLong",
        "{:#}",
        body["details"]["causes"][0]["reason"]
    );
    Ok(())
}

async fn patches_that_cannot_be_read_are_refused(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[]).await?;
    let send = async |kind: &str, text: &str| {
        cluster.admin.ask(Method::PATCH, &path, &[("content-type", kind)], text.as_bytes().to_vec()).await
    };
    send("text/plain", "{}").await?.refused(415, "UnsupportedMediaType")?;
    send(JSON, "{}").await?.refused(400, "BadRequest")?;
    // What is no label at all is found when the patched object is read.
    send(MERGE, r#"{"metadata":{"labels":{"a":1}}}"#).await?.is(422)?;
    Ok(())
}

/// What comes of a merge patch that is no JSON.
async fn broken_merge_patch(cluster: &Cluster) -> Result<Answer> {
    let (path, _) = cluster.node(&[]).await?;
    cluster.admin.ask(Method::PATCH, &path, &[("content-type", MERGE)], b"{".to_vec()).await
}

async fn a_broken_merge_patch_is_an_error_of_the_server(cluster: &Cluster) -> Result<()> {
    broken_merge_patch(cluster).await?.is(500).map(drop)
}

async fn a_broken_merge_patch_is_a_bad_request(cluster: &Cluster) -> Result<()> {
    broken_merge_patch(cluster).await?.refused(400, "BadRequest").map(drop)
}

async fn writers_of_different_labels_do_not_meet(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[("step", "0")]).await?;
    let write = async |number: usize| {
        for kind in [MERGE, STRATEGIC] {
            let patch = json!({"metadata": {"labels": {format!("writer-{number}"): kind[12..17]}}});
            cluster.admin.patch(&path, kind, &patch).await?.is(200)?;
        }
        anyhow::Ok(())
    };
    for result in join_all((0..20).map(write)).await {
        result?;
    }
    let node = cluster.admin.get(&path).await?.is(200)?;
    let labels = node["metadata"]["labels"].as_object().context("no labels")?;
    ensure!(labels.len() == 21, "{labels:#?}");
    Ok(())
}

async fn of_writers_that_test_the_same_label_one_wins(cluster: &Cluster) -> Result<()> {
    let (path, _) = cluster.node(&[("step", "0")]).await?;
    let write = async |number: usize| {
        let patch = json!([{"op": "test", "path": "/metadata/labels/step", "value": "0"},
                           {"op": "replace", "path": "/metadata/labels/step", "value": format!("w{number}")}]);
        cluster.admin.patch(&path, JSON, &patch).await
    };
    let answers: Vec<Answer> = join_all((0..20).map(write)).await.into_iter().collect::<Result<_>>()?;
    let codes: Vec<_> = answers.iter().map(|answer| answer.code).collect();
    let won: Vec<_> = answers.iter().filter(|answer| answer.code == 200).collect();
    ensure!(won.len() == 1 && codes.iter().all(|code| [200, 409, 422].contains(code)), "{codes:?}");
    let node = cluster.admin.get(&path).await?.is(200)?;
    ensure!(node["metadata"]["labels"]["step"] == won[0].body["metadata"]["labels"]["step"], "{node:#}");
    Ok(())
}

/// What comes of a patch with an unknown field, which is dropped by default, where strictness is asked for.
async fn strictly_validated(cluster: &Cluster) -> Result<Answer> {
    let (path, _) = cluster.node(&[]).await?;
    let patch = json!({"spec": {"nonsense": 1}});
    let node = cluster.admin.patch(&path, MERGE, &patch).await?.is(200)?;
    ensure!(node["spec"].get("nonsense").is_none(), "{node:#}");
    cluster.admin.patch(&format!("{path}?fieldValidation=Strict"), MERGE, &patch).await
}

async fn strict_validation_is_not_known_of(cluster: &Cluster) -> Result<()> {
    strictly_validated(cluster).await?.is(200).map(drop)
}

async fn strict_validation_refuses_unknown_fields(cluster: &Cluster) -> Result<()> {
    let body = strictly_validated(cluster).await?;
    ensure!([400, 422].contains(&body.code), "{body:?}");
    ensure!(body.body["message"].as_str().is_some_and(|text| text.contains("unknown field")), "{body:?}");
    Ok(())
}

// -- who may do what ---------------------------------------------------------------------------------------------------

/// What an identity asks, and the code that it gets.
type Attempt<'a> = (Method, String, Value, u16);

async fn attempts(api: &Api, attempts: Vec<Attempt<'_>>) -> Result<()> {
    for (method, path, body, code) in attempts {
        let kind = if method == Method::PATCH { MERGE } else { "application/json" };
        let bytes = if body.is_null() { Vec::new() } else { serde_json::to_vec(&body)? };
        let answer = api.ask(method.clone(), &path, &[("content-type", kind)], bytes).await?;
        let at = format!("{method} {path}");
        match code {
            403 => drop(answer.refused(403, "Forbidden").context(at)?),
            _ => drop(answer.is(code).context(at)?),
        }
    }
    Ok(())
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"app": "component"}},
        "spec": {
            "nodeName": node, "hostNetwork": true, "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": real_kube::IMAGE, "imagePullPolicy": "Never"}],
        },
    })
}

fn event(node: &str, namespace: &str) -> Value {
    json!({
        "metadata": {"generateName": "contract-", "namespace": namespace},
        "involvedObject": {"kind": "Node", "name": node, "uid": node, "apiVersion": "v1"},
        "reason": "Contract", "message": "Seen", "type": "Normal", "count": 1,
        "source": {"component": "contract"},
        "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z",
    })
}

/// A service account in a new namespace has not been made by the time that the namespace has.
async fn await_default_account(cluster: &Cluster, namespace: &str) -> Result<()> {
    if cluster.is_real() {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/default");
        cluster.admin.until(&path, |answer| (answer.code == 200).then_some(())).await?;
    }
    Ok(())
}

async fn the_operators_rules_of_cc_manager_allow_this_and_no_more(cluster: &Cluster) -> Result<()> {
    let (operator, other) = (cluster.namespace().await?, cluster.namespace().await?);
    let (path, name) = cluster.node(&[]).await?;
    let agent = cluster.account(&operator, &Rule::operator_cc_manager(&operator)).await?;
    let label = json!({"metadata": {"labels": {"nvidia.com/cc.mode.state": "on"}}});
    let status = json!({"status": {"allocatable": {"nvidia.com/pgpu": "2"}}});
    let pods = |namespace: &str| format!("/api/v1/namespaces/{namespace}/pods");
    let none = || Value::Null;
    attempts(
        &agent.api,
        vec![
            (Method::GET, path.clone(), none(), 200),
            (Method::GET, only(&name), none(), 200),
            (Method::GET, format!("{}&watch=true&timeoutSeconds=1", only(&name)), none(), 200),
            (Method::PATCH, path.clone(), label.clone(), 200),
            (Method::PATCH, format!("{path}/status"), status, 403),
            (Method::DELETE, path.clone(), none(), 403),
            (Method::POST, "/api/v1/nodes".to_owned(), json!({"metadata": {"name": "other"}}), 403),
            (Method::PUT, path.clone(), json!({"metadata": {"name": name}}), 403),
            (Method::GET, pods(&operator), none(), 200),
            (Method::GET, format!("{}?watch=true&timeoutSeconds=1", pods(&operator)), none(), 200),
            (Method::GET, pods(&other), none(), 403),
            (Method::GET, "/api/v1/pods".to_owned(), none(), 403),
            (Method::DELETE, format!("{}/component", pods(&operator)), none(), 403),
            (Method::POST, "/api/v1/namespaces/default/events".to_owned(), event(&name, "default"), 403),
            (Method::POST, format!("/api/v1/namespaces/{operator}/events"), event(&name, &operator), 403),
            (Method::GET, format!("/api/v1/namespaces/{operator}/configmaps"), none(), 403),
        ],
    )
    .await
}

async fn the_operators_rules_of_vfio_manager_allow_this_and_no_more(cluster: &Cluster) -> Result<()> {
    let (operator, other) = (cluster.namespace().await?, cluster.namespace().await?);
    let (path, name) = cluster.node(&[]).await?;
    await_default_account(cluster, &other).await?;
    cluster.admin.post(&format!("/api/v1/namespaces/{other}/pods"), &pod("victim", &name)).await?.is(201)?;
    let agent = cluster.account(&operator, &Rule::operator_vfio_manager()).await?;
    let eviction = |pod: &str| json!({"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": pod, "namespace": other}});
    let victim = format!("/api/v1/namespaces/{other}/pods/victim");
    attempts(
        &agent.api,
        vec![
            (Method::GET, path.clone(), Value::Null, 200),
            (Method::PATCH, path, json!({"metadata": {"labels": {"a": "b"}}}), 200),
            (Method::GET, "/api/v1/pods".to_owned(), Value::Null, 200),
            (Method::GET, victim.clone(), Value::Null, 200),
            (Method::DELETE, victim.clone(), Value::Null, 403),
            (Method::POST, format!("{victim}/eviction"), eviction("victim"), 201),
            (Method::POST, format!("/api/v1/namespaces/{other}/pods/nobody/eviction"), eviction("nobody"), 404),
        ],
    )
    .await
}

async fn a_refusal_names_user_verb_and_resource(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace().await?;
    let nobody = cluster.account(&namespace, &[]).await?;
    for (path, resource, group, place) in [
        ("/api/v1/nodes".to_owned(), "nodes", "", "at the cluster scope".to_owned()),
        (
            format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"),
            "events",
            "events.k8s.io",
            format!("in the namespace \"{namespace}\""),
        ),
    ] {
        let body = nobody.api.get(&path).await?.refused(403, "Forbidden")?;
        let user = &nobody.user;
        let at = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
        let text = format!(
            "{at} is forbidden: User \"{user}\" cannot list resource \"{resource}\" in API group \"{group}\" {place}"
        );
        ensure!(body["message"] == text, "{:#} and not {text}", body["message"]);
    }
    Ok(())
}

async fn a_kubelets_identity_is_kept_to_its_own_node(cluster: &Cluster) -> Result<()> {
    let (kubelet, node) = cluster.kubelet().await?;
    let (other, _) = cluster.node(&[]).await?;
    let own = format!("/api/v1/nodes/{node}");
    let label = |key: &str| json!({"metadata": {"labels": {key: "x"}}});
    attempts(
        &kubelet,
        vec![
            (Method::GET, own.clone(), Value::Null, 200),
            (Method::PATCH, own.clone(), label("nvidia.com/contract"), 200),
            (Method::PATCH, own.clone(), label("feature.node.kubernetes.io/contract"), 200),
            (Method::PATCH, own.clone(), label("node-restriction.kubernetes.io/contract"), 403),
            (Method::PATCH, own.clone(), label("contract.kubernetes.io/x"), 403),
            (Method::PATCH, own.clone(), json!({"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}), 403),
            (Method::PATCH, other, label("nvidia.com/contract"), 403),
            (Method::PATCH, format!("{own}/status"), json!({"status": {"nodeInfo": {}}}), 200),
        ],
    )
    .await
}

async fn an_expired_or_unknown_token_is_unauthorized_and_no_token_is_forbidden(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace().await?;
    let (path, name) = cluster.node(&[("step", "0")]).await?;
    let agent = cluster.account(&namespace, &Rule::operator_cc_manager(&namespace)).await?;
    let mut watch = agent.api.watch(&format!("{}&watch=true", only(&name))).await?;
    watch.until(|event| event["type"] == "ADDED").await?;
    let expired = cluster.expired(&agent).await?;
    for api in [expired, cluster.bearer("nonsense").await?] {
        let body = api.get(&path).await?.refused(401, "Unauthorized")?;
        ensure!(body["message"] == "Unauthorized", "{body:#}");
    }
    let body = cluster.anonymous().await?.get(&path).await?.refused(403, "Forbidden")?;
    ensure!(
        body["message"].as_str().is_some_and(|text| text.contains("User \"system:anonymous\" cannot get")),
        "{body:#}"
    );
    // Who has opened a watch keeps it.
    set_step(&cluster.admin, &path, "1").await?;
    watch.until(|event| step(event) == "1").await.map(drop)
}

// -- events and pods ---------------------------------------------------------------------------------------------------

async fn events_of_a_node_are_of_the_default_namespace(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace().await?;
    let (_, name) = cluster.node(&[]).await?;
    let place = |namespace: &str| format!("/api/v1/namespaces/{namespace}/events");
    let made = cluster.admin.post(&place("default"), &event(&name, "default")).await?.is(201)?;
    ensure!(made["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("contract-")), "{made:#}");
    // The object has no namespace: that is the default one, or none.
    let refused = cluster.admin.post(&place(&namespace), &event(&name, &namespace)).await?.refused(422, "Invalid")?;
    ensure!(refused["details"]["causes"][0]["field"] == "involvedObject.namespace", "{refused:#}");
    let path = format!("{}?fieldSelector=involvedObject.name%3D{name}", place("default"));
    let list = cluster.admin.get(&path).await?.is(200)?;
    let found = list["items"].as_array().context("no items")?;
    // The controllers tell of a node, too.
    ensure!(found.iter().any(|found| found["metadata"]["name"] == made["metadata"]["name"]), "{list:#}");
    let newer =
        format!("/apis/events.k8s.io/v1/namespaces/default/events/{}", made["metadata"]["name"].as_str().unwrap_or(""));
    let newer = cluster.admin.get(&newer).await?.is(200)?;
    ensure!(
        newer["regarding"]["name"] == name && newer["note"] == "Seen" && newer["deprecatedCount"] == 1,
        "{newer:#}"
    );
    Ok(())
}

/// What comes of an event of the newer kind about a node, as the agents write them.
async fn newer_event(cluster: &Cluster, name: &str, namespace: &str) -> Result<Answer> {
    let event = json!({
        "metadata": {"generateName": "contract-", "namespace": namespace}, "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal", "reason": "Contract", "action": "Change", "note": "Seen",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": name, "uid": name},
        "reportingController": "ccnode.dev/contract", "reportingInstance": name,
    });
    cluster.admin.post(&format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"), &event).await
}

/// Of 1.20.2, that is: the later ones of 1.20 to 1.22 take it (kubernetes/kubernetes#100125).
async fn an_event_of_the_newer_kind_about_a_node_is_invalid_outside_of_kube_system(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    newer_event(cluster, &name, "default").await?.refused(422, "Invalid")?;
    newer_event(cluster, &name, "kube-system").await?.is(201).map(drop)
}

async fn an_event_of_the_newer_kind_about_a_node_may_be_in_the_default_namespace(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    let made = newer_event(cluster, &name, "default").await?.is(201)?;
    ensure!(made["regarding"]["name"] == name && made["note"] == "Seen", "{made:#}");
    Ok(())
}

async fn an_event_is_counted_up_by_a_patch(cluster: &Cluster) -> Result<()> {
    let (_, name) = cluster.node(&[]).await?;
    let made = cluster.admin.post("/api/v1/namespaces/default/events", &event(&name, "default")).await?.is(201)?;
    let path = format!("/api/v1/namespaces/default/events/{}", made["metadata"]["name"].as_str().unwrap_or_default());
    let patch = json!({"count": 2, "lastTimestamp": "2026-01-01T00:01:00Z"});
    for kind in [MERGE, STRATEGIC] {
        let patched = cluster.admin.patch(&path, kind, &patch).await?.is(200)?;
        ensure!(patched["count"] == 2 && patched["message"] == "Seen", "{patched:#}");
    }
    Ok(())
}

/// A pod `component` in a namespace of its own, on a node that no kubelet keeps: the path of its namespace's pods, and the pod.
async fn component(cluster: &Cluster) -> Result<(String, Value)> {
    let namespace = cluster.namespace().await?;
    let (_, node) = cluster.node(&[]).await?;
    await_default_account(cluster, &namespace).await?;
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let made = cluster.admin.post(&pods, &pod("component", &node)).await?.is(201)?;
    Ok((pods, made))
}

async fn a_deleted_pod_stays_until_its_time_is_over(cluster: &Cluster) -> Result<()> {
    let (pods, _) = component(cluster).await?;
    let path = format!("{pods}/component");
    let marked = cluster.admin.delete(&path).await?.is(200)?;
    ensure!(marked["metadata"]["deletionTimestamp"].is_string(), "{marked:#}");
    ensure!(marked["metadata"]["deletionGracePeriodSeconds"] == 30, "{marked:#}");
    // There is no kubelet to end it.
    let still = cluster.admin.get(&path).await?.is(200)?;
    ensure!(still["metadata"]["deletionTimestamp"].is_string(), "{still:#}");
    cluster.admin.delete_now(&path).await
}

/// An eviction as `ccnode drain-holders` asks for it.
fn eviction(version: &str, pod: &str, uid: &Value) -> Value {
    json!({
        "apiVersion": version, "kind": "Eviction", "metadata": {"name": pod},
        "deleteOptions": {"preconditions": {"uid": uid}},
    })
}

async fn a_pod_that_a_budget_needs_is_not_evicted_before_it_may_be(cluster: &Cluster) -> Result<()> {
    let (pods, made) = component(cluster).await?;
    let namespace = made["metadata"]["namespace"].as_str().context("no namespace")?;
    let path = format!("{pods}/component");
    let eviction = eviction(cluster.policy(), "component", &made["metadata"]["uid"]);
    let evict = async || cluster.admin.post(&format!("{path}/eviction"), &eviction).await;
    // There is no kubelet to say so. One that does not run yet is nobody's loss.
    let runs = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    cluster.admin.patch(&format!("{path}/status"), STRATEGIC, &runs).await?.is(200)?;
    cluster.forbid_disruptions(namespace, "component", "component").await?;
    for _ in 0..2 {
        let refused = evict().await?.refused(429, "TooManyRequests")?;
        ensure!(
            refused["message"] == "Cannot evict pod as it would violate the pod's disruption budget.",
            "{refused:#}"
        );
        let needed = format!("The disruption budget {} needs 1 healthy pods and has 1 currently", budget("component"));
        ensure!(
            refused["details"]["causes"] == json!([{"reason": "DisruptionBudget", "message": needed}]),
            "{refused:#}"
        );
        ensure!(refused["details"]["retryAfterSeconds"].is_null(), "{refused:#}");
    }
    let stays = cluster.admin.get(&path).await?.is(200)?;
    ensure!(stays["metadata"]["deletionTimestamp"].is_null(), "{stays:#}");
    cluster.allow_disruptions(namespace, "component").await?;
    // The server may not have heard of it yet.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let answer = loop {
        let answer = evict().await?;
        if answer.code != 429 || tokio::time::Instant::now() > deadline {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    ensure!(answer.is(201)?["status"] == "Success", "the eviction is no success");
    let ends = cluster.admin.get(&path).await?.is(200)?;
    ensure!(ends["metadata"]["deletionTimestamp"].is_string(), "{ends:#}");
    Ok(())
}

/// Another pod may have the name by now. 1.20.2 tries it again and again, and takes ten seconds for the answer.
async fn an_eviction_of_another_uid_is_a_conflict(cluster: &Cluster) -> Result<()> {
    let (pods, _) = component(cluster).await?;
    let other = eviction(cluster.policy(), "component", &json!("11111111-2222-3333-4444-555555555555"));
    cluster.admin.post(&format!("{pods}/component/eviction"), &other).await?.refused(409, "Conflict")?;
    let stays = cluster.admin.get(&format!("{pods}/component")).await?.is(200)?;
    ensure!(stays["metadata"]["deletionTimestamp"].is_null(), "{stays:#}");
    Ok(())
}

async fn evictions_are_of_policy_v1(cluster: &Cluster) -> Result<()> {
    let (pods, _) = component(cluster).await?;
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "component"}});
    cluster.admin.post(&format!("{pods}/component/eviction"), &eviction).await?.is(201).map(drop)
}

// -- the list against both ---------------------------------------------------------------------------------------------

async fn all(cluster: Cluster) -> Result<()> {
    holds(CONTRACT, &cluster, cluster.minor, cluster.is_ours()).await
}

#[test]
fn the_stand_in_keeps_the_contract() -> Result<()> {
    let config = ApiServerConfig { bookmark_interval: Duration::from_mins(1), ..ApiServerConfig::default() };
    run(async { all(Cluster::stand_in(config).await?).await })
}

#[test]
#[ignore = "needs a real cluster: hack/test --real-kube"]
fn a_real_api_server_keeps_the_contract() -> Result<()> {
    run(async { all(Cluster::real().await?).await })
}
