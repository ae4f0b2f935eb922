//! The operator's components on this node: which of them are in the way of a change, and how each is paused by its deploy
//! label and taken up again (operator-contract sections 2.3 and 5.4). No I/O.

use std::collections::BTreeMap;

use crate::{Change, NodeState};

/// What a paused component's label says. It is the reference's own marker: each of us takes up what the other has paused
/// and left behind.
const MARKER: &str = "paused-for-cc-mode-change";

/// A component.
struct Operand {
    /// Its deploy label: the DaemonSet's node selector wants it to be `true`.
    label: &'static str,
    /// What its pods say of themselves, by the label `name` or `app`.
    pod: &'static str,
}

/// Those that the reference pauses, and the Kata plugin: it would go on to offer GPUs that are being reset.
const OPERANDS: [Operand; 6] = [
    Operand { label: "nvidia.com/gpu.deploy.vfio-manager", pod: "nvidia-vfio-manager" },
    Operand { label: "nvidia.com/gpu.deploy.vgpu-manager", pod: "nvidia-vgpu-manager-daemonset" },
    Operand { label: "nvidia.com/gpu.deploy.sandbox-validator", pod: "nvidia-sandbox-validator" },
    Operand { label: "nvidia.com/gpu.deploy.sandbox-device-plugin", pod: "nvidia-sandbox-device-plugin-daemonset" },
    Operand { label: "nvidia.com/gpu.deploy.vgpu-device-manager", pod: "nvidia-vgpu-device-manager" },
    Operand {
        label: "nvidia.com/gpu.deploy.kata-sandbox-device-plugin",
        pod: "nvidia-kata-sandbox-device-plugin-daemonset",
    },
];

/// The labels that pausing and taking up are computed from.
pub fn labels() -> impl Iterator<Item = &'static str> {
    OPERANDS.iter().map(|operand| operand.label)
}

/// The deploy labels of the node as they are, where they say anything.
pub fn present(node: &NodeState) -> BTreeMap<String, String> {
    let value = |label| node.label(label).filter(|value| !value.is_empty());
    labels().filter_map(|label| Some((label.to_owned(), value(label)?.to_owned()))).collect()
}

/// The deploy labels of the components that are paused by us, or by the reference in our place.
pub fn all_paused(node: &NodeState) -> impl Iterator<Item = &'static str> {
    labels().filter(|label| node.label(label).is_some_and(|value| value.contains(MARKER)))
}

/// Whether a component is paused by us, or by the reference in our place.
pub fn any_paused(node: &NodeState) -> bool {
    all_paused(node).next().is_some()
}

/// Whether pausing would stop any component.
pub fn any_to_pause(node: &NodeState) -> bool {
    !pause(node, Change::new()).missing_from(node).is_empty()
}

/// Adds the pausing of every component to `change`. A label that is absent or empty stays so: the operator takes an empty
/// one for a request to deploy.
pub fn pause(node: &NodeState, change: Change) -> Change {
    transform(node, change, paused)
}

/// Adds the taking up of every component to `change`, from the labels as they are now: what others wrote meanwhile stays.
pub fn take_up(node: &NodeState, change: Change) -> Change {
    transform(node, change, taken_up)
}

fn transform(node: &NodeState, change: Change, transform: fn(&str) -> String) -> Change {
    present(node).into_iter().fold(change, |change, (label, value)| {
        let transformed = transform(&value);
        change.label(label, transformed)
    })
}

fn paused(value: &str) -> String {
    match value {
        // Not deployed by somebody's choice.
        "false" => value.to_owned(),
        "true" => MARKER.to_owned(),
        value if value.contains(MARKER) => value.to_owned(),
        value => format!("{value}_{MARKER}"),
    }
}

fn taken_up(value: &str) -> String {
    if value == MARKER {
        return "true".to_owned();
    }
    let prefixed = format!("_{MARKER}");
    let suffixed = format!("{MARKER}_");
    value.replace(&prefixed, "").replace(&suffixed, "").replace(MARKER, "")
}

/// Whether a pod with these labels belongs to a component whose label on `node` is paused by us. A component that somebody
/// else has stopped has nothing to wait for.
pub fn is_paused_pod(node: &NodeState, pod: &BTreeMap<String, String>) -> bool {
    OPERANDS.iter().any(|operand| {
        let is_its = ["name", "app"].iter().any(|key| pod.get(*key).is_some_and(|value| value == operand.pod));
        is_its && node.label(operand.label).is_some_and(|value| value.contains(MARKER))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(labels: &[(&str, &str)]) -> NodeState {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        NodeState { uid: "u".to_owned(), resource_version: "1".to_owned(), labels, ..NodeState::default() }
    }

    const VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";
    const KATA: &str = "nvidia.com/gpu.deploy.kata-sandbox-device-plugin";

    #[test]
    fn values_are_transformed_as_the_contract_says() {
        for (before, while_paused, after) in [
            ("true", MARKER, "true"),
            ("false", "false", "false"),
            ("pre-installed", "pre-installed_paused-for-cc-mode-change", "pre-installed"),
            (
                "paused-for-driver-upgrade",
                "paused-for-driver-upgrade_paused-for-cc-mode-change",
                "paused-for-driver-upgrade",
            ),
            // The other party stacks its marker on ours, and takes it away again in whatever order.
            (
                "paused-for-cc-mode-change_paused-for-driver-upgrade",
                "paused-for-cc-mode-change_paused-for-driver-upgrade",
                "paused-for-driver-upgrade",
            ),
            (MARKER, MARKER, "true"),
        ] {
            assert_eq!(
                (paused(before).as_str(), taken_up(&paused(before)).as_str()),
                (while_paused, after),
                "{before}"
            );
            assert_eq!(paused(&paused(before)), while_paused, "twice is once");
            assert_eq!(taken_up(after), after, "twice is once");
        }
    }

    #[test]
    fn only_labels_that_say_something_are_touched() {
        let before = node(&[(VFIO, "true"), (KATA, ""), ("nvidia.com/gpu.deploy.client", "true")]);
        let change = pause(&before, Change::new());
        assert_eq!(change, Change::new().label(VFIO, MARKER));
        assert!(!any_paused(&before) && any_paused(&node(&[(VFIO, MARKER)])));
        let both = node(&[(VFIO, "pre-installed_paused-for-cc-mode-change"), (KATA, "true")]);
        assert_eq!(all_paused(&both).collect::<Vec<_>>(), [VFIO]);
        assert_eq!(
            take_up(&node(&[(VFIO, MARKER), (KATA, "false")]), Change::new()).missing_from(&before),
            Change::new().label(KATA, "false")
        );
        assert_eq!(present(&before).len(), 1);
    }

    #[test]
    fn pods_are_known_by_either_label_and_only_while_paused() {
        let pod = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let paused = node(&[(VFIO, MARKER), (KATA, "false")]);
        assert!(is_paused_pod(&paused, &pod("name", "nvidia-vfio-manager")));
        assert!(is_paused_pod(&paused, &pod("app", "nvidia-vfio-manager")));
        assert!(!is_paused_pod(&paused, &pod("app", "nvidia-kata-sandbox-device-plugin-daemonset")));
        assert!(!is_paused_pod(&paused, &pod("app", "nvidia-cc-manager")));
        assert!(!is_paused_pod(&node(&[(VFIO, "true")]), &pod("name", "nvidia-vfio-manager")));
    }
}
