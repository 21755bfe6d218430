#![no_main]

use fuzz::driver::{SplitDriver, tx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| tx::<SplitDriver>(bytes));
