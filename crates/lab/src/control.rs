//! A socket over which a running guest's devices are asked and made to fail: `cargo lab fault`.
//!
//! One request a connection, one line: `fault DEVICE FAULT`, `clear DEVICE`, `status DEVICE`, `unplug DEVICE`,
//! `plug DEVICE` or `list`. The answer is `ok` and what was asked for, or `error` and the reason.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use lab_devices::{Fault, Fleet};
use lab_vm::Guest;

/// Longest request: a device's name and a fault.
const MAX_REQUEST: u64 = 4096;

/// How long one side waits for the other's line.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a guest may take to let go of a device. The kernel alone waits 5 seconds for a second thought.
const UNPLUG: Duration = Duration::from_secs(30);

/// How often the server looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// Where a run listens unless it is told otherwise, and where `fault` looks.
pub fn default_path() -> PathBuf {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    folder.join("ccnode-lab.sock")
}

/// What can be done with the devices of a run.
pub trait Devices: Sync {
    /// The devices themselves.
    fn fleet(&self) -> &Fleet;
    /// Takes one out of its slot, or puts it back.
    fn plug(&self, device: &str, into: bool) -> anyhow::Result<()>;
}

impl Devices for Guest {
    fn fleet(&self) -> &Fleet {
        Self::fleet(self)
    }

    fn plug(&self, device: &str, into: bool) -> anyhow::Result<()> {
        if into {
            Self::plug(self, device)?;
        } else {
            self.unplug(device, UNPLUG)?;
        }
        Ok(())
    }
}

/// A listening socket; the file goes with it.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens at `path`. A socket that nobody listens on any more is replaced; one in use is an error.
    pub fn listen(path: &Path) -> anyhow::Result<Self> {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
        if is_socket {
            if UnixStream::connect(path).is_ok() {
                bail!("Another run listens on {}; give this one its own with --control", path.display());
            }
            fs::remove_file(path).with_context(|| format!("The old socket {} cannot be removed", path.display()))?;
        }
        let listener = UnixListener::bind(path).with_context(|| format!("Cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until `stop`.
    pub fn serve(&self, devices: &impl Devices, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match self.listener.accept() {
                // A client that breaks off harms nobody but itself.
                Ok((stream, _)) => drop(answer(&stream, devices)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK),
                Err(error) => {
                    tracing::warn!(%error, "the control socket cannot be listened on");
                    thread::sleep(LOOK);
                }
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Whether it is still there is of no consequence.
        let _ = fs::remove_file(&self.path);
    }
}

fn answer(stream: &UnixStream, devices: &impl Devices) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_REQUEST)).read_line(&mut line)?;
    let mut reply = match perform(line.trim(), devices) {
        Ok(text) => format!("ok {text}"),
        Err(error) => format!("error {error:#}").replace('\n', " "),
    };
    reply.push('\n');
    let mut stream = stream;
    stream.write_all(reply.as_bytes())
}

fn perform(request: &str, devices: &impl Devices) -> anyhow::Result<String> {
    let fleet = devices.fleet();
    let words: Vec<&str> = request.split_whitespace().collect();
    match words.as_slice() {
        ["list"] => Ok(fleet.names().join(" ")),
        ["status", device] => Ok(serde_json::to_string(&fleet.status(device)?)?),
        ["clear", device] => {
            fleet.clear_faults(device)?;
            Ok(format!("{device} has no faults"))
        }
        ["fault", device, fault] => {
            let fault: Fault = fault.parse()?;
            let told = fault.to_string();
            fleet.set_fault(device, fault)?;
            Ok(format!("{device} has the fault {told}"))
        }
        ["unplug", device] => {
            devices.plug(device, false)?;
            Ok(format!("{device} is out of its slot"))
        }
        ["plug", device] => {
            devices.plug(device, true)?;
            Ok(format!("{device} is in its slot"))
        }
        _ => bail!(
            "{request:?} is no request: fault DEVICE FAULT, clear DEVICE, status DEVICE, unplug DEVICE, plug DEVICE or list"
        ),
    }
}

/// Sends one request to the run that listens at `path`; its answer.
pub fn ask(path: &Path, request: &str) -> anyhow::Result<String> {
    let stream = UnixStream::connect(path)
        .with_context(|| format!("No run listens on {}; start one with cargo lab run", path.display()))?;
    stream.set_read_timeout(Some(PATIENCE + UNPLUG))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    (&stream).write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).context("The run did not answer")?;
    match line.trim_end().split_once(' ') {
        Some(("ok", text)) => Ok(text.to_owned()),
        Some(("error", text)) => bail!("{text}"),
        _ => bail!("The run answered {line:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use lab_devices::{DeviceSpec, FleetConfig, ModelKind};

    /// Devices without a guest, and what was asked of their slots.
    struct Loose(Fleet, Mutex<Vec<(String, bool)>>);

    impl Devices for Loose {
        fn fleet(&self) -> &Fleet {
            &self.0
        }

        fn plug(&self, device: &str, into: bool) -> anyhow::Result<()> {
            self.0.status(device)?;
            self.1.lock().unwrap().push((device.to_owned(), into));
            Ok(())
        }
    }

    #[test]
    fn faults_are_set_told_and_cleared_over_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let fleet = Fleet::start(FleetConfig {
            socket_dir: folder.path().to_owned(),
            devices: vec![DeviceSpec::new("gpu0", ModelKind::H100)],
            knob_file: None,
            trace_file: None,
        })
        .unwrap();
        let devices = Loose(fleet, Mutex::default());
        let path = folder.path().join("control");
        let control = Control::listen(&path).unwrap();
        assert!(Control::listen(&path).is_err(), "a socket in use is not taken over");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| control.serve(&devices, &stop));
            assert_eq!(ask(&path, "list").unwrap(), "gpu0");
            ask(&path, "fault gpu0 boot-never-completes").unwrap();
            assert!(ask(&path, "status gpu0").unwrap().contains("boot-never-completes"));
            ask(&path, "clear gpu0").unwrap();
            assert!(!ask(&path, "status gpu0").unwrap().contains("boot-never-completes"));
            ask(&path, "unplug gpu0").unwrap();
            ask(&path, "plug gpu0").unwrap();
            let nonsense = ["", "fault gpu9 boot-slow:1", "fault gpu0 no-such-fault", "fault gpu0", "\u{7f}"];
            for nonsense in nonsense.into_iter().chain(["unplug gpu9", "plug"]) {
                assert!(ask(&path, nonsense).is_err(), "{nonsense:?}");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(*devices.1.lock().unwrap(), [("gpu0".to_owned(), false), ("gpu0".to_owned(), true)]);
        drop(control);
        assert!(!path.exists());
        let error = ask(&path, "list").unwrap_err();
        assert!(error.to_string().contains("No run listens"), "{error}");
    }
}
