//! What happened on a node of the lab, in order, as a person can follow it.

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// Time since the guest began to boot, in seconds where it is written down.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub at: Duration,
    /// Who did it: `person`, `cc-manager`, `gpu0`, `kubelet`, ...
    pub actor: String,
    /// What it was.
    pub text: String,
}

fn seconds<S: Serializer>(at: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(at.as_secs_f64())
}

/// Moments, kept in the order of time.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Vec<Moment>);

impl Timeline {
    /// Adds a moment, whenever it was.
    pub fn add(&mut self, at: Duration, actor: impl Into<String>, text: impl Into<String>) {
        let moment = Moment { at, actor: actor.into(), text: text.into() };
        let place = self.0.partition_point(|earlier| earlier.at <= moment.at);
        self.0.insert(place, moment);
    }

    /// The moments in order.
    pub fn moments(&self) -> &[Moment] {
        &self.0
    }

    /// A line a moment, with its time and the time since the one before where that is worth knowing.
    pub fn render(&self) -> String {
        let width = self.0.iter().map(|moment| moment.actor.len()).max().unwrap_or_default();
        let mut text = String::new();
        for moment in &self.0 {
            let seconds = moment.at.as_secs_f64();
            // Writing to a string does not fail.
            let _ = writeln!(text, "{seconds:8.3} s  {:width$}  {}", moment.actor, moment.text);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_in_order_and_equals_as_they_came() {
        let mut timeline = Timeline::default();
        timeline.add(Duration::from_millis(1500), "gpu0", "reset");
        timeline.add(Duration::from_millis(20), "person", "label set");
        timeline.add(Duration::from_millis(1500), "gpu0", "booted");
        assert_eq!(
            timeline.render(),
            "   0.020 s  person  label set\n   1.500 s  gpu0    reset\n   1.500 s  gpu0    booted\n"
        );
    }
}
