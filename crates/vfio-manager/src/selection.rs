//! Which of the GPUs go to VFIO: all, or those that a selection names by address, model and NUMA node.

use std::fmt;
use std::str::FromStr;

use hw_probe::{Bdf, PciFunction};

/// GPUs by address, model and NUMA node. A GPU is selected when it matches one value of each kind that is given; without any
/// every GPU is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    addresses: Vec<Bdf>,
    models: Vec<String>,
    nodes: Vec<u32>,
}

/// A text that is no selection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{term:?} selects nothing: give bdf=0000:41:00.0, model=H100 (or model=10de:2330) or numa=0, several with commas"
)]
pub struct SelectionError {
    term: String,
}

impl FromStr for Selection {
    type Err = SelectionError;

    fn from_str(text: &str) -> Result<Self, SelectionError> {
        let mut selection = Self::default();
        for term in text.split(',').map(str::trim).filter(|term| !term.is_empty()) {
            let error = || SelectionError { term: term.to_owned() };
            let (kind, value) = term.split_once('=').ok_or_else(error)?;
            match (kind.trim(), value.trim()) {
                ("bdf", value) => selection.addresses.push(value.parse().map_err(|_| error())?),
                ("numa", value) => selection.nodes.push(value.parse().map_err(|_| error())?),
                ("model", value) if !value.is_empty() => selection.models.push(value.to_owned()),
                _ => return Err(error()),
            }
        }
        Ok(selection)
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.addresses.iter().map(|bdf| format!("bdf={bdf}"));
        let models = self.models.iter().map(|model| format!("model={model}"));
        let nodes = self.nodes.iter().map(|node| format!("numa={node}"));
        f.write_str(&addresses.chain(models).chain(nodes).collect::<Vec<_>>().join(","))
    }
}

impl Selection {
    /// Whether every GPU is selected, whatever it is.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// The addresses that are named.
    pub fn addresses(&self) -> &[Bdf] {
        &self.addresses
    }

    /// Whether `gpu` is selected.
    pub fn takes(&self, gpu: &PciFunction) -> bool {
        let is_model = |wanted: &String| {
            let names = [gpu.model.as_ref().map(|model| model.name.as_str()), gpu.name.as_deref()];
            let ids = format!("{:04x}:{:04x}", gpu.vendor, gpu.device);
            names.into_iter().flatten().any(|name| name.eq_ignore_ascii_case(wanted))
                || ids.eq_ignore_ascii_case(wanted)
        };
        (self.addresses.is_empty() || self.addresses.contains(&gpu.bdf))
            && (self.models.is_empty() || self.models.iter().any(is_model))
            && (self.nodes.is_empty() || gpu.numa_node.is_some_and(|node| self.nodes.contains(&node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::Inventory;
    use hw_probe::testing::FakeSysfs;

    #[test]
    fn one_value_of_each_kind_must_match() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2330).numa(0);
        fake.gpu("0000:42:00.0", 0x2330).numa(1);
        fake.gpu("0000:43:00.0", 0x2331).numa(1);
        fake.gpu("0000:44:00.0", 0x2331);
        let inventory = Inventory::scan(&fake.root());
        for (text, buses) in [
            ("", &[0x41, 0x42, 0x43, 0x44][..]),
            ("bdf=0000:42:00.0", &[0x42]),
            ("bdf=0000:42:00.0, bdf=0000:44:00.0", &[0x42, 0x44]),
            ("model=10DE:2331", &[0x43, 0x44]),
            ("numa=1", &[0x42, 0x43]),
            ("numa=1,model=10de:2330", &[0x42]),
            ("numa=7", &[]),
        ] {
            let selection: Selection = text.parse().unwrap();
            let taken: Vec<u8> = inventory.gpus().filter(|gpu| selection.takes(gpu)).map(|gpu| gpu.bdf.bus).collect();
            assert_eq!(taken, buses, "{text}");
            assert_eq!(selection.to_string().parse::<Selection>().unwrap(), selection, "{text}");
        }
    }

    #[test]
    fn the_tables_name_is_a_model() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2330);
        let inventory = Inventory::scan(&fake.root());
        let gpu = inventory.gpus().next().unwrap();
        let name = &gpu.model.as_ref().unwrap().name;
        assert!(format!("model={}", name.to_lowercase()).parse::<Selection>().unwrap().takes(gpu));
    }

    #[test]
    fn nonsense_is_named() {
        for text in ["41:00.0", "bdf=41:00.0", "numa=-1", "model=", "colour=green", "bdf"] {
            let error = text.parse::<Selection>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
