#![no_main]

use fuzz::Input;
use fuzz::driver::{PackedDriver, Step};
use libfuzzer_sys::fuzz_target;
use vring::Frames;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut driver = PackedDriver::new(&mut input);
    let mut ring = driver.packed.start_tx();
    let mut frames = Frames::default();
    while !input.is_empty() {
        if let Step::Turn = driver.step(&mut input) {
            driver.packed.rig.load();
            if driver.packed.send(&mut ring, &mut frames).is_err() {
                return;
            }
        }
    }
});
