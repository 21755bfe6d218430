//! Two guests that send to each other across parts of the host that may lose a frame while they are set up.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use vring::HEADER_LEN;

use crate::oracle::{Flow, Oracle};
use crate::peer::Peer;

/// The addresses of the two.
pub const GUESTS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 0xa], [2, 0, 0, 0, 0, 0xb]];
/// Header of a frame that asks for nothing.
pub const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];

const SOON: Duration = Duration::from_secs(30);
/// For a frame that was not lost.
const AGAIN: Duration = Duration::from_millis(200);

/// Each guest gets what the other sends, whole.
pub fn exchange(a: &mut Peer, b: &mut Peer) -> Result<()> {
    exchange_as(GUESTS, a, b)
}

/// The same from other addresses.
pub fn exchange_as([src, dst]: [[u8; 6]; 2], a: &mut Peer, b: &mut Peer) -> Result<()> {
    let oracle = Oracle::new(std::process::id());
    let (there, back) = (Flow { id: 0, src, dst }, Flow { id: 1, src: dst, dst: src });
    for (sequence, len) in (0..).zip([60, 64, 590, 1514, 60]) {
        pass(a, b, &oracle.frame(&there, sequence, len))?;
        pass(b, a, &oracle.frame(&back, sequence, len))?;
    }
    Ok(())
}

/// Sends a frame again and again until it comes.
fn pass(from: &mut Peer, to: &mut Peer, frame: &[u8]) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        ensure!(from.send_now(0, &PLAIN, frame), "buffers come back");
        let again = Instant::now() + AGAIN;
        while Instant::now() < again {
            if to.receive(0).is_some_and(|(_, got)| got == frame) {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
    bail!("a frame of {} bytes has not come", frame.len())
}
