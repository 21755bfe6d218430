#![no_main]

use fuzz::Input;
use fuzz::driver::{PackedDriver, Step};
use fuzz::model::noise;
use libfuzzer_sys::fuzz_target;
use vring::Frames;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut driver = PackedDriver::new(&mut input);
    let mut ring = driver.packed.start_rx();
    let mut room = Frames::default();
    while !input.is_empty() {
        if let Step::Turn = driver.step(&mut input) {
            driver.packed.rig.load();
            let frames: Vec<_> = (0..1 + input.byte() % 8)
                .map(|i| {
                    let mut frame = noise(12 + 14 + usize::from(input.word() % 4096), i.into());
                    frame[10..12].copy_from_slice(&[1, 0]);
                    frame
                })
                .collect();
            let parts = frames.iter().filter_map(|frame| frame.split_first_chunk());
            let burst = room.load(parts);
            // Buffers over each other: anything may be in them.
            let Some(Ok(_)) = driver.packed.receive(&mut ring, &burst, &frames) else { return };
        }
    }
});
