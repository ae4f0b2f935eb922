//! The laboratory: a node with virtual GPUs under a real kernel, and stand-ins of Kubernetes around it.

#![forbid(unsafe_code)]

pub mod boot;
pub mod control;
pub mod demo;
pub mod node;
pub mod programs;
pub mod replay;
pub mod timeline;

pub use boot::Boot;
pub use node::Node;
