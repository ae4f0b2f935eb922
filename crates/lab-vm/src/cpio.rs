//! Writer of "newc" cpio archives, the form that the kernel unpacks into its first root file system.

use std::io::{self, Read, Write};

/// What a member of the archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    CharacterDevice { major: u32, minor: u32 },
}

/// A member's header, without its content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    /// Path without a leading slash.
    pub(crate) name: &'a [u8],
    pub(crate) kind: Kind,
    /// Permission bits, set-id and sticky included.
    pub(crate) mode: u32,
    /// Bytes that follow: the content of a file, the target of a link.
    pub(crate) size: u64,
}

/// Writes members one after the other; owner is always root and the time always zero, so that equal input gives equal bytes.
pub(crate) struct Writer<W> {
    out: W,
    written: u64,
    next_inode: u32,
}

const TRAILER: &[u8] = b"TRAILER!!!";

impl<W: Write> Writer<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, next_inode: 1 }
    }

    /// Adds a member whose content is read from `content`.
    ///
    /// # Errors
    ///
    /// Those of reader and writer; `InvalidInput` for a size that the format cannot express (4 GiB and more);
    /// `UnexpectedEof` for content that ends before `size`.
    pub(crate) fn member(&mut self, member: Member<'_>, content: impl Read) -> io::Result<()> {
        let Member { name, kind, mode, size } = member;
        let Ok(size32) = u32::try_from(size) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "File of 4 GiB or more does not fit the image"));
        };
        let (file_type, major, minor) = match kind {
            Kind::File => (0o100_000, 0, 0),
            Kind::Directory => (0o040_000, 0, 0),
            Kind::Symlink => (0o120_000, 0, 0),
            Kind::CharacterDevice { major, minor } => (0o020_000, major, minor),
        };
        let inode = self.next_inode;
        self.next_inode += 1;
        self.header(name, inode, file_type | (mode & 0o7777), size32, (major, minor))?;
        let copied = io::copy(&mut content.take(size), &mut self.out)?;
        self.written += copied;
        if copied != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "File became shorter while it was read"));
        }
        self.pad()
    }

    /// Ends the archive and returns the writer.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.header(TRAILER, 0, 0, 0, (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn header(&mut self, name: &[u8], inode: u32, mode: u32, size: u32, device: (u32, u32)) -> io::Result<()> {
        // The name's length counts its terminating zero.
        let name_size = u32::try_from(name.len() + 1)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "Path does not fit the image"))?;
        let (major, minor) = device;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::with_capacity(110);
        header.push_str("070701");
        for field in fields {
            use std::fmt::Write as _;
            write!(header, "{field:08x}").map_err(io::Error::other)?;
        }
        self.put(header.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Header plus name, and content, each end on a multiple of four.
    fn pad(&mut self) -> io::Result<()> {
        let over = (self.written % 4) as usize;
        if over == 0 { Ok(()) } else { self.put(&[0; 4][..4 - over]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_byte_for_byte_what_the_format_says() {
        let mut writer = Writer::new(Vec::new());
        writer.member(Member { name: b"d", kind: Kind::Directory, mode: 0o755, size: 0 }, io::empty()).unwrap();
        writer.member(Member { name: b"d/f", kind: Kind::File, mode: 0o4711, size: 5 }, &b"hello"[..]).unwrap();
        let device = Kind::CharacterDevice { major: 5, minor: 1 };
        writer.member(Member { name: b"c", kind: device, mode: 0o600, size: 0 }, io::empty()).unwrap();
        let bytes = writer.finish().unwrap();
        let zero = "00000000";
        let expected = [
            &format!("07070100000001000041ed{zero}{zero}00000001{zero}{zero}{zero}{zero}{zero}{zero}00000002{zero}d\0"),
            &format!(
                "07070100000002000089c9{zero}{zero}00000001{zero}00000005{zero}{zero}{zero}{zero}00000004{zero}d/f\0\0\0hello\0\0\0"
            ),
            &format!(
                "0707010000000300002180{zero}{zero}00000001{zero}{zero}{zero}{zero}00000005000000010000000200000000c\0"
            ),
            &format!(
                "070701{zero}{zero}{zero}{zero}00000001{zero}{zero}{zero}{zero}{zero}{zero}0000000b{zero}TRAILER!!!\0\0\0\0"
            ),
        ];
        let mut at = 0;
        for part in expected {
            let end = at + part.len();
            assert_eq!(String::from_utf8_lossy(&bytes[at..end]), part.as_str());
            at = end;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(at % 4, 0);
    }

    #[test]
    fn content_that_is_short_or_too_large_is_refused() {
        let mut writer = Writer::new(Vec::new());
        let short = Member { name: b"f", kind: Kind::File, mode: 0o644, size: 6 };
        assert_eq!(writer.member(short, &b"hello"[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let large = Member { name: b"f", kind: Kind::File, mode: 0o644, size: 1 << 32 };
        assert_eq!(writer.member(large, io::empty()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn content_longer_than_announced_is_cut() {
        let mut writer = Writer::new(Vec::new());
        writer.member(Member { name: b"f", kind: Kind::File, mode: 0o644, size: 2 }, &b"hello"[..]).unwrap();
        let bytes = writer.finish().unwrap();
        assert!(!bytes.windows(3).any(|window| window == b"hel"));
    }
}
