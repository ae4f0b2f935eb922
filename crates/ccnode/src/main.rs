//! Command line for people: what a node is, and why it is not ready.

fn main() {}
