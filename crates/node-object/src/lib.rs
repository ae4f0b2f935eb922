//! Labels, annotations and events of one Kubernetes node.
