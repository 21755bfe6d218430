#![no_main]

use fuzz::Input;
use fuzz::driver::{Driver, Step};
use libfuzzer_sys::fuzz_target;
use vring::Frames;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut driver = Driver::new(&mut input);
    let mut ring = driver.rig.start_tx();
    let mut frames = Frames::default();
    while !input.is_empty() {
        if let Step::Turn = driver.step(&mut input) {
            driver.rig.load();
            if driver.rig.send(&mut ring, &mut frames).is_err() {
                return;
            }
        }
    }
});
