//! PCI addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A PCI address in the form the kernel prints: domain, bus, device, function (`0000:41:00.0`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Bdf {
    /// PCI domain (segment); 16 bits on most hosts, 32 behind a VMD controller.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// A text that is not a PCI address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a PCI address of the form 0000:41:00.0")]
pub struct BdfError(String);

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        let parse = || {
            let (head, function) = text.rsplit_once('.')?;
            let mut fields = head.rsplitn(3, ':');
            let device = hex(fields.next()?, 2)?;
            let bus = hex(fields.next()?, 2)?;
            let domain = fields.next()?;
            let bdf = Bdf {
                domain: if (4..=8).contains(&domain.len()) { hex(domain, 8)? } else { return None },
                bus: u8::try_from(bus).ok()?,
                device: u8::try_from(device).ok()?,
                function: u8::try_from(hex(function, 1)?).ok()?,
            };
            (bdf.device < 32 && bdf.function < 8).then_some(bdf)
        };
        parse().ok_or_else(|| BdfError(text.chars().take(64).collect()))
    }
}

impl TryFrom<&str> for Bdf {
    type Error = BdfError;

    fn try_from(text: &str) -> Result<Self, BdfError> {
        text.parse()
    }
}

/// Hexadecimal of at most `most` digits, and of at least one: `from_str_radix` alone would accept a sign.
fn hex(text: &str, most: usize) -> Option<u32> {
    let plain = !text.is_empty() && text.len() <= most && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_form_round_trips() {
        for text in ["0000:41:00.0", "0000:00:1f.7", "10000:e1:00.0", "ffff:ff:1f.7"] {
            let bdf: Bdf = text.parse().unwrap();
            assert_eq!(bdf.to_string(), text);
            assert_eq!(serde_json::from_str::<Bdf>(&serde_json::to_string(&bdf).unwrap()).unwrap(), bdf);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "41:00.0", "0000:41:00", "0000:41:20.0", "0000:41:00.8", "0000:+1:00.0", "0000:41:00.0\n", "é"]
        {
            assert!(text.parse::<Bdf>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn order_is_numeric() {
        let mut all: Vec<Bdf> = ["10000:01:00.0", "0000:a1:00.0", "0000:0a:00.1", "0000:0a:00.0"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        all.sort();
        let text: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["0000:0a:00.0", "0000:0a:00.1", "0000:a1:00.0", "10000:01:00.0"]);
    }
}
