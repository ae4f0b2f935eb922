//! A real kernel in QEMU with the virtual devices: artifacts, topologies, files in and out.
