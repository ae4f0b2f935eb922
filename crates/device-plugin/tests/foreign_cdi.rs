//! CDI files of others are judged as Kata's Go runtime does, by the kubelet stand-in's reader of them, which was written from
//! CDI's rules alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::World;
use device_plugin::cdi::Resolver;
use device_plugin::units::IdScheme;
use serde_json::{Value, json};

/// A file with everything that CDI 0.6.0 has.
fn whole() -> Value {
    let edits = json!({
        "env": ["A=B"],
        "deviceNodes": [{
            "path": "/dev/x", "hostPath": "/dev/y", "type": "c", "major": 1, "minor": 2, "fileMode": 384,
            "permissions": "rw", "uid": 0, "gid": 0,
        }],
        "hooks": [{"hookName": "createRuntime", "path": "/bin/x", "args": ["x"], "env": ["C=D"], "timeout": 5}],
        "mounts": [{"hostPath": "/a", "containerPath": "/b", "options": ["ro"], "type": "bind"}],
    });
    json!({
        "cdiVersion": "0.6.0", "kind": "a.b/c", "annotations": {"k": "v"}, "containerEdits": edits,
        "devices": [{"name": "x", "annotations": {"k": "v"}, "containerEdits": edits}, {"name": "y", "containerEdits": edits}],
    })
}

/// The places of all values in a value.
fn places(value: &Value, here: &str, found: &mut Vec<String>) {
    found.push(here.to_owned());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, field)| places(field, &format!("{here}/{name}"), found));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(at, item)| places(item, &format!("{here}/{at}"), found));
        }
        _ => {}
    }
}

/// The file without what is at this place.
fn without(mut file: Value, place: &str) -> Value {
    let (parent, last) = place.rsplit_once('/').unwrap();
    match file.pointer_mut(parent).unwrap() {
        Value::Object(fields) => drop(fields.remove(last)),
        Value::Array(items) => drop(items.remove(last.parse().unwrap())),
        _ => unreachable!("only these have parts"),
    }
    file
}

/// Files with one thing changed, in every version, and what was changed.
fn files() -> BTreeMap<String, Value> {
    let mut found = Vec::new();
    places(&whole(), "", &mut found);
    let mut files = BTreeMap::from([("nothing".to_owned(), whole())]);
    for place in found.iter().filter(|place| !place.is_empty()) {
        files.insert(format!("without {place}"), without(whole(), place));
        for value in [json!(""), json!("a b"), json!("0"), json!("x.y/c.d"), json!("y"), json!(7), json!([]), json!({})]
        {
            let mut file = whole();
            file.pointer_mut(place).unwrap().clone_from(&value);
            files.insert(format!("{place} is {value}"), file);
        }
    }
    for place in &found {
        let mut file = whole();
        if let Some(Value::Object(fields)) = file.pointer_mut(place) {
            fields.insert("surprise".into(), json!("x"));
            files.insert(format!("{place} has a surprise"), file);
        }
    }
    // What each version lacks, alone in an otherwise plain file.
    let plain = json!({"kind": "a.b/c", "devices": [{"name": "x", "containerEdits": {"env": ["A=B"]}}]});
    let node = |more: Value| {
        let mut node = json!({"path": "/dev/x"});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"deviceNodes": [node]})
    };
    let news: [(&str, &str, Value); 7] = [
        ("nothing new", "/kind", json!("a.b/c")),
        ("a dot", "/kind", json!("a.b/c.d")),
        ("a digit", "/devices/0/name", json!("0")),
        ("a node of the host", "/devices/0/containerEdits", node(json!({"hostPath": "/dev/y"}))),
        ("a node with a type", "/devices/0/containerEdits", node(json!({"type": "b"}))),
        (
            "a mount with a type",
            "/devices/0/containerEdits",
            json!({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "t"}]}),
        ),
        ("a mount", "/devices/0/containerEdits", json!({"mounts": [{"hostPath": "/a", "containerPath": "/b"}]})),
    ];
    for version in ["", "0.2.0", "0.3", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "1.0.0"] {
        for (what, place, value) in &news {
            let mut file = plain.clone();
            file["cdiVersion"] = version.into();
            file.pointer_mut(place).unwrap().clone_from(value);
            files.insert(format!("{what} in version {version:?}"), file);
        }
        let mut file = plain.clone();
        file["cdiVersion"] = version.into();
        file["annotations"] = json!({"k": "v"});
        files.insert(format!("an annotation in version {version:?}"), file);
    }
    files
}

#[tokio::test]
async fn what_kata_refuses_is_found_and_nothing_else() {
    let mut world = World::new(1).await;
    let agent = world.start(world.config(IdScheme::Pci));
    world.allocatable(1).await;
    let pod = world.running_pod(1).await;
    agent.end().await;
    let folder = world.fake.path().join("etc/cdi");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("foreign.json");
    let (mut valid, mut invalid) = (0, 0);
    for (what, file) in files() {
        std::fs::write(&path, file.to_string()).unwrap();
        let refused = world.resolve(&pod).await.err();
        let mut resolver = Resolver::new([folder.clone(), world.cdi_dir()]);
        let found = resolver.check(&[], &BTreeSet::new()).problems.remove(&path);
        assert_eq!(found.is_some(), refused.is_some(), "{what}: {found:?}, and Kata says {refused:?}\n{file:#}");
        if found.is_some() { invalid += 1 } else { valid += 1 }
    }
    eprintln!("{valid} valid files, {invalid} that are not; 0 of them judged otherwise");
    assert!(valid > 50 && invalid > 200, "{valid} {invalid}");
}
