//! NVIDIA's management library, if this build may load it and it is there.
//!
//! The feature `nvml` needs a dynamically linked build. The library opens the driver's own device nodes, as `nvidia-smi` does; it is
//! asked for states only, and only when the NVIDIA driver has a GPU.

use crate::cc::Nvml;

#[cfg(all(feature = "nvml", target_feature = "crt-static"))]
compile_error!(
    "The feature nvml loads a library at run time, which a static program cannot; build with RUSTFLAGS='-C target-feature=-crt-static'"
);

/// Loads it, or says why not.
#[cfg(not(feature = "nvml"))]
pub fn open() -> Result<Box<dyn Nvml>, String> {
    Err("this build has no NVML (cargo feature nvml)".into())
}

/// Loads it, or says why not.
#[cfg(feature = "nvml")]
pub fn open() -> Result<Box<dyn Nvml>, String> {
    real::open()
}

#[cfg(feature = "nvml")]
mod real {
    use hw_probe::Bdf;

    use nvml_wrapper::error::NvmlError;
    use nvml_wrapper::structs::device::ConfidentialComputeGpuCapabilities;

    use crate::cc::{Nvml, NvmlFacts};

    struct Library(nvml_wrapper::Nvml);

    pub(super) fn open() -> Result<Box<dyn Nvml>, String> {
        // The runtime's name of the library: the other belongs to the development package.
        let names = ["libnvidia-ml.so.1", "libnvidia-ml.so"];
        let mut trouble = String::new();
        for name in names {
            // Without attaching (an option of the library) it finds no GPU at all.
            let library = nvml_wrapper::Nvml::builder().lib_path(name.as_ref()).init();
            match library {
                Ok(library) => return Ok(Box::new(Library(library))),
                Err(NvmlError::LibloadingError(_)) if trouble.is_empty() => {
                    trouble = format!("{name} cannot be loaded: it comes with the driver");
                }
                Err(NvmlError::LibloadingError(_)) => {}
                Err(error) => return Err(format!("{name}: {error}")),
            }
        }
        Err(trouble)
    }

    impl Nvml for Library {
        fn ask(&self, bdf: Bdf) -> Result<NvmlFacts, String> {
            let words = |error: NvmlError| error.to_string();
            // NVML's own form of an address has a domain of eight digits.
            let Bdf { domain, bus, device, function } = bdf;
            let address = format!("{domain:08x}:{bus:02x}:{device:02x}.{function:x}");
            let device = self.0.device_by_pci_bus_id(address).map_err(words)?;
            let capable = device.get_confidential_compute_capabilities().ok();
            Ok(NvmlFacts {
                driver_version: self.0.sys_driver_version().ok(),
                cc_capable: capable.map(|found| matches!(found.gpus_caps, ConfidentialComputeGpuCapabilities::Capable)),
                cc_enabled: device.is_cc_enabled().map_err(words)?,
                devtools: device.is_cc_dev_mode_enabled().map_err(words)?,
                protected_pcie: device.is_multi_gpu_protected_pcie_enabled().map_err(words)?,
            })
        }
    }
}
