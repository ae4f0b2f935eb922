//! Agent: the node's label becomes the confidential-computing mode of its GPUs.

fn main() {}
