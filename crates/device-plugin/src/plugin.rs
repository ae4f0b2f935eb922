//! One resource's life with the kubelet: its socket, its registration, and both again whenever they are lost.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_core::backoff::Backoff;
use agent_core::readiness::Guard;
use agent_core::shutdown::Shutdown;
use agent_core::text::chain;
use kubelet_api::device_plugin::{
    RegisterRequest, device_plugin_server::DevicePluginServer, registration_client::RegistrationClient,
};
use kubelet_api::{KUBELET_SOCKET, VERSION, socket};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::checkpoint::Lately;
use crate::metrics::PluginMetrics;
use crate::names::ResourceName;
use crate::predecessor::Predecessors;
use crate::server::{Manner, Role, Service, Snapshot, digest, options};
use crate::watch::FolderWatch;

/// Longest path that fits into a Unix socket address, with its final zero byte.
const SOCKET_PATH: usize = 107;
/// How long connecting to the kubelet may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a registration may take: the kubelet dials back first, and gives that about 10 s.
const REGISTER: Duration = Duration::from_secs(15);
/// How long open calls may take to end when the server stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the controller may take to write the CDI file of a resource that is served again.
const HANDOVER: Duration = Duration::from_millis(250);
/// A socket is there a moment before somebody listens at it: how often a connection is tried again at once, and after
/// how long.
const QUICK: (u32, Duration) = (20, Duration::from_millis(5));
/// How often the sockets are looked at when the folder can be watched, and when it cannot.
const LOOK: [Duration; 2] = [Duration::from_secs(15), Duration::from_secs(1)];

/// How long the kubelet is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// How long it may go without a ListAndWatch stream before it is told of us again.
    pub unheard: Duration,
    /// First and longest wait before it is asked again. Spread at random, so that several resources (and several nodes after a
    /// power cut) do not knock at the same moment.
    pub retry: [Duration; 2],
}

impl Default for Waits {
    fn default() -> Self {
        Self { unheard: Duration::from_secs(5), retry: [Duration::from_millis(200), Duration::from_secs(30)] }
    }
}

/// What one resource needs to live.
#[derive(Debug)]
pub struct Plugin {
    /// Its name.
    pub resource: ResourceName,
    /// Its units.
    pub units: watch::Receiver<Snapshot>,
    /// The kubelet's device plugin folder.
    pub folder: PathBuf,
    /// How it answers.
    pub manner: Manner,
    /// The end.
    pub shutdown: Shutdown,
    /// Says whether the kubelet listens to us.
    pub ready: Guard,
    pub(crate) metrics: PluginMetrics,
    /// Notes what is allocated.
    pub lately: Lately,
    /// Says whether it stands back.
    pub aside: Aside,
    /// How long it waits for the kubelet.
    pub waits: Waits,
}

/// The resources that another process serves in the place of this one, while it does.
pub type Aside = watch::Sender<BTreeSet<ResourceName>>;

/// Why the kubelet does not know of us.
#[derive(Debug, thiserror::Error)]
enum RegisterError {
    #[error(transparent)]
    Connect(#[from] socket::Error),
    #[error("The kubelet refused the registration: {} ({:?})", .0.message(), .0.code())]
    Refused(tonic::Status),
    #[error("The kubelet did not answer the registration within {REGISTER:?}")]
    Silent,
}

/// Why our socket is not served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Listen(#[from] socket::Error),
    #[error("Cannot prepare {}", path.display())]
    Prepare { path: PathBuf, source: io::Error },
}

/// Which socket a path led to. Inode numbers are used again, so that the time of making belongs to it; a socket's
/// modification time is that, and neither use nor a change of mode moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketId(u64, u64, i64, i64);

/// The socket at a path; none where there is nothing.
pub(crate) fn socket_id(path: &Path) -> Option<SocketId> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    Some(SocketId(meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

/// What is logged once for as long as it lasts.
#[derive(Debug, Default)]
struct Said(Option<String>);

impl Said {
    fn warn(&mut self, resource: &ResourceName, text: String) {
        if self.0.as_deref() != Some(&text) {
            tracing::warn!(%resource, reason = text, "The kubelet does not know of this resource yet; trying again");
            self.0 = Some(text);
        }
    }

    fn absent(&mut self, resource: &ResourceName, path: &Path) {
        if self.0.as_deref() != Some("") {
            tracing::info!(%resource, path = %path.display(), "The kubelet's socket is not there; waiting for it");
            self.0 = Some(String::new());
        }
    }
}

/// What is kept from one life of the socket to the next.
struct Past {
    backoff: Backoff,
    said: Said,
    /// The kubelet that took the last registration.
    kubelet: Option<SocketId>,
    /// The kubelet that is there, and since when.
    appeared: Option<(SocketId, Instant)>,
    /// How often it was tried at once.
    quick: u32,
    /// Whoever had the socket before.
    predecessors: Predecessors,
}

impl Past {
    /// Notes since when a kubelet is there, if it is another than before.
    fn sees(&mut self, present: Option<SocketId>, now: Instant) {
        if let Some(id) = present
            && self.appeared.is_none_or(|(whom, _)| whom != id)
        {
            self.appeared = Some((id, now));
            self.quick = 0;
        }
    }
}

/// Why serving ended.
enum End {
    Shutdown,
    /// The socket is gone, or another process serves the path, or the server stopped.
    Lost(&'static str),
    /// The sender of the units is gone: the agent ends.
    Over,
}

/// Base name of the socket in the kubelet's folder.
fn endpoint(role: Role, resource: &ResourceName, folder: &Path) -> String {
    let whose = match role {
        Role::Kata => "sandbox",
        Role::Kubevirt => "kubevirt",
    };
    let name = format!("{whose}-{}.sock", resource.class());
    if folder.as_os_str().len() + 1 + name.len() <= SOCKET_PATH {
        return name;
    }
    // Too long for a socket address: the end of the name says least, a hash of all of it keeps two names apart.
    format!("{whose}-{:016x}.sock", digest(resource))
}

impl Plugin {
    /// Serves and registers until the shutdown, whatever the kubelet does meanwhile.
    pub async fn run(mut self) {
        self.known(false);
        let endpoint = endpoint(self.manner.role, &self.resource, &self.folder);
        let mut past = Past {
            backoff: Backoff::new(self.waits.retry[0], self.waits.retry[1]),
            said: Said::default(),
            kubelet: None,
            appeared: None,
            quick: 0,
            predecessors: Predecessors::default(),
        };
        while !self.shutdown.is_requested() {
            // Nothing is served before there is something to serve.
            tokio::select! {
                () = self.shutdown.wait() => return,
                some = self.units.wait_for(|units| !units.is_empty()) => if some.is_err() { return },
            }
            let path = self.folder.join(&endpoint);
            match self.serve(&path, &endpoint, &mut past).await {
                Ok(End::Shutdown | End::Over) => return,
                Ok(End::Lost(why)) => tracing::info!(resource = %self.resource, why, "Serving again"),
                Err(error) => {
                    past.said.warn(&self.resource, chain(&error));
                    let delay = past.backoff.next_delay();
                    tokio::select! {
                        () = sleep(delay) => {}
                        () = self.shutdown.wait() => return,
                    }
                }
            }
            self.known(false);
        }
    }

    /// Opens the socket, serves it and keeps it registered until it is lost.
    async fn serve(&mut self, path: &Path, endpoint: &str, past: &mut Past) -> Result<End, ServeError> {
        // Watched before anything is made, so that no change falls between looking and watching.
        let mut changes = FolderWatch::new(&self.folder);
        // A wait that was broken off may have left it there.
        self.aside.send_if_modified(|aside| aside.remove(&self.resource));
        tokio::select! {
            () = past.predecessors.meet(path) => {}
            () = self.shutdown.wait() => return Ok(End::Shutdown),
        }
        let listener = socket::replace(path)?;
        // The kubelet is root; nobody else has business here.
        std::fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(|source| ServeError::Prepare { path: path.to_owned(), source })?;
        let own = socket_id(path);

        let (streams, listening) = watch::channel(0);
        let (stop, stopped) = watch::channel(false);
        let service = Service::new(
            self.resource.clone(),
            self.units.clone(),
            self.manner,
            self.metrics.clone(),
            self.lately.clone(),
            streams,
            stopped.clone(),
        );
        let router = tonic::transport::Server::builder().add_service(DevicePluginServer::new(service));
        let mut stopped = stopped;
        let heard = listening.clone();
        let mut server = tokio::spawn(socket::serve(router, listener, async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));

        let end = tokio::select! {
            end = self.stay_registered(path, own, endpoint, &mut changes, listening, past) => end,
            result = &mut server => {
                match result {
                    Ok(Err(error)) => tracing::warn!(resource = %self.resource, error = chain(&error), "The server ended"),
                    Err(error) => tracing::error!(resource = %self.resource, %error, "The server failed"),
                    Ok(Ok(())) => {}
                }
                End::Lost("the server ended")
            }
        };
        if *heard.borrow() > 0 {
            past.predecessors.ended();
        }
        stop.send_replace(true);
        if !server.is_finished() && timeout(DRAIN, &mut server).await.is_err() {
            server.abort();
        }
        // Another's socket at the same path is not ours to remove.
        if own.is_some() && socket_id(path) == own {
            let _ = std::fs::remove_file(path);
        }
        Ok(end)
    }

    /// Registers, and again whenever the kubelet is another or has stopped to listen.
    async fn stay_registered(
        &mut self,
        path: &Path,
        own: Option<SocketId>,
        endpoint: &str,
        changes: &mut FolderWatch,
        mut listening: watch::Receiver<usize>,
        past: &mut Past,
    ) -> End {
        let kubelet = self.folder.join(KUBELET_SOCKET);
        // The kubelet that knows of us.
        let mut known: Option<SocketId> = None;
        // The kubelet that did not take us, and when to try it again.
        let mut refused: Option<(SocketId, Instant)> = None;
        // Since when nobody listens.
        let mut unheard: Option<Instant> = None;
        // The kubelet that took us, and had not begun to listen when that was given up.
        let mut slow: Option<SocketId> = None;
        let mut was_listening = false;
        loop {
            if self.shutdown.is_requested() {
                return End::Shutdown;
            }
            let armed = changes.arm();
            if let Some(end) = self.lost(path, own, changes).await {
                return end;
            }
            let now = Instant::now();
            let present = socket_id(&kubelet);
            let heard = *listening.borrow_and_update() > 0;
            if heard && known.is_none() && slow.is_some() && slow == present {
                // To register again would end the stream that it has begun after all.
                (known, slow, refused) = (slow, None, None);
            }
            if heard && known.is_some() {
                // Only a kubelet that listens ends the waiting: one that takes the registration and hangs up does not.
                past.backoff.reset();
                unheard = None;
                self.known(true);
            } else if known.is_some() {
                if was_listening {
                    tracing::info!(resource = %self.resource, "The kubelet has stopped to listen");
                }
                self.known(false);
                unheard = unheard.or(Some(now));
            }
            was_listening = heard;
            past.sees(present, now);
            if known.is_some() && (present != known || unheard.is_some_and(|since| now >= since + self.waits.unheard)) {
                if present == known
                    && let Some(kubelet) = known
                {
                    // It has us registered and does not listen: not a reason to knock without pause.
                    refused = Some((kubelet, now + past.backoff.next_delay()));
                    slow = Some(kubelet);
                }
                known = None;
                unheard = None;
                // A kubelet that goes removes its socket first and hangs up later.
                self.known(false);
            }
            match present {
                None => {
                    refused = None;
                    past.said.absent(&self.resource, &kubelet);
                }
                // A resource without units is not worth a place in the node's capacity.
                Some(_) if self.units.borrow_and_update().is_empty() => {}
                Some(id) if known.is_none() && refused.is_none_or(|(whom, until)| whom != id || now >= until) => {
                    match self.register(&kubelet, endpoint).await {
                        Ok(()) => {
                            known = Some(id);
                            (refused, slow) = (None, None);
                            unheard = Some(Instant::now());
                            past.said.0 = None;
                            let since = past.appeared.map_or(Duration::ZERO, |(_, since)| since.elapsed());
                            self.metrics.registered(&self.resource, since);
                            if past.kubelet.replace(id).is_some_and(|before| before != id) {
                                self.metrics.kubelet_restarted(&self.resource);
                            }
                            let units = self.units.borrow().len();
                            tracing::info!(
                                event = "registered", resource = %self.resource, units, endpoint,
                                "The kubelet knows of this resource"
                            );
                        }
                        Err(RegisterError::Connect(_)) if past.quick < QUICK.0 => {
                            past.quick += 1;
                            refused = Some((id, Instant::now() + QUICK.1));
                        }
                        Err(error) => {
                            past.said.warn(&self.resource, chain(&error));
                            slow = None;
                            refused = Some((id, Instant::now() + past.backoff.next_delay()));
                        }
                    }
                    // Much may have happened during the call: look again before waiting.
                    continue;
                }
                Some(_) => {}
            }
            let look = now + LOOK[usize::from(!armed)];
            let deadlines =
                [Some(look), refused.map(|(_, until)| until), unheard.map(|since| since + self.waits.unheard)];
            let next = deadlines.into_iter().flatten().min().unwrap_or(look);
            tokio::select! {
                () = self.shutdown.wait() => return End::Shutdown,
                () = changes.changed() => {}
                () = past.predecessors.gone() => {
                    tracing::info!(resource = %self.resource, "What served this resource before has ended");
                    (known, slow, refused) = (None, None, None);
                }
                heard = listening.changed() => if heard.is_err() { return End::Over },
                told = self.units.changed() => if told.is_err() { return End::Over },
                () = sleep_until(next) => {}
            }
        }
    }

    /// Says whether the kubelet knows of us and listens.
    fn known(&self, is_known: bool) {
        if is_known {
            self.ready.ready();
        } else {
            self.ready.not_ready();
        }
        self.metrics.known(&self.resource, is_known);
    }

    /// Whether our socket is still ours.
    async fn lost(&self, path: &Path, own: Option<SocketId>, changes: &mut FolderWatch) -> Option<End> {
        match socket_id(path) {
            Some(found) if Some(found) == own => None,
            None => Some(End::Lost("the socket was removed")),
            // Two plugins that take the socket from each other would never end: the newcomer keeps it while it lives.
            Some(_) => {
                tracing::warn!(
                    resource = %self.resource, path = %path.display(),
                    "Another process has taken over the socket of this resource; standing back while it serves"
                );
                self.known(false);
                self.aside.send_modify(|aside| {
                    aside.insert(self.resource.clone());
                });
                while let Ok(Ok(_)) = timeout(CONNECT, tokio::net::UnixStream::connect(path)).await {
                    let armed = changes.arm();
                    tokio::select! {
                        () = self.shutdown.wait() => return Some(End::Shutdown),
                        () = changes.changed() => {}
                        () = sleep(LOOK[usize::from(!armed)]) => {}
                    }
                }
                self.aside.send_modify(|aside| {
                    aside.remove(&self.resource);
                });
                // The CDI file is to be ours before the kubelet hears of us.
                sleep(HANDOVER).await;
                Some(End::Lost("the other process is gone"))
            }
        }
    }

    async fn register(&self, kubelet: &Path, endpoint: &str) -> Result<(), RegisterError> {
        let channel = socket::connect(kubelet, CONNECT).await?;
        let request = RegisterRequest {
            version: VERSION.to_owned(),
            endpoint: endpoint.to_owned(),
            resource_name: self.resource.to_string(),
            options: Some(options()),
        };
        match timeout(REGISTER, RegistrationClient::new(channel).register(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(RegisterError::Refused(status)),
            Err(_) => Err(RegisterError::Silent),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use agent_core::metrics::Metrics;
    use agent_core::readiness::Registry;
    use lab_kube::kubelet::{Config, Kubelet};

    use super::*;
    use crate::units::Unit;

    fn plugin(
        folder: &Path,
        units: watch::Receiver<Snapshot>,
        shutdown: &Shutdown,
        registry: &Registry,
        waits: Waits,
    ) -> Plugin {
        Plugin {
            resource: "pgpu".parse().unwrap(),
            units,
            folder: folder.to_owned(),
            manner: Manner::default(),
            shutdown: shutdown.clone(),
            ready: registry.register("pgpu"),
            metrics: PluginMetrics::register(&Metrics::new()),
            lately: Lately::default(),
            aside: Aside::default(),
            waits,
        }
    }

    #[tokio::test]
    async fn a_kubelet_that_begins_to_listen_when_it_was_given_up_is_listened_to() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("plugins");
        let kubelet = Kubelet::start(Config::new("node", &folder, place.path().join("pods.sock")), None).await.unwrap();
        kubelet.set_listen_delay(Duration::from_secs(1));
        let (_units, units) = watch::channel(Arc::new(vec![Unit::sample("0000:41:00.0")]));
        let (shutdown, registry) = (Shutdown::manual(), Registry::default());
        // It is told again 5 to 10 s after it was given up.
        let waits = Waits { unheard: Duration::from_millis(200), retry: [Duration::from_secs(10); 2] };
        let task = tokio::spawn(plugin(&folder, units, &shutdown, &registry, waits).run());
        kubelet.wait_allocatable("nvidia.com/pgpu", 1, Duration::from_mins(1)).await.unwrap();
        sleep(Duration::from_secs(11)).await;
        assert_eq!(kubelet.dump()["resources"]["nvidia.com/pgpu"]["registrations"], 1);
        assert!(registry.is_ready());
        shutdown.trigger();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_kubelet_that_is_away_for_an_hour_is_told_within_moments_of_its_return() {
        const HOUR: Duration = Duration::from_hours(1);
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("plugins");
        std::fs::create_dir(&folder).unwrap();
        let (_units, units) = watch::channel(Arc::new(vec![Unit::sample("0000:41:00.0")]));
        let (shutdown, registry, metrics) = (Shutdown::manual(), Registry::default(), Metrics::new());
        let says = |line: &str| metrics.encode().unwrap().lines().any(|found| found == line);
        let [known, unknown] =
            [1, 0].map(|value| format!("ccnode_plugin_registered{{resource=\"nvidia.com/pgpu\"}} {value}"));
        let mut plugin = plugin(&folder, units, &shutdown, &registry, Waits::default());
        plugin.metrics = PluginMetrics::register(&metrics);
        let task = tokio::spawn(plugin.run());
        let begun = Instant::now();
        sleep(HOUR).await;
        assert!(begun.elapsed() >= HOUR && !task.is_finished() && !registry.is_ready());
        assert!(folder.join("sandbox-pgpu.sock").exists(), "it is there before the kubelet is");
        assert!(says(&unknown), "a resource that was never registered is told of");

        // From here on there is another process, whose time is real.
        tokio::time::resume();
        let kubelet = Kubelet::start(Config::new("node", &folder, place.path().join("pods.sock")), None).await.unwrap();
        let begun = Instant::now();
        kubelet.wait_allocatable("nvidia.com/pgpu", 1, Duration::from_mins(1)).await.unwrap();
        assert!(begun.elapsed() < Waits::default().retry[1], "no long wait was begun in the hour");
        let told = async |line: &str| {
            let said = timeout(Duration::from_mins(1), async {
                while !says(line) {
                    sleep(Duration::from_millis(5)).await;
                }
            });
            assert!(said.await.is_ok(), "{line} is not said:\n{}", metrics.encode().unwrap());
        };
        told(&known).await;
        assert!(registry.is_ready());
        kubelet.stop().await.unwrap();
        told(&unknown).await;
        assert!(!registry.is_ready());
        kubelet.resume().await.unwrap();
        told(&known).await;
        shutdown.trigger();
        task.await.unwrap();
    }

    #[test]
    fn a_name_too_long_for_a_socket_is_shortened_and_stays_its_own() {
        let folder = Path::new("/var/lib/kubelet/device-plugins");
        assert_eq!(endpoint(Role::Kata, &"pgpu".parse().unwrap(), folder), "sandbox-pgpu.sock");
        assert_eq!(endpoint(Role::Kubevirt, &"pgpu".parse().unwrap(), folder), "kubevirt-pgpu.sock");
        let long = |last: &str| format!("{}{last}", "A".repeat(62)).parse::<ResourceName>().unwrap();
        let deep = PathBuf::from(format!("/{}", "d".repeat(60)));
        let (one, other) = (endpoint(Role::Kata, &long("1"), &deep), endpoint(Role::Kata, &long("2"), &deep));
        assert_ne!(one, other);
        assert!(deep.join(one).as_os_str().len() <= SOCKET_PATH);
    }
}
