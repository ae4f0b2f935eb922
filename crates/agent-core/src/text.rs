//! Small texts that every agent reads or writes alike.

use std::convert::Infallible;
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

/// An error and its causes on one line: `Cannot write /sys/...: Device or resource busy (os error 16)`. Causes that other
/// people's errors have told in their own text already are left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = cause.source();
    }
    text
}

/// Takes a path for a flag that may be empty, which means none: clap's own parser refuses that.
pub fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

/// Parses a time for a flag: `500ms`, `90s`, `2m`, `1h`; a bare number is in seconds. From 1 ms to 24 h.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{unit:?} is not a unit of time (ms, s, m, h)")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a time such as 30s"))?;
    number
        .checked_mul(millis)
        .filter(|millis| (1..=86_400_000).contains(millis))
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is not between 1ms and 24h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_mins(2)));
        for text in ["", "s", "-1s", "1w", "0s", "99999999999999999999h", "25h", "1é"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn causes_follow_their_effect() {
        #[derive(Debug, thiserror::Error)]
        #[error("Cannot write {0}")]
        struct Outer(&'static str, #[source] std::io::Error);
        let error = Outer("/x", std::io::Error::other("disk gone"));
        assert_eq!(chain(&error), "Cannot write /x: disk gone");
    }
}
