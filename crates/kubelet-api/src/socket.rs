//! gRPC over Unix sockets.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::net::{UnixListener, UnixStream};
use tonic::codegen::http::Uri;
use tonic::codegen::tokio_stream::Stream;
use tonic::transport::server::Router;
use tonic::transport::{Channel, Endpoint};

/// Why a Unix socket could not be dialled or served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path has bytes that a gRPC address cannot carry.
    #[error("Socket path {} is not UTF-8", path.display())]
    Path {
        /// The socket.
        path: PathBuf,
    },
    /// Nobody answered at the socket.
    #[error("Cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What gRPC said.
        source: tonic::transport::Error,
    },
    /// The deadline passed first.
    #[error("Cannot connect to {} within {:?}", path.display(), deadline)]
    Deadline {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        deadline: Duration,
    },
    /// A file that is not a socket is in the way.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The socket could not be created.
    #[error("Cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The server ended with an error.
    #[error("Serving gRPC failed")]
    Serve {
        /// What gRPC said.
        #[from]
        source: tonic::transport::Error,
    },
}

/// Opens a channel to the gRPC server on a Unix socket and waits until it is connected, at most `deadline`.
///
/// The authority sent is `localhost`: Go servers refuse a socket path there.
pub async fn connect(path: &Path, deadline: Duration) -> Result<Channel, Error> {
    let utf8 = path.to_str().ok_or_else(|| Error::Path { path: path.into() })?;
    let endpoint = Endpoint::from_shared(format!("unix:{utf8}"))
        .map_err(|source| Error::Connect { path: path.into(), source })?
        .origin(Uri::from_static("http://localhost"));
    match tokio::time::timeout(deadline, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(source)) => Err(Error::Connect { path: path.into(), source }),
        Err(_) => Err(Error::Deadline { path: path.into(), deadline }),
    }
}

/// Creates the socket, taking away a stale one first. Call it inside a tokio runtime.
pub fn listen(path: &Path) -> Result<UnixListener, Error> {
    let listen_error = |source| Error::Listen { path: path.into(), source };
    if is_socket(path)? {
        std::fs::remove_file(path).map_err(listen_error)?;
    }
    UnixListener::bind(path).map_err(listen_error)
}

/// Creates the socket in the place of one that somebody may still serve, who does not see the path without a socket for a moment.
/// Call it inside a tokio runtime.
pub fn replace(path: &Path) -> Result<UnixListener, Error> {
    static MADE: AtomicU32 = AtomicU32::new(0);

    is_socket(path)?;
    // Shorter than a socket's own name, for addresses have little room; of the time, as in every container the process is number 1.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let made = path.with_file_name(format!(".{now:x}-{}", MADE.fetch_add(1, Ordering::Relaxed)));
    let listener = listen(&made)?;
    std::fs::rename(&made, path).map_err(|source| {
        let _ = std::fs::remove_file(&made);
        Error::Listen { path: path.into(), source }
    })?;
    Ok(listener)
}

/// Whether a socket is there; an error if something else is.
fn is_socket(path: &Path) -> Result<bool, Error> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(true),
        Ok(_) => Err(Error::NotASocket { path: path.into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Listen { path: path.into(), source }),
    }
}

/// Serves `router` on a listener from [`listen`] until `stop` completes, then lets running calls end.
///
/// A stream that never ends (ListAndWatch) keeps this waiting: end such streams before, or drop the future.
pub async fn serve<F>(router: Router, listener: UnixListener, stop: F) -> Result<(), Error>
where
    F: Future<Output = ()>,
{
    router.serve_with_incoming_shutdown(Incoming(listener), stop).await?;
    Ok(())
}

/// The connections of a listener as a stream, which is what tonic serves.
struct Incoming(UnixListener);

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(context).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device_plugin as dp;
    use tonic::{Request, Response, Status};

    struct Echo;

    #[tonic::async_trait]
    impl dp::registration_server::Registration for Echo {
        async fn register(&self, request: Request<dp::RegisterRequest>) -> Result<Response<dp::Empty>, Status> {
            Err(Status::unknown(request.into_inner().endpoint))
        }
    }

    #[tokio::test]
    async fn a_call_travels_over_a_socket_and_a_stale_socket_is_replaced() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listener = listen(&path).unwrap();
        let router =
            tonic::transport::Server::builder().add_service(dp::registration_server::RegistrationServer::new(Echo));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(serve(router, listener, async {
            let _ = stopped.await;
        }));
        let channel = connect(&path, Duration::from_secs(5)).await.unwrap();
        let mut client = dp::registration_client::RegistrationClient::new(channel);
        let answer =
            client.register(dp::RegisterRequest { endpoint: "over".into(), ..Default::default() }).await.unwrap_err();
        assert_eq!((answer.code(), answer.message()), (tonic::Code::Unknown, "over"));
        drop(client);
        drop(stop);
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_is_replaced_is_there_all_the_time() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let path = folder.path().join("s");
        let mut served = replace(&path).unwrap();
        let watched = path.clone();
        let looks = std::thread::spawn(move || (0..20_000).all(|_| std::fs::symlink_metadata(&watched).is_ok()));
        while !looks.is_finished() {
            served = replace(&path).unwrap();
        }
        assert!(looks.join().unwrap(), "the path had no socket for a moment");
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["s"]);
        let connected = UnixStream::connect(&path).await;
        assert!(connected.is_ok() && served.accept().await.is_ok());
    }

    #[tokio::test]
    async fn what_is_not_a_socket_stays_and_nobody_home_is_an_error() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, "keep").unwrap();
        assert!(matches!(listen(&path), Err(Error::NotASocket { .. })));
        assert!(matches!(replace(&path), Err(Error::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"keep");
        let nobody = folder.path().join("n");
        let error = connect(&nobody, Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().starts_with("Cannot connect to /tmp/"), "{error}");
    }
}
