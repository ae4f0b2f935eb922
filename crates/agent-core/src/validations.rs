//! The files by which the operator's validator tells the others what a node is for, and vfio-manager in its place.

/// Their folder, from the host's root.
pub const FOLDER: &str = "run/nvidia/validations";

/// The node's workload, in one line.
pub const WORKLOAD_FILE: &str = "workload-type";

/// There, and empty, while every GPU is on VFIO.
pub const READY_FILE: &str = "vfio-pci-ready";

/// The workload of nodes that give their GPUs to virtual machines.
pub const VM_PASSTHROUGH: &str = "vm-passthrough";
