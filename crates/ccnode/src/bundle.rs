//! `ccnode bundle`: everything that `probe` and `doctor` look at, redacted, in one archive that both can replay.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use hw_probe::record::{Entry, Recording};
use hw_probe::{Bdf, Problem};
use serde::{Deserialize, Serialize};

use crate::archive;
use crate::args::BundleArgs;
use crate::checks::Facts;
use crate::doctor::Answer;
use crate::redact::{Redactor, WHAT};
use crate::source::{Live, Source};

/// What the archive is, and what is not in it; its first entry.
pub const MANIFEST: &str = "manifest.json";

/// What `probe --json` said on the node.
pub const PROBE: &str = "probe.json";

/// What `doctor --json` said on the node.
pub const DOCTOR: &str = "doctor.json";

/// What only the node itself could tell, for a replay.
pub const LIVE: &str = "live.json";

/// The folder of recorded files.
pub const TREE: &str = "root";

/// The first entry of a bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `ccnode-bundle`.
    pub kind: String,
    /// Schema of the whole archive.
    pub schema: u32,
    /// Version of ccnode that made it.
    pub ccnode: String,
    /// Kernel release of the node.
    pub kernel: Option<String>,
    /// Number of recorded files, folders and links.
    pub entries: usize,
    /// What was taken out of purpose.
    pub redacted: Vec<String>,
    /// What should be there and could not be read, or vanished meanwhile.
    pub left_out: Vec<Problem>,
}

impl Manifest {
    /// The schema number of this version.
    pub const SCHEMA: u32 = 1;

    const KIND: &str = "ccnode-bundle";

    /// Whether this version can read a bundle with such a manifest.
    pub fn check(text: &[u8]) -> anyhow::Result<()> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Head {
            kind: String,
            schema: u32,
        }
        let Head { kind, schema } =
            serde_json::from_slice(text).with_context(|| format!("{MANIFEST} cannot be read"))?;
        ensure!(kind == Self::KIND, "{MANIFEST} is of something else");
        ensure!(
            schema == Self::SCHEMA,
            "It has schema {schema}, and this ccnode reads schema {}; use the ccnode that made it, or make it anew",
            Self::SCHEMA
        );
        Ok(())
    }
}

/// Runs the command.
pub fn run(args: &BundleArgs, out: &mut impl Write, notes: &mut impl Write) -> anyhow::Result<()> {
    let BundleArgs { output, root } = args;
    let source = Source::open(root)?;
    ensure!(source.live().is_none(), "{}: Is a bundle already", root.display());
    let left_out = write(&source, output)?;
    writeln!(out, "{}", output.display())?;
    if left_out > 0 {
        writeln!(notes, "warning: {left_out} files could not be read; {MANIFEST} in the bundle names them")?;
    }
    Ok(())
}

/// Writes the bundle of a node, whole or not at all, for its owner's eyes. Returns how much could not be read.
fn write(source: &Source, output: &Path) -> anyhow::Result<usize> {
    let redactor = Redactor::of(source.root());
    let facts = redactor.facts(Facts::read(source));
    let Recording { mut entries, mut left_out } = Recording::of(source.root());
    let config_unreadable = config_unreadable(&left_out, &redactor);
    for (path, entry) in &mut entries {
        // These texts are a person's.
        if let Entry::File(content) = entry
            && (path.ends_with("/driver_override") || path == "proc/cmdline")
        {
            *content = redactor.text(&String::from_utf8_lossy(content)).into_bytes();
        }
    }
    for Problem { bdf: _, path, message } in &mut left_out {
        (*path, *message) = (redactor.text(path), redactor.text(message));
    }
    let mut files: BTreeMap<String, Entry> =
        entries.into_iter().map(|(path, entry)| (format!("{TREE}/{path}"), entry)).collect();
    let manifest = Manifest {
        kind: Manifest::KIND.into(),
        schema: Manifest::SCHEMA,
        ccnode: env!("CARGO_PKG_VERSION").into(),
        kernel: facts.report.host.kernel_release.clone(),
        entries: files.len(),
        redacted: WHAT.map(str::to_owned).to_vec(),
        left_out,
    };
    let answer = Answer::of(&facts);
    let Facts { report, get, has_node_files, exchanged } = facts;
    let live = Live {
        lockdown: report.host_details.lockdown.clone(),
        holders: report.holders.clone(),
        node: report.node.clone(),
        has_node_files,
        get,
        problems: report.problems.clone(),
        config_unreadable,
        exchanged: Some(exchanged),
    };
    files.insert(PROBE.into(), json(&report)?);
    files.insert(DOCTOR.into(), json(&answer)?);
    files.insert(LIVE.into(), json(&live)?);
    let Entry::File(first) = json(&manifest)? else { return Ok(0) };
    exchange(output, |file| archive::write((MANIFEST, &first), &files, file))
        .with_context(|| format!("{}: The bundle cannot be written", output.display()))?;
    Ok(manifest.left_out.len())
}

fn config_unreadable(left_out: &[Problem], redactor: &Redactor) -> BTreeMap<Bdf, String> {
    let cause = |problem: &Problem| {
        let cause = problem.path.ends_with("/config").then(|| problem.message.strip_prefix("Cannot be read: "))??;
        Some((problem.bdf?, redactor.text(cause)))
    };
    left_out.iter().filter_map(cause).collect()
}

fn json(value: &impl Serialize) -> anyhow::Result<Entry> {
    let mut text = serde_json::to_vec_pretty(value).context("The facts cannot be put into JSON")?;
    text.push(b'\n');
    Ok(Entry::File(text))
}

/// Puts a new file, which only its owner may read, in the place of `path`.
fn exchange(path: &Path, write: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>) -> anyhow::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    // Made with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(&folder)?;
    write(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
