//! A contract: things that are so in every server of a kind, each from a version of Kubernetes on, and some up to one.

use anyhow::{Result, ensure};
use futures::future::{LocalBoxFuture, join_all};

/// The oldest version that any of it was seen on.
pub(crate) const FIRST: u32 = 20;

/// One thing that is so in some versions.
pub(crate) struct Entry<T> {
    pub(crate) what: &'static str,
    /// The second number of the first version of Kubernetes 1 that does it.
    pub(crate) since: u32,
    /// That of the last one, where a newer one is known to do otherwise.
    pub(crate) until: Option<u32>,
    /// Whether it needs the cluster's keys, or a part of it that can be restarted.
    pub(crate) needs_ours: bool,
    pub(crate) check: for<'a> fn(&'a T) -> LocalBoxFuture<'a, Result<()>>,
}

/// What came of an entry.
enum Found {
    Holds,
    /// It is of other versions than the one that was asked.
    NotHere,
    /// It cannot be asked of a cluster of somebody else's.
    LeftOut,
    Fails(String),
}

impl<T> Entry<T> {
    /// Asks for it, if it is to be found here at all.
    async fn ask(&self, asked: &T, minor: u32, is_ours: bool) -> Found {
        let versions = match self.until {
            Some(until) => format!("1.{} to 1.{until}", self.since),
            None => format!("from 1.{}", self.since),
        };
        let what = format!("{versions}: {}", self.what.replace('_', " "));
        if minor < self.since || self.until.is_some_and(|until| minor > until) {
            println!("NOT HERE, which is 1.{minor}: {what}");
            return Found::NotHere;
        }
        if self.needs_ours && !is_ours {
            println!("LEFT OUT, because the cluster is somebody else's: {what}");
            return Found::LeftOut;
        }
        let begun = std::time::Instant::now();
        match (self.check)(asked).await {
            Ok(()) => {
                println!("holds {what} ({:.1} s)", begun.elapsed().as_secs_f64());
                Found::Holds
            }
            Err(error) => {
                println!("FAILS {what}: {error:#}");
                Found::Fails(format!("{what}: {error:#}"))
            }
        }
    }
}

/// `entry!(22, what)` from a version on, `entry!(FIRST..=21, what)` up to one; with `OURS` at the end where it needs that.
macro_rules! entry {
    (@ $since:expr, $until:expr, $check:ident, $needs_ours:expr) => {
        crate::real_kube::contract::Entry {
            what: stringify!($check),
            since: $since,
            until: $until,
            needs_ours: $needs_ours,
            check: |asked| Box::pin($check(asked)),
        }
    };
    ($since:tt..=$until:tt, $check:ident) => {
        crate::real_kube::contract::entry!(@ $since, Some($until), $check, false)
    };
    ($since:expr, $check:ident) => {
        crate::real_kube::contract::entry!(@ $since, None, $check, false)
    };
    ($since:expr, $check:ident, $needs_ours:expr) => {
        crate::real_kube::contract::entry!(@ $since, None, $check, $needs_ours)
    };
}

pub(crate) use entry;

/// What an entry needs that a foreign cluster does not have.
pub(crate) const OURS: bool = true;

/// Asks all of it of one that is of version 1.`minor`, and that is ours or somebody else's. What needs one of ours may restart it,
/// and is asked in turn, after the others, which are asked together: each has names of its own.
pub(crate) async fn holds<T>(contract: &[Entry<T>], asked: &T, minor: u32, is_ours: bool) -> Result<()> {
    let mut names: Vec<&str> = contract.iter().map(|entry| entry.what).collect();
    names.sort_unstable();
    names.dedup();
    ensure!(names.len() == contract.len(), "an entry stands twice in the list");
    let is_empty = |entry: &Entry<T>| entry.until.is_some_and(|until| until < entry.since);
    ensure!(!contract.iter().any(is_empty), "an entry ends before it begins");
    let (alone, together): (Vec<_>, Vec<_>) = contract.iter().partition(|entry| entry.needs_ours);
    let together = together.into_iter().map(|entry| entry.ask(asked, minor, is_ours));
    let mut found = join_all(together).await;
    for entry in alone {
        found.push(entry.ask(asked, minor, is_ours).await);
    }
    let count = |is_it: fn(&Found) -> bool| found.iter().filter(|found| is_it(found)).count();
    println!(
        "1.{minor}: {} of {} entries hold; NOT HERE, but in other versions: {}; LEFT OUT: {}",
        count(|found| matches!(found, Found::Holds)),
        contract.len(),
        count(|found| matches!(found, Found::NotHere)),
        count(|found| matches!(found, Found::LeftOut)),
    );
    let failures: Vec<String> = found
        .into_iter()
        .filter_map(|found| match found {
            Found::Fails(why) => Some(why),
            _ => None,
        })
        .collect();
    ensure!(failures.is_empty(), "{} of {}: {failures:#?}", failures.len(), contract.len());
    Ok(())
}
