//! Two light front ends that send to each other as fast as their back end lets them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane::light::{LightConfig, LightGuest};

/// Two front ends on two sockets.
pub struct Pair {
    guests: [LightGuest; 2],
}

impl Pair {
    /// Connects to the two sockets, and fills the TX rings with frames of `frame_len` bytes from each to the other.
    pub fn connect(sockets: [&Path; 2], config: &LightConfig, frame_len: usize) -> Result<Self> {
        let connect = |socket: &Path| {
            LightGuest::connect(socket, config).with_context(|| format!("connecting to {}", socket.display()))
        };
        let mut guests = [connect(sockets[0])?, connect(sockets[1])?];
        for (from, guest) in (0u8..).zip(&mut guests) {
            guest.load(&[frame(from + 1, 2 - from, frame_len)]);
        }
        Ok(Self { guests })
    }

    /// Lets them run for so long; returns frames delivered per second, both directions together.
    pub fn rate(&mut self, time: Duration) -> Result<f64> {
        let (start, mut delivered) = (Instant::now(), 0);
        loop {
            for _ in 0..256 {
                delivered += self.step();
            }
            let elapsed = start.elapsed();
            if elapsed >= time {
                ensure!(delivered != 0, "the back end delivers nothing");
                return Ok(delivered as f64 / elapsed.as_secs_f64());
            }
        }
    }

    /// Lets them run until so many frames are delivered; returns the time.
    pub fn deliver(&mut self, frames: u64) -> Duration {
        let (start, mut delivered) = (Instant::now(), 0);
        while delivered < frames {
            delivered += self.step();
        }
        start.elapsed()
    }

    #[inline]
    fn step(&mut self) -> u64 {
        self.guests.iter_mut().map(|guest| guest.recycle().1).sum()
    }
}

/// A frame from station `from` to station `to` with an EtherType that means nothing to anybody.
fn frame(from: u8, to: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5]);
    frame
}
