//! Orderly end on SIGTERM and SIGINT.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells when the process is to end. Clones are the same token.
#[derive(Clone, Debug)]
pub struct Shutdown {
    sender: Arc<watch::Sender<bool>>,
    _listener: Option<Arc<Listener>>,
}

/// The task that waits for signals; it ends with the last token.
#[derive(Debug)]
struct Listener(tokio::task::AbortHandle);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::manual()
    }
}

impl Shutdown {
    /// A token that the first SIGTERM or SIGINT triggers; a second one ends the process at once with the shell's code
    /// for that signal (128 + its number). Must be called within a tokio runtime.
    pub fn on_signals() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let sender = Arc::new(watch::Sender::new(false));
        let trigger = Arc::clone(&sender);
        let task = tokio::spawn(async move {
            loop {
                let (name, code) = tokio::select! {
                    Some(()) = terminate.recv() => ("SIGTERM", 143),
                    Some(()) = interrupt.recv() => ("SIGINT", 130),
                    else => return,
                };
                if trigger.send_replace(true) {
                    tracing::warn!(signal = name, "Second signal, ending at once");
                    std::process::exit(code);
                }
                tracing::info!(event = "shutdown", signal = name, "Signal received, ending in order");
            }
        });
        Ok(Self { sender, _listener: Some(Arc::new(Listener(task.abort_handle()))) })
    }

    /// A token that only [`Shutdown::trigger`] triggers.
    pub fn manual() -> Self {
        Self { sender: Arc::new(watch::Sender::new(false)), _listener: None }
    }

    /// Asks for the end, as a signal does.
    pub fn trigger(&self) {
        self.sender.send_replace(true);
    }

    /// Whether the end has been asked for.
    pub fn is_requested(&self) -> bool {
        *self.sender.borrow()
    }

    /// Waits until the end is asked for. Safe to drop and to call again.
    pub async fn wait(&self) {
        let mut receiver = self.sender.subscribe();
        // The sender lives in `self`, so this cannot fail; should it, the end is near anyway.
        let _ = receiver.wait_for(|requested| *requested).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn clones_are_one_token() {
        let token = Shutdown::manual();
        let other = token.clone();
        assert!(!other.is_requested());
        assert!(tokio::time::timeout(Duration::from_millis(10), other.wait()).await.is_err());
        token.trigger();
        tokio::time::timeout(Duration::from_secs(5), other.wait()).await.unwrap();
        assert!(other.is_requested());
    }

    #[tokio::test]
    async fn a_signal_triggers() {
        let token = Shutdown::on_signals().unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(Duration::from_secs(5), token.wait()).await.unwrap();
    }
}
