//! What the fuzz targets share.
//!
//! | target | input | what must hold |
//! |---|---|---|
//! | `codec` | bytes from a front end | the same messages in whatever pieces they come; nothing long is kept |
//! | `session` | messages with descriptors | rings start and stop in turn; no descriptor stays |
//! | `split_tx` | what a driver does, step by step | chains, frames and all memory as the model has them |
//! | `split_rx` | the same, and frames | the same; behind the used length nothing is touched |
//! | `packed_tx`, `packed_rx` | the same with a packed ring | the same |
//! | `header` | virtio-net header and frame | what passes is true; segments are the frame again |
//!
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz TARGET tests/fuzz/corpus/TARGET tests/fuzz/seeds/TARGET`: what is found
//! goes into `corpus`, which is not kept; `seeds` is, and gets an input for every defect that was found.

pub mod driver;
#[path = "../../../crates/vring/tests/model/mod.rs"]
pub mod model;
#[path = "../../../crates/vhost-user/tests/support/mod.rs"]
pub mod support;

/// Bytes of an input, one after the other; zeros when they are used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let byte;
        (byte, self.0) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        byte
    }

    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes.to_vec()
    }
}
