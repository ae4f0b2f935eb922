//! Talks to one GPU or NVSwitch: ownership, BAR0, firmware messages, confidential-computing knobs, reset, boot wait.
//! The only crate of ccnode that writes device registers. No async, no Kubernetes.
//!
//! A mode has two sides (gpu-cc-protocol section 6.3): the knobs say what the device will be after its next reset, a
//! status register says what it booted with. "In mode X" means both, everywhere in this crate.
//!
//! The way through it, for a node:
//!
//! ```no_run
//! use gpu_firmware::{Mode, Ownership, Places, Progress, Transaction};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let inventory = hw_probe::Inventory::scan(&hw_probe::SysRoot::host());
//! let gpus: Vec<_> = inventory.gpus().cloned().collect();
//! // Nothing has been touched yet; a device in use ends it here.
//! let ownership = Ownership::take(&gpus, &Places::host("example"))?;
//! let outcome = Transaction::new(&ownership).run(Mode::On, &|progress: &Progress| println!("{progress}"));
//! for device in &outcome.devices {
//!     match &device.result {
//!         Ok(done) => println!("{} is {}", device.bdf, done.effective),
//!         Err(error) => println!("{}", error.line()),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Devices are reached through sysfs while their VFIO group files are held, or as opened VFIO devices where the kernel is
//! locked down or has no group files ([`Access`]).
//!
//! Hopper and Blackwell GPUs and LS10 switches are driven; other devices are refused by name, with the reason.

#![deny(unsafe_code)]

mod access;
mod chip;
mod clock;
mod device;
mod emem;
mod error;
#[allow(unsafe_code, reason = "system calls of VFIO; every block states why it is sound")]
mod ioctl;
mod knob;
mod lock;
mod mailbox;
mod message;
#[allow(unsafe_code, reason = "register access through a mapping; every block states why it is sound")]
mod mmap;
mod mnoc;
mod mode;
mod ownership;
mod plan;
mod sysfs;
mod transition;
mod vfio;

#[cfg(test)]
mod fake;

pub use access::{Access, AccessError, BackEnd, Bar0, Choice, Reset};
pub use chip::{Chip, GB10X, GB20X, GH100, LS10, Support};
pub use clock::{Clock, SystemClock};
pub use device::{Device, Observed, Staged};
pub use error::{Error, Fault, Holder};
pub use knob::{Knob, KnobState, KnobWrite, Step, configured, forbidden, matches, reason, steps, vector};
pub use lock::DeviceLock;
pub use mode::{Effective, Mode, ModeError};
pub use ownership::{
    Cost, Hold, OwnedDevice, Ownership, Places, Refused, Use, device_use, group_holders, group_is_free,
};
pub use plan::{NodePlan, Part, PlannedDevice};
pub use transition::{
    DeviceDone, DeviceOutcome, Milestone, NodeOutcome, Observer, Progress, Transaction, change_devices,
};
