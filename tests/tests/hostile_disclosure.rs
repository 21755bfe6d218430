//! What a guest must not learn: bytes of others, of earlier frames and of this process, in its RX buffers and elsewhere.
#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use e2e::hand::{BUFFERS, Hand, HandConfig, MEMORY, POISON, chained, writable};
use e2e::inproc::{PortPlan, until};
use e2e::peer::{MERGEABLE, MODERN, PeerConfig};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, plain, to_hostile};
use vring::{DESC_NEXT, DESC_WRITE, HEADER_LEN, features};
use wire::VnetHeader;
use wire::craft::{Craft, Tcp, leave_segments};

/// Every byte of the virtio-net header is written, whatever was in the buffer, on every way into it.
#[test]
fn x01_receive_headers_are_defined_to_the_last_byte() -> Result<()> {
    let takes = 1 << features::GUEST_CSUM | 1 << features::GUEST_TSO4;
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let sends = 1 << features::CSUM | 1 << features::HOST_TSO4;
    let neighbour = PeerConfig { features: MERGEABLE | sends, tx_len: 70_000, ..PeerConfig::default() };
    let craft = Craft::v4(
        wire::Mac::new(NEIGHBOUR),
        wire::Mac::new(HOSTILE),
        [10, 0, 0, 2].into(),
        [10, 0, 0, 1].into(),
    );
    let mut tcp = craft.tcp(&Tcp::default(), &[7; 3000]);
    let gso = leave_segments(&mut tcp, 1000).unwrap();
    for features in [MODERN, MERGEABLE, MODERN | takes, MERGEABLE | takes, 0, takes] {
        let mut stage = Stage::with(plan, neighbour)?;
        let mut hand = stage.connect(&HandConfig { features, ..HandConfig::default() })?;
        let header_len = hand.header_len();
        stage.good(&mut hand)?;
        // Fresh and reused buffers, whole and chained, frames plain and to be segmented, one and many.
        hand.rx().ring.set_descriptor(0, writable(BUFFERS, 4000));
        hand.rx().ring.set_descriptor(1, chained(BUFFERS, 5, DESC_WRITE | DESC_NEXT, 2));
        hand.rx().ring.set_descriptor(2, writable(BUFFERS + 5, 4000));
        for (head, header, sent) in [
            (0, VnetHeader::PLAIN, to_hostile(500)),
            (1, VnetHeader::PLAIN, to_hostile(60)),
            (0, gso, tcp.clone()),
            (1, gso, tcp.clone()),
        ] {
            hand.poison(5000);
            // What nobody took is three segments.
            let whole = header.is_plain() || features & takes == takes;
            let frames: u16 = if whole { 1 } else { 3 };
            let at = hand.rx().avail;
            hand.rx().post_all(&vec![head; frames.into()]);
            stage.neighbour_sends(&header.to_bytes(), &sent)?;
            stage.book.tx += u64::from(frames);
            hand.rx().expect_used()?;
            let expected = if whole { header.to_bytes() } else { plain() };
            ensure!(hand.read(BUFFERS, header_len) == expected[..header_len], "{features:#x} {header:?}");
            let used = hand.rx().used(at.wrapping_add(frames - 1)).1 as usize;
            ensure!(whole == (used == header_len + sent.len()), "{used} bytes used");
        }
        drop(hand);
        stage.finish()?;
    }
    Ok(())
}

#[test]
fn x02_nothing_behind_the_used_length_is_touched() -> Result<()> {
    for features in [MODERN, MERGEABLE] {
        let (mut stage, mut hand) = Stage::introduced(&HandConfig { features, ..HandConfig::default() })?;
        for (i, len) in (14..200).chain([1000, 1900, 4000]).enumerate() {
            hand.poison(8192);
            let index = hand.rx().avail;
            // One buffer with room behind the frame, then two that a frame of 4000 has to share if it may.
            let heads: &[u16] = if len < 2000 || features == MODERN { &[0] } else { &[1, 2] };
            hand.rx().ring.set_descriptor(0, writable(BUFFERS, 5000));
            hand.rx().ring.set_descriptor(1, writable(BUFFERS, 3000));
            hand.rx().ring.set_descriptor(2, writable(BUFFERS + 4096, 3000));
            hand.rx().post_all(heads);
            stage.neighbour_sends(&plain(), &to_hostile(len))?;
            stage.book.tx += 1;
            hand.rx().expect_used()?;
            let bytes = hand.read(BUFFERS, 8192);
            let mut written = vec![false; 8192];
            for (n, head) in (0..).zip(heads) {
                let used = hand.rx().used(index.wrapping_add(n)).1 as usize;
                let start = if *head == 2 { 4096 } else { 0 };
                written[start..start + used].fill(true);
            }
            let count = written.iter().filter(|written| **written).count();
            ensure!(count == len + HEADER_LEN, "frame {i}: {count} bytes used for {len}");
            ensure!(
                bytes.iter().zip(&written).all(|(byte, written)| *written || *byte == POISON),
                "a frame of {len} bytes wrote behind its used length"
            );
        }
        stage.end(hand)?;
    }
    Ok(())
}

#[test]
fn x03_short_frames_carry_nothing_of_earlier_ones() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    let mut secret = to_hostile(1500);
    secret[14..].fill(0xaa);
    for len in 14..60 {
        hand.rx().ring.set_descriptor(0, writable(BUFFERS, 2000));
        hand.rx().ring.set_descriptor(1, writable(BUFFERS + 0x1000, 2000));
        hand.rx().post_all(&[1, 0]);
        hand.poison(2000);
        // Through the same worker, the same ring and the same private memory.
        stage.neighbour_sends(&plain(), &secret)?;
        stage.neighbour_sends(&plain(), &to_hostile(len))?;
        stage.book.tx += 2;
        ensure!(hand.rx().expect_used()? == (0, u32::try_from(HEADER_LEN + len)?));
        let bytes = hand.read(BUFFERS, 2000);
        ensure!(bytes[HEADER_LEN..HEADER_LEN + len] == to_hostile(len));
        ensure!(bytes[HEADER_LEN + len..].iter().all(|byte| *byte == POISON), "{len} bytes");
    }
    stage.end(hand)
}

#[test]
fn x04_configuration_space_has_no_stray_bytes() -> Result<()> {
    const CONFIG: u64 = 1 << 9;
    let stage = Stage::new()?;
    let mut front = vhost_user::FrontEnd::connect(stage.plane().path("hostile"))?;
    front.negotiate(MODERN | 1 << features::PROTOCOL_FEATURES, e2e::peer::PROTOCOL | CONFIG)?;
    let space = front.config(0, 256)?;
    // virtio 1.2, 5.1.4: no MAC, link up, pairs, MTU, speed and duplex unknown; the rest does not exist.
    let mtu = MTU.to_le_bytes();
    let expected = [0, 0, 0, 0, 0, 0, 1, 0, 4, 0, mtu[0], mtu[1], 0xff, 0xff, 0xff, 0xff, 0xff];
    ensure!(space[..17] == expected, "{space:?}");
    ensure!(space[17..].iter().all(|byte| *byte == 0), "{space:?}");
    drop(front);
    stage.finish()
}

/// Mappings of the hostile guest's memory file in this process: ours and the dataplane's. Their lines in `smaps`.
fn mappings(hand: &Hand) -> Result<Vec<String>> {
    let inode = rustix::fs::fstat(hand.memory().fd())?.st_ino.to_string();
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let mut found: Vec<String> = Vec::new();
    let mut ours = false;
    for line in smaps.lines() {
        // Each mapping begins with its address range.
        if line.split('-').next().is_some_and(|start| u64::from_str_radix(start, 16).is_ok()) {
            ours = line.split_whitespace().nth(4) == Some(&inode);
            if ours {
                found.push(String::new());
            }
        }
        if ours && let Some(lines) = found.last_mut() {
            lines.push_str(line);
            lines.push('\n');
        }
    }
    Ok(found)
}

#[test]
fn x06_memory_of_a_removed_port_is_unmapped() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand)?;
    ensure!(mappings(&hand)?.len() == 2, "ours and the dataplane's");
    ensure!(stage.plane().dataplane().remove_port(stage.port));
    until("the dataplane's mapping to go", || mappings(&hand).is_ok_and(|found| found.len() == 1))?;
    // Whatever is in the rings now is nobody's business.
    let before = hand.read(0, 0x4000);
    hand.tx().post(0);
    ensure!(stage.plane().port(stage.port).is_err());
    let after = hand.read(0, 0x4000);
    let used = hand.tx().ring.area_offsets()[2];
    ensure!(before[used..] == after[used..], "the used ring is left alone");
    drop(hand);
    Ok(())
}

#[test]
fn x07_guest_memory_is_not_in_core_dumps() -> Result<()> {
    let mut stage = Stage::new()?;
    let regions = vec![(0, BUFFERS), (BUFFERS, MEMORY - BUFFERS)];
    let mut hand = stage.connect(&HandConfig { regions, ..HandConfig::default() })?;
    stage.good(&mut hand)?;
    let found = mappings(&hand)?;
    let excluded = |lines: &&String| {
        lines
            .lines()
            .any(|line| line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "dd"))
    };
    // Ours is one mapping of the whole file, without the flag.
    let (dumped, kept_out) =
        (found.iter().filter(|f| !excluded(f)).count(), found.iter().filter(excluded).count());
    ensure!((dumped, kept_out) == (1, 2), "{found:#?}");
    drop(hand);
    stage.finish()
}
