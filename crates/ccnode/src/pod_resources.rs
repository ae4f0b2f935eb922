//! Whether the kubelet answers the question that Kata asks it (operator-contract section 10).

use std::path::Path;
use std::time::Duration;

use kubelet_api::pod_resources::GetPodResourcesRequest;
use kubelet_api::pod_resources::pod_resources_lister_client::PodResourcesListerClient;
use kubelet_api::socket::connect;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

/// Longest wait for connection and answer together.
const PATIENCE: Duration = Duration::from_secs(2);

/// What became of a `Get` for a pod that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Get {
    /// It answers.
    Answers,
    /// The kubelet knows the method and refuses it, or is too old to know it.
    Disabled {
        /// The kubelet's words.
        message: String,
    },
    /// Something else went wrong.
    Fails {
        /// What.
        message: String,
    },
    /// Nobody was asked.
    NotAsked {
        /// Why.
        cause: String,
    },
}

/// Asks. Waits 2 seconds at most.
pub fn get(socket: &Path) -> Get {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Get::NotAsked { cause: format!("No runtime: {error}") },
    };
    let ask = async {
        let channel = connect(socket, PATIENCE).await.map_err(|error| agent_core::text::chain(&error))?;
        let request = GetPodResourcesRequest { pod_name: "ccnode-doctor-asks".into(), pod_namespace: "default".into() };
        Ok::<_, String>(PodResourcesListerClient::new(channel).get(request).await)
    };
    let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, ask).await });
    match answer {
        Ok(Ok(Ok(_))) => Get::Answers,
        Ok(Ok(Err(status))) => judge(&status),
        Ok(Err(message)) => Get::Fails { message },
        Err(_) => Get::Fails { message: format!("No answer within {} s", PATIENCE.as_secs()) },
    }
}

/// The kubelet has no code of its own for a pod that it does not know, nor for a gate that is off: only words.
fn judge(status: &Status) -> Get {
    let message = status.message().to_owned();
    if status.code() == Code::NotFound || message.contains("not found") {
        Get::Answers
    } else if status.code() == Code::Unimplemented || message.contains("disabled") {
        Get::Disabled { message }
    } else {
        Get::Fails { message: format!("{:?}: {message}", status.code()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelets_words_are_understood() {
        let disabled = |message: &str| Get::Disabled { message: message.into() };
        for (status, answer) in [
            (Status::unknown("pod z in namespace n not found"), Get::Answers),
            (Status::not_found(""), Get::Answers),
            (Status::unknown("PodResources API Get method disabled"), disabled("PodResources API Get method disabled")),
            (Status::unimplemented("unknown method Get"), disabled("unknown method Get")),
            (
                Status::resource_exhausted("rejected by rate limit"),
                Get::Fails { message: "ResourceExhausted: rejected by rate limit".into() },
            ),
        ] {
            assert_eq!(judge(&status), answer);
        }
    }

    #[test]
    fn nobody_home_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(get(&folder.path().join("kubelet.sock")), Get::Fails { .. }));
        // One that accepts and says nothing.
        let silent = std::os::unix::net::UnixListener::bind(folder.path().join("silent.sock")).unwrap();
        let started = std::time::Instant::now();
        assert!(matches!(get(&folder.path().join("silent.sock")), Get::Fails { .. }));
        assert!(started.elapsed() < PATIENCE * 3);
        drop(silent);
    }
}
