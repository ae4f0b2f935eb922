//! Agent: VFIO-bound GPUs and NVSwitches offered to the kubelet, with CDI files for Kata.
