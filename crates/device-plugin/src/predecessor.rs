//! The plugin that served a resource before, and may end later: in an update that starts the new pod first, or when another's
//! plugin is replaced.
//!
//! A kubelet (since 1.25) goes by the name of the resource alone when a plugin's stream ends: it takes the end of the old plugin
//! for that of the new one, and the resource stays dead, though the new one's stream goes on. So the new one listens to the old
//! one as the kubelet does, and registers once more when that has ended.

use std::path::Path;
use std::time::Duration;

use kubelet_api::device_plugin::device_plugin_client::DevicePluginClient;
use kubelet_api::device_plugin::{Empty, ListAndWatchResponse};
use kubelet_api::socket;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Streaming;

/// How long one that does not answer is waited for.
const ANSWER: Duration = Duration::from_secs(1);
/// The kubelet hears of the end at the same moment: it is to be done with it first.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Whoever served a socket before.
#[derive(Debug, Default)]
pub(crate) struct Predecessor {
    stream: Option<Streaming<ListAndWatchResponse>>,
    ended: Option<Instant>,
}

impl Predecessor {
    /// Listens to whoever serves this socket now, if anybody does.
    pub(crate) async fn at(path: &Path) -> Self {
        let stream = async {
            let channel = socket::connect(path, ANSWER).await.ok()?;
            Some(DevicePluginClient::new(channel).list_and_watch(Empty {}).await.ok()?.into_inner())
        };
        Self { stream: timeout(ANSWER, stream).await.ok().flatten(), ended: None }
    }

    /// Completes once it has ended and the kubelet has heard of that; never where there is none.
    pub(crate) async fn gone(&mut self) {
        if let Some(stream) = &mut self.stream {
            // What it offers is none of our business.
            while let Ok(Some(_)) = stream.message().await {}
            self.stream = None;
            self.ended = Some(Instant::now());
        }
        let Some(ended) = self.ended else { return std::future::pending().await };
        sleep_until(ended + AFTERWARDS).await;
        self.ended = None;
    }
}
