//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.

fn main() {}
