//! The real client against the stand-in, and raw HTTP where a client would not go.

mod client;
mod raw;
