//! Steps that take a while: run with a deadline, logged, told on standard error.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{ArtifactError, file_error};

/// How much of a log an error shows, in bytes.
const TAIL: u64 = 3000;

pub(crate) struct Steps {
    logs: PathBuf,
}

impl Steps {
    pub(crate) fn new(logs: PathBuf) -> Self {
        Self { logs }
    }

    /// Runs a command to its end, its output in a log of the step's name.
    pub(crate) fn run(&self, step: &str, command: &mut Command, deadline: Duration) -> Result<(), ArtifactError> {
        let log =
            self.logs.join(format!("{}.log", step.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-")));
        let file = File::create(&log).map_err(file_error("write", &log))?;
        let errors = file.try_clone().map_err(file_error("write", &log))?;
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        let start = Instant::now();
        eprintln!("lab: {step} …");
        let mut child = command.spawn().map_err(|source| ArtifactError::Spawn {
            program: command.get_program().to_string_lossy().into_owned(),
            source,
        })?;
        let outcome = wait(&mut child, start, deadline, step);
        match outcome {
            Ok(Some(status)) if status.success() => {
                eprintln!("lab: {step}: {:.1} s", start.elapsed().as_secs_f32());
                Ok(())
            }
            Ok(Some(status)) => Err(self.failed(step, status.to_string(), log)),
            Ok(None) => Err(self.failed(step, format!("not finished after {} s", deadline.as_secs()), log)),
            Err(source) => Err(ArtifactError::Spawn { program: step.to_owned(), source }),
        }
    }

    #[expect(clippy::unused_self, reason = "reads as part of the step")]
    fn failed(&self, step: &str, reason: String, log: PathBuf) -> ArtifactError {
        let tail = tail(&log, TAIL);
        ArtifactError::Step { step: step.to_owned(), reason, log, tail }
    }

    /// Unpacks Debian packages into one folder.
    pub(crate) fn unpack<'a>(
        &self,
        step: &str,
        packages: impl IntoIterator<Item = &'a Path>,
        folder: &Path,
    ) -> Result<(), ArtifactError> {
        fs::create_dir_all(folder).map_err(file_error("make folder", folder))?;
        let mut command = Command::new("sh");
        command.args(["-ec", r#"folder=$1; shift; for deb; do dpkg-deb -x "$deb" "$folder"; done"#, "sh"]);
        command.arg(folder).args(packages);
        self.run(step, &mut command, Duration::from_mins(5))
    }
}

fn wait(child: &mut Child, start: Instant, deadline: Duration, step: &str) -> std::io::Result<Option<ExitStatus>> {
    let mut tell_at = Duration::from_secs(30);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let elapsed = start.elapsed();
        if elapsed > deadline {
            end(child);
            return Ok(None);
        }
        if elapsed >= tell_at {
            eprintln!("lab: {step}: {} s so far", elapsed.as_secs());
            tell_at += Duration::from_secs(30);
        }
        thread::sleep(Duration::from_millis(if elapsed < Duration::from_secs(2) { 20 } else { 200 }));
    }
}

/// Asks first: make and apt take their children with them when terminated, but not when killed.
fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The last bytes of a file, as text; empty if it cannot be read.
pub(crate) fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(bytes)))?;
        let mut content = Vec::new();
        file.take(bytes).read_to_end(&mut content)?;
        Ok(content)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).trim_end().to_owned()
}

/// Finds a program as a shell would.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Users' PATH often lacks the system's folders.
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}

/// Says in one go what the host lacks, with the packages that have it.
pub(crate) fn require_tools(kernel_build: bool) -> Result<(), ArtifactError> {
    const FETCH: [(&str, &str); 3] = [("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("xz", "xz-utils")];
    const BUILD: [(&str, &str); 7] = [
        ("tar", "tar"),
        ("gcc", "gcc"),
        ("make", "make"),
        ("bc", "bc"),
        ("perl", "perl"),
        ("ld", "binutils"),
        ("strip", "binutils"),
    ];
    let needed = FETCH.iter().chain(if kernel_build { &BUILD[..] } else { &[] });
    let missing: Vec<_> = needed.filter(|(program, _)| on_path(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Err(ArtifactError::Tools { programs: missing.iter().map(|(program, _)| *program).collect(), packages })
}

/// Where the host's release is unknown, the build's libraries must be installed.
pub(crate) fn require_build_libraries() -> Result<(), ArtifactError> {
    let programs = [("flex", "flex"), ("bison", "bison"), ("m4", "m4"), ("openssl", "openssl")]
        .into_iter()
        .filter(|(program, _)| on_path(program).is_none());
    let headers =
        [("gelf.h", "libelf-dev"), ("zlib.h", "zlib1g-dev"), ("openssl/evp.h", "libssl-dev"), ("stdio.h", "libc6-dev")]
            .into_iter()
            .filter(|(header, _)| !Path::new("/usr/include").join(header).exists());
    let (programs, packages): (Vec<_>, Vec<_>) = programs.chain(headers).unzip();
    if programs.is_empty() { Ok(()) } else { Err(ArtifactError::Tools { programs, packages }) }
}

/// Decompresses an xz file to another place.
pub(crate) fn unxz(from: &Path, to: &Path) -> Result<(), ArtifactError> {
    let file = File::open(from).map_err(file_error("read", from))?;
    let output = Command::new("xz")
        .arg("-dc")
        .stdin(file)
        .output()
        .map_err(|source| ArtifactError::Spawn { program: "xz".to_owned(), source })?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(ArtifactError::Unusable { what: from.display().to_string(), reason });
    }
    File::create(to).and_then(|mut file| file.write_all(&output.stdout)).map_err(file_error("write", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_step_shows_the_end_of_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let steps = Steps::new(folder.path().to_owned());
        let mut command = Command::new("sh");
        command.args(["-c", "echo first; echo the cause >&2; exit 3"]);
        let error = steps.run("Try It", &mut command, Duration::from_secs(20)).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("Try It failed: exit status: 3"), "{text}");
        assert!(text.ends_with("first\nthe cause"), "{text}");
        assert!(folder.path().join("try-it.log").exists());
    }

    #[test]
    fn a_step_over_its_deadline_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let steps = Steps::new(folder.path().to_owned());
        let start = Instant::now();
        let error = steps.run("Sleep", Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("not finished after"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_program_that_is_absent_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let steps = Steps::new(folder.path().to_owned());
        let error = steps.run("Run", &mut Command::new("no-such-program-here"), Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.to_string(), "Cannot run no-such-program-here");
    }

    #[test]
    fn the_tail_of_a_log_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(&log, "0123456789").unwrap();
        assert_eq!(tail(&log, 4), "6789");
        assert_eq!(tail(&log, 400), "0123456789");
        assert_eq!(tail(&folder.path().join("absent"), 4), "");
    }
}
