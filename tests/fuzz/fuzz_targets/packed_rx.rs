#![no_main]

use fuzz::driver::{PackedDriver, rx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| rx::<PackedDriver>(bytes));
