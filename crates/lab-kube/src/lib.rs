//! Stand-ins of the Kubernetes API server and of the kubelet, strict and with fault injection.

#![forbid(unsafe_code)]

pub mod api_server;
pub mod kubelet;
