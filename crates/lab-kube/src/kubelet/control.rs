//! The control socket: one JSON command a line, one JSON answer a line.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tracing::warn;

use super::{Kubelet, Pod};

/// What can be asked of a running stand-in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Everything it knows.
    Dump,
    /// Stop, stay away, start.
    Restart {
        /// Time away, in milliseconds.
        #[serde(default)]
        down_ms: u64,
    },
    /// Stop, as a killed process stops.
    Stop,
    /// Start after a stop.
    Start,
    /// Wait until exactly so many devices are allocatable.
    WaitAllocatable {
        /// Resource name.
        resource: String,
        /// Devices.
        count: usize,
        /// Milliseconds to wait at most.
        timeout_ms: u64,
    },
    /// Admit a pod that is not from the API server.
    Admit {
        /// The pod.
        pod: Pod,
    },
    /// End a pod.
    Remove {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Fault: end a resource's ListAndWatch streams.
    DropStream {
        /// Resource name.
        resource: String,
    },
    /// Fault: delays, in milliseconds; what is left out stays as it is.
    Delays {
        /// Before a registration is looked at.
        register_ms: Option<u64>,
        /// Between a pod's deletion and its end.
        stop_ms: Option<u64>,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Answer {
    Good { result: Value },
    Bad { error: String },
}

/// Serves commands until the listener fails.
pub async fn serve(kubelet: Arc<Kubelet>, listener: UnixListener) {
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tasks.spawn(converse(kubelet.clone(), stream));
                }
                Err(error) => {
                    warn!(%error, "The control socket failed");
                    return;
                }
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn converse(kubelet: Arc<Kubelet>, stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match serde_json::from_str::<Command>(&line) {
            Ok(command) => obey(&kubelet, command).await,
            Err(error) => Err(format!("Not a command: {error}")),
        };
        let answer = match answer {
            Ok(result) => Answer::Good { result },
            Err(error) => Answer::Bad { error },
        };
        let mut text = serde_json::to_vec(&answer).unwrap_or_default();
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return;
        }
    }
}

async fn obey(kubelet: &Kubelet, command: Command) -> Result<Value, String> {
    let done = Ok(json!({}));
    let result = match command {
        Command::Dump => return Ok(kubelet.dump()),
        Command::Restart { down_ms } => kubelet.restart(Duration::from_millis(down_ms)).await,
        Command::Stop => kubelet.stop().await,
        Command::Start => kubelet.resume().await,
        Command::WaitAllocatable { resource, count, timeout_ms } => {
            kubelet.wait_allocatable(&resource, count, Duration::from_millis(timeout_ms)).await
        }
        Command::Admit { pod } => {
            return kubelet.admit(pod).await.map(|outcome| json!(outcome)).map_err(|error| super::chain(&error));
        }
        Command::Remove { namespace, name } => kubelet.remove(&namespace, &name).await,
        Command::DropStream { resource } => kubelet.drop_stream(&resource),
        Command::Delays { register_ms, stop_ms } => {
            if let Some(delay) = register_ms {
                kubelet.set_register_delay(Duration::from_millis(delay));
            }
            if let Some(delay) = stop_ms {
                kubelet.set_stop_delay(Duration::from_millis(delay));
            }
            return done;
        }
    };
    result.map_err(|error| super::chain(&error))?;
    done
}

/// Sends one command to a stand-in. The error is what it answered, or why it could not be asked.
pub async fn ask(socket: &Path, command: &Command) -> Result<Value, String> {
    let unreachable = |error: std::io::Error| format!("Control socket {}: {error}", socket.display());
    let mut stream = UnixStream::connect(socket).await.map_err(unreachable)?;
    let mut text = serde_json::to_vec(command).map_err(|error| error.to_string())?;
    text.push(b'\n');
    stream.write_all(&text).await.map_err(unreachable)?;
    let line = BufReader::new(stream).lines().next_line().await.map_err(unreachable)?;
    let line = line.ok_or_else(|| format!("Control socket {}: closed without an answer", socket.display()))?;
    match serde_json::from_str(&line) {
        Ok(Answer::Good { result }) => Ok(result),
        Ok(Answer::Bad { error }) => Err(error),
        Err(error) => Err(format!("Control socket {}: not an answer: {error}", socket.display())),
    }
}
