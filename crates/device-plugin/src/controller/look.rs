//! One look at the node, on a thread of its own: the kernel may take its time over a device that no longer answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use agent_core::text::chain;
use hw_probe::{AerCounts, Bdf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::checkpoint::Book;
use crate::observe::{ObserveError, Places, observe};
use crate::units::Observation;

/// How long one look at the node may take before its units are withdrawn.
const LOOK: Duration = Duration::from_secs(30);

/// What one look finds.
pub(super) struct Sight {
    pub(super) seen: Observation,
    pub(super) book: Book,
    pub(super) errors: BTreeMap<Bdf, AerCounts>,
}

/// Looks at the node and at the kubelet's book. Blocks.
pub(super) fn look(places: &Places, plugin_dir: &Path) -> Result<Sight, ObserveError> {
    let seen = observe(places)?;
    let mains = seen.inventory.gpus().chain(seen.inventory.nvswitches());
    let errors = mains.filter_map(|main| Some((main.bdf, AerCounts::read(&places.root, main.bdf)?))).collect();
    Ok(Sight { book: Book::read(plugin_dir), errors, seen })
}

pub(super) type Look = JoinHandle<Result<Sight, ObserveError>>;

/// Waits for a look, and hands it back where it is late: no second thread is sent after it.
pub(super) async fn look_within(mut look: Look) -> (Result<Sight, String>, Option<Look>) {
    match timeout(LOOK, &mut look).await {
        Err(_) => (Err(format!("Reading sysfs has not come back within {LOOK:?}")), Some(look)),
        Ok(Ok(Ok(sight))) => (Ok(sight), None),
        Ok(Ok(Err(error))) => (Err(chain(&error)), None),
        Ok(Err(error)) => (Err(chain(&error)), None),
    }
}
