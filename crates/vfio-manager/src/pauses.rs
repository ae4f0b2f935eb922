//! The pauses that a driver-manager has put on the node's components and left there (operator-contract section 2.3).

use std::path::Path;
use std::time::Duration;

use node_object::{Change, NodeClient, NodeError, NodeState};

/// What a component's deploy label says while it is paused. It is the reference's own marker.
const MARKER: &str = "paused-for-driver-upgrade";

/// What the deploy labels begin with.
const DEPLOY: &str = "nvidia.com/gpu.deploy.";

/// How often, and in what distance, the API server is asked that does not answer.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_secs(3);

/// Lifts the pauses; the labels that were changed.
pub(crate) async fn lift(node: &str, kubeconfig: Option<&Path>) -> Result<Vec<String>, NodeError> {
    let client = node_object::connect(kubeconfig).await?;
    lift_of(&NodeClient::new(client, node, "ccnode-driver-manager"), PAUSE).await
}

async fn lift_of(node: &NodeClient, pause: Duration) -> Result<Vec<String>, NodeError> {
    let mut attempt = 1;
    loop {
        let result = lift_once(node).await;
        match result {
            // An answer that will be the same the next time, or the last one.
            Err(error) if attempt == ATTEMPTS || matches!(error.status(), Some(401 | 403 | 404)) => return Err(error),
            Err(error) => tracing::warn!(code = error.code(), "{}", error.line()),
            Ok(lifted) => return Ok(lifted),
        }
        attempt += 1;
        tokio::time::sleep(pause).await;
    }
}

async fn lift_once(node: &NodeClient) -> Result<Vec<String>, NodeError> {
    let paused = paused(&*node.get().await?);
    if paused.is_empty() {
        return Ok(paused);
    }
    node.update((&[], &[]), |state| {
        self::paused(state).into_iter().fold(Change::new(), |change, label| {
            let value = lifted(state.label(&label).unwrap_or_default());
            change.label(label, value)
        })
    })
    .await?;
    Ok(paused)
}

/// The labels with our marker. Labels that are absent stay absent: the operator takes an empty one for a request to deploy.
fn paused(state: &NodeState) -> Vec<String> {
    let is_paused = |(name, value): &(&String, &String)| name.starts_with(DEPLOY) && value.contains(MARKER);
    state.labels.iter().filter(is_paused).map(|(name, _)| name.clone()).collect()
}

/// The value without the marker; what others have added stays.
fn lifted(value: &str) -> String {
    if value == MARKER {
        return "true".to_owned();
    }
    let (prefixed, suffixed) = (format!("_{MARKER}"), format!("{MARKER}_"));
    value.replace(&prefixed, "").replace(&suffixed, "").replace(MARKER, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;
    use node_object::testing::FakeApi;

    #[tokio::test]
    async fn only_pauses_of_a_driver_manager_are_lifted_and_no_label_is_made() {
        let api = FakeApi::new("node");
        let name = |component: &str| format!("{DEPLOY}{component}");
        let rows = [
            ("sandbox-validator", MARKER, "true"),
            ("client", "false", "false"),
            ("sandbox-device-plugin", "paused-for-cc-mode-change", "paused-for-cc-mode-change"),
            ("vgpu-manager", "paused-for-driver-upgrade_paused-for-cc-mode-change", "paused-for-cc-mode-change"),
            ("vgpu-device-manager", "x_paused-for-driver-upgrade", "x"),
            ("driver", "pre-installed", "pre-installed"),
        ];
        for (component, before, _) in rows {
            api.set_label(&name(component), Some(before));
        }
        let count = api.labels().len();
        let node = NodeClient::new(api.client(), "node", "test");
        api.fail_next(Method::GET, 500);
        let lifted = lift_of(&node, Duration::from_millis(1)).await.unwrap();
        let changed = ["sandbox-validator", "vgpu-device-manager", "vgpu-manager"].map(name);
        assert_eq!(lifted, changed);
        for (component, _, after) in rows {
            assert_eq!(api.labels()[&name(component)], after, "{component}");
        }
        assert_eq!((api.labels().len(), api.patches().len()), (count, 1));
        // Nothing to do: nothing is written.
        assert!(lift_of(&node, Duration::from_millis(1)).await.unwrap().is_empty());
        assert_eq!(api.patches().len(), 1);
    }

    #[tokio::test]
    async fn an_api_server_that_refuses_is_an_error_at_once() {
        let api = FakeApi::new("node");
        let node = NodeClient::new(api.client(), "node", "test");
        api.fail_next(Method::GET, 403);
        let error = lift_of(&node, Duration::from_hours(1)).await.unwrap_err();
        assert_eq!(error.status(), Some(403));
    }
}
