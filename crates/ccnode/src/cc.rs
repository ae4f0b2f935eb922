//! In which mode a device is now, by whichever source may be asked, and which that was.

use hw_probe::registers::{CcMode, Registers};
use hw_probe::{Bdf, PciFunction};
use serde::Serialize;

/// The mode of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CcState {
    /// The mode that it has booted with, if that is known.
    pub mode: Option<CcMode>,
    /// Who says so.
    pub source: Option<Source>,
    /// Why it is not known.
    pub reason: Option<String>,
}

/// Who knows the mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A register in BAR0.
    Registers,
    /// NVIDIA's management library, which asks the driver. It speaks of all GPUs of that driver together.
    Nvml,
}

/// What NVIDIA's management library says of confidential computing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NvmlFacts {
    /// Version of the driver that was asked.
    pub driver_version: Option<String>,
    /// Whether the GPUs can do it.
    pub cc_capable: Option<bool>,
    /// Whether it is on.
    pub cc_enabled: bool,
    /// Whether developers' tools may look in.
    pub devtools: bool,
    /// Whether protected PCIe is on.
    pub protected_pcie: bool,
}

impl NvmlFacts {
    fn mode(&self) -> CcMode {
        match (self.cc_enabled, self.devtools, self.protected_pcie) {
            (_, _, true) => CcMode::Ppcie,
            (true, true, false) => CcMode::Devtools,
            (true, false, false) => CcMode::On,
            (false, _, false) => CcMode::Off,
        }
    }
}

/// Something that can be asked about a GPU of the NVIDIA driver.
pub trait Nvml {
    /// What it says, or why it says nothing.
    fn ask(&self, bdf: Bdf) -> Result<NvmlFacts, String>;
}

/// Opens NVIDIA's management library.
pub type OpenNvml = fn() -> Result<Box<dyn Nvml>, String>;

/// Whether a device is one that NVML could tell of: the library knows nothing of GPUs of other drivers.
pub fn is_nvmls(function: &PciFunction) -> bool {
    function.is_gpu() && !function.is_virtual_function && function.driver.as_deref() == Some("nvidia")
}

impl CcState {
    /// What is known: a register that was read comes before the library's word. None of what has no modes: foreign, audio and
    /// virtual functions.
    pub fn of(
        function: &PciFunction,
        registers: Option<&Registers>,
        nvml: Option<&Result<NvmlFacts, String>>,
    ) -> Option<Self> {
        if !(function.is_gpu() || function.is_nvswitch()) || function.is_virtual_function {
            return None;
        }
        let known = |mode, source| Self { mode: Some(mode), source: Some(source), reason: None };
        let unknown = |reason: &str| Self { mode: None, source: None, reason: Some(reason.to_owned()) };
        Some(match (registers, nvml) {
            (Some(Registers::Read { mode: Some(mode), .. }), _) => known(*mode, Source::Registers),
            (_, Some(Ok(facts))) => known(facts.mode(), Source::Nvml),
            (_, Some(Err(reason))) => {
                unknown(&format!("the NVIDIA driver has the GPU, and NVML cannot be asked: {reason}"))
            }
            (Some(Registers::Read { reason: Some(reason), .. } | Registers::NotRead { reason }), None) => {
                unknown(reason)
            }
            (Some(Registers::Read { .. }), None) => unknown("the registers do not say it"),
            (None, None) => unknown("not asked; `ccnode probe --registers` reads it of an idle device"),
        })
    }

    /// In words.
    pub fn text(&self) -> String {
        match (self.mode, self.source, &self.reason) {
            (Some(mode), source, _) => {
                let mode = match mode {
                    CcMode::Off => "off",
                    CcMode::On => "on",
                    CcMode::Devtools => "devtools",
                    CcMode::Ppcie => "ppcie",
                    CcMode::Invalid => "invalid: set any mode to cure it",
                };
                let source = if source == Some(Source::Nvml) { "NVML, for all GPUs of the driver" } else { "register" };
                format!("Mode {mode} (by {source})")
            }
            (None, _, reason) => format!("Mode not known: {}", reason.as_deref().unwrap_or("no reason given")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;
    use hw_probe::{Inventory, SysRoot};

    fn functions(root: &SysRoot) -> Vec<PciFunction> {
        Inventory::scan(root).functions
    }

    fn facts(cc_enabled: bool, devtools: bool, protected_pcie: bool) -> NvmlFacts {
        NvmlFacts { driver_version: None, cc_capable: Some(true), cc_enabled, devtools, protected_pcie }
    }

    fn read(mode: Option<CcMode>) -> Registers {
        let reason = mode.is_none().then(|| "boot is not complete".to_owned());
        Registers::Read { boot_0: 1, boot_scratch: Some(0xff), mode_register: Some(1), mode, reason }
    }

    #[test]
    fn the_register_comes_first_then_nvml_and_each_says_its_source() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2335).driver("nvidia");
        let function = &functions(&fake.root())[0];
        let not_read = Registers::NotRead { reason: "its registers are those of the driver nvidia".into() };
        let failed = || Some(Err::<NvmlFacts, _>("no library".to_owned()));
        let ok = |facts| Some(Ok::<_, String>(facts));
        let cases = [
            (Some(read(Some(CcMode::On))), ok(facts(false, false, false)), Some((CcMode::On, Source::Registers)), ""),
            (Some(not_read.clone()), ok(facts(true, false, false)), Some((CcMode::On, Source::Nvml)), ""),
            (None, ok(facts(true, true, false)), Some((CcMode::Devtools, Source::Nvml)), ""),
            (None, ok(facts(false, false, true)), Some((CcMode::Ppcie, Source::Nvml)), ""),
            (None, ok(facts(false, true, false)), Some((CcMode::Off, Source::Nvml)), ""),
            (Some(read(None)), None, None, "boot is not complete"),
            (Some(not_read), None, None, "those of the driver nvidia"),
            (None, failed(), None, "NVML cannot be asked: no library"),
            (None, None, None, "not asked"),
        ];
        for (registers, nvml, expected, words) in cases {
            let state = CcState::of(function, registers.as_ref(), nvml.as_ref()).unwrap();
            assert_eq!(state.mode.zip(state.source), expected, "{registers:?} {nvml:?}");
            assert!(state.reason.as_deref().unwrap_or_default().contains(words), "{state:?}");
            assert_eq!(state.reason.is_none(), expected.is_some());
        }
    }

    #[test]
    fn what_has_no_modes_has_no_state() {
        let fake = FakeSysfs::new();
        fake.gpu("0000:41:00.0", 0x2bb5).driver("nvidia");
        fake.function("0000:41:00.1", 0x10de, 0x22e8, 0x04_0300).driver("nvidia");
        fake.gpu("0000:42:00.0", 0x2335).virtual_function_of("0000:41:00.0").driver("nvidia");
        fake.nvswitch("0000:43:00.0");
        let told: Vec<(bool, bool)> = functions(&fake.root())
            .iter()
            .map(|function| (CcState::of(function, None, None).is_some(), is_nvmls(function)))
            .collect();
        assert_eq!(told, [(true, true), (false, false), (false, false), (true, false)]);
    }
}
