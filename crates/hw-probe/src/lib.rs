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

mod bdf;
mod function;
mod host;
mod inventory;
mod root;

pub use bdf::{Bdf, BdfError};
pub use function::{
    Architecture, Bar, CcEnable, DeviceKind, FormFactor, FspTransport, Link, Model, PciFunction, Power, VfioCdev,
};
pub use host::{HostFacts, IommuState, Lockdown, Tee};
pub use inventory::{Inventory, Problem};
pub use root::SysRoot;
