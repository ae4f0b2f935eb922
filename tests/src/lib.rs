//! End-to-end scenarios, by behaviour, run inside the lab.
