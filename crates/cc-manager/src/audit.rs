//! One line a change of mode: who asked for it, from what to what, what became of each device. The line is in the log, and the
//! last of them are kept on the host.

use std::path::Path;

use agent_core::hostfile::HostDir;
use agent_core::state::SCHEMA;
use gpu_firmware::Mode;
use hw_probe::Bdf;
use serde::Serialize;

use crate::executor::DeviceResult;

/// Where they are kept, beside `devices.json`: JSON objects, one a line, the newest last.
pub(crate) const FILE: &str = "transitions.jsonl";
/// Lines that are kept.
const KEPT: usize = 50;
/// Most that is read of the file, in bytes: far more than the lines that are kept need.
const LONGEST: u64 = 1 << 20;

/// A change of mode that has ended.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Line<'a> {
    schema: u32,
    version: &'static str,
    at: jiff::Timestamp,
    node: &'a str,
    boot_id: &'a str,
    /// The field manager that wrote the label; none where the default was wanted, or the API server does not say.
    asked_by: Option<&'a str>,
    /// The mode that every device was in before, if it was one.
    from: Option<&'static str>,
    to: &'static str,
    result: &'static str,
    took_ms: u64,
    devices: Vec<Device<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device<'a> {
    bdf: Bdf,
    /// The mode it is in now; none when it failed.
    mode: Option<&'a str>,
    error: Option<&'a str>,
}

/// What a line is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    pub(crate) node: &'a str,
    pub(crate) boot_id: &'a str,
    pub(crate) asked_by: Option<&'a str>,
    pub(crate) from: Option<Mode>,
    pub(crate) to: Mode,
    pub(crate) result: &'static str,
    pub(crate) took_ms: u64,
}

impl<'a> Line<'a> {
    pub(crate) fn of(change: Change<'a>, results: &'a [DeviceResult]) -> Self {
        let Change { node, boot_id, asked_by, from, to, result, took_ms } = change;
        let device = |result: &'a DeviceResult| match &result.result {
            Ok(verified) => Device { bdf: result.bdf, mode: Some(&verified.active), error: None },
            Err(fault) => Device { bdf: result.bdf, mode: None, error: Some(&fault.error.code) },
        };
        Self {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            at: jiff::Timestamp::now(),
            node,
            boot_id,
            asked_by,
            from: from.map(Mode::as_str),
            to: to.as_str(),
            result,
            took_ms,
            devices: results.iter().map(device).collect(),
        }
    }

    /// Logs the line and appends it to those that are kept in `dir`. A file that cannot be written is told and harms nothing.
    pub(crate) fn record(&self, dir: &Path) {
        let line = serde_json::to_string(self).unwrap_or_default();
        tracing::info!(
            event = "audit",
            audit = line,
            "Change of mode {} -> {}: {}",
            self.from.unwrap_or("?"),
            self.to,
            self.result
        );
        let appended = HostDir::open(dir).and_then(|dir| {
            let before = dir.read(FILE, LONGEST)?.unwrap_or_default();
            let before = String::from_utf8_lossy(&before);
            let mut lines: Vec<&str> = before.lines().filter(|line| !line.is_empty()).collect();
            lines.push(&line);
            let kept = lines.split_off(lines.len().saturating_sub(KEPT));
            dir.write_atomic(FILE, format!("{}\n", kept.join("\n")).as_bytes(), 0o644)
        });
        if let Err(error) = appended {
            tracing::warn!(code = "StateFile", "Change of mode is not kept: {}", agent_core::text::chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fifty_are_kept() {
        let here = tempfile::tempdir().unwrap();
        let dir = here.path().join("state");
        for took_ms in 0..60 {
            let change = Change {
                node: "n1",
                boot_id: "b",
                asked_by: Some("kubectl-label"),
                from: Some(Mode::Off),
                to: Mode::On,
                result: "applied",
                took_ms,
            };
            Line::of(change, &[]).record(&dir);
        }
        let text = std::fs::read_to_string(dir.join(FILE)).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((lines.len(), &lines[0]["tookMs"], &lines[49]["tookMs"]), (50, &10.into(), &59.into()));
        assert_eq!((&lines[0]["askedBy"], &lines[0]["from"]), (&"kubectl-label".into(), &"off".into()));
        // Whatever stands in its place is replaced in time, and never a reason to fail.
        std::fs::write(dir.join(FILE), b"\xff\n\n{").unwrap();
        let change =
            Change { node: "n1", boot_id: "b", asked_by: None, from: None, to: Mode::On, result: "failed", took_ms: 1 };
        Line::of(change, &[]).record(&dir);
        assert_eq!(std::fs::read_to_string(dir.join(FILE)).unwrap().lines().count(), 3);
    }
}
