//! The node object, as a person's commands reach it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use node_object::{NodeClient, NodeError, Timing};
use tokio::runtime::{Builder, Runtime};

use crate::agents;

/// Flags of commands that ask the API server.
#[derive(Clone, Debug, clap::Args)]
pub struct ClusterArgs {
    /// Name of the node object; by default what cc-manager here was told, else this machine's host name.
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node: Option<String>,
    /// Kubeconfig file; a pod's service account comes first.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG", value_parser = agent_core::text::path)]
    pub kubeconfig: Option<PathBuf>,
    /// Ask no API server.
    #[arg(long)]
    pub offline: bool,
}

/// Longest wait for an answer of the API server.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Under which name we write.
const MANAGER: &str = "ccnode";

/// Which node object is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    /// Its name; none where nothing tells it.
    pub(crate) name: Option<String>,
    /// Whether the name is this machine's own, by its host name or by what cc-manager here was told.
    pub(crate) is_ours: bool,
}

impl Named {
    /// The name asked for, else this machine's.
    pub(crate) fn of(root: &Path, asked: Option<&str>) -> Self {
        let told = agents::running(root, agents::CC_MANAGER).and_then(|agent| agents::node_of(root, &agent));
        let own: Vec<String> = told.into_iter().chain(agents::host_name(root)).collect();
        match asked.map(str::trim).filter(|name| !name.is_empty()) {
            Some(name) => Self { name: Some(name.to_owned()), is_ours: own.iter().any(|own| own == name) },
            None => Self { name: own.first().cloned(), is_ours: true },
        }
    }
}

/// What drives requests. A client works in the runtime that it was made in alone.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("No runtime to ask the API server with")
}

/// A client of this node.
pub(crate) async fn client(name: &str, kubeconfig: Option<&Path>) -> Result<NodeClient, NodeError> {
    let client = node_object::connect(kubeconfig).await?;
    let timing = Timing { request: PATIENCE, ..Timing::default() };
    Ok(NodeClient::new(client, name, MANAGER).with_timing(timing))
}

#[cfg(test)]
mod tests {
    use hw_probe::testing::FakeSysfs;

    use super::*;

    #[test]
    fn a_name_that_is_asked_for_is_ours_only_if_something_here_says_so() {
        let fake = FakeSysfs::new();
        let named = |asked| Named::of(fake.path(), asked);
        let is = |name: &str, is_ours| Named { name: Some(name.to_owned()), is_ours };
        assert_eq!(named(None), Named { name: None, is_ours: true });
        assert_eq!(named(Some("gpu-7")), is("gpu-7", false));
        fake.file("proc/sys/kernel/hostname", "host-7\n");
        assert_eq!((named(None), named(Some(" "))), (is("host-7", true), is("host-7", true)));
        fake.process(7, "cc-manager", "", &[]).file("proc/7/environ", "NODE_NAME=gpu-7\0");
        assert_eq!(named(None), is("gpu-7", true));
        for (asked, is_ours) in [("gpu-7", true), ("host-7", true), ("gpu-8", false)] {
            assert_eq!(named(Some(asked)), is(asked, is_ours));
        }
    }
}
