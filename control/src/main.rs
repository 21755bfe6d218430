//! vhostd.
#![forbid(unsafe_code)]

fn main() {}
