//! Virtual GPUs and NVSwitches over vfio-user, written from the protocol specification alone.
//!
//! [`model::Model`] is one device: a pure state machine over model time, with a PCI configuration space, a BAR0
//! register file and the firmware processor's mailbox. [`server::Fleet`] puts many of them behind Unix sockets that
//! QEMU's `vfio-user-pci` connects to, and keeps a trace of every access ([`trace`]) and a live handle for faults
//! ([`fault`]).
//!
//! The crate knows nothing of the crates that drive real devices: a misreading on one side is to show up as a
//! failing test.
//!
//! What the documents leave open is decided by the named constants of [`undecided`], and nowhere else.
#![forbid(unsafe_code)]

mod config_space;
mod emem;
pub mod fault;
mod kind;
mod knob_file;
mod knobs;
mod mnoc;
pub mod model;
mod registers;
pub mod server;
pub mod spec;
pub mod trace;
pub mod undecided;

#[cfg(test)]
mod tests;

pub use fault::Fault;
pub use kind::{ModelKind, UnknownModel};
pub use model::{BootState, DeviceStatus, HostError, Model};
pub use server::{Fleet, FleetConfig, FleetError};
pub use spec::{DeviceSpec, Firmware};
pub use trace::{Kind, Rpc, Space, TraceEvent};
