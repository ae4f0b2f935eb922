//! Behaviour of the devices as a host sees it: through registers, configuration space and sockets only.

mod blackwell;
mod boot_and_reset;
mod examples;
mod faults;
mod fleet;
mod host;
mod models;
mod strictness;
