//! The line protocol between the host and `lab-guest`, one JSON object a line in each direction over a virtio-serial port.
//!
//! Bytes travel as base64, so that a line never contains a newline of its own and a lost or mangled line costs only
//! itself. Every request carries an id chosen by the host; every event names the request it belongs to.

use std::collections::BTreeMap;
use std::io::{self, BufRead};

use serde::de::{Deserializer, Error as _};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port, as the guest sees it in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "ccnode.lab.0";

/// Version of this protocol; both ends must speak the same one.
pub const VERSION: u32 = 1;

/// Longest line either side accepts, in bytes. Far above the largest chunk, so that only a broken peer meets it.
pub const MAX_LINE: usize = 1 << 20;

/// Most payload bytes put into one line.
pub const CHUNK: usize = 48 * 1024;

/// Bytes that travel as base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

/// Which of a process's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What the host asks of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Start a process in a process group of its own. Answered by `Started`, then `Output`s and one `Exited`; or `Failed`.
    Spawn {
        /// Request id, and from then on the process's.
        id: u64,
        /// Program and arguments; the program is looked up in PATH.
        argv: Vec<String>,
        /// Variables set over the guest's own few.
        #[serde(default)]
        env: BTreeMap<String, String>,
        /// Working directory; `/` if absent.
        #[serde(default)]
        cwd: Option<String>,
        /// Whether standard input is a pipe from the host; `/dev/null` otherwise.
        #[serde(default)]
        stdin: bool,
    },
    /// Bytes for a process's standard input. Not answered.
    Stdin {
        /// The process.
        process: u64,
        /// What to write.
        data: Bytes,
    },
    /// Close a process's standard input. Not answered.
    CloseStdin {
        /// The process.
        process: u64,
    },
    /// Send a signal to a process's whole group. Answered by `Done` or `Failed`.
    Signal {
        /// Request id.
        id: u64,
        /// The process.
        process: u64,
        /// Signal number.
        signal: i32,
    },
    /// Begin a file. `Data` and `End` with the same id follow; answered by `Done` or `Failed` after `End`.
    Put {
        /// Request id.
        id: u64,
        /// Absolute path; missing folders are made.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Part of the file being put.
    Data {
        /// Id of the `Put`.
        id: u64,
        /// The next bytes.
        data: Bytes,
    },
    /// The file is complete: move it into place.
    End {
        /// Id of the `Put`.
        id: u64,
    },
    /// Read a file. Answered by `Data`s and `Done`, or `Failed`.
    Get {
        /// Request id.
        id: u64,
        /// Absolute path.
        path: String,
    },
    /// End all processes (terminate, wait, kill), then power off or reset the machine.
    Power {
        /// Reset instead of powering off.
        reboot: bool,
        /// Time given to processes between terminate and kill, in milliseconds.
        grace_ms: u64,
    },
}

/// What the guest tells the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ev", rename_all = "snake_case")]
pub enum Event {
    /// First line: the guest is up.
    Ready {
        /// [`VERSION`] of the guest's binary.
        version: u32,
        /// Kernel release.
        kernel: String,
        /// Time since the kernel started, in milliseconds.
        uptime_ms: u64,
        /// What went wrong while preparing the node; empty on a good boot.
        problems: Vec<String>,
    },
    /// The process runs.
    Started {
        /// The process.
        id: u64,
        /// Its process id, also that of its group.
        pid: i32,
    },
    /// Output of a process.
    Output {
        /// The process.
        id: u64,
        /// Which stream.
        stream: Stream,
        /// The bytes.
        data: Bytes,
    },
    /// The process ended; exactly one of `code` and `signal` is present.
    Exited {
        /// The process.
        id: u64,
        /// Exit code.
        code: Option<i32>,
        /// Number of the signal that ended it.
        signal: Option<i32>,
    },
    /// Part of the file being read.
    Data {
        /// Id of the `Get`.
        id: u64,
        /// The next bytes.
        data: Bytes,
    },
    /// The request succeeded.
    Done {
        /// Request id.
        id: u64,
    },
    /// The request failed.
    Failed {
        /// Request id.
        id: u64,
        /// What failed, with the path or program.
        message: String,
        /// The kernel's error number, where there was one.
        errno: Option<i32>,
    },
    /// A line that could not be understood; it was dropped.
    Malformed {
        /// Why.
        message: String,
    },
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(&text).map(Self).ok_or_else(|| D::Error::custom("Not base64"))
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding (RFC 4648 section 4).
fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            if digit <= group.len() {
                let index = (bits >> (18 - 6 * digit)) & 0x3f;
                text.push(char::from(ALPHABET[index as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|&&byte| byte == b'=').count();
    if padding > 2 {
        return None;
    }
    let digits = &text[..text.len() - padding];
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0u32, 0u32);
    for &digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0x000f_ffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(((bits >> held) & 0xff) as u8);
        }
    }
    Some(bytes)
}

/// One line read by [`read_line`].
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// The line without its newline.
    Text(Vec<u8>),
    /// A line over [`MAX_LINE`]; skipped to its end.
    TooLong,
    /// No more input for now, or for good. What was read of an unfinished line stays in the buffer.
    End,
}

/// Reads one line of bounded length. `partial` carries an unfinished line between calls.
///
/// # Errors
///
/// Those of the reader.
pub fn read_line(reader: &mut impl BufRead, partial: &mut Vec<u8>) -> io::Result<Line> {
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            return Ok(Line::End);
        }
        let newline = available.iter().position(|&byte| byte == b'\n');
        let used = newline.map_or(available.len(), |at| at + 1);
        // One byte over the limit marks the line as too long without keeping the rest of it.
        let room = (MAX_LINE + 1).saturating_sub(partial.len());
        let text = newline.unwrap_or(available.len());
        partial.extend_from_slice(&available[..text.min(room)]);
        reader.consume(used);
        if newline.is_some() {
            let line = std::mem::take(partial);
            return Ok(if line.len() > MAX_LINE { Line::TooLong } else { Line::Text(line) });
        }
    }
}

/// One event or request as a line, newline included.
///
/// # Errors
///
/// None for the types of this module; serde's signature has one.
pub fn to_line(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_rfc_examples() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text).as_deref(), Some(bytes.as_bytes()));
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all)), Some(all));
    }

    #[test]
    fn base64_refuses_what_is_not_base64() {
        for text in ["A", "AA", "AAA", "====", "A===", "AA=A", "Zm9v\n", "Zm 9", "Zm9v====", "é000"] {
            assert_eq!(decode(text), None, "{text:?}");
        }
    }

    #[test]
    fn requests_and_events_survive_the_line() {
        let request = Request::Spawn {
            id: 7,
            argv: vec!["sh".into(), "-c".into(), "echo \"a\nb\"".into()],
            env: BTreeMap::from([("A".into(), "é".into())]),
            cwd: Some("/tmp".into()),
            stdin: true,
        };
        let line = to_line(&request).unwrap();
        assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
        assert_eq!(serde_json::from_slice::<Request>(&line).unwrap(), request);
        let event = Event::Output { id: 7, stream: Stream::Stderr, data: Bytes(vec![0, 10, 255]) };
        assert_eq!(serde_json::from_slice::<Event>(&to_line(&event).unwrap()).unwrap(), event);
    }

    #[test]
    fn a_line_over_the_limit_is_skipped_and_the_next_one_read() {
        let mut input = vec![b'x'; MAX_LINE + 5];
        input.extend_from_slice(b"\nnext\nunfinished");
        let mut reader = io::BufReader::with_capacity(1000, input.as_slice());
        let mut partial = Vec::new();
        assert_eq!(read_line(&mut reader, &mut partial).unwrap(), Line::TooLong);
        assert_eq!(read_line(&mut reader, &mut partial).unwrap(), Line::Text(b"next".to_vec()));
        assert_eq!(read_line(&mut reader, &mut partial).unwrap(), Line::End);
        assert_eq!(partial, b"unfinished");
    }
}
