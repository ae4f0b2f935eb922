//! A contract: things that are so in every server of a kind from a version of Kubernetes on.

use anyhow::{Result, ensure};
use futures::future::{LocalBoxFuture, join_all};

/// The oldest version that any of it was seen on.
pub(crate) const FIRST: u32 = 20;

/// One thing that is so from a version on.
pub(crate) struct Entry<T> {
    pub(crate) what: &'static str,
    /// The second number of the first version of Kubernetes 1 that does it.
    pub(crate) since: u32,
    /// Whether it needs the cluster's keys, or a part of it that can be restarted.
    pub(crate) needs_ours: bool,
    pub(crate) check: for<'a> fn(&'a T) -> LocalBoxFuture<'a, Result<()>>,
}

impl<T> Entry<T> {
    /// Asks for it, if it is to be found here at all; what is wrong with it.
    async fn failure(&self, asked: &T, minor: u32, is_ours: bool) -> Option<String> {
        let what = format!("from 1.{}: {}", self.since, self.what.replace('_', " "));
        if minor < self.since {
            println!("NOT HERE, which is 1.{minor}: {what}; against the stand-in alone");
            return None;
        }
        if self.needs_ours && !is_ours {
            println!("LEFT OUT, because the cluster is somebody else's: {what}");
            return None;
        }
        let begun = std::time::Instant::now();
        match (self.check)(asked).await {
            Ok(()) => {
                println!("holds {what} ({:.1} s)", begun.elapsed().as_secs_f64());
                None
            }
            Err(error) => {
                println!("FAILS {what}: {error:#}");
                Some(format!("{what}: {error:#}"))
            }
        }
    }
}

macro_rules! entry {
    ($since:expr, $check:ident) => {
        crate::real_kube::contract::entry!($since, $check, false)
    };
    ($since:expr, $check:ident, $needs_ours:expr) => {
        crate::real_kube::contract::Entry {
            what: stringify!($check),
            since: $since,
            needs_ours: $needs_ours,
            check: |asked| Box::pin($check(asked)),
        }
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
    let (alone, together): (Vec<_>, Vec<_>) = contract.iter().partition(|entry| entry.needs_ours);
    let together = together.into_iter().map(|entry| entry.failure(asked, minor, is_ours));
    let mut failures: Vec<String> = join_all(together).await.into_iter().flatten().collect();
    for entry in alone {
        failures.extend(entry.failure(asked, minor, is_ours).await);
    }
    ensure!(failures.is_empty(), "{} of {}: {failures:#?}", failures.len(), contract.len());
    Ok(())
}
