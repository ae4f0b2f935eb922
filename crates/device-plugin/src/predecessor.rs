//! The plugins that served a resource before, and may end later: in an update that starts the new pod first, or when another's
//! plugin is replaced.
//!
//! A kubelet (since 1.25) goes by the name of the resource alone when a plugin's stream ends: it takes the end of the old plugin
//! for that of the new one, and the resource stays dead, though the new one's stream goes on. So the new one listens to the old
//! one as the kubelet does, and registers once more when that has ended. The same holds for a stream of its own that has ended
//! shortly before it serves again.

use std::future::pending;
use std::path::Path;
use std::time::Duration;

use kubelet_api::device_plugin::device_plugin_client::DevicePluginClient;
use kubelet_api::device_plugin::{Empty, ListAndWatchResponse};
use kubelet_api::socket;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::Streaming;

/// How long one that does not answer is waited for.
const ANSWER: Duration = Duration::from_secs(1);
/// The kubelet hears of the end at the same moment: it is to be done with it first.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Whoever served a socket before, each by a task that ends once the kubelet has heard of its end.
#[derive(Debug, Default)]
pub(crate) struct Predecessors(JoinSet<()>);

impl Predecessors {
    /// Listens to whoever serves this socket now, too, if anybody does.
    pub(crate) async fn meet(&mut self, path: &Path) {
        let Ok(Some(mut stream)) = timeout(ANSWER, listened_to(path)).await else { return };
        self.0.spawn(async move {
            // What it offers is none of our business.
            while let Ok(Some(_)) = stream.message().await {}
            sleep(AFTERWARDS).await;
        });
    }

    /// A stream to the kubelet has just ended.
    pub(crate) fn ended(&mut self) {
        self.0.spawn(sleep(AFTERWARDS));
    }

    /// Completes once one has ended and the kubelet has heard of that; never where there is none.
    pub(crate) async fn gone(&mut self) {
        if self.0.join_next().await.is_none() {
            pending::<()>().await;
        }
    }
}

async fn listened_to(path: &Path) -> Option<Streaming<ListAndWatchResponse>> {
    let channel = socket::connect(path, ANSWER).await.ok()?;
    Some(DevicePluginClient::new(channel).list_and_watch(Empty {}).await.ok()?.into_inner())
}
