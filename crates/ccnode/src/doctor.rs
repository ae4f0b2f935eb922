//! `ccnode doctor`: what keeps the node from running confidential GPU pods.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::{Context as _, bail};
use hw_probe::Problem;
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::checks::{CHECKS, Facts, Finding, Outcome, examine};
use crate::source::Source;
use crate::{FAILED, SUCCESS, printable};

/// What `--json` prints. Within a schema number fields are only added, and a check keeps its id.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// Schema of this document.
    pub schema: u32,
    /// Number of GPUs on the node. Without any, there are no checks.
    pub gpus: usize,
    /// How many checks ended how.
    pub summary: Summary,
    /// Every check, in a fixed order.
    pub checks: Vec<Finding>,
}

/// How many checks ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Nothing to do.
    pub ok: usize,
    /// Something to look at.
    pub warning: usize,
    /// Something in the way.
    pub failed: usize,
    /// Nothing to check, or nothing to be seen.
    pub not_applicable: usize,
}

impl Answer {
    /// The schema number of this version.
    pub const SCHEMA: u32 = 1;

    /// Judges the facts.
    pub fn of(facts: &Facts) -> Self {
        let gpus = facts.report.gpus().count();
        let checks = if facts.report.parts().next().is_none() { Vec::new() } else { examine(facts) };
        let mut summary = Summary::default();
        for check in &checks {
            *match check.result {
                Outcome::Ok => &mut summary.ok,
                Outcome::Warning => &mut summary.warning,
                Outcome::Failed => &mut summary.failed,
                Outcome::NotApplicable => &mut summary.not_applicable,
            } += 1;
        }
        Self { schema: Self::SCHEMA, gpus, summary, checks }
    }
}

/// Runs the command; the exit code.
pub fn run(args: &DoctorArgs, out: &mut impl Write, colour: bool) -> anyhow::Result<u8> {
    let DoctorArgs { json, explain, root } = args;
    if let Some(id) = explain {
        let Some(check) = CHECKS.iter().find(|check| check.id == id) else {
            let ids: Vec<&str> = CHECKS.iter().map(|check| check.id).collect();
            bail!("There is no check {id:?}; there are: {}", ids.join(", "));
        };
        writeln!(out, "{}: {}\n\n{}", check.id, check.title, check.explanation)?;
        return Ok(SUCCESS);
    }
    let facts = Facts::read(&Source::open(root)?);
    if facts.report.parts().next().is_none()
        && let Some(Problem { path, message, .. }) = facts.report.doubts.first()
    {
        bail!(
            "Cannot tell which GPUs this node has: {}; check that /sys is mounted and readable, and the kernel's log",
            printable(&format!("{path}: {message}"))
        );
    }
    let answer = Answer::of(&facts);
    if *json {
        let text = serde_json::to_string_pretty(&answer).context("The answer cannot be put into JSON")?;
        writeln!(out, "{text}")?;
    } else {
        out.write_all(human(&answer, colour).as_bytes())?;
    }
    Ok(if answer.summary.failed > 0 { FAILED } else { SUCCESS })
}

fn human(answer: &Answer, colour: bool) -> String {
    if answer.checks.is_empty() {
        return "No NVIDIA GPU on this node: there is nothing to check\n".into();
    }
    let width = CHECKS.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let mut text = String::new();
    // A string takes any text, so that writing to it does not fail.
    for Finding { id, title, result, evidence, cure } in &answer.checks {
        let (word, paint) = match result {
            Outcome::Ok => ("ok", "32"),
            Outcome::Warning => ("warning", "33"),
            Outcome::Failed => ("FAILED", "31"),
            Outcome::NotApplicable => ("n/a", "2"),
        };
        let painted = if colour { format!("\u{1b}[{paint}m{word:7}\u{1b}[0m") } else { format!("{word:7}") };
        let mut evidence = evidence.iter().map(|line| printable(line));
        let first = evidence.next().unwrap_or_else(|| (*title).to_owned());
        let _ = writeln!(text, "{painted}  {id:width$}  {first}");
        let indent = 7 + 2 + width + 2;
        for line in evidence {
            let _ = writeln!(text, "{:indent$}{line}", "");
        }
        if let Some(cure) = cure {
            let _ = writeln!(text, "{:indent$}Cure: {}", "", printable(cure));
        }
    }
    let Summary { ok, warning, failed, not_applicable } = answer.summary;
    let warnings = if warning == 1 { "warning" } else { "warnings" };
    let _ = writeln!(text, "{failed} failed, {warning} {warnings}, {ok} ok, {not_applicable} not applicable");
    text
}
