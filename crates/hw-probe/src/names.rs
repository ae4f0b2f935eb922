//! Names of the PCI ID repository.

/// The PCI ID repository's text for a device id (`GH100 [H100 SXM5 80GB]`), from which the sandbox device plugin of the
/// GPU Operator makes its per-model resource names (operator-contract section 7.5).
///
/// With the feature `names`, every NVIDIA device of the repository's edition 2025.07.11, the one the reference plugin embeds,
/// is known, and the device table fills in what is newer; without the feature only the NVIDIA devices of the table are.
pub fn pci_ids_name(vendor: u16, device: u16) -> Option<&'static str> {
    repository(vendor, device)
        .or_else(|| (vendor == crate::NVIDIA).then(|| crate::table::pci_ids_name(device)).flatten())
}

#[cfg(feature = "names")]
fn repository(vendor: u16, device: u16) -> Option<&'static str> {
    /// Devices, ascending.
    static KEYS: &[u16] = include!(concat!(env!("OUT_DIR"), "/name_keys.rs"));
    /// Where the name of the device at the same place ends.
    static ENDS: &[u32] = include!(concat!(env!("OUT_DIR"), "/name_ends.rs"));
    static TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/names.txt"));

    let index = (vendor == crate::NVIDIA).then(|| KEYS.binary_search(&device).ok()).flatten()?;
    let place = |index: usize| usize::try_from(*ENDS.get(index)?).ok();
    let start = index.checked_sub(1).map_or(Some(0), place)?;
    TEXT.get(start..place(index)?)
}

#[cfg(not(feature = "names"))]
fn repository(_vendor: u16, _device: u16) -> Option<&'static str> {
    None
}

#[cfg(all(test, feature = "names"))]
mod tests {
    use super::*;

    #[test]
    fn names_behind_the_operators_resource_names() {
        // operator-contract section 7.5
        for (device, text) in [
            (0x2330, "GH100 [H100 SXM5 80GB]"),
            (0x2331, "GH100 [H100 PCIe]"),
            (0x2321, "GH100 [H100L 94GB]"),
            (0x2335, "GH100 [H200 SXM 141GB]"),
            (0x2901, "GB100 [B200]"),
            (0x22a3, "GH100 [H100 NVSwitch]"),
        ] {
            assert_eq!(pci_ids_name(0x10de, device), Some(text), "{device:04x}");
            assert_eq!(crate::table::pci_ids_name(device), Some(text), "the table's copy for {device:04x}");
        }
    }

    /// The first and the last of NVIDIA's, and one between; other vendors' are not here.
    #[test]
    fn names_are_cut_at_their_ends() {
        for (vendor, device, text) in [
            (0x10de, 0x0008, Some("NV1 [STG2000X-B Series]")),
            (0x10de, 0x3340, Some("GB120")),
            (0x10de, 0x20b5, Some("GA100 [A100 PCIe 80GB]")),
            (0x15b3, 0x1021, None),
        ] {
            assert_eq!(pci_ids_name(vendor, device), text, "{vendor:04x}:{device:04x}");
        }
    }

    #[test]
    fn what_nobody_registered_has_no_name() {
        assert_eq!(pci_ids_name(0x10de, 0xffff), None);
        assert_eq!(pci_ids_name(0xfffe, 0x2330), None);
    }
}
