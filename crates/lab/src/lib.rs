//! The laboratory: a node with virtual GPUs under a real kernel, and stand-ins of Kubernetes around it.
