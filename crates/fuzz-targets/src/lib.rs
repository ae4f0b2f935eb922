//! Fuzz targets over what ccnode reads: each is a function of bytes that panics when something that must hold does not.
//!
//! The tests of this crate run them over the seeds in `fuzz/corpus` and over seeded mutations of those, on the stable
//! compiler; `hack/fuzz` runs them under cargo-fuzz. `docs/fuzzing.md` tells how.

#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::panic, reason = "a target tells what it found by a panic")]
#![allow(clippy::missing_panics_doc, reason = "the module's documentation says it of all of them")]

mod checkpoint;
mod config;
mod firmware;
mod kubelet;
mod modalias;
mod resource;
mod room;
mod tree;
mod uevent;

pub use checkpoint::checkpoint;
pub use config::config;
pub use firmware::firmware;
pub use kubelet::kubelet;
pub use modalias::modalias;
pub use resource::resource;
pub use tree::tree;
pub use uevent::uevent;

/// A target: its name, which is also that of its folder of seeds, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 8] = [
    ("checkpoint", checkpoint),
    ("config", config),
    ("firmware", firmware),
    ("kubelet", kubelet),
    ("modalias", modalias),
    ("resource", resource),
    ("tree", tree),
    ("uevent", uevent),
];
