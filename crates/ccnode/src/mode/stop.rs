//! Being asked to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that has gone.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Listens for the signals from its creation on; until then they end the process as ever.
pub(super) struct Stop {
    runtime: Runtime,
    signals: [Signal; 3],
}

impl Stop {
    pub(super) fn listen() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let signals = {
            let _inside = runtime.enter();
            let [interrupt, terminate, hangup] =
                [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
            [interrupt?, terminate?, hangup?]
        };
        Ok(Self { runtime, signals })
    }

    /// Counts the signals, and tells of each with its number, until `end` comes or is dropped.
    pub(super) fn count(self, asked: &AtomicUsize, tell: impl Fn(usize), end: oneshot::Receiver<()>) {
        let Self { runtime, signals: [mut interrupt, mut terminate, mut hangup] } = self;
        runtime.block_on(async move {
            tokio::pin!(end);
            loop {
                tokio::select! {
                    Some(()) = interrupt.recv() => {}
                    Some(()) = terminate.recv() => {}
                    Some(()) = hangup.recv() => {}
                    _ = &mut end => return,
                }
                tell(asked.fetch_add(1, Ordering::SeqCst) + 1);
            }
        });
    }
}
