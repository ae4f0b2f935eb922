//! cc-manager with a real API server, the DaemonSets of the operator and a real kubelet: what it pauses really ends, what it asks
//! is counted in the server's own audit log, and what it may not do it says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "real_kube/agent.rs"]
mod agent;
#[path = "real_kube/operator.rs"]
mod operator;
mod real_kube;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent::parts::{OPERANDS, ready_state};
use agent::{Agent, Hardware, Start};
use anyhow::{Context, Result, ensure};
use gpu_firmware::Mode;
use lab_kube::api_server::Rule;
use node_object::annotations;
use node_object::labels::{CC_MODE_STATE, CC_READY_STATE};
use operator::{Components, OPERATOR, chart, want};
use real_kube::{Account, Cluster, IMAGE, NODE, PATIENCE, audited, run};
use serde_json::{Value, json};

/// What has been asked since.
fn since(before: &BTreeMap<String, usize>, now: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let more = |(what, count): (&String, &usize)| {
        let more = count - before.get(what).copied().unwrap_or_default();
        (more > 0).then(|| (what.clone(), more))
    };
    now.iter().filter_map(more).collect()
}

/// What the server answers to a patch that was computed from what another has changed meanwhile: it is computed anew.
const MET_ANOTHER: &str = "patch nodes, 422";

/// A change with all components at work on the kubelet's node. Returns what the agent has asked meanwhile.
async fn changes(
    components: &Components,
    hardware: &Hardware,
    account: &Account,
    cluster: &Cluster,
    mode: Mode,
) -> Result<BTreeMap<String, usize>> {
    let (asked, before) = (audited(account)?, components.running().await?);
    want(&cluster.admin, NODE, Some(mode)).await?;
    components.until_settled(mode).await.with_context(|| format!("mode {mode}"))?;
    hardware.is_in(mode)?;
    let after = components.running().await?;
    ensure!(after.keys().eq(before.keys()), "{after:?} after {before:?}");
    let kept: Vec<_> = after.iter().filter(|(name, uid)| before[*name] == **uid).collect();
    ensure!(kept.is_empty(), "these pods were never ended: {kept:?}");
    // Events come after the result.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = since(&asked, &audited(account)?);
    println!("audit: a change to {mode}: {asked:?}");
    ensure!(asked.get("patch nodes") == Some(&2), "a change is two patches, and not {asked:?}");
    Ok(asked)
}

fn start(hardware: &Hardware, account: &Account, namespace: &str, components: &Components) -> Result<Agent> {
    let (look, ended) = (components.look(), agent::nobody_is_told());
    hardware.start(Start { kubeconfig: &account.kubeconfig, node: NODE, namespace, answer: PATIENCE, look, ended })
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn pausing_ends_the_operators_pods_and_a_change_is_two_patches() -> Result<()> {
    run(async {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        let rules = Rule::operator_cc_manager(&namespace);
        let account = cluster.account_named(&namespace, "nvidia-cc-manager", &rules).await?;
        want(&cluster.admin, NODE, Some(Mode::Off)).await?;
        let components = Components::on_the_kubelets_node(&cluster, &namespace).await?;
        let hardware = Hardware::new()?;
        let agent = start(&hardware, &account, &namespace, &components)?;
        components.until_settled(Mode::Off).await.context("at the start")?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let counts = audited(&account)?;
        println!("audit: the start of cc-manager: {counts:?}");

        // Watches are resumed before they end by themselves; besides, nothing is asked.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let idle = since(&counts, &audited(&account)?);
        println!("audit: 10 s at rest: {idle:?}");
        ensure!(idle.is_empty(), "at rest it asks for {idle:?}");

        for mode in [Mode::On, Mode::Devtools, Mode::Off] {
            let asked = changes(&components, &hardware, &account, &cluster, mode).await?;
            // The operator grants no events.
            let is_right = |what: &str| !what.contains(", ") || ["create events, 403", MET_ANOTHER].contains(&what);
            ensure!(asked.keys().all(|what| is_right(what)), "{asked:?}");
        }
        agent.end().await?;
        components.remove().await
    })
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn the_charts_own_accounts_and_roles_are_enough_and_nothing_is_refused() -> Result<()> {
    run(async {
        let cluster = Cluster::real().await?;
        let account = operator::charts_account(&cluster).await?;
        want(&cluster.admin, NODE, Some(Mode::Off)).await?;
        let components = Components::on_the_kubelets_node(&cluster, OPERATOR).await?;
        let hardware = Hardware::new()?;
        let agent = start(&hardware, &account, OPERATOR, &components)?;
        components.until_settled(Mode::Off).await.context("at the start")?;
        for mode in [Mode::On, Mode::Off] {
            let asked = changes(&components, &hardware, &account, &cluster, mode).await?;
            // The first servers of 1.20 to 1.22 find events about nodes invalid, whoever writes them.
            let told = if cluster.minor < 22 { "create events, 422" } else { "create events" };
            ensure!(asked.contains_key(told), "no event is told: {asked:?}");
            ensure!(
                asked.keys().all(|what| !what.contains(", ") || [told, MET_ANOTHER].contains(&&**what)),
                "{asked:?}"
            );
        }
        agent.end().await?;
        components.remove().await
    })
}

/// The chart's rules for cc-manager without one verb, and that verb alone, for components in a namespace.
fn without_a_verb(namespace: &str) -> Result<Vec<(Vec<Rule>, Rule)>> {
    let mut rules = chart()?.rules("ccnode-cc-manager")?;
    for place in rules.iter_mut().filter_map(|rule| rule.namespace.as_mut()).filter(|place| *place == OPERATOR) {
        namespace.clone_into(place);
    }
    let mut all = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        for verb in &rule.verbs {
            let mut rest = rules.clone();
            rest[index].verbs.retain(|other| other != verb);
            // A rule without verbs is none.
            rest.retain(|rule| !rule.verbs.is_empty());
            all.push((rest, Rule { verbs: vec![verb.clone()], ..rule.clone() }));
        }
    }
    ensure!(all.len() >= 6, "the chart grants {}", all.len());
    Ok(all)
}

/// Waits until an agent has logged a line with all of these words.
async fn until_logged(agent: &Agent, words: &[String]) -> Result<String> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let log = agent.log();
        if let Some(line) = log.lines().find(|line| words.iter().all(|word| line.contains(word.as_str()))) {
            return Ok(line.to_owned());
        }
        ensure!(tokio::time::Instant::now() < deadline, "no line with {words:?} in\n{log}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the log says of a request that a rule would have allowed: the server's own words. Nobody waits for an event.
fn refusal(rule: &Rule, account: &Account) -> Vec<String> {
    let (verb, resource) = (&rule.verbs[0], &rule.resources[0]);
    match resource.as_str() {
        "events" => vec!["ApiForbidden".to_owned(), "Events may not be written with these rights".to_owned()],
        _ => vec![format!("cannot {verb} resource \"{resource}\""), account.user.clone()],
    }
}

#[test]
#[ignore = "needs a real API server: hack/test --real-kube"]
fn a_verb_that_the_chart_lacks_is_named_and_the_change_is_made_once_it_is_there() -> Result<()> {
    run(async {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        for (rest, missing) in without_a_verb(&namespace)? {
            let what = format!("{} {}", missing.verbs[0], missing.resources[0]);
            let account = cluster.account(&namespace, &rest).await?;
            let labels: Vec<(&str, &str)> = OPERANDS.iter().map(|(label, _)| (*label, "true")).collect();
            let (path, node) = cluster.node(&labels).await?;
            want(&cluster.admin, &node, Some(Mode::On)).await?;
            // A pod of a component that nobody ends: it is listed, and then watched.
            let pod = json!({
                "metadata": {"name": node, "labels": {"app": OPERANDS[0].1}},
                "spec": {"nodeName": node, "containers": [{"name": "main", "image": IMAGE}]},
            });
            let pods = format!("/api/v1/namespaces/{namespace}/pods");
            cluster.admin.post(&pods, &pod).await?.is(201)?;

            let hardware = Hardware::new()?;
            let agent = hardware.start(Start {
                kubeconfig: &account.kubeconfig,
                node: &node,
                namespace: &namespace,
                answer: PATIENCE,
                look: Arc::new(|| Ok(())),
                ended: agent::nobody_is_told(),
            })?;
            // Events are told beside the change, and nothing waits for them.
            let is_needed = missing.resources[0] != "events";
            if !is_needed {
                cluster.admin.delete_now(&format!("{pods}/{node}")).await?;
            }
            let line = until_logged(&agent, &refusal(&missing, &account)).await.context(what.clone())?;
            println!("without {what}: {line}");
            if is_needed {
                hardware.is_in(Mode::Off).with_context(|| format!("devices are changed without {what}"))?;
                let found = cluster.admin.get(&path).await?.is(200)?;
                let ready = &found["metadata"]["labels"][CC_READY_STATE];
                ensure!(ready.is_null() || ready == "", "without {what} the node says {ready}");
                cluster.admin.delete_now(&format!("{pods}/{node}")).await?;
                cluster.grant(&account, &[missing]).await?;
            }
            let is_so = |node: &Value| {
                let (labels, annotations) = (&node["metadata"]["labels"], &node["metadata"]["annotations"]);
                labels[CC_MODE_STATE] == "on"
                    && labels[CC_READY_STATE] == ready_state(Mode::On)
                    && annotations[annotations::TRANSITION].is_null()
            };
            let settled = cluster.admin.until(&path, |answer| is_so(&answer.body).then_some(())).await;
            settled.with_context(|| format!("with {what} again; {}", agent.log()))?;
            hardware.is_in(Mode::On)?;
            agent.end().await?;
            cluster.admin.delete(&path).await?.is(200)?;
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs a real kubelet: hack/test --real-kube"]
fn without_the_right_to_see_pods_no_device_is_touched_and_with_it_the_change_is_made() -> Result<()> {
    run(async {
        let cluster = Cluster::real().await?;
        let namespace = cluster.namespace().await?;
        let (rest, missing) = without_a_verb(&namespace)?
            .into_iter()
            .find(|(_, missing)| (&*missing.verbs[0], &*missing.resources[0]) == ("list", "pods"))
            .context("the chart lists no pods")?;
        let account = cluster.account(&namespace, &rest).await?;
        want(&cluster.admin, NODE, Some(Mode::Off)).await?;
        let components = Components::on_the_kubelets_node(&cluster, &namespace).await?;
        let hardware = Hardware::new()?;
        let agent = start(&hardware, &account, &namespace, &components)?;
        components.until_settled(Mode::Off).await.context("at the start")?;
        want(&cluster.admin, NODE, Some(Mode::On)).await?;
        until_logged(&agent, &refusal(&missing, &account)).await?;
        hardware.is_in(Mode::Off)?;
        cluster.grant(&account, &[missing]).await?;
        components.until_settled(Mode::On).await.with_context(|| agent.log())?;
        hardware.is_in(Mode::On)?;
        agent.end().await?;
        want(&cluster.admin, NODE, None).await?;
        components.remove().await
    })
}
