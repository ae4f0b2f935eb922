//! What is on this node: PCI functions, drivers, IOMMU groups, VFIO nodes, and the facts of the host that decide
//! whether a GPU can be handed to a confidential virtual machine.
//!
//! This crate only reads. It opens no VFIO device, sends no firmware message, resets nothing and wakes nothing: what it
//! tells is what sysfs, procfs and the 64 to 4096 bytes of configuration space say. No async, no Kubernetes.
//!
//! ```no_run
//! let inventory = hw_probe::Inventory::scan(&hw_probe::SysRoot::host());
//! for gpu in inventory.gpus() {
//!     println!("{} {}", gpu.bdf, gpu.driver.as_deref().unwrap_or("no driver"));
//! }
//! ```

#![forbid(unsafe_code)]

mod bdf;
pub mod config;
mod function;
mod host;
mod inventory;
mod names;
mod root;
mod scan;
mod sysfs;
mod table;
#[cfg(feature = "testing")]
pub mod testing;

pub use bdf::{Bdf, BdfError};
pub use function::{
    Architecture, Bar, BarFirewall, BitField, CcEnable, DRIVER_UNREADABLE, DeviceKind, FormFactor, FspTransport, Link,
    Model, NVIDIA, PciFunction, Power, RESET_UNNAMED, VfioCdev,
};
pub use host::{HostFacts, IommuState, Lockdown, Tee};
pub use inventory::{Inventory, Problem};
pub use names::pci_ids_name;
pub use root::SysRoot;
