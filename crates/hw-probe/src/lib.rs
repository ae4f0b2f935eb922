//! What is on this node: PCI functions, drivers, IOMMU groups, VFIO nodes, and the facts of the host that decide
//! whether a GPU can be handed to a confidential virtual machine.
//!
//! This crate only reads. It opens no VFIO device, sends no firmware message, resets nothing and wakes nothing: what it
//! tells is what sysfs, procfs and the 64 to 4096 bytes of configuration space say. ([`LockdownFinding`] tells of the one
//! thing that is tried.) No async, no Kubernetes.
//!
//! ```no_run
//! let inventory = hw_probe::Inventory::scan(&hw_probe::SysRoot::host());
//! for gpu in inventory.gpus() {
//!     println!("{} {}", gpu.bdf, gpu.driver.as_deref().unwrap_or("no driver"));
//! }
//! ```

#![deny(unsafe_code)]

pub mod acs;
mod aer;
mod bdf;
mod condition;
pub mod config;
mod details;
mod diff;
mod function;
mod holders;
mod host;
mod inventory;
#[allow(unsafe_code, reason = "memory mappings have no safe interface")]
mod mmap;
mod names;
mod power;
pub mod record;
pub mod registers;
mod root;
mod scan;
mod sysfs;
mod table;
#[cfg(feature = "testing")]
pub mod testing;
mod watch;

pub use aer::AerCounts;
pub use bdf::{Bdf, BdfError};
pub use condition::{Condition, Fault};
pub use details::{HostDetails, LockdownFinding, Module, ModuleState, Parameter, TeeEvidence};
pub use diff::{Change, Property};
pub use function::{
    Architecture, Bar, BarFirewall, BitField, CcEnable, DRIVER_UNREADABLE, DeviceKind, FormFactor, FspTransport, Link,
    Model, NVIDIA, PciFunction, Power, RESET_UNNAMED, Unclassified, VfioCdev,
};
pub use holders::{Holder, Holders, holders};
pub use host::{HostFacts, IommuState, Lockdown, Tee};
pub use inventory::{Inventory, Problem};
pub use names::pci_ids_name;
pub use power::RuntimePower;
pub use root::SysRoot;
pub use watch::{Watch, is_device_event};
