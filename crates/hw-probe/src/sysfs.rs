//! Reading the kernel's files with suspicion: bounded in size and, where the kernel can hold a reader up, in time.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SendError, Sender};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;

use crate::{Bdf, Problem, SysRoot};

/// Most bytes of an attribute: sysfs gives at most one page, so more is no attribute.
const LIMIT: u64 = 64 * 1024;

/// How long a reader waits for an attribute that the kernel shows only under the device's lock.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// A link that is there, but whose target cannot be told.
pub(crate) struct Unreadable;

/// A directory whose files are read by name; what goes wrong on the way is collected.
pub(crate) struct Node {
    directory: PathBuf,
    /// The directory's path below the root, as problems show it; empty for the root itself.
    shown: String,
    bdf: Option<Bdf>,
    pub(crate) problems: Vec<Problem>,
}

impl Node {
    pub(crate) fn new(root: &SysRoot, path: &str, bdf: Option<Bdf>) -> Self {
        Self { directory: root.join(path), shown: path.to_owned(), bdf, problems: Vec::new() }
    }

    fn at(&self, name: &str) -> PathBuf {
        // Joining nothing would add a slash, which asks for a directory.
        if name.is_empty() { self.directory.clone() } else { self.directory.join(name) }
    }

    /// Notes that `name` is not as it should be.
    pub(crate) fn note(&mut self, name: &str, message: impl Into<String>) {
        let path = match (self.shown.as_str(), name) {
            ("", name) => name.to_owned(),
            (shown, "") => shown.to_owned(),
            (shown, name) => format!("{shown}/{name}"),
        };
        self.problems.push(Problem { bdf: self.bdf, path, message: message.into() });
    }

    fn note_io(&mut self, name: &str, error: &io::Error) {
        self.note(name, format!("Cannot be read: {error}"));
    }

    /// The file's text without white space at its end; none when the file is absent.
    pub(crate) fn text(&mut self, name: &str) -> Option<String> {
        let bytes = read(&self.at(name));
        self.judge(name, bytes)
    }

    /// The same for a file that the kernel shows only under the device's lock, which a reset of a dead device holds for
    /// minutes and an unbind from under a virtual machine for ever.
    pub(crate) fn text_within(&mut self, name: &str, patience: Duration) -> Option<String> {
        let path = self.at(name);
        let bytes = patiently(path.clone(), patience, move || read(&path));
        self.judge(name, bytes)
    }

    fn judge(&mut self, name: &str, bytes: io::Result<Vec<u8>>) -> Option<String> {
        match bytes.map(String::from_utf8) {
            // The kernel writes none before it, and the first line of some files is that of the first BAR.
            Ok(Ok(text)) => Some(text.trim_end().to_owned()),
            Ok(Err(_)) => {
                self.note(name, "Is not text");
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.note_io(name, &error);
                None
            }
        }
    }

    /// The same, where an empty file says as little as an absent one.
    pub(crate) fn word(&mut self, name: &str) -> Option<String> {
        self.text(name).filter(|text| !text.is_empty())
    }

    /// The file's text as `parse` understands it; none when the file is absent.
    pub(crate) fn parsed<T>(&mut self, name: &str, what: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.text(name)?;
        let value = parse(&text);
        if value.is_none() {
            self.note(name, format!("Is not {what}: {:?}", excerpt(&text)));
        }
        value
    }

    /// The same for a file that every function has.
    pub(crate) fn required<T>(&mut self, name: &str, what: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let before = self.problems.len();
        let value = self.parsed(name, what, parse);
        if value.is_none() && self.problems.len() == before {
            self.note(name, "Is missing");
        }
        value
    }

    /// The last part of the path that the link `name` points to; none when there is no link. That there is one whose
    /// target cannot be told is noted here.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<String>, Unreadable> {
        before_access();
        match fs::read_link(self.at(name)) {
            Ok(target) => {
                let last = target.file_name().map(|last| last.to_string_lossy().into_owned());
                if last.is_none() {
                    self.note(name, "Points nowhere");
                }
                last.map(Some).ok_or(Unreadable)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                self.note_io(name, &error);
                Err(Unreadable)
            }
        }
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        before_access();
        fs::symlink_metadata(self.at(name)).is_ok()
    }

    /// Names in the directory `name` (the node's own when empty), sorted; none of them when it is absent.
    pub(crate) fn entries(&mut self, name: &str) -> Vec<String> {
        before_access();
        let mut names = Vec::new();
        let listing = match fs::read_dir(self.at(name)) {
            Ok(listing) => listing,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    self.note(name, format!("Cannot be listed: {error}"));
                }
                return names;
            }
        };
        for entry in listing {
            match entry {
                Ok(entry) => names.push(entry.file_name().to_string_lossy().into_owned()),
                Err(error) => {
                    self.note(name, format!("Cannot be listed to its end: {error}"));
                    break;
                }
            }
        }
        names.sort_unstable();
        names
    }
}

/// The start of a text that goes into a message.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(48).collect()
}

/// `0x` and hexadecimal digits: the form of sysfs ids.
pub(crate) fn hex(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x")?;
    let plain = (1..=16).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

/// A decimal number without sign.
pub(crate) fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Called before each access to the tree, so that a test can change it between any two of them.
pub(crate) fn before_access() {
    #[cfg(feature = "testing")]
    crate::testing::interrupt();
}

/// Opens a regular file, and nothing else: a device node or a pipe that stands in an attribute's place is not opened,
/// since that alone can reset a device; one that takes the place meanwhile does not make us wait.
fn open(path: &Path) -> io::Result<File> {
    before_access();
    if fs::metadata(path)?.is_file() {
        OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}

pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {LIMIT} bytes")));
    }
    Ok(bytes)
}

/// The first `most` bytes of a file that may be longer.
pub(crate) fn read_head(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Up to `length` bytes from `offset`; fewer where the file ends.
pub(crate) fn read_at(path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Files whose reading was given up and has not ended yet. Such a thread cannot be stopped, so a file of which that is
/// known is not asked again.
static STUCK: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

fn stuck() -> MutexGuard<'static, HashSet<PathBuf>> {
    STUCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn late() -> io::Error {
    let text = "the kernel does not answer: a reset or an unbind of the device has not finished";
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// What a reader does; tells whether it may be given more.
type Work = Box<dyn FnOnce(&Arc<Reader>) -> bool + Send>;

/// A thread that reads for others.
struct Reader(Sender<Work>);

/// A reader that has ended its work and waits a moment for more: to make a thread costs more than most reads.
static IDLE: Mutex<Option<Arc<Reader>>> = Mutex::new(None);

fn idle() -> MutexGuard<'static, Option<Arc<Reader>>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For how long a reader waits for more.
const REST: Duration = Duration::from_millis(100);

/// Gives work to the reader that waits for some, or to a new one.
fn hand_out(work: Work) -> io::Result<()> {
    let waiting = idle().take();
    let work = match waiting {
        Some(reader) => match reader.0.send(work) {
            Ok(()) => return Ok(()),
            Err(SendError(work)) => work,
        },
        None => work,
    };
    let (sender, receiver) = mpsc::channel();
    let own = Arc::new(Reader(sender));
    thread::Builder::new().name("hw-probe-read".into()).spawn(move || read_for_others(&own, &receiver, work))?;
    Ok(())
}

fn read_for_others(own: &Arc<Reader>, receiver: &Receiver<Work>, first: Work) {
    let mut work = Some(first);
    while let Some(now) = work.take() {
        if !now(own) {
            return;
        }
        work = receiver.recv_timeout(REST).ok();
        if work.is_none() {
            let mut idle = idle();
            if idle.as_ref().is_some_and(|reader| Arc::ptr_eq(reader, own)) {
                *idle = None;
                return;
            }
            drop(idle);
            // Somebody has just taken us, and sends.
            work = receiver.recv().ok();
        }
    }
}

/// Runs `read` of `path` on a thread of its own and waits no longer than `patience`.
pub(crate) fn patiently<T: Send + 'static>(
    path: PathBuf,
    patience: Duration,
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    patiently_each(vec![(path, read)], patience).pop().unwrap_or_else(|| Err(late()))
}

/// The same for many, one after another on one thread; each may take as long as `patience`, and one that hangs holds up none
/// of the others. The results are in the order of `reads`.
pub(crate) fn patiently_each<T, F>(reads: Vec<(PathBuf, F)>, patience: Duration) -> Vec<io::Result<T>>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let (mut results, mut waiting) = (Vec::new(), VecDeque::new());
    for (index, (path, read)) in reads.into_iter().enumerate() {
        // What has hung before says so until it is read.
        results.push(Err(late()));
        if !stuck().contains(&path) {
            before_access();
            waiting.push_back((index, path, read));
        }
    }
    let mut order: VecDeque<(usize, PathBuf)> = waiting.iter().map(|(index, path, _)| (*index, path.clone())).collect();
    let waiting = Arc::new(Mutex::new(waiting));
    while !order.is_empty() {
        let (sender, receiver) = mpsc::channel();
        let is_given_up = Arc::new(AtomicBool::new(false));
        if let Err(error) = hand_out(reading(Arc::clone(&waiting), Arc::clone(&is_given_up), sender)) {
            for (index, _) in order {
                results[index] = Err(io::Error::new(error.kind(), error.to_string()));
            }
            break;
        }
        while let Some((index, path)) = order.pop_front() {
            let result = receiver.recv_timeout(patience).or_else(|_| {
                let mut stuck = stuck();
                // Readers answer under this lock: what is not there now comes too late.
                receiver.try_recv().inspect_err(|_| {
                    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    // Relaxed: the flag is read and written only under the locks.
                    is_given_up.store(true, Ordering::Relaxed);
                    // A reader that has not come to it, on a machine that is busy enough, is late and not stuck.
                    if waiting.front().is_some_and(|(next, ..)| *next == index) {
                        waiting.pop_front();
                    } else {
                        stuck.insert(path);
                    }
                })
            });
            match result {
                Ok(result) => results[index] = result,
                // The rest is for another reader.
                Err(_) => break,
            }
        }
    }
    results
}

/// Reads what waits, in order, and answers each.
fn reading<T, F>(
    waiting: Arc<Mutex<VecDeque<(usize, PathBuf, F)>>>,
    is_given_up: Arc<AtomicBool>,
    answers: Sender<io::Result<T>>,
) -> Work
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let given_up = Arc::clone(&is_given_up);
    let next = move || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up.load(Ordering::Relaxed) { None } else { waiting.pop_front() }
    };
    Box::new(move |own| {
        let mut found = next();
        while let Some((_, path, read)) = found.take() {
            let result = read();
            let mut stuck = stuck();
            stuck.remove(&path);
            if is_given_up.load(Ordering::Relaxed) {
                return false;
            }
            found = next();
            // Free before the answer is there: who has it may come with more at once.
            let rests = found.is_none() && rest(own);
            // Nobody listens any more when the answer came too late.
            let _ = answers.send(result);
            if found.is_none() {
                return rests;
            }
        }
        false
    })
}

/// Waits for more work, unless another reader does already.
fn rest(own: &Arc<Reader>) -> bool {
    let mut idle = idle();
    let is_free = idle.is_none();
    if is_free {
        *idle = Some(Arc::clone(own));
    }
    is_free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_as_the_kernel_writes_them() {
        for (text, value) in [("0x10de", Some(0x10de)), ("0x0", Some(0)), ("0xffffffffffffffff", Some(u64::MAX))] {
            assert_eq!(hex(text), value);
        }
        for text in ["", "0x", "x", "10de", "0x+1", "0x-1", "0x10deg", "0x11112222333344445", "é"] {
            assert_eq!(hex(text), None, "{text:?}");
        }
        assert_eq!(decimal::<u8>("16"), Some(16));
        for text in ["", "-1", "+1", "256", "1 "] {
            assert_eq!(decimal::<u8>(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_read_that_hangs_is_given_up_and_not_repeated() {
        let path = PathBuf::from("/nowhere/driver_override");
        let (release, hold) = mpsc::channel::<()>();
        let first = patiently(path.clone(), Duration::from_millis(20), move || {
            let _ = hold.recv();
            Ok(1)
        });
        assert_eq!(first.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let second = patiently(path.clone(), Duration::from_mins(1), || Ok(2));
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::TimedOut);
        release.send(()).unwrap();
        let third = (0..500).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            patiently(path.clone(), Duration::from_mins(1), || Ok(3)).ok()
        });
        assert_eq!(third, Some(3));
    }

    #[test]
    fn of_many_reads_one_that_hangs_holds_up_no_other() {
        type Read = Box<dyn FnOnce() -> io::Result<u8> + Send>;
        let path = |number: u8| PathBuf::from(format!("/nowhere/{number}"));
        let (release, hold) = mpsc::channel::<()>();
        let (before, after): (Read, Read) = (Box::new(|| Ok(1)), Box::new(|| Ok(3)));
        let hangs: Read = Box::new(move || {
            let _ = hold.recv();
            Ok(2)
        });
        let fails: Read = Box::new(|| Err(io::Error::from(io::ErrorKind::NotFound)));
        let reads = vec![(path(1), before), (path(2), hangs), (path(3), after), (path(4), fails)];
        let results = patiently_each(reads, Duration::from_secs(2));
        let told: Vec<_> = results.into_iter().map(|result| result.map_err(|error| error.kind())).collect();
        assert_eq!(told, [Ok(1), Err(io::ErrorKind::TimedOut), Ok(3), Err(io::ErrorKind::NotFound)]);
        let again: Read = Box::new(|| Ok(2));
        let told: Vec<_> = patiently_each(vec![(path(2), again)], Duration::from_mins(1));
        assert_eq!(told[0].as_ref().unwrap_err().kind(), io::ErrorKind::TimedOut, "it is not asked again meanwhile");
        release.send(()).unwrap();
        assert!(patiently_each(Vec::<(PathBuf, Read)>::new(), Duration::ZERO).is_empty());
    }

    #[test]
    fn every_read_is_answered_or_late_however_little_patience_there_is() {
        for round in 0..200_u32 {
            let reads: Vec<_> = (0..8_u32)
                .map(|number| (PathBuf::from(format!("/nowhere/{round}/{number}")), move || Ok(number)))
                .collect();
            let results = patiently_each(reads, Duration::from_micros(u64::from(round % 20)));
            assert_eq!(results.len(), 8);
            for (number, result) in (0..).zip(results) {
                match result {
                    Ok(read) => assert_eq!(read, number, "each has its own answer"),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
                }
            }
        }
    }

    #[test]
    fn reads_that_follow_each_other_need_no_thread_each() {
        let mut threads = HashSet::new();
        for number in 0..100 {
            let read = || Ok(thread::current().id());
            threads.insert(patiently(format!("/nowhere/{number}").into(), Duration::from_mins(1), read).unwrap());
        }
        // Tests that run beside this one have readers, too, and a reader that was not given work in time ends.
        assert!(threads.len() < 50, "{} threads for 100 reads", threads.len());
    }

    #[test]
    fn what_is_not_a_regular_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(dir.path().join("directory")).unwrap();
        for name in ["pipe", "directory"] {
            assert_eq!(read(&dir.path().join(name)).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
