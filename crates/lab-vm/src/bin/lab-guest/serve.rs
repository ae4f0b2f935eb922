//! The conversation with the host.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lab_vm::wire::{self, Event, Line, Request};

use crate::files::{self, Failure, Incoming};
use crate::processes::{Processes, Spawn};
use crate::system::Power;

const PORT_WAIT: Duration = Duration::from_secs(10);

/// The way to the host.
#[derive(Clone)]
pub(crate) struct Host(Arc<Mutex<File>>);

impl Host {
    /// Sends one event. A host that is gone takes the machine with it, so there is nobody to tell of a failure.
    pub(crate) fn send(&self, event: &Event) {
        let Ok(line) = wire::to_line(event) else { return };
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = port.write_all(&line) {
            eprintln!("lab-guest: event lost: {error}");
        }
    }
}

fn find_port() -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim() == wire::PORT_NAME).then(|| PathBuf::from("/dev").join(entry.file_name()))
    })
}

fn open_port() -> Result<File, String> {
    let deadline = Instant::now() + PORT_WAIT;
    loop {
        let opened = find_port().map(|path| (OpenOptions::new().read(true).write(true).open(&path), path));
        match opened {
            Some((Ok(port), _)) => return Ok(port),
            Some((Err(error), path)) if Instant::now() >= deadline => {
                return Err(format!("{} cannot be opened: {error}", path.display()));
            }
            None if Instant::now() >= deadline => return Err(format!("No virtio-serial port {}", wire::PORT_NAME)),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Milliseconds since the kernel started.
fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    // "12.34 5.67": seconds with two decimals.
    let first = text.split_ascii_whitespace().next().unwrap_or_default();
    first.replace('.', "").parse::<u64>().map_or(0, |hundredths| hundredths * 10)
}

/// Serves the host until it asks for the end of the machine.
pub(crate) fn run(problems: Vec<String>) -> Result<Power, String> {
    let port = open_port()?;
    // A port admits one opener; reader and writer share the description.
    let reader = port.try_clone().map_err(|error| format!("Virtio-serial port cannot be shared: {error}"))?;
    let host = Host(Arc::new(Mutex::new(port)));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    host.send(&Event::Ready { version: wire::VERSION, kernel, uptime_ms: uptime_ms(), problems });

    let processes = Processes::new(host.clone());
    let mut incoming = HashMap::new();
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let mut partial = Vec::new();
    loop {
        match wire::read_line(&mut reader, &mut partial) {
            Ok(Line::Text(line)) if line.is_empty() => {}
            Ok(Line::Text(line)) => match serde_json::from_slice(&line) {
                Ok(Request::Power { reboot, grace_ms }) => {
                    return Ok(Power { reboot, grace: Duration::from_millis(grace_ms) });
                }
                Ok(request) => answer(request, &host, &processes, &mut incoming),
                Err(error) => host.send(&Event::Malformed { message: error.to_string() }),
            },
            Ok(Line::TooLong) => {
                host.send(&Event::Malformed { message: format!("Line over {} bytes", wire::MAX_LINE) });
            }
            // Nobody at the other end for the moment.
            Ok(Line::End) => thread::sleep(Duration::from_millis(20)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("Virtio-serial port cannot be read: {error}")),
        }
    }
}

fn answer(request: Request, host: &Host, processes: &Processes, incoming: &mut HashMap<u64, Incoming>) {
    let failed = |id: u64, Failure { message, errno }: Failure| host.send(&Event::Failed { id, message, errno });
    match request {
        Request::Spawn { id, argv, env, cwd, stdin } => processes.spawn(Spawn { id, argv, env, cwd, stdin }),
        Request::Stdin { process, data } => processes.write_stdin(process, data.0),
        Request::CloseStdin { process } => processes.close_stdin(process),
        Request::Signal { id, process, signal } => processes.signal(id, process, signal),
        Request::Put { id, path, mode } => match Incoming::begin(id, &path, mode) {
            Ok(file) => {
                incoming.insert(id, file);
            }
            Err(failure) => failed(id, failure),
        },
        // After a failure the rest of the file is still on its way: it is dropped here.
        Request::Data { id, data } => {
            if let Some(file) = incoming.get_mut(&id)
                && let Err(failure) = file.write(&data.0)
            {
                incoming.remove(&id);
                failed(id, failure);
            }
        }
        Request::End { id } => {
            if let Some(file) = incoming.remove(&id) {
                match file.end() {
                    Ok(()) => host.send(&Event::Done { id }),
                    Err(failure) => failed(id, failure),
                }
            }
        }
        Request::Get { id, path } => {
            let host = host.clone();
            thread::spawn(move || files::get(id, &path, &host));
        }
        Request::Power { .. } => {}
    }
}
