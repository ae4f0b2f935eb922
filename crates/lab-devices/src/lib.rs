//! Virtual GPUs and NVSwitches over vfio-user, written from the protocol specification alone.
