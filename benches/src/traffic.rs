//! Light front ends that send to each other as fast as their back end lets them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::watch::{TRIES, Watch};
use anyhow::{Context, Result, ensure};
use dataplane::light::{LightConfig, LightGuest};
use vring::{HEADER_LEN, features};

/// The mix of frame lengths that stands for the Internet: 7 : 4 : 1 of 64, 570 and 1518 bytes.
const IMIX: [usize; 12] = [64, 570, 64, 64, 570, 64, 1518, 64, 570, 64, 570, 64];
/// Length of DPDK's own buffers for frames of usual length.
const BUFFER: usize = 2048;

/// How long a back end may take until it delivers the first frame.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);

/// What the front ends send: to all others in turn, and so do their addresses.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// Lengths of the frames, in turn, bytes.
    lengths: Vec<usize>,
    stations: u32,
    /// Frames begin as IPv4 datagrams do.
    ipv4: bool,
}

impl Traffic {
    /// Frames of one length, from 14 bytes on.
    pub fn of(len: usize) -> Self {
        Self { lengths: vec![len], stations: 0, ipv4: false }
    }

    /// The mix.
    pub fn imix() -> Self {
        Self { lengths: IMIX.to_vec(), stations: 0, ipv4: false }
    }

    /// The same from so many addresses in all, of which each front end has its share.
    pub fn with_stations(self, stations: u32) -> Self {
        Self { stations, ..self }
    }

    /// The same as datagrams of IPv4, each from [`ip`] of its front end.
    pub fn over_ipv4(self) -> Self {
        Self { ipv4: true, ..self }
    }

    /// Length of the longest frame.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// What front end `from` of `ports` sends.
    fn frames(&self, from: usize, ports: usize) -> Vec<Vec<u8>> {
        let others = ports - 1;
        let frame = |n: usize| {
            let to = (from + 1 + n % others) % ports;
            let mut frame = frame(from, to, self.lengths[n / others]);
            if self.ipv4 {
                frame[12..15].copy_from_slice(&[0x08, 0x00, 0x45]);
                frame[26..30].copy_from_slice(&ip(from));
            }
            frame
        };
        (0..others * self.lengths.len()).map(frame).collect()
    }
}

/// A frame from front end `from` to front end `to` with an EtherType that means nothing to anybody. The last three bytes
/// of the addresses are the station's number.
pub fn frame(from: usize, to: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..6].copy_from_slice(&mac(to));
    frame[6..12].copy_from_slice(&mac(from));
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// Ethernet address of a front end.
pub fn mac(port: usize) -> [u8; 6] {
    [2, 0, number(port), 0, 0, 0]
}

/// IPv4 address of a front end.
pub fn ip(port: usize) -> [u8; 4] {
    [10, 0, 0, number(port)]
}

fn number(port: usize) -> u8 {
    u8::try_from(port + 1).expect("few ports")
}

/// Front ends, one on each of a back end's sockets.
pub struct Guests {
    guests: Vec<LightGuest>,
}

impl Guests {
    /// Connects, and fills the TX rings. Buffers are made so long that each holds the longest frame.
    pub fn connect(sockets: &[PathBuf], config: &LightConfig, traffic: &Traffic) -> Result<Self> {
        ensure!(sockets.len() > 1, "traffic needs two front ends");
        let buffer_len = (traffic.longest() + HEADER_LEN).next_multiple_of(64).max(BUFFER);
        let stations = traffic.stations / u32::try_from(sockets.len())?;
        let config = LightConfig { buffer_len: u32::try_from(buffer_len)?, stations, ..config.clone() };
        let connect = |socket: &PathBuf| {
            LightGuest::connect(socket, &config)
                .with_context(|| format!("connecting to {}", socket.display()))
        };
        let mut guests = sockets.iter().map(connect).collect::<Result<Vec<_>>>()?;
        if config.features & 1 << features::RING_PACKED != 0 {
            // A split ring starts at 0, a packed one with its wrap counter set.
            ensure!(guests.iter().all(|g| g.pairs[0].rx.start() != 0), "the back end has no packed rings");
        }
        for (from, guest) in guests.iter_mut().enumerate() {
            guest.load(&traffic.frames(from, sockets.len()));
        }
        Ok(Self { guests })
    }

    /// Lets them run until frames come, and then for so long.
    pub fn warm_up(&mut self, time: Duration) -> Result<()> {
        let start = Instant::now();
        while self.step() == 0 {
            ensure!(start.elapsed() < FIRST_TIMEOUT, "the back end delivers nothing");
        }
        self.rate(time);
        Ok(())
    }

    /// Lets them run for so long; returns frames delivered per second, all front ends together. Measures again, up to
    /// [`TRIES`] times, when other programs took processor time from front ends or back end; returns whether they did even
    /// in the last try.
    pub fn undisturbed_rate(&mut self, backend: &mut Backend, time: Duration) -> Result<(f64, bool)> {
        let (start, mut tries) = (Instant::now(), 0);
        loop {
            let watch = Watch::start(backend);
            let rate = self.rate(time);
            let disturbed = watch.disturbed(backend)?;
            tries += 1;
            if rate != 0.0 && (!disturbed || tries >= TRIES) {
                return Ok((rate, disturbed));
            }
            // Where others have much to do, it may not have run for all of this time.
            ensure!(start.elapsed() < FIRST_TIMEOUT, "the back end delivers nothing");
        }
    }

    fn rate(&mut self, time: Duration) -> f64 {
        let (start, mut delivered) = (Instant::now(), 0);
        loop {
            for _ in 0..256 {
                delivered += self.step();
            }
            let elapsed = start.elapsed();
            if elapsed >= time {
                return delivered as f64 / elapsed.as_secs_f64();
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

    /// Gives back what the back end has used; returns the frames delivered since the last step.
    #[inline]
    pub fn step(&mut self) -> u64 {
        self.guests.iter_mut().map(|guest| guest.recycle().1).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_seven_to_four_to_one() {
        let count = |len| IMIX.iter().filter(|l| **l == len).count();
        assert_eq!([64, 570, 1518].map(count), [7, 4, 1]);
    }

    #[test]
    fn every_front_end_sends_to_all_others() {
        let frames = Traffic::imix().frames(2, 4);
        assert_eq!(frames.len(), 3 * 12);
        for to in [0, 1, 3] {
            let lengths = frames.iter().filter(|f| f[..6] == frame(2, to, 64)[..6]).map(Vec::len);
            assert_eq!(lengths.collect::<Vec<_>>(), IMIX, "to {to}");
        }
        assert!(frames.iter().all(|f| f[6..12] == [2, 0, 3, 0, 0, 0]));
    }
}
