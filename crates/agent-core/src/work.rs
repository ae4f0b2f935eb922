//! Whether an agent works, or only tells what it would do.

/// Whether to work.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// Bring the node to what is wanted.
    #[default]
    Enforce,
    /// Say what is and what would be done.
    Observe,
}
