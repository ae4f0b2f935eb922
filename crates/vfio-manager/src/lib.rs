//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.
//!
//! [`binding`] decides, without touching anything, what is to be done with each function; [`executor`] does it through
//! sysfs; [`controller`] is the loop and the commands around the two.

#![forbid(unsafe_code)]

pub mod args;
pub mod binding;
pub mod controller;
pub mod executor;
mod metrics;
pub mod modalias;
