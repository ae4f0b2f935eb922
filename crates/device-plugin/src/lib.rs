//! Agent: VFIO-bound GPUs and NVSwitches offered to the kubelet, with CDI files for Kata.
//!
//! One look at the node gives the units ([`units`], pure); they are written into CDI files ([`cdi`]), and then the
//! kubelet is told of the same units ([`server`], [`plugin`]): what the kubelet allocates, Kata can resolve.

#![forbid(unsafe_code)]

pub mod args;
pub mod cdi;
pub mod controller;
mod metrics;
pub mod names;
pub mod observe;
pub mod plugin;
pub mod server;
pub mod units;
pub mod watch;
