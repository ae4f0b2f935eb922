//! The archive of a bundle: a gzipped tar of plain files, folders and links that lead nowhere else.
//!
//! Anybody may send one, so reading trusts nothing: it counts bytes and entries, takes no device nodes, pipes or hard links,
//! and no path or link that leads out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Component, Path};

use anyhow::{Context as _, bail, ensure};
use flate2::read::GzDecoder;
use flate2::{Compression, GzBuilder};
use hw_probe::record::{Entry, stays_inside};
use tar::{Archive, Builder, EntryType, Header};

/// Most entries of an archive.
const MOST_ENTRIES: usize = 200_000;

/// Most bytes of all files of an archive.
const MOST_BYTES: u64 = 64 << 20;

/// Most bytes of the archive once unpacked, headers and all.
const MOST_UNPACKED: u64 = 256 << 20;

/// Longest path, in bytes.
const LONGEST_PATH: usize = 1024;

/// The archive of these entries: the first as given, the others by path. The same entries make the same bytes.
pub(crate) fn write(first: (&str, &[u8]), entries: &BTreeMap<String, Entry>, to: impl Write) -> io::Result<()> {
    let gzip = GzBuilder::new().mtime(0).write(to, Compression::default());
    let mut builder = Builder::new(gzip);
    put(&mut builder, first.0, &Entry::File(first.1.to_vec()))?;
    for (path, entry) in entries {
        put(&mut builder, path, entry)?;
    }
    builder.into_inner()?.finish()?.flush()
}

fn put(builder: &mut Builder<impl Write>, path: &str, entry: &Entry) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(if matches!(entry, Entry::Folder) { 0o755 } else { 0o644 });
    header.set_size(0);
    match entry {
        Entry::Folder => {
            header.set_entry_type(EntryType::Directory);
            builder.append_data(&mut header, path, io::empty())
        }
        Entry::File(content) => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content.as_slice())
        }
        Entry::Link(target) => {
            header.set_entry_type(EntryType::Symlink);
            builder.append_link(&mut header, path, target)
        }
    }
}

/// The entries of the archive at `path`.
pub(crate) fn read(path: &Path) -> anyhow::Result<BTreeMap<String, Entry>> {
    let file = File::open(path).with_context(|| format!("{}: Cannot be opened", path.display()))?;
    entries(BufReader::new(file)).with_context(|| format!("{}: Is not a bundle that can be used", path.display()))
}

fn entries(from: impl Read) -> anyhow::Result<BTreeMap<String, Entry>> {
    // The limit also bounds what the tar reader itself keeps of long names.
    let mut archive = Archive::new(GzDecoder::new(from).take(MOST_UNPACKED));
    let mut found = BTreeMap::new();
    let mut bytes = 0_u64;
    for entry in archive.entries().context("It is no gzipped tar")? {
        let mut entry = entry.context("It is no gzipped tar, or cut off")?;
        let path = entry.path().context("It has a path that cannot be read")?.into_owned();
        let at = plain(&path)?;
        ensure!(found.len() < MOST_ENTRIES, "It has more than {MOST_ENTRIES} entries");
        let content = match entry.header().entry_type() {
            EntryType::Directory => Entry::Folder,
            EntryType::Regular => {
                bytes = bytes.saturating_add(entry.size());
                ensure!(bytes <= MOST_BYTES, "Its files have more than {MOST_BYTES} bytes");
                let mut content = Vec::new();
                entry.read_to_end(&mut content).with_context(|| format!("{at} is cut off"))?;
                ensure!(content.len() as u64 == entry.size(), "{at} is cut off");
                Entry::File(content)
            }
            EntryType::Symlink => {
                let target = entry.link_name().ok().flatten().and_then(|target| Some(target.to_str()?.to_owned()));
                match target {
                    Some(target) if target.len() <= LONGEST_PATH && stays_inside(&at, &target) => Entry::Link(target),
                    _ => bail!("{at} is a link that leads out of it"),
                }
            }
            other => bail!("{at} is neither file, folder nor symbolic link ({other:?})"),
        };
        ensure!(found.insert(at.clone(), content).is_none(), "{at} is in it twice");
    }
    for path in found.keys() {
        let parents = path.match_indices('/').map(|(end, _)| &path[..end]);
        for parent in parents {
            let is_folder = found.get(parent).is_none_or(|entry| *entry == Entry::Folder);
            ensure!(is_folder, "{path} is below {parent}, which is no folder");
        }
    }
    Ok(found)
}

fn plain(path: &Path) -> anyhow::Result<String> {
    let parts: Option<Vec<&str>> =
        path.components().map(|part| if let Component::Normal(name) = part { name.to_str() } else { None }).collect();
    match parts {
        Some(parts) if !parts.is_empty() && path.as_os_str().len() <= LONGEST_PATH => Ok(parts.join("/")),
        _ => bail!("It has a path that leads out of it or is no text: {}", crate::printable(&path.to_string_lossy())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(entries: &[(&str, Entry)]) -> Vec<u8> {
        let map = entries.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect();
        let mut bytes = Vec::new();
        write(("manifest.json", b"{}"), &map, &mut bytes).unwrap();
        bytes
    }

    /// A gzipped tar of one entry that our writer would not make.
    fn odd(kind: EntryType, path: &str, link: &str, size: u64, content: &[u8]) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_size(size);
        header.set_cksum();
        let mut gzip = GzBuilder::new().write(Vec::new(), Compression::default());
        gzip.write_all(header.as_bytes()).unwrap();
        gzip.write_all(content).unwrap();
        gzip.finish().unwrap()
    }

    fn refusal(bytes: &[u8]) -> String {
        format!("{:#}", entries(bytes).unwrap_err())
    }

    #[test]
    fn what_is_written_is_read() {
        let long = "deep/".repeat(60) + "file";
        let list = [
            ("a", Entry::Folder),
            ("a/b", Entry::File(b"text".to_vec())),
            ("a/c", Entry::Link("../d/0000:41:00.0".into())),
            ("d/0000:41:00.0", Entry::File(vec![0; 5000])),
            (long.as_str(), Entry::Link("../x".repeat(40))),
        ];
        let bytes = packed(&list);
        let found = entries(bytes.as_slice()).unwrap();
        assert_eq!(found.len(), list.len() + 1);
        for (path, entry) in &list {
            assert_eq!(found.get(*path), Some(entry), "{path}");
        }
        assert_eq!(packed(&list), bytes, "the same twice");
    }

    #[test]
    fn hostile_archives_are_refused() {
        use EntryType as Kind;
        for (kind, path, link, words) in [
            (Kind::Regular, "../x", "", "leads out"),
            (Kind::Regular, "/etc/passwd", "", "leads out"),
            (Kind::Regular, "a/../../x", "", "leads out"),
            (Kind::Directory, ".", "", "leads out"),
            (Kind::Symlink, "a", "/etc", "leads out"),
            (Kind::Symlink, "a", "../b", "leads out"),
            (Kind::Symlink, "a/b/c", "d/../../../../x", "leads out"),
            (Kind::Symlink, "a", "", "leads out"),
            (Kind::Link, "a", "b", "neither file"),
            (Kind::Char, "a", "", "neither file"),
            (Kind::Block, "a", "", "neither file"),
            (Kind::Fifo, "a", "", "neither file"),
            (Kind::GNUSparse, "a", "", ""),
        ] {
            let said = refusal(&odd(kind, path, link, 0, &[0; 1024]));
            assert!(said.contains(words), "{kind:?} {path} {link}: {said}");
        }
        for (list, words) in [
            (vec![("a", Entry::Link("b".into())), ("a/x", Entry::File(vec![]))], "below a, which is no folder"),
            (vec![("a", Entry::File(vec![])), ("a/x", Entry::File(vec![]))], "below a, which is no folder"),
            (vec![("manifest.json", Entry::File(vec![]))], "twice"),
        ] {
            assert!(refusal(&packed(&list)).contains(words), "{list:?}");
        }
    }

    #[test]
    fn bombs_and_cut_archives_are_refused() {
        let bomb = |path: &str, size: u64| {
            let mut gzip = GzBuilder::new().write(Vec::new(), Compression::fast());
            let mut header = Header::new_gnu();
            header.set_entry_type(if path.is_empty() { EntryType::GNULongName } else { EntryType::Regular });
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(size);
            header.set_cksum();
            gzip.write_all(header.as_bytes()).unwrap();
            let zeros = vec![0; 1 << 20];
            for _ in 0..size >> 20 {
                gzip.write_all(&zeros).unwrap();
            }
            gzip.finish().unwrap()
        };
        assert!(refusal(&bomb("a", (64 << 20) + 512)).contains("more than 67108864 bytes"));
        // A long name is read by the tar reader itself.
        refusal(&bomb("", 300 << 20));
        refusal(&odd(EntryType::Regular, "a", "", u64::MAX >> 1, &[]));
        refusal(&odd(EntryType::Regular, "a", "", 4000, &[0; 1024]));
        let whole = packed(&[("a", Entry::File(vec![7; 9000]))]);
        for cut in [0, 5, 20, whole.len() / 2] {
            refusal(&whole[..cut]);
        }
        refusal(b"not gzip at all");
        refusal(&[]);
    }

    #[test]
    fn no_damage_upsets_the_reader() {
        let whole = packed(&[("a/b", Entry::File(vec![7; 900])), ("a/c", Entry::Link("b".into()))]);
        let mut tar = Vec::new();
        GzDecoder::new(whole.as_slice()).read_to_end(&mut tar).unwrap();
        for at in 0..1536 {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = tar.clone();
                damaged[at] ^= flip;
                let mut gzip = GzBuilder::new().write(Vec::new(), Compression::none());
                gzip.write_all(&damaged).unwrap();
                let _ = entries(gzip.finish().unwrap().as_slice());
            }
        }
    }
}
