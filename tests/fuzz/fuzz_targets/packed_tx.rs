#![no_main]

use fuzz::driver::{PackedDriver, tx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| tx::<PackedDriver>(bytes));
