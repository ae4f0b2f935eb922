//! The kubelet's registration service, and its side of every plugin's ListAndWatch stream.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kubelet_api::device_plugin as dp;
use kubelet_api::device_plugin::device_plugin_client::DevicePluginClient;
use kubelet_api::device_plugin::registration_server::Registration;
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::names::is_extended_resource;
use super::state::{Client, Shared, devices_json};

/// First pause between attempts to dial a plugin; each further one is 1.6 times as long, as Go's gRPC does it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The real kubelet waits for the options as long as the plugin waits for the registration; so long is enough.
const OPTIONS_DEADLINE: Duration = Duration::from_mins(1);

/// The service on kubelet.sock.
pub(crate) struct Registry(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl Registration for Registry {
    async fn register(&self, request: Request<dp::RegisterRequest>) -> Result<Response<dp::Empty>, Status> {
        let request = request.into_inner();
        let shared = &self.0;
        let delay = shared.state().faults.register_delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        shared.change(|state| *state.registrations.entry(request.resource_name.clone()).or_default() += 1);
        let result = register(shared, &request).await;
        let asked = json!({"version": request.version, "endpoint": request.endpoint});
        shared.log_call(
            "Register",
            &request.resource_name,
            &request.endpoint,
            &asked,
            result.clone().map(|()| json!({})),
        );
        match result {
            Ok(()) => {
                info!(resource = request.resource_name, endpoint = request.endpoint, "Device plugin registered");
                Ok(Response::new(dp::Empty {}))
            }
            Err(text) => {
                warn!(resource = request.resource_name, reason = text, "Device plugin refused");
                Err(Status::unknown(text))
            }
        }
    }
}

async fn register(shared: &Arc<Shared>, request: &dp::RegisterRequest) -> Result<(), String> {
    let dp::RegisterRequest { version, endpoint, resource_name, .. } = request;
    if version != kubelet_api::VERSION {
        return Err(format!(
            "requested API version {version:?} is not supported by kubelet. Supported version is {:?}",
            [kubelet_api::VERSION]
        ));
    }
    if !is_extended_resource(resource_name) {
        return Err(format!("the ResourceName {resource_name:?} is invalid"));
    }
    let start = shared.state().starts;
    let channel = dial(&shared.plugin_socket(endpoint), shared.config.dial_deadline).await?;
    // The options in the request are ignored: the kubelet asks for them.
    let mut client = DevicePluginClient::new(channel.clone());
    let options = match timeout(OPTIONS_DEADLINE, client.get_device_plugin_options(dp::Empty {})).await {
        Ok(Ok(options)) => Ok(options.into_inner()),
        Ok(Err(status)) => Err(super::go_error(&status)),
        Err(_) => Err(super::DEADLINE_EXCEEDED.to_owned()),
    };
    let logged = options.as_ref().map_err(Clone::clone).map(|options| {
        json!({
            "pre_start_required": options.pre_start_required,
            "get_preferred_allocation_available": options.get_preferred_allocation_available,
        })
    });
    shared.log_call("GetDevicePluginOptions", resource_name, endpoint, &json!({}), logged);
    let options = options.map_err(|error| format!("failed to get device plugin options: {error}"))?;
    let cut = Arc::new(Notify::new());
    let current = shared.change(|state| {
        // The kubelet was stopped or restarted in the meantime.
        if state.starts != start || !state.running {
            return false;
        }
        state.manager.connected(resource_name, endpoint, options);
        state.channels.insert(resource_name.clone(), channel.clone());
        let client = Client { socket: endpoint.clone(), cut: cut.clone() };
        state.clients.entry(resource_name.clone()).or_default().push(client);
        true
    });
    if !current {
        return Err("the kubelet has stopped".to_owned());
    }
    shared.spawn(follow(shared.clone(), resource_name.clone(), endpoint.clone(), channel, cut));
    Ok(())
}

/// Dials until somebody answers, for at most `deadline` altogether.
async fn dial(socket: &Path, deadline: Duration) -> Result<Channel, String> {
    let attempts = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match kubelet_api::socket::connect(socket, deadline).await {
                Ok(channel) => return channel,
                Err(error) => warn!(error = %super::chain(&error), "Dialling a device plugin failed, trying again"),
            }
            sleep(pause).await;
            pause = pause.mul_f64(1.6);
        }
    };
    timeout(deadline, attempts).await.map_err(|_| "failed to dial device plugin: context deadline exceeded".to_owned())
}

/// Reads a plugin's lists until the stream ends, whoever ends it.
async fn follow(shared: Arc<Shared>, resource: String, socket: String, channel: Channel, cut: Arc<Notify>) {
    let reading = read_lists(&shared, &resource, &socket, channel);
    let end = tokio::select! {
        end = reading => end,
        () = cut.notified() => "cut by a fault".to_owned(),
    };
    warn!(resource, socket, reason = end, "ListAndWatch ended");
    shared.log_call("ListAndWatch", &resource, &socket, &json!({}), Err(end));
    // Clients are looked up by socket, the oldest first; the manager goes by the resource alone.
    shared.change(|state| {
        let Some(clients) = state.clients.get_mut(&resource) else { return };
        let Some(index) = clients.iter().position(|client| client.socket == socket) else { return };
        clients.remove(index);
        if clients.is_empty() {
            state.clients.remove(&resource);
        }
        state.manager.disconnected(&resource, Instant::now());
    });
}

async fn read_lists(shared: &Arc<Shared>, resource: &str, socket: &str, channel: Channel) -> String {
    let delay = shared.state().faults.listen_delay;
    if !delay.is_zero() {
        sleep(delay).await;
    }
    let mut stream = match DevicePluginClient::new(channel).list_and_watch(dp::Empty {}).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return super::go_error(&status),
    };
    loop {
        match stream.message().await {
            Ok(Some(list)) => {
                shared.log_call("ListAndWatch", resource, socket, &json!({}), Ok(devices_json(&list.devices)));
                shared.change(|state| state.manager.listed(resource, &list.devices));
                shared.save();
            }
            Ok(None) => return "EOF".to_owned(),
            Err(status) => return super::go_error(&status),
        }
    }
}
