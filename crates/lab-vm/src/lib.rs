//! A real kernel in QEMU with the virtual devices: artifacts, topologies, files in and out.
//!
//! [`artifacts`] fetches and builds what a guest consists of, once. [`topology`] says which virtual devices it has and
//! where. [`guest::Guest`] boots it: the devices run in this process, the guest's init takes commands over a
//! virtio-serial port ([`wire`]).

#![forbid(unsafe_code)]

mod agent;
pub mod artifacts;
mod cpio;
mod elf;
pub mod guest;
pub mod image;
mod qemu;
mod strip;
pub mod topology;
pub mod wire;

pub use agent::{AgentError, Chunk, Command, Output, Process, Status};
pub use artifacts::{Artifacts, Cache, Kernel, Wanted};
pub use guest::{BootTimes, Guest, GuestBuilder, GuestError, exit_code};
pub use image::{Add, Tree};
pub use topology::Topology;
pub use wire::Stream;
