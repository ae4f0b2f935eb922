//! Access control services (ACS) of the ports above a function: what lets the IOMMU tell neighbours apart.

use std::collections::BTreeMap;
use std::error::Error as _;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigSpace, Liveness, ask};
use crate::{Bdf, PciFunction, SysRoot};

/// A port above a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its address.
    pub bdf: Bdf,
    /// What it is, by its PCI Express capability.
    pub role: PortRole,
    /// Whether it keeps what is below it apart.
    pub acs: Acs,
}

/// Port type of the PCI Express capability (gpu-cc-protocol section 1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortRole {
    /// Root port.
    Root,
    /// Upstream port of a switch.
    Upstream,
    /// Downstream port of a switch.
    Downstream,
    /// Anything else, or not readable.
    Other,
}

/// Isolation by a port. The kernel asks for source validation, request and completion redirection and upstream
/// forwarding before it puts what is below the port into groups of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Acs {
    /// All four are on.
    Isolates,
    /// The port could, or in part could, but these are off.
    Off {
        /// `source-validation`, `request-redirect`, `completion-redirect`, `upstream-forwarding`.
        missing: Vec<String>,
    },
    /// The port has no such capability. (The kernel knows some that isolate all the same.)
    Absent,
    /// Not needed: the upstream port of a switch has one thing below it, the switch.
    NotNeeded,
    /// It cannot be told.
    Unknown {
        /// Why.
        cause: String,
    },
}

impl Acs {
    /// Whether the port is known not to keep its neighbours apart.
    pub fn lets_neighbours_mix(&self) -> bool {
        matches!(self, Self::Off { .. } | Self::Absent)
    }
}

/// Ports that were asked already: functions behind one switch share most of their path.
#[derive(Debug, Default)]
pub struct Ports(BTreeMap<Bdf, Port>);

impl Ports {
    /// The ports above `function`, nearest first, with what configuration space says of them. A port in D3cold is not asked.
    /// Waits 2 seconds for each new port at most.
    pub fn above(&mut self, root: &SysRoot, function: &PciFunction) -> Vec<Port> {
        let ask = |bdf: &Bdf| self.0.entry(*bdf).or_insert_with(|| port(root, *bdf)).clone();
        function.upstream.iter().map(ask).collect()
    }
}

fn port(root: &SysRoot, bdf: Bdf) -> Port {
    let unknown = |cause: String| Port { bdf, role: PortRole::Other, acs: Acs::Unknown { cause } };
    match ask(root, bdf) {
        Ok((Liveness::Answers, Some(config))) => judge(bdf, &config),
        Ok((Liveness::Asleep, _)) => unknown("The port is in D3cold and was not asked".into()),
        Ok(_) => unknown("The port does not answer".into()),
        Err(error) => unknown(error.source().map_or_else(|| error.to_string(), ToString::to_string)),
    }
}

fn judge(bdf: Bdf, config: &ConfigSpace) -> Port {
    const FLAGS: [(u16, &str); 4] = [
        (1, "source-validation"),
        (1 << 2, "request-redirect"),
        (1 << 3, "completion-redirect"),
        (1 << 4, "upstream-forwarding"),
    ];
    let flags = config.capability(0x10).and_then(|offset| config.u16(offset.checked_add(2)?));
    let role = match flags.map(|flags| flags >> 4 & 0xf) {
        Some(4) => PortRole::Root,
        Some(5) => PortRole::Upstream,
        Some(6) => PortRole::Downstream,
        _ => PortRole::Other,
    };
    let control = config.extended_capability(0x0d).and_then(|offset| config.u16(offset.checked_add(6)?));
    let acs = match control {
        _ if role == PortRole::Upstream => Acs::NotNeeded,
        Some(control) => {
            let off = FLAGS.iter().filter(|(flag, _)| control & flag == 0);
            let missing: Vec<String> = off.map(|(_, name)| (*name).to_owned()).collect();
            if missing.is_empty() { Acs::Isolates } else { Acs::Off { missing } }
        }
        None if config.as_bytes().len() <= 256 => {
            Acs::Unknown { cause: "Extended configuration space cannot be seen, which needs root".into() }
        }
        None => Acs::Absent,
    };
    Port { bdf, role, acs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Inventory;
    use crate::testing::FakeSysfs;

    /// Configuration space of a port: PCI Express capability at 0x40, ACS (when given) at 0x100 with this control word.
    pub(crate) fn config(port_type: u8, control: Option<u16>) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(&[0x36, 0x1b, 0x0c, 0x00]);
        bytes[0x06] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x40..0x44].copy_from_slice(&[0x10, 0, port_type << 4, 0]);
        if let Some(control) = control {
            bytes[0x100..0x104].copy_from_slice(&[0x0d, 0, 1, 0]);
            bytes[0x106..0x108].copy_from_slice(&control.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_path_is_told_port_by_port() {
        let fake = FakeSysfs::new();
        fake.bridge("0000:00:01.0").config(&config(4, Some(0x1d)));
        fake.below("0000:00:01.0").bridge("0000:01:00.0").config(&config(5, None));
        fake.below("0000:01:00.0").bridge("0000:02:00.0").config(&config(6, Some(0x05)));
        fake.below("0000:02:00.0").gpu("0000:03:00.0", 0x2330);
        fake.bridge("0000:00:02.0").config(&config(4, None));
        fake.below("0000:00:02.0").gpu("0000:04:00.0", 0x2330);
        fake.bridge("0000:00:03.0").config(&config(4, None)[..64]);
        fake.below("0000:00:03.0").gpu("0000:05:00.0", 0x2330);
        let inventory = Inventory::scan(&fake.root());
        let path = |bdf: &str| {
            let ports = Ports::default().above(&fake.root(), inventory.get(bdf.parse().unwrap()).unwrap());
            ports.into_iter().map(|port| (port.bdf.to_string(), port.role, port.acs)).collect::<Vec<_>>()
        };
        let off = Acs::Off { missing: vec!["completion-redirect".into(), "upstream-forwarding".into()] };
        assert_eq!(
            path("0000:03:00.0"),
            [
                ("0000:02:00.0".into(), PortRole::Downstream, off),
                ("0000:01:00.0".into(), PortRole::Upstream, Acs::NotNeeded),
                ("0000:00:01.0".into(), PortRole::Root, Acs::Isolates),
            ]
        );
        assert_eq!(path("0000:04:00.0"), [("0000:00:02.0".into(), PortRole::Root, Acs::Absent)]);
        assert!(matches!(path("0000:05:00.0")[0].2, Acs::Unknown { .. }));
        fake.get("0000:00:02.0").config(&[0xff; 4096]);
        assert!(matches!(path("0000:04:00.0")[0].2, Acs::Unknown { .. }));
    }
}
