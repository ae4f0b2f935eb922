//! Confidential-computing modes: those that can be asked for, and those that a device can be in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A mode that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// No confidential computing, no protected PCIe.
    Off,
    /// Confidential computing.
    On,
    /// Confidential computing with the developer's tools left open: not confidential.
    Devtools,
    /// Protected PCIe: several Hopper GPUs and their NVSwitches in one virtual machine.
    Ppcie,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Off, Self::On, Self::Devtools, Self::Ppcie];

    /// The word for it in labels, files and command lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Devtools => "devtools",
            Self::Ppcie => "ppcie",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that is not a mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: on, off, devtools or ppcie")]
pub struct ModeError(String);

impl FromStr for Mode {
    type Err = ModeError;

    /// Exact words only: a mode is security policy, so nothing is trimmed or folded.
    fn from_str(text: &str) -> Result<Self, ModeError> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| ModeError(text.chars().take(64).collect()))
    }
}

/// The mode a device booted with, as its status register says (gpu-cc-protocol section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effective {
    /// Neither confidential computing nor protected PCIe.
    Off,
    /// Confidential computing.
    On,
    /// Confidential computing with developer's tools.
    Devtools,
    /// Protected PCIe.
    Ppcie,
    /// State 2: developer's tools without confidential computing, left by an interrupted change. Any mode can be set,
    /// and a reset repairs it.
    InvalidDevtoolsOnly,
    /// Confidential computing and protected PCIe at once; what firmware makes of it is not known
    /// (gpu-cc-protocol section 13, question 5).
    InvalidCcWithPpcie,
}

impl Effective {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Devtools => "devtools",
            Self::Ppcie => "ppcie",
            Self::InvalidDevtoolsOnly => "invalid-devtools-only",
            Self::InvalidCcWithPpcie => "invalid-cc-with-ppcie",
        }
    }

    /// The mode that it is, unless it is none that can be asked for.
    pub const fn mode(self) -> Option<Mode> {
        match self {
            Self::Off => Some(Mode::Off),
            Self::On => Some(Mode::On),
            Self::Devtools => Some(Mode::Devtools),
            Self::Ppcie => Some(Mode::Ppcie),
            Self::InvalidDevtoolsOnly | Self::InvalidCcWithPpcie => None,
        }
    }

    /// Whether protected PCIe is on, alone or not.
    pub(crate) const fn has_ppcie(self) -> bool {
        matches!(self, Self::Ppcie | Self::InvalidCcWithPpcie)
    }
}

impl PartialEq<Mode> for Effective {
    fn eq(&self, mode: &Mode) -> bool {
        self.mode() == Some(*mode)
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_modes_are_exact() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for text in ["", "On", " on", "on\n", "enabled", "invalid-devtools-only", "\u{1f600}"] {
            let error = text.parse::<Mode>().unwrap_err();
            assert!(error.to_string().contains("is not a mode"), "{error}");
        }
    }

    #[test]
    fn an_invalid_state_is_no_mode() {
        for effective in [Effective::InvalidDevtoolsOnly, Effective::InvalidCcWithPpcie] {
            assert!(Mode::ALL.into_iter().all(|mode| effective != mode));
        }
        assert_eq!(Effective::Ppcie, Mode::Ppcie);
    }
}
