//! The guest's root file system: a tree put together from layers on the host, written as one cpio archive.
//!
//! The kernel would also unpack several archives one after the other, but then a layer with a real `lib64` folder would
//! silently replace the link of that name below it. Here layers are merged as `cp -a` would on a running system: a
//! folder laid over a link to a folder goes where the link points.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use crate::artifacts::{Artifacts, Kernel};
use crate::cpio::{Kind, Member, Writer};

/// Why an image could not be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file of the host cannot be read.
    #[error("Cannot read {path} for the guest's image")]
    Read {
        /// The host's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("Cannot write the guest's image {path}")]
    Write {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A layer puts something where a folder is, or the other way round.
    #[error("{layer} cannot be put at {place} in the guest: {reason}")]
    Conflict {
        /// What was to be put there.
        layer: String,
        /// Where.
        place: String,
        /// What is in the way.
        reason: &'static str,
    },
    /// An argument is not `HOSTPATH:/GUESTPATH`.
    #[error("Not HOSTPATH:/GUESTPATH: {text}")]
    Syntax {
        /// The argument.
        text: String,
    },
}

/// A folder or file of the host, and its place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add {
    /// Folder, whose content is laid over the guest's, or single file.
    pub host: PathBuf,
    /// Absolute path in the guest.
    pub guest: PathBuf,
}

impl std::str::FromStr for Add {
    type Err = ImageError;

    /// Reads `HOSTPATH:/GUESTPATH`, split at the last colon.
    fn from_str(text: &str) -> Result<Self, ImageError> {
        match text.rsplit_once(':') {
            Some((host, guest)) if !host.is_empty() && guest.starts_with('/') => {
                Ok(Self { host: host.into(), guest: guest.into() })
            }
            _ => Err(ImageError::Syntax { text: text.to_owned() }),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Directory { mode: u32 },
    Symlink { target: PathBuf },
    File { source: Source, mode: u32 },
    CharacterDevice { major: u32, minor: u32, mode: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Host { path: PathBuf, size: u64 },
    Bytes(Vec<u8>),
}

/// Root file system under construction. Paths are relative to the root, parents always present.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<PathBuf, Node>,
}

/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

impl Tree {
    /// The guest's own part: busybox, the kernel's modules, `agent` as init.
    ///
    /// # Errors
    ///
    /// [`ImageError`], if a file of the artifacts or the agent cannot be read.
    pub fn base(artifacts: &Artifacts, kernel: Kernel, agent: &Path, hostname: &str) -> Result<Self, ImageError> {
        let mut tree = Self::default();
        for folder in [
            "usr/bin",
            "usr/sbin",
            "usr/lib",
            "usr/lib64",
            "dev",
            "etc/lab",
            "proc",
            "root",
            "run",
            "sys",
            "tmp",
            "var/lib",
        ] {
            tree.directory(Path::new(folder), 0o755)?;
        }
        tree.nodes.insert("tmp".into(), Node::Directory { mode: 0o1777 });
        tree.nodes.insert("root".into(), Node::Directory { mode: 0o700 });
        for (link, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
            ("var/run", "../run"),
        ] {
            tree.nodes.insert(link.into(), Node::Symlink { target: target.into() });
        }
        // Before the kernel's own /dev is mounted: without them init would start with closed standard streams.
        for (name, major, minor) in [("dev/console", 5, 1), ("dev/null", 1, 3)] {
            tree.nodes.insert(name.into(), Node::CharacterDevice { major, minor, mode: 0o600 });
        }
        tree.host_file(&artifacts.busybox, Path::new("usr/bin/busybox"))?;
        for applet in &artifacts.applets {
            let place = Path::new("/").join(applet);
            let place = tree.resolve_parent(&place)?;
            tree.nodes.entry(place).or_insert_with(|| Node::Symlink { target: "/usr/bin/busybox".into() });
        }
        tree.host_file(agent, Path::new("init"))?;
        tree.bytes("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
        tree.bytes("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")?;
        tree.bytes("etc/hosts", &format!("127.0.0.1 localhost\n10.0.2.15 {hostname}\n10.0.2.2 host\n"))?;
        tree.bytes("etc/hostname", &format!("{hostname}\n"))?;
        tree.bytes("etc/resolv.conf", "nameserver 10.0.2.3\n")?;
        tree.bytes("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")?;
        tree.modules(artifacts, kernel)?;
        Ok(tree)
    }

    fn modules(&mut self, artifacts: &Artifacts, kernel: Kernel) -> Result<(), ImageError> {
        let Some(files) = artifacts.kernel(kernel) else { return Ok(()) };
        let folder = Path::new("usr/lib/modules").join(&files.release);
        self.add(&Add { host: files.modules.clone(), guest: Path::new("/").join(&folder) })?;
        let lines =
            files.load.iter().map(|module| format!("{} /{}", module.stage, folder.join(&module.path).display()));
        let mut list = lines.collect::<Vec<_>>().join("\n");
        list.push('\n');
        self.bytes("etc/lab/modules", &list)
    }

    /// Lays a folder of the host over the tree, or puts a single file.
    ///
    /// Links stay links, modes stay; several names of one file become copies; sockets, pipes and device nodes are left
    /// out. Everything belongs to root in the guest.
    ///
    /// # Errors
    ///
    /// [`ImageError`], naming the file.
    pub fn add(&mut self, add: &Add) -> Result<(), ImageError> {
        let Add { host, guest } = add;
        let metadata = fs::metadata(host).map_err(|source| ImageError::Read { path: host.clone(), source })?;
        if metadata.is_dir() {
            // The folder itself is only the layer's anchor: often a temporary one, whose mode 0700 is no wish for the guest.
            let place = self.walk(PathBuf::new(), guest, &mut 0)?;
            self.layer(host, &place)
        } else {
            let place = self.resolve_parent(guest)?;
            self.host_file(host, &place)
        }
    }

    fn layer(&mut self, host: &Path, place: &Path) -> Result<(), ImageError> {
        let unreadable = |source| ImageError::Read { path: host.to_owned(), source };
        for entry in fs::read_dir(host).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let path = entry.path();
            let guest = place.join(entry.file_name());
            let metadata =
                fs::symlink_metadata(&path).map_err(|source| ImageError::Read { path: path.clone(), source })?;
            let file_type = metadata.file_type();
            if file_type.is_dir() {
                let inner = self.directory(&guest, metadata.permissions().mode() & 0o7777)?;
                self.layer(&path, &inner)?;
            } else if file_type.is_symlink() {
                let target = fs::read_link(&path).map_err(|source| ImageError::Read { path: path.clone(), source })?;
                self.symlink(&path, guest, target)?;
            } else if file_type.is_file() {
                self.host_file(&path, &guest)?;
            } else if file_type.is_char_device()
                || file_type.is_block_device()
                || file_type.is_fifo()
                || file_type.is_socket()
            {
                tracing::debug!(path = %path.display(), "Special file left out of the guest's image");
            }
        }
        Ok(())
    }

    fn symlink(&mut self, layer: &Path, place: PathBuf, target: PathBuf) -> Result<(), ImageError> {
        if matches!(self.nodes.get(&place), Some(Node::Directory { .. })) {
            return Err(conflict(&layer.display(), &place, "a folder is there, and a link would hide its content"));
        }
        self.nodes.insert(place, Node::Symlink { target });
        Ok(())
    }

    fn host_file(&mut self, path: &Path, place: &Path) -> Result<(), ImageError> {
        let metadata = fs::metadata(path).map_err(|source| ImageError::Read { path: path.to_owned(), source })?;
        if !metadata.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "Not a file");
            return Err(ImageError::Read { path: path.to_owned(), source });
        }
        let source = Source::Host { path: path.to_owned(), size: metadata.size() };
        self.file(&path.display(), place, source, metadata.permissions().mode() & 0o7777)
    }

    /// Puts a file with the given content, mode 0644.
    ///
    /// # Errors
    ///
    /// [`ImageError::Conflict`], if a folder is there.
    pub fn bytes(&mut self, place: &str, content: &str) -> Result<(), ImageError> {
        self.file(place, Path::new(place), Source::Bytes(content.as_bytes().to_vec()), 0o644)
    }

    fn file(
        &mut self,
        layer: &(impl ToString + ?Sized),
        place: &Path,
        source: Source,
        mode: u32,
    ) -> Result<(), ImageError> {
        let place = self.resolve_parent(place)?;
        if matches!(self.nodes.get(&place), Some(Node::Directory { .. })) {
            return Err(conflict(layer, &place, "a folder is there"));
        }
        self.nodes.insert(place, Node::File { source, mode });
        Ok(())
    }

    /// Makes a folder and its parents, or finds the one that the path leads to. Returns its true place.
    fn directory(&mut self, path: &Path, mode: u32) -> Result<PathBuf, ImageError> {
        let place = self.walk(PathBuf::new(), path, &mut 0)?;
        if !place.as_os_str().is_empty() {
            self.nodes.insert(place.clone(), Node::Directory { mode });
        }
        Ok(place)
    }

    /// The path with every folder of it made or found, its last part as it is.
    fn resolve_parent(&mut self, path: &Path) -> Result<PathBuf, ImageError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(conflict("A file", path, "not the path of a file"));
        };
        Ok(self.walk(PathBuf::new(), parent, &mut 0)?.join(name))
    }

    /// Follows `path` from the folder `at`, making what is missing.
    fn walk(&mut self, mut at: PathBuf, path: &Path, links: &mut usize) -> Result<PathBuf, ImageError> {
        for component in path.components() {
            let name = match component {
                Component::RootDir => {
                    at = PathBuf::new();
                    continue;
                }
                Component::ParentDir => {
                    at.pop();
                    continue;
                }
                Component::CurDir | Component::Prefix(_) => continue,
                Component::Normal(name) => name,
            };
            let next = at.join(name);
            match self.nodes.get(&next) {
                Some(Node::Directory { .. }) => at = next,
                Some(Node::Symlink { target }) => {
                    *links += 1;
                    if *links > MAX_LINKS {
                        return Err(conflict("A folder", &next, "too many links"));
                    }
                    let target = target.clone();
                    at = self.walk(at, &target, links)?;
                }
                Some(Node::File { .. } | Node::CharacterDevice { .. }) => {
                    return Err(conflict("A folder", &next, "a file is there"));
                }
                None => {
                    self.nodes.insert(next.clone(), Node::Directory { mode: 0o755 });
                    at = next;
                }
            }
        }
        Ok(at)
    }

    /// Bytes of all files together, which the guest must hold in memory.
    pub fn size(&self) -> u64 {
        self.nodes
            .values()
            .map(|node| match node {
                Node::File { source: Source::Host { size, .. }, .. } => *size,
                Node::File { source: Source::Bytes(bytes), .. } => bytes.len() as u64,
                _ => 0,
            })
            .sum()
    }

    /// Writes the archive.
    ///
    /// # Errors
    ///
    /// [`ImageError`], naming the file that could not be read or written.
    pub fn write(&self, path: &Path) -> Result<(), ImageError> {
        let unwritable = |source| ImageError::Write { path: path.to_owned(), source };
        let file = File::create(path).map_err(unwritable)?;
        let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, file));
        for (place, node) in &self.nodes {
            let name = place.as_os_str().as_bytes();
            let written = match node {
                Node::Directory { mode } => {
                    writer.member(Member { name, kind: Kind::Directory, mode: *mode, size: 0 }, io::empty())
                }
                Node::Symlink { target } => {
                    let target = target.as_os_str().as_bytes();
                    writer.member(Member { name, kind: Kind::Symlink, mode: 0o777, size: target.len() as u64 }, target)
                }
                Node::CharacterDevice { major, minor, mode } => {
                    let kind = Kind::CharacterDevice { major: *major, minor: *minor };
                    writer.member(Member { name, kind, mode: *mode, size: 0 }, io::empty())
                }
                Node::File { source: Source::Bytes(bytes), mode } => writer
                    .member(Member { name, kind: Kind::File, mode: *mode, size: bytes.len() as u64 }, bytes.as_slice()),
                Node::File { source: Source::Host { path: host, size }, mode } => {
                    let unreadable = |source| ImageError::Read { path: host.clone(), source };
                    let file = File::open(host).map_err(unreadable)?;
                    match writer.member(Member { name, kind: Kind::File, mode: *mode, size: *size }, file) {
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(unreadable(error)),
                        other => other,
                    }
                }
            };
            written.map_err(unwritable)?;
        }
        writer.finish().map_err(unwritable)?;
        Ok(())
    }
}

fn conflict(layer: &(impl ToString + ?Sized), place: &Path, reason: &'static str) -> ImageError {
    let mut guest = OsStr::new("/").to_owned().into_vec();
    guest.extend_from_slice(place.strip_prefix("/").unwrap_or(place).as_os_str().as_bytes());
    ImageError::Conflict { layer: layer.to_string(), place: String::from_utf8_lossy(&guest).into_owned(), reason }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn merged_usr() -> Tree {
        let mut tree = Tree::default();
        tree.directory(Path::new("/usr/lib64"), 0o755).unwrap();
        tree.nodes.insert("lib64".into(), Node::Symlink { target: "usr/lib64".into() });
        tree
    }

    fn names(tree: &Tree) -> Vec<&str> {
        tree.nodes.keys().map(|path| path.to_str().unwrap()).collect()
    }

    #[test]
    fn arguments_are_split_at_the_last_colon() {
        let add: Add = "/a:b:/c".parse().unwrap();
        assert_eq!(add, Add { host: "/a:b".into(), guest: "/c".into() });
        for text in ["", "/a", "/a:", ":/b", "/a:b"] {
            assert!(matches!(text.parse::<Add>(), Err(ImageError::Syntax { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_folder_over_a_link_goes_where_the_link_points() {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("lib64")).unwrap();
        fs::write(host.path().join("lib64/ld.so"), "x").unwrap();
        let mut tree = merged_usr();
        tree.add(&Add { host: host.path().into(), guest: "/".into() }).unwrap();
        assert_eq!(names(&tree), ["lib64", "usr", "usr/lib64", "usr/lib64/ld.so"]);
    }

    #[test]
    fn links_modes_and_hard_links_arrive() {
        let host = tempfile::tempdir().unwrap();
        let at = |name: &str| host.path().join(name);
        fs::write(at("tool"), "12345").unwrap();
        fs::set_permissions(at("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(at("tool"), at("twin")).unwrap();
        symlink("/nowhere/at/all", at("dangling")).unwrap();
        let mut tree = Tree::default();
        tree.add(&Add { host: host.path().into(), guest: "/opt/deep".into() }).unwrap();
        assert_eq!(names(&tree), ["opt", "opt/deep", "opt/deep/dangling", "opt/deep/tool", "opt/deep/twin"]);
        assert!(matches!(tree.nodes[Path::new("opt/deep/tool")], Node::File { mode: 0o4755, .. }));
        assert_eq!(tree.nodes[Path::new("opt/deep/dangling")], Node::Symlink { target: "/nowhere/at/all".into() });
        assert_eq!(tree.size(), 10);
        let image = host.path().join("image");
        tree.write(&image).unwrap();
        let bytes = fs::read(image).unwrap();
        assert_eq!(bytes.windows(5).filter(|window| window == b"12345").count(), 2);
    }

    #[test]
    fn a_single_file_is_put_at_its_place() {
        let host = tempfile::tempdir().unwrap();
        let file = host.path().join("f");
        fs::write(&file, "x").unwrap();
        let mut tree = merged_usr();
        tree.add(&Add { host: file, guest: "/lib64/g".into() }).unwrap();
        assert_eq!(names(&tree), ["lib64", "usr", "usr/lib64", "usr/lib64/g"]);
    }

    #[test]
    fn conflicts_and_absent_files_are_errors_that_name_the_place() {
        let host = tempfile::tempdir().unwrap();
        symlink("elsewhere", host.path().join("usr")).unwrap();
        let mut tree = merged_usr();
        let error = tree.add(&Add { host: host.path().into(), guest: "/".into() }).unwrap_err();
        assert!(error.to_string().contains("/usr in the guest"), "{error}");

        let mut tree = Tree::default();
        tree.bytes("etc", "a file").unwrap();
        let error = tree.bytes("etc/passwd", "x").unwrap_err();
        assert!(error.to_string().contains("a file is there"), "{error}");
        let error = tree.add(&Add { host: host.path().join("absent"), guest: "/x".into() }).unwrap_err();
        assert!(error.to_string().contains("absent"), "{error}");

        let mut tree = Tree::default();
        tree.nodes.insert("a".into(), Node::Symlink { target: "b".into() });
        tree.nodes.insert("b".into(), Node::Symlink { target: "a".into() });
        let error = tree.bytes("a/x", "x").unwrap_err();
        assert!(error.to_string().contains("too many links"), "{error}");
    }

    #[test]
    fn a_file_that_vanishes_before_writing_is_named() {
        let host = tempfile::tempdir().unwrap();
        let file = host.path().join("f");
        fs::write(&file, "xyz").unwrap();
        let mut tree = Tree::default();
        tree.add(&Add { host: file.clone(), guest: "/f".into() }).unwrap();
        fs::write(&file, "x").unwrap();
        let image = host.path().join("image");
        assert!(matches!(tree.write(&image), Err(ImageError::Read { path, .. }) if path == file));
        fs::remove_file(&file).unwrap();
        assert!(matches!(tree.write(&image), Err(ImageError::Read { path, .. }) if path == file));
    }
}
