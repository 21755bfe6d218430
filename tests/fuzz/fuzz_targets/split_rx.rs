#![no_main]

use fuzz::driver::{SplitDriver, rx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| rx::<SplitDriver>(bytes));
