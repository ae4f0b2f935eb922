//! The devices that can be imitated, and what tells them apart.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::undecided;

/// PCI vendor id of NVIDIA.
const NVIDIA: u16 = 0x10de;
/// PCI vendor id of Intel.
const INTEL: u16 = 0x8086;

/// A device that can be imitated. Its name in files and on command lines is that of [`ModelKind::name`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelKind {
    /// A100 SXM4 40GB: 10de:20b0, chip GA100. It has no firmware processor to talk to.
    A100,
    /// B200: 10de:2901, subsystem 10de:1999, chip GB100.
    B200,
    /// B300: 10de:3182, subsystem 10de:20e6, chip GB110.
    B300,
    /// GB200, the GPU of a Grace Blackwell board: 10de:2941, subsystem 10de:2045, chip GB100 with C2C.
    Gb200,
    /// GB300, the GPU of a Grace Blackwell board: 10de:31c2, subsystem 10de:21f1, chip GB110 with C2C.
    Gb300,
    /// GH200, the GPU of a Grace Hopper board: 10de:2342, subsystem 10de:16eb, chip GH100 with C2C.
    Gh200,
    /// H100 SXM: 10de:2330, subsystem 10de:16c1, chip GH100.
    H100,
    /// H200 SXM: 10de:2335, subsystem 10de:18bf, chip GH100.
    H200,
    /// Second-generation NVSwitch: 10de:1af1, chip LR10. It has no firmware processor to talk to.
    Lr10,
    /// Third-generation NVSwitch: 10de:22a3, chip LS10.
    Ls10,
    /// Another vendor's network card: 8086:10d3, class 0x020000. A neighbour to share an IOMMU group with.
    Nic,
    /// RTX PRO 6000 Blackwell Server Edition: 10de:2bb5, subsystem 10de:204e, chip GB202.
    #[serde(rename = "rtx-pro-6000")]
    RtxPro6000,
    /// The audio function of such a board, class 0x040300.
    #[serde(rename = "rtx-pro-6000-audio")]
    RtxPro6000Audio,
    /// An NVIDIA 3D controller of a chip that no table knows.
    UnknownGpu,
}

/// A text that names no model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a model of a virtual device; known are {}", ModelKind::ALL.map(ModelKind::name).join(", "))]
pub struct UnknownModel {
    text: String,
}

/// What the models of one register map have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Chip {
    /// GA100, LR10 or a chip that no table knows: of all registers only PMC_BOOT_0 is documented.
    Bare,
    /// GH100.
    Hopper,
    /// GB100, GB102, GB110, GB112.
    Gb10x,
    /// GB202 and its smaller siblings.
    Gb20x,
    /// LS10.
    Laguna,
    /// Not a GPU or NVSwitch: no register is documented.
    Other,
}

/// How the firmware processor is talked to (gpu-cc-protocol section 4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Transport {
    /// EMEM queues, section 4.8.
    Emem,
    /// The MNOC mailbox, section 4.9.
    Mnoc,
}

impl ModelKind {
    /// Every model, in the order of their names.
    pub const ALL: [ModelKind; 14] = [
        ModelKind::A100,
        ModelKind::B200,
        ModelKind::B300,
        ModelKind::Gb200,
        ModelKind::Gb300,
        ModelKind::Gh200,
        ModelKind::H100,
        ModelKind::H200,
        ModelKind::Lr10,
        ModelKind::Ls10,
        ModelKind::Nic,
        ModelKind::RtxPro6000,
        ModelKind::RtxPro6000Audio,
        ModelKind::UnknownGpu,
    ];

    /// The name in files and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            ModelKind::A100 => "a100",
            ModelKind::B200 => "b200",
            ModelKind::B300 => "b300",
            ModelKind::Gb200 => "gb200",
            ModelKind::Gb300 => "gb300",
            ModelKind::Gh200 => "gh200",
            ModelKind::H100 => "h100",
            ModelKind::H200 => "h200",
            ModelKind::Lr10 => "lr10",
            ModelKind::Ls10 => "ls10",
            ModelKind::Nic => "nic",
            ModelKind::RtxPro6000 => "rtx-pro-6000",
            ModelKind::RtxPro6000Audio => "rtx-pro-6000-audio",
            ModelKind::UnknownGpu => "unknown-gpu",
        }
    }

    /// Whether this is an NVSwitch.
    pub fn is_switch(self) -> bool {
        matches!(self, ModelKind::Ls10 | ModelKind::Lr10)
    }

    /// Whether this is a GPU, of whatever generation.
    pub fn is_gpu(self) -> bool {
        self.class() == 0x03_0200
    }

    /// Whether the GPU hangs on a Grace CPU by NVLink-C2C.
    pub fn has_c2c(self) -> bool {
        matches!(self, ModelKind::Gh200 | ModelKind::Gb200 | ModelKind::Gb300)
    }

    /// PCI vendor id, and subsystem vendor id.
    pub fn vendor_id(self) -> u16 {
        if self == ModelKind::Nic { INTEL } else { NVIDIA }
    }

    /// PCI device id.
    pub fn device_id(self) -> u16 {
        match self {
            ModelKind::A100 => 0x20b0,
            ModelKind::B200 => 0x2901,
            ModelKind::B300 => 0x3182,
            ModelKind::Gb200 => 0x2941,
            ModelKind::Gb300 => 0x31c2,
            ModelKind::Gh200 => 0x2342,
            ModelKind::H100 => 0x2330,
            ModelKind::H200 => 0x2335,
            ModelKind::Lr10 => 0x1af1,
            ModelKind::Ls10 => 0x22a3,
            ModelKind::Nic => 0x10d3,
            ModelKind::RtxPro6000 => 0x2bb5,
            ModelKind::RtxPro6000Audio => undecided::AUDIO_DEVICE,
            ModelKind::UnknownGpu => undecided::UNKNOWN_GPU_DEVICE,
        }
    }

    /// PCI subsystem device id.
    pub fn subsystem_id(self) -> u16 {
        match self {
            ModelKind::B200 => 0x1999,
            ModelKind::B300 => 0x20e6,
            ModelKind::Gb200 => 0x2045,
            ModelKind::Gb300 => 0x21f1,
            ModelKind::Gh200 => 0x16eb,
            ModelKind::H100 => 0x16c1,
            ModelKind::H200 => 0x18bf,
            // The functions of a board have one subsystem.
            ModelKind::RtxPro6000 | ModelKind::RtxPro6000Audio => 0x204e,
            ModelKind::Lr10 | ModelKind::Ls10 => undecided::SWITCH_SUBSYSTEM_DEVICE,
            ModelKind::A100 | ModelKind::UnknownGpu | ModelKind::Nic => undecided::OTHER_SUBSYSTEM_DEVICE,
        }
    }

    /// PCI class, subclass and programming interface (gpu-cc-protocol section 1.1).
    pub fn class(self) -> u32 {
        match self {
            ModelKind::Lr10 | ModelKind::Ls10 => 0x06_8000,
            ModelKind::RtxPro6000Audio => 0x04_0300,
            ModelKind::Nic => 0x02_0000,
            _ => 0x03_0200,
        }
    }

    pub(crate) fn chip(self) -> Chip {
        match self {
            ModelKind::H100 | ModelKind::H200 | ModelKind::Gh200 => Chip::Hopper,
            ModelKind::B200 | ModelKind::B300 | ModelKind::Gb200 | ModelKind::Gb300 => Chip::Gb10x,
            ModelKind::RtxPro6000 => Chip::Gb20x,
            ModelKind::Ls10 => Chip::Laguna,
            ModelKind::A100 | ModelKind::Lr10 | ModelKind::UnknownGpu => Chip::Bare,
            ModelKind::RtxPro6000Audio | ModelKind::Nic => Chip::Other,
        }
    }

    /// PMC_BOOT_0 (gpu-cc-protocol section 1.5); none for what is neither GPU nor NVSwitch.
    pub(crate) fn boot_0(self) -> Option<u32> {
        match self {
            ModelKind::A100 => Some(0x1700_00a1),
            ModelKind::Lr10 => Some(0x0060_00a1),
            ModelKind::Ls10 => Some(0x0070_00a1),
            ModelKind::UnknownGpu => Some(undecided::UNKNOWN_GPU_BOOT_0),
            _ => match self.chip() {
                Chip::Hopper => Some(0x1800_00a1),
                Chip::Gb10x => Some(undecided::GB10X_BOOT_0),
                Chip::Gb20x => Some(undecided::GB20X_BOOT_0),
                _ => None,
            },
        }
    }
}

impl Chip {
    pub(crate) fn transport(self) -> Option<Transport> {
        match self {
            Chip::Hopper | Chip::Laguna => Some(Transport::Emem),
            Chip::Gb10x | Chip::Gb20x => Some(Transport::Mnoc),
            Chip::Bare | Chip::Other => None,
        }
    }

    /// Whether a firewall keeps BAR0 shut for a while after each reset (gpu-cc-protocol section 5.2).
    pub(crate) fn has_firewall(self) -> bool {
        matches!(self, Chip::Gb10x | Chip::Gb20x)
    }
}

impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ModelKind {
    type Err = UnknownModel;

    fn from_str(text: &str) -> Result<Self, UnknownModel> {
        ModelKind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| UnknownModel { text: text.chars().take(64).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_names_parse_as_they_print_and_as_files_have_them() {
        for kind in ModelKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
        let names = ModelKind::ALL.map(ModelKind::name);
        assert!(names.is_sorted(), "{names:?}");
        assert!("H100".parse::<ModelKind>().unwrap_err().to_string().ends_with("rtx-pro-6000-audio, unknown-gpu"));
    }
}
