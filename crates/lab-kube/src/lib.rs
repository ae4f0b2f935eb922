//! Stand-ins of the Kubernetes API server and of the kubelet, strict and with fault injection.

pub mod api_server;

pub mod kubelet;
