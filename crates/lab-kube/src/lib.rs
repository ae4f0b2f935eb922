//! Stand-ins of the Kubernetes API server and of the kubelet, strict and with fault injection.
