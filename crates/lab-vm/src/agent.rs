//! The host's end of the conversation with `lab-guest`: processes, files.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use thiserror::Error;

use crate::wire::{self, Bytes, Event, Line, Request, Stream};

/// Why something could not be done in the guest.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The guest is off, or was: nothing it was doing can be asked about any more.
    #[error("The guest is gone")]
    Gone,
    /// Not finished in time; processes go on until told otherwise.
    #[error("{what}: not finished after {} s", after.as_secs_f32())]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// The guest refused.
    #[error("{message}")]
    Failed {
        /// What the guest says.
        message: String,
        /// The kernel's error number, where there was one.
        errno: Option<i32>,
    },
    /// The connection to the guest broke.
    #[error("Cannot reach the guest")]
    Connection(#[from] io::Error),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal of this number.
    Signaled(i32),
}

impl Status {
    /// Exit code as a shell would show it: 128 and the signal's number for a signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }

    /// Whether it ended with code 0.
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signaled(signal) => match Signal::try_from(*signal) {
                Ok(signal) => write!(f, "{signal}"),
                Err(_) => write!(f, "signal {signal}"),
            },
        }
    }
}

/// A piece of a process's output.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// When it arrived here.
    pub at: Instant,
    /// On which stream.
    pub stream: Stream,
    /// The bytes.
    pub data: Vec<u8>,
}

/// What a process has written, and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended; none while it runs.
    pub status: Option<Status>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// Standard error as text, without the last newline.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end_matches('\n').to_owned()
    }

    /// Whether the process ended with code 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(Status::success)
    }
}

type Sink = Box<dyn FnMut(&Chunk) + Send>;

/// A process to be started in the guest.
#[derive(Default)]
pub struct Command {
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    stdin: bool,
    sink: Option<Sink>,
}

impl Command {
    /// A program, looked up in the guest's PATH, and its arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// A shell script.
    pub fn shell(script: &str) -> Self {
        Self::new(["sh", "-c", script])
    }

    /// Sets a variable, over PATH, HOME, LANG and TERM which every process has.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory; `/` otherwise.
    #[must_use]
    pub fn cwd(mut self, folder: impl Into<String>) -> Self {
        self.cwd = Some(folder.into());
        self
    }

    /// Gives it a standard input to write to with [`Process::write_stdin`]; `/dev/null` otherwise.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Calls `sink` with each piece of output as it arrives. It runs on the connection's own thread: it must not block
    /// for long, nor ask the guest anything.
    #[must_use]
    pub fn on_output(mut self, sink: impl FnMut(&Chunk) + Send + 'static) -> Self {
        self.sink = Some(Box::new(sink));
        self
    }
}

/// A process of the guest. Dropping this leaves it running.
pub struct Process {
    id: u64,
    pid: i32,
    name: String,
    call: Arc<Call>,
    agent: Arc<Agent>,
}

impl Process {
    /// Its process id in the guest, which is also its group's.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// [`AgentError::Timeout`], the process then still running; [`AgentError::Gone`].
    pub fn wait(&self, timeout: Duration) -> Result<Status, AgentError> {
        self.call.wait(&self.name, timeout, |state| state.status)
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<Status> {
        self.call.lock().status
    }

    /// Sends a signal to it and all processes of its group.
    ///
    /// # Errors
    ///
    /// [`AgentError::Failed`], if none of the group is left; [`AgentError::Gone`].
    pub fn signal(&self, signal: Signal) -> Result<(), AgentError> {
        let process = self.id;
        let what = format!("{signal} to {}", self.name);
        self.agent.ask(&what, |id| Request::Signal { id, process, signal: signal as i32 })
    }

    /// Writes to its standard input; lost if the process has none or no longer reads.
    ///
    /// # Errors
    ///
    /// [`AgentError`], if the guest cannot be reached.
    pub fn write_stdin(&self, data: &[u8]) -> Result<(), AgentError> {
        data.chunks(wire::CHUNK)
            .try_for_each(|part| self.agent.send(&Request::Stdin { process: self.id, data: Bytes(part.to_vec()) }))
    }

    /// Closes its standard input.
    ///
    /// # Errors
    ///
    /// [`AgentError`], if the guest cannot be reached.
    pub fn close_stdin(&self) -> Result<(), AgentError> {
        self.agent.send(&Request::CloseStdin { process: self.id })
    }

    /// What it has written so far, with times.
    pub fn chunks(&self) -> Vec<Chunk> {
        self.call.lock().chunks.clone()
    }

    /// What it has written so far, and its end if it has come.
    pub fn output(&self) -> Output {
        let state = self.call.lock();
        let collect = |wanted| {
            let chunks = state.chunks.iter().filter(|chunk| chunk.stream == wanted);
            chunks.flat_map(|chunk| chunk.data.iter().copied()).collect()
        };
        Output { status: state.status, stdout: collect(Stream::Stdout), stderr: collect(Stream::Stderr) }
    }

    /// Waits until its output, both streams together in the order of arrival, satisfies a condition.
    ///
    /// # Errors
    ///
    /// As for [`Process::wait`]; [`AgentError::Failed`], if it ends before.
    pub fn wait_output(&self, timeout: Duration, mut wanted: impl FnMut(&str) -> bool) -> Result<(), AgentError> {
        let what = format!("The awaited output of {}", self.name);
        let mut seen = (0, Vec::new());
        let met = self.call.wait(&what, timeout, |state| {
            for chunk in &state.chunks[seen.0..] {
                seen.1.extend_from_slice(&chunk.data);
            }
            seen.0 = state.chunks.len();
            if wanted(&String::from_utf8_lossy(&seen.1)) { Some(Ok(())) } else { state.status.map(Err) }
        })?;
        met.map_err(|status| AgentError::Failed {
            message: format!("{} ended with {status} before the awaited output", self.name),
            errno: None,
        })
    }
}

/// What is known of one request.
#[derive(Default)]
struct State {
    pid: Option<i32>,
    chunks: Vec<Chunk>,
    status: Option<Status>,
    data: Vec<u8>,
    done: bool,
    failed: Option<(String, Option<i32>)>,
    gone: bool,
    sink: Option<Sink>,
}

#[derive(Default)]
struct Call {
    state: Mutex<State>,
    changed: Condvar,
}

impl Call {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, AgentError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            if let Some((message, errno)) = &state.failed {
                return Err(AgentError::Failed { message: message.clone(), errno: *errno });
            }
            if state.gone {
                return Err(AgentError::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::Timeout { what: what.to_owned(), after: timeout });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

/// How the guest came up.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    pub(crate) version: u32,
    pub(crate) kernel: String,
    pub(crate) uptime: Duration,
    pub(crate) problems: Vec<String>,
}

/// Requests that only need an answer get it at once; a machine this slow is stuck.
const ANSWER: Duration = Duration::from_mins(1);

/// The connection to one boot of a guest.
pub(crate) struct Agent {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Shared {
    calls: Mutex<HashMap<u64, Arc<Call>>>,
    ready: Mutex<(Option<Ready>, bool)>,
    readied: Condvar,
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, HashMap<u64, Arc<Call>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, id: u64) -> Option<Arc<Call>> {
        self.calls().get(&id).cloned()
    }

    fn ready(&self) -> MutexGuard<'_, (Option<Ready>, bool)> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) {
        self.ready().1 = true;
        self.readied.notify_all();
        for call in self.calls().values() {
            call.update(|state| state.gone = true);
        }
    }

    fn take(&self, event: Event) {
        match event {
            Event::Ready { version, kernel, uptime_ms, problems } => {
                let uptime = Duration::from_millis(uptime_ms);
                self.ready().0 = Some(Ready { version, kernel, uptime, problems });
                self.readied.notify_all();
            }
            Event::Started { id, pid } => self.update(id, |state| state.pid = Some(pid)),
            Event::Output { id, stream, data } => self.update(id, |state| {
                let chunk = Chunk { at: Instant::now(), stream, data: data.0 };
                if let Some(sink) = &mut state.sink {
                    sink(&chunk);
                }
                state.chunks.push(chunk);
            }),
            Event::Exited { id, code, signal } => {
                let status = signal.map_or(Status::Exited(code.unwrap_or(255)), Status::Signaled);
                self.update(id, |state| state.status = Some(status));
            }
            Event::Data { id, data } => self.update(id, |state| state.data.extend_from_slice(&data.0)),
            Event::Done { id } => self.update(id, |state| state.done = true),
            Event::Failed { id, message, errno } => self.update(id, |state| state.failed = Some((message, errno))),
            Event::Malformed { message } => tracing::warn!(message, "The guest did not understand a line"),
        }
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut State)) {
        if let Some(call) = self.call(id) {
            call.update(change);
        } else {
            tracing::debug!(id, "The guest answers what nobody asked");
        }
    }
}

impl Agent {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Arc<Self>> {
        let reader = stream.try_clone()?;
        // A guest that no longer reads must not hang the host.
        stream.set_write_timeout(Some(ANSWER))?;
        let shared = Arc::new(Shared::default());
        let listener = Arc::clone(&shared);
        thread::Builder::new().name("lab-guest".to_owned()).spawn(move || {
            listen(reader, &listener);
            listener.gone();
        })?;
        Ok(Arc::new(Self { writer: Mutex::new(stream), shared, next_id: AtomicU64::new(1) }))
    }

    /// Waits a little for the guest's first line; `None` if it has not come yet.
    pub(crate) fn poll_ready(&self, timeout: Duration) -> Result<Option<Ready>, AgentError> {
        let waiting = |(ready, gone): &mut (Option<Ready>, bool)| ready.is_none() && !*gone;
        let waited = self.shared.readied.wait_timeout_while(self.shared.ready(), timeout, waiting);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*guard {
            (Some(ready), _) => Ok(Some(ready.clone())),
            (None, true) => Err(AgentError::Gone),
            (None, false) => Ok(None),
        }
    }

    fn send(&self, request: &Request) -> Result<(), AgentError> {
        let line = wire::to_line(request).map_err(io::Error::from)?;
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        match writer.write_all(&line) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(AgentError::Gone),
            Err(error) => Err(error.into()),
        }
    }

    fn call(&self, sink: Option<Sink>) -> (u64, Arc<Call>) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let gone = self.shared.ready().1;
        let call =
            Arc::new(Call { state: Mutex::new(State { gone, sink, ..State::default() }), changed: Condvar::new() });
        self.shared.calls().insert(id, Arc::clone(&call));
        (id, call)
    }

    fn forget(&self, id: u64) {
        self.shared.calls().remove(&id);
    }

    fn ask(&self, what: &str, request: impl FnOnce(u64) -> Request) -> Result<(), AgentError> {
        let (id, call) = self.call(None);
        let answer = self.send(&request(id)).and_then(|()| call.wait(what, ANSWER, |state| state.done.then_some(())));
        self.forget(id);
        answer
    }

    pub(crate) fn spawn(self: &Arc<Self>, command: Command) -> Result<Process, AgentError> {
        let Command { argv, env, cwd, stdin, sink } = command;
        let name = argv.join(" ");
        let (id, call) = self.call(sink);
        let started = self
            .send(&Request::Spawn { id, argv, env, cwd, stdin })
            .and_then(|()| call.wait(&name, ANSWER, |state| state.pid));
        match started {
            Ok(pid) => Ok(Process { id, pid, name, call, agent: Arc::clone(self) }),
            Err(error) => {
                self.forget(id);
                Err(error)
            }
        }
    }

    pub(crate) fn put(&self, content: &mut dyn io::Read, path: &str, mode: u32) -> Result<(), AgentError> {
        let (id, call) = self.call(None);
        let mut send = || {
            self.send(&Request::Put { id, path: path.to_owned(), mode })?;
            let mut buffer = vec![0; wire::CHUNK];
            loop {
                match content.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => self.send(&Request::Data { id, data: Bytes(buffer[..read].to_vec()) })?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
            self.send(&Request::End { id })
        };
        let answer = send().and_then(|()| call.wait(path, ANSWER, |state| state.done.then_some(())));
        self.forget(id);
        answer
    }

    pub(crate) fn get(&self, path: &str) -> Result<Vec<u8>, AgentError> {
        let (id, call) = self.call(None);
        let request = Request::Get { id, path: path.to_owned() };
        let answer = self.send(&request).and_then(|()| {
            call.wait(path, ANSWER, |state| if state.done { Some(std::mem::take(&mut state.data)) } else { None })
        });
        self.forget(id);
        answer
    }

    pub(crate) fn power(&self, reboot: bool, grace: Duration) -> Result<(), AgentError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.send(&Request::Power { reboot, grace_ms })
    }
}

fn listen(reader: UnixStream, shared: &Shared) {
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let mut partial = Vec::new();
    loop {
        match wire::read_line(&mut reader, &mut partial) {
            Ok(Line::Text(line)) => match serde_json::from_slice(&line) {
                Ok(event) => shared.take(event),
                Err(error) => tracing::warn!(%error, "The guest sent a line that is no event"),
            },
            Ok(Line::TooLong) => tracing::warn!("The guest sent a line that is too long"),
            Ok(Line::End) => return,
            Err(error) => {
                tracing::debug!(%error, "The connection to the guest ended");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;

    use super::*;

    const SECOND: Duration = Duration::from_secs(5);

    /// A guest that answers each request line with the given lines.
    fn guest(answers: Vec<&'static str>) -> (Arc<Agent>, thread::JoinHandle<Vec<Request>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            answers
                .into_iter()
                .map(|answer| {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    theirs.write_all(answer.as_bytes()).unwrap();
                    serde_json::from_str(&line).unwrap()
                })
                .collect()
        });
        (Agent::new(ours).unwrap(), thread)
    }

    #[test]
    fn a_process_is_followed_from_start_to_end() {
        let lines = "garbage\n{\"ev\":\"unheard-of\"}\n{\"ev\":\"started\",\"id\":1,\"pid\":77}\n\
                     {\"ev\":\"output\",\"id\":1,\"stream\":\"stdout\",\"data\":\"Zm9v\"}\n\
                     {\"ev\":\"output\",\"id\":9,\"stream\":\"stdout\",\"data\":\"Zm9v\"}\n\
                     {\"ev\":\"output\",\"id\":1,\"stream\":\"stderr\",\"data\":\"Zg==\"}\n\
                     {\"ev\":\"output\",\"id\":1,\"stream\":\"stdout\",\"data\":\"Zm8=\"}\n\
                     {\"ev\":\"exited\",\"id\":1,\"code\":null,\"signal\":15}\n";
        let (agent, thread) = guest(vec![lines]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let command =
            Command::new(["cat"]).env("A", "b").on_output(move |chunk| sink.lock().unwrap().extend(chunk.data.clone()));
        let process = agent.spawn(command).unwrap();
        assert_eq!(process.pid(), 77);
        assert_eq!(process.wait(SECOND).unwrap(), Status::Signaled(15));
        assert_eq!(process.output().text(), "foofo");
        assert_eq!(process.output().error_text(), "f");
        assert_eq!(seen.lock().unwrap().as_slice(), b"fooffo");
        assert_eq!(process.status().unwrap().code(), 143);
        assert!(matches!(&thread.join().unwrap()[0], Request::Spawn { id: 1, env, .. } if env["A"] == "b"));
    }

    #[test]
    fn a_guest_that_goes_ends_every_wait() {
        let (agent, thread) = guest(vec!["{\"ev\":\"started\",\"id\":1,\"pid\":7}\n"]);
        let process = agent.spawn(Command::shell("sleep 9")).unwrap();
        thread.join().unwrap();
        assert!(matches!(process.wait(SECOND), Err(AgentError::Gone)));
        assert!(matches!(agent.poll_ready(SECOND), Err(AgentError::Gone)));
        assert!(matches!(agent.get("/x"), Err(AgentError::Gone)));
    }

    #[test]
    fn refusals_and_silence_are_errors() {
        let (agent, _thread) = guest(vec![
            "{\"ev\":\"failed\",\"id\":1,\"message\":\"Cannot run x in /\",\"errno\":2}\n",
            "{\"ev\":\"data\",\"id\":2,\"data\":\"Zm9v\"}\n{\"ev\":\"done\",\"id\":2}\n",
            "{\"ev\":\"started\",\"id\":3,\"pid\":7}\n",
            "",
        ]);
        let error = agent.spawn(Command::new(["x"])).err().unwrap();
        assert!(matches!(&error, AgentError::Failed { errno: Some(2), .. }), "{error}");
        assert_eq!(agent.get("/f").unwrap(), b"foo");
        let process = agent.spawn(Command::new(["y"])).unwrap();
        let error = process.wait(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.to_string(), "y: not finished after 0.02 s");
    }
}
