//! Processes of the host's wish, and the orphans that PID 1 inherits.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lab_vm::wire::{Bytes, Event, Stream};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::serve::Host;

/// How long an ended process's output may stay open, with nothing in it, before its end is told. A daemon that it left behind
/// keeps the pipes; whoever waits for the process does not want to wait for the daemon.
const OUTPUT_GRACE: Duration = Duration::from_millis(300);
/// The same while there is something in it: on a busy machine it takes its time to the host.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(20);

const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

pub(crate) struct Spawn {
    pub(crate) id: u64,
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) cwd: Option<String>,
    pub(crate) stdin: bool,
}

#[derive(Clone)]
pub(crate) struct Processes {
    table: Arc<(Mutex<Table>, Condvar)>,
    host: Host,
}

#[derive(Default)]
struct Table {
    by_pid: HashMap<Pid, u64>,
    by_id: HashMap<u64, Entry>,
}

struct Entry {
    pid: Pid,
    /// Absent when there is no pipe, or it was closed.
    stdin: Option<Sender<Vec<u8>>>,
    /// The output that has not come to its end.
    outputs: Vec<(Stream, OwnedFd)>,
}

impl Entry {
    /// Whether some of its output is still to be read, be it only its end.
    fn has_output(&self) -> bool {
        let mut pipes: Vec<PollFd<'_>> =
            self.outputs.iter().map(|(_, pipe)| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)).collect();
        let has = |pipe: &PollFd<'_>| pipe.revents().is_some_and(|found| !found.is_empty());
        poll(&mut pipes, PollTimeout::ZERO).is_ok() && pipes.iter().any(has)
    }
}

impl Processes {
    pub(crate) fn new(host: Host) -> Self {
        let processes = Self { table: Arc::default(), host };
        let reaper = processes.clone();
        thread::spawn(move || reaper.reap());
        processes
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spawn(&self, spawn: Spawn) {
        let Spawn { id, argv, env, cwd, stdin } = spawn;
        let failed = |message: String, errno| self.host.send(&Event::Failed { id, message, errno });
        let Some((program, arguments)) = argv.split_first() else {
            return failed("No program given".to_owned(), None);
        };
        let folder = cwd.as_deref().unwrap_or("/");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs([("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", "dumb")])
            .envs(env)
            .current_dir(folder)
            // A group of its own, so that a signal reaches the whole tree.
            .process_group(0)
            .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Held over the fork: the reaper must find the process in the table, however short its life.
        let mut table = self.lock();
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                drop(table);
                return failed(format!("Cannot run {program} in {folder}: {error}"), error.raw_os_error());
            }
        };
        let Ok(raw) = i32::try_from(child.id()) else {
            drop(table);
            return failed(format!("Process id {} out of range", child.id()), None);
        };
        let pid = Pid::from_raw(raw);
        let stdin = child.stdin.take().map(|pipe| {
            let (sender, receiver) = channel();
            thread::spawn(move || feed(pipe, &receiver));
            sender
        });
        table.by_pid.insert(pid, id);
        let outputs = [
            child.stdout.as_ref().map(|pipe| (Stream::Stdout, pipe.as_fd())),
            child.stderr.as_ref().map(|pipe| (Stream::Stderr, pipe.as_fd())),
        ];
        let outputs = outputs.into_iter().flatten();
        let outputs = outputs.filter_map(|(stream, pipe)| Some((stream, pipe.try_clone_to_owned().ok()?))).collect();
        table.by_id.insert(id, Entry { pid, stdin, outputs });
        // Before the lock is released, so that no event of the process comes earlier.
        self.host.send(&Event::Started { id, pid: raw });
        drop(table);
        let (_, wake) = &*self.table;
        wake.notify_all();
        if let Some(pipe) = child.stdout.take() {
            self.forward(id, Stream::Stdout, pipe);
        }
        if let Some(pipe) = child.stderr.take() {
            self.forward(id, Stream::Stderr, pipe);
        }
    }

    fn forward(&self, id: u64, stream: Stream, mut pipe: impl Read + Send + 'static) {
        let this = self.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 16 * 1024];
            loop {
                match pipe.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => this.host.send(&Event::Output { id, stream, data: Bytes(buffer[..read].to_vec()) }),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            if let Some(entry) = this.lock().by_id.get_mut(&id) {
                entry.outputs.retain(|(open, _)| *open != stream);
            }
            this.table.1.notify_all();
        });
    }

    pub(crate) fn write_stdin(&self, process: u64, data: Vec<u8>) {
        if let Some(stdin) = self.lock().by_id.get(&process).and_then(|entry| entry.stdin.as_ref()) {
            // A process that closed its input loses the rest, as on any pipe.
            let _ = stdin.send(data);
        }
    }

    pub(crate) fn close_stdin(&self, process: u64) {
        if let Some(entry) = self.lock().by_id.get_mut(&process) {
            entry.stdin = None;
        }
    }

    pub(crate) fn signal(&self, id: u64, process: u64, signal: i32) {
        let answer = self.try_signal(process, signal);
        self.host.send(&match answer {
            Ok(()) => Event::Done { id },
            Err((message, errno)) => Event::Failed { id, message, errno: errno.map(|errno| errno as i32) },
        });
    }

    fn try_signal(&self, process: u64, signal: i32) -> Result<(), (String, Option<Errno>)> {
        let pid = self.lock().by_id.get(&process).map(|entry| entry.pid);
        let pid = pid.ok_or_else(|| (format!("No process {process}"), None))?;
        let name = Signal::try_from(signal).map_err(|error| (format!("No signal {signal}"), Some(error)))?;
        killpg(pid, name).map_err(|error| (format!("{name} does not reach process {pid}: {error}"), Some(error)))
    }

    /// Collects every dead child, ours and adopted.
    fn reap(&self) {
        loop {
            // Looked at without collecting: collecting happens under the lock, where no fork is half done.
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(status) => {
                    let Some(pid) = status.pid() else { continue };
                    let mut table = self.lock();
                    let status = waitpid(pid, Some(WaitPidFlag::WNOHANG));
                    let id = table.by_pid.remove(&pid);
                    drop(table);
                    if let (Some(id), Ok(status)) = (id, status) {
                        let this = self.clone();
                        thread::spawn(move || this.tell_end(id, status));
                    }
                }
                Err(Errno::ECHILD) => {
                    let table = self.lock();
                    if table.by_pid.is_empty() {
                        drop(self.table.1.wait_timeout(table, Duration::from_millis(200)));
                    }
                }
                Err(_) => {}
            }
        }
    }

    fn tell_end(&self, id: u64, status: WaitStatus) {
        let (_, wake) = &*self.table;
        let until = Instant::now() + OUTPUT_PATIENCE;
        let still_open = |table: &mut Table| table.by_id.get(&id).is_some_and(|entry| !entry.outputs.is_empty());
        let mut guard = self.lock();
        loop {
            let waited = wake.wait_timeout_while(guard, OUTPUT_GRACE, still_open);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
            if Instant::now() >= until || !guard.by_id.get(&id).is_some_and(Entry::has_output) {
                break;
            }
        }
        if let Some(entry) = guard.by_id.get_mut(&id) {
            entry.outputs.clear();
        }
        drop(guard);
        self.close_stdin(id);
        let (code, signal) = match status {
            WaitStatus::Exited(_, code) => (Some(code), None),
            WaitStatus::Signaled(_, signal, _) => (None, Some(signal as i32)),
            other => {
                eprintln!("lab-guest: process {id} ended in an unknown way: {other:?}");
                (Some(255), None)
            }
        };
        self.host.send(&Event::Exited { id, code, signal });
    }
}

/// Writes what the host sends until the host closes or the process no longer reads.
fn feed(mut pipe: impl Write, receiver: &Receiver<Vec<u8>>) {
    for data in receiver {
        if pipe.write_all(&data).and_then(|()| pipe.flush()).is_err() {
            return;
        }
    }
}
