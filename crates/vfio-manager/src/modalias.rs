//! Which VFIO driver the running kernel has for a device: the best match of its modalias among the `vfio_pci:` lines of
//! `modules.alias` (operator-contract section 6.6).

use std::path::PathBuf;

use tracing::warn;

use crate::driver::read_bounded;

/// The driver for every device that no variant driver claims.
pub const GENERIC: &str = "vfio-pci";

/// Largest `modules.alias` we read, in bytes: a distribution's is about 1.5 MB.
const MAX_ALIAS_FILE: u64 = 32 << 20;

/// The `vfio_pci:` lines of a kernel's `modules.alias`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VfioAliases {
    entries: Vec<(Fields, String)>,
}

/// The fields of a PCI modalias: vendor, device, subsystem vendor and device, base class, sub-class, interface.
/// A pattern's field is none where it says `*`.
type Fields = [Option<u32>; 7];

const FIELD_NAMES: [&str; 7] = ["v", "d", "sv", "sd", "bc", "sc", "i"];
const FIELD_DIGITS: [usize; 7] = [8, 8, 8, 8, 2, 2, 2];

impl VfioAliases {
    /// Reads `modules.alias` of `release` below the first of `roots` that has it. A kernel whose file cannot be read has no
    /// variant drivers that we could know of: every device then gets [`GENERIC`], and the log says so.
    pub fn read(roots: &[PathBuf], release: &str) -> Self {
        let paths: Vec<_> =
            roots.iter().map(|root| root.join("lib/modules").join(release).join("modules.alias")).collect();
        let Some(text) = paths.iter().find_map(|path| read_bounded(path, MAX_ALIAS_FILE)) else {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            warn!(
                code = "NoModulesAlias",
                "Whether this kernel has a VFIO driver made for these devices cannot be told, so they get {GENERIC}: none of {} \
                 can be read; mount the host's /lib/modules",
                paths.join(", ")
            );
            return Self::default();
        };
        Self::parse(&text)
    }

    /// Parses the text of `modules.alias`; lines that do not parse are skipped.
    pub fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let (pattern, module) = line.strip_prefix("alias vfio_pci:")?.split_once(' ')?;
            Some((fields(pattern)?, is_module_name(module).then(|| module.to_owned())?))
        };
        Self { entries: text.lines().filter_map(entry).collect() }
    }

    /// The module for a device with this `modalias`, by its module name (`vfio_pci`, `nvgrace_gpu_vfio_pci`): the
    /// matching line with the fewest wildcards, the first of equals. None where no line matches.
    pub fn module_for(&self, modalias: &str) -> Option<&str> {
        let device = fields(modalias.split_once(':')?.1.trim_end())?;
        if device.contains(&None) {
            return None;
        }
        let matches =
            |pattern: &Fields| pattern.iter().zip(&device).all(|(wanted, has)| wanted.is_none() || wanted == has);
        let wildcards = |pattern: &Fields| pattern.iter().filter(|field| field.is_none()).count();
        self.entries
            .iter()
            .filter(|(pattern, _)| matches(pattern))
            .min_by_key(|(pattern, _)| wildcards(pattern))
            .map(|(_, module)| module.as_str())
    }

    /// The module to load and bind for a device; [`GENERIC`] where its modalias is unreadable or nothing matches.
    pub fn choose(&self, modalias: Option<&str>) -> String {
        modalias.and_then(|text| self.module_for(text)).unwrap_or(GENERIC).to_owned()
    }
}

/// Splits `v000010DEd00002342sv*sd*bc03sc02i00`. The names are also hexadecimal letters (`d`, `bc`), so fields are cut
/// by their fixed widths, not by searching for the next name.
fn fields(text: &str) -> Option<Fields> {
    let mut rest = text;
    let mut fields = [None; 7];
    for ((name, digits), field) in FIELD_NAMES.iter().zip(FIELD_DIGITS).zip(&mut fields) {
        rest = rest.strip_prefix(name)?;
        if let Some(after) = rest.strip_prefix('*') {
            rest = after;
        } else {
            let (value, after) = rest.split_at_checked(digits)?;
            if !value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return None;
            }
            *field = Some(u32::from_str_radix(value, 16).ok()?);
            rest = after;
        }
    }
    rest.is_empty().then_some(fields)
}

/// Whether this can be a module's name: it becomes an argument of modprobe and a folder's name.
fn is_module_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIASES: &str = "\
alias pci:v000010DEd*sv*sd*bc03sc02i00* nvidia
alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v00008086d*sv*sd*bc*sc*i* first_of_equals
alias vfio_pci:v*d00001234sv*sd*bc*sc*i* second_of_equals
alias vfio_pci:vnonsense broken
alias vfio_pci:v000010DEd00002331sv*sd*bc*sc*i*\u{b} no_pattern
alias vfio_pci:\u{c}v000010DEd00002331sv*sd*bc*sc*i* no_pattern
alias vfio_pci:v000010DEd00002331sv*sd*bc*sc*i* --remove
alias vfio_pci:v000010DEd00002331sv*sd*bc*sc*i* ../../x
alias vfio_pci:v000010DEd00002342
";

    #[test]
    fn the_most_specific_line_wins() {
        let aliases = VfioAliases::parse(ALIASES);
        for (modalias, module) in [
            ("pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00\n", Some("nvgrace_gpu_vfio_pci")),
            ("pci:v000010DEd00002330sv000010DEsd000016C0bc03sc02i00", Some("vfio_pci")),
            ("pci:v000010DEd00002331sv000010DEsd000016C0bc03sc02i00", Some("vfio_pci")),
            ("pci:v00008086d00001234sv00000000sd00000000bc02sc00i00", Some("first_of_equals")),
            ("pci:v000010DEd0000234", None),
            ("pci:v000010DEd*sv*sd*bc*sc*i*", None),
            ("usb:v1", None),
            ("", None),
            ("pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i0é", None),
        ] {
            assert_eq!(aliases.module_for(modalias), module, "{modalias:?}");
        }
    }

    #[test]
    fn without_an_alias_file_the_generic_driver_is_chosen() {
        let none = VfioAliases::read(&[PathBuf::from("/nonexistent")], "6.12.0");
        assert_eq!(none, VfioAliases::default());
        assert_eq!(none.choose(Some("pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00")), GENERIC);
        assert_eq!(VfioAliases::parse(ALIASES).choose(None), GENERIC);
    }
}
