//! Resource names: what the kubelet counts and what the CDI kind is, from an alias or from the model.

use std::fmt;
use std::str::FromStr;

pub use agent_core::cdi::VENDOR;
use hw_probe::PciFunction;

/// Longest name part of a Kubernetes qualified name.
const LONGEST: usize = 63;

/// The part of a resource name after `nvidia.com/`. It is the CDI class too, so it obeys both sets of rules: CDI's
/// (a letter first, a letter or digit last, no dot before version 0.6.0) and Kubernetes' (63 characters).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceName(String);

/// A text that cannot be a resource name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// Nothing at all.
    #[error("A resource name cannot be empty")]
    Empty,
    /// More than Kubernetes allows.
    #[error("The resource name is {0} characters long, Kubernetes allows {LONGEST}")]
    TooLong(usize),
    /// CDI classes begin with a letter.
    #[error("Resource name {0:?} must begin with a letter (CDI class rule)")]
    First(String),
    /// Both rules.
    #[error("Resource name {0:?} must end with a letter or a digit")]
    Last(String),
    /// Dots are legal in Kubernetes and in newer CDI only.
    #[error("Resource name {0:?} has a dot, which CDI 0.5.0, the version that Kata reads, does not allow")]
    Dot(String),
    /// A slash usually means that somebody wrote the whole resource name.
    #[error("Resource name {0:?} has a slash: give only the part after {VENDOR}/")]
    Slash(String),
    /// Anything else.
    #[error("Resource name {name:?} has {bad:?}: only letters, digits, '-' and '_' are allowed")]
    Character {
        /// The text.
        name: String,
        /// The first character that does not belong.
        bad: char,
    },
}

impl ResourceName {
    /// The CDI class: the name without the vendor.
    pub fn class(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ResourceName {
    /// The whole name, as the kubelet and CDI know it: `nvidia.com/pgpu`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VENDOR}/{}", self.0)
    }
}

impl FromStr for ResourceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let length = text.chars().count();
        if length > LONGEST {
            return Err(NameError::TooLong(length));
        }
        let (Some(first), Some(last)) = (text.chars().next(), text.chars().next_back()) else {
            return Err(NameError::Empty);
        };
        let name = || text.to_owned();
        match text.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_')) {
            Some('.') => return Err(NameError::Dot(name())),
            Some('/') => return Err(NameError::Slash(name())),
            Some(bad) => return Err(NameError::Character { name: name(), bad }),
            None => {}
        }
        if !first.is_ascii_alphabetic() {
            return Err(NameError::First(name()));
        }
        if !last.is_ascii_alphanumeric() {
            return Err(NameError::Last(name()));
        }
        Ok(Self(name()))
    }
}

/// How devices of one kind are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Naming {
    /// All under one name.
    Alias(ResourceName),
    /// One name a model: the PCI ID repository's.
    PerModel,
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alias(name) => name.fmt(f),
            Self::PerModel => f.write_str("by model"),
        }
    }
}

impl FromStr for Naming {
    type Err = NameError;

    /// Empty is the documented switch to names by model (operator-contract section 7.3).
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() { Ok(Self::PerModel) } else { text.parse().map(Self::Alias) }
    }
}

/// The resource under which `function` is offered. `text` is what the PCI ID repository calls it.
pub fn resource_name(naming: &Naming, function: &PciFunction, text: Option<&str>) -> ResourceName {
    match naming {
        Naming::Alias(name) => name.clone(),
        Naming::PerModel => text.and_then(|text| model_name(text).parse().ok()).unwrap_or_else(|| {
            // The reference calls every unknown device UNKNOWN_DEVICE, so that two models fight over one socket; the
            // device id alone would begin with a digit, which is no CDI class.
            let kind = if function.is_nvswitch() { "NVSWITCH" } else { "GPU" };
            ResourceName(format!("{kind}_{:04X}", function.device))
        }),
    }
}

/// The reference's spelling of a model (operator-contract section 7.5).
fn model_name(text: &str) -> String {
    let spaced = text.to_uppercase().replace(['/', '.'], "_");
    let joined = spaced.split_whitespace().collect::<Vec<_>>().join("_");
    joined.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_obey_cdi_and_kubernetes() {
        for good in ["pgpu", "nvswitch", "GH100_H100_SXM5_80GB", "a", "a-b_c9"] {
            assert_eq!(good.parse::<ResourceName>().unwrap().to_string(), format!("nvidia.com/{good}"));
        }
        let name = |text: &str| text.to_owned();
        let longest = "a".repeat(63);
        assert!(longest.parse::<ResourceName>().is_ok());
        for (bad, error) in [
            ("", NameError::Empty),
            (&"a".repeat(64), NameError::TooLong(64)),
            ("2330", NameError::First(name("2330"))),
            ("_gpu", NameError::First(name("_gpu"))),
            ("gpu-", NameError::Last(name("gpu-"))),
            ("h100.80gb", NameError::Dot(name("h100.80gb"))),
            ("nvidia.com/pgpu", NameError::Dot(name("nvidia.com/pgpu"))),
            ("nvidia/pgpu", NameError::Slash(name("nvidia/pgpu"))),
            ("p gpu", NameError::Character { name: name("p gpu"), bad: ' ' }),
            ("grün", NameError::Character { name: name("grün"), bad: 'ü' }),
        ] {
            assert_eq!(bad.parse::<ResourceName>(), Err(error), "{bad:?}");
        }
    }

    #[test]
    fn an_alias_that_is_set_but_empty_means_names_by_model() {
        assert_eq!("".parse(), Ok(Naming::PerModel));
        assert_eq!("pgpu".parse(), Ok(Naming::Alias("pgpu".parse().unwrap())));
        assert!("a b".parse::<Naming>().is_err());
    }

    #[test]
    fn models_are_spelled_as_the_reference_does() {
        for (text, name) in [
            ("GH100 [H100 SXM5 80GB]", "GH100_H100_SXM5_80GB"),
            ("GH100 [H100 PCIe]", "GH100_H100_PCIE"),
            ("GH100 [H100L 94GB]", "GH100_H100L_94GB"),
            ("GB100 [B200]", "GB100_B200"),
            ("GH100 [H100 NVSwitch]", "GH100_H100_NVSWITCH"),
            ("AD102GL [RTX 6000 Ada  Generation / v1.5]", "AD102GL_RTX_6000_ADA_GENERATION___V1_5"),
        ] {
            assert_eq!(model_name(text), name);
        }
    }
}
