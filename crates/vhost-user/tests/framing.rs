//! Bytes and descriptors that are no messages, and peers that stop in the middle of one (test ids P01-P13): each line ends
//! as it should, a second endpoint is served at once all the time, and nothing of the peer is left behind.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::*;
use vhost_user::{Limits, SessionState};

#[test]
fn p01_header_in_pieces_works_and_half_a_header_ends() {
    let deadline = Duration::from_millis(400);
    let bench = Bench::with_limits(Limits { message_deadline: deadline, ..Limits::default() });
    let mut raw = bench.raw();
    for byte in message(id::GET_FEATURES, PLAIN, &[]) {
        raw.send_bytes(&[byte], &[]);
    }
    assert_eq!(raw.reply(id::GET_FEATURES), OFFERED.to_ne_bytes());

    // Silence between messages is nobody's business.
    std::thread::sleep(deadline * 2);
    assert_eq!(raw.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());

    let began = Instant::now();
    raw.send_bytes(&message(id::SET_FEATURES, PLAIN, &[0; 8])[..5], &[]);
    bench.check_canary();
    raw.closed();
    assert!(began.elapsed() >= deadline);
    drop(raw);
    // The same for half a payload, and for a peer that trickles.
    let mut raw = bench.raw();
    raw.send_bytes(&message(id::SET_FEATURES, PLAIN, &[0; 8])[..15], &[]);
    raw.closed();
    drop(raw);
    let mut raw = bench.raw();
    let began = Instant::now();
    while raw.try_send_bytes(&[1], &[]) && began.elapsed() < SOON {
        std::thread::sleep(deadline / 8);
    }
    raw.closed();
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p02_wrong_version_reply_flag_and_reserved_flags_close() {
    let bench = Bench::new();
    for flags in [0, 2, 3, 1 | 4, 1 | 8 | 4, 1 | 16, 1 | 1 << 31] {
        bench.check_closes("flags", &message(id::GET_FEATURES, flags, &[]), &[]);
    }
    bench.check_recovered();
}

#[test]
fn p03_wrong_size_closes_before_the_payload_is_read() {
    let bench = Bench::new();
    let header = |id: u32, size: u32| [id, PLAIN, size].map(u32::to_ne_bytes).concat();
    for (id, right) in [
        (id::GET_FEATURES, 0),
        (id::SET_FEATURES, 8),
        (id::SET_OWNER, 0),
        (id::SET_MEM_TABLE, 40),
        (id::SET_VRING_NUM, 8),
        (id::SET_VRING_ADDR, 40),
        (id::GET_VRING_BASE, 8),
        (id::SET_VRING_KICK, 8),
        (id::SEND_RARP, 8),
        (id::NET_SET_MTU, 8),
        (id::ADD_MEM_REG, 40),
        (id::GET_QUEUE_NUM, 0),
        (99, 0),
    ] {
        // Nothing follows the header, so that only the header can be what ends the session.
        for size in [u32::MAX, 1 << 31, 4097] {
            bench.check_closes("size", &header(id, size), &[]);
        }
        if !matches!(id, id::SET_MEM_TABLE | 99) {
            bench.check_closes("size", &header(id, right + 1), &[]);
        }
        if right > 0 {
            bench.check_closes("size", &header(id, 0), &[]);
        }
    }
    bench.check_recovered();
}

#[test]
fn p04_unknown_request_is_refused_or_closes() {
    let bench = Bench::new();
    for id in [0, 6, 7, 22, 23, 26, 31, 32, 35, 41, 42, 44, 45, 99, u32::MAX] {
        let mut raw = bench.negotiated();
        raw.refused(id, &[], &[]);
        raw.refused(id, &[0; 4096], &[]);
        raw.send(id, &[], &[]);
        raw.closed();
        let reason = bench.status().last_error.unwrap();
        assert!(id != 99 || reason.contains("99"), "{reason}");
        drop(raw);
    }
    bench.check_recovered();
}

#[test]
fn p04_without_reply_ack_need_reply_has_no_effect() {
    let bench = Bench::new();
    let mut raw = bench.raw();
    raw.send_bytes(&message(id::SET_OWNER, NEED_REPLY, &[]), &[]);
    // The next reply is this one's.
    assert_eq!(raw.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    raw.send_bytes(&message(99, NEED_REPLY, &[]), &[]);
    raw.closed();
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p04_set_protocol_features_acknowledges_itself() {
    let bench = Bench::new();
    let mut raw = bench.raw();
    raw.accepted(id::SET_PROTOCOL_FEATURES, &REPLY_ACK.to_ne_bytes(), &[]);
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p05_owner_messages_never_lose_memory_or_rings() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.raw();
    // Before SET_OWNER everything works: front ends negotiate first.
    raw.number(id::SET_PROTOCOL_FEATURES, REPLY_ACK);
    raw.accepted(id::SET_FEATURES, &OFFERED.to_ne_bytes(), &[]);
    memory.give(&mut raw);
    raw.accepted(id::SET_OWNER, &[], &[]);
    raw.accepted(id::SET_OWNER, &[], &[]);
    let kick = raw.start_ring(0, &memory);
    raw.accepted(id::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(bench.status().state, SessionState::Linked);
    // RESET_OWNER disables rings and does nothing else.
    raw.accepted(id::RESET_OWNER, &[], &[]);
    let status = bench.status();
    assert_eq!(status.memory_regions, 1);
    assert!(status.rings[0].started && !status.rings[0].enabled);
    assert_eq!(bench.device.calls().last(), Some(&Call::Enable(0, false)));
    raw.accepted(id::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(bench.status().state, SessionState::Linked);
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p06_a_thousand_messages_in_one_write() {
    let bench = Bench::new();
    let mut raw = bench.raw();
    let write = message(id::GET_FEATURES, PLAIN, &[]).repeat(1000);
    let sender = raw.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || (&sender).write_all(&write).unwrap());
    bench.check_canary();
    for _ in 0..1000 {
        assert_eq!(raw.reply(id::GET_FEATURES), OFFERED.to_ne_bytes());
    }
    sending.join().unwrap();
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p06_messages_split_at_every_byte_give_the_same_result() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let bell = event();
    let handshake = handshake(&memory, &bell);
    let run = |pieces: &dyn Fn(usize) -> Vec<usize>| {
        bench.device.notes().calls.clear();
        let mut raw = bench.raw();
        for (number, (bytes, fd)) in handshake.iter().enumerate() {
            let mut rest = &bytes[..];
            let mut fds: Vec<_> = fd.iter().copied().collect();
            for len in pieces(number) {
                let (piece, after) = rest.split_at(len.min(rest.len()));
                raw.send_bytes(piece, &fds);
                if !piece.is_empty() {
                    fds.clear();
                }
                rest = after;
            }
            raw.send_bytes(rest, &fds);
        }
        let replies = read_all(&mut raw);
        drop(raw);
        bench.wait_for_state(&SessionState::Listening);
        (replies, bench.device.calls())
    };
    let whole = run(&|_| Vec::new());
    assert!(whole.1.contains(&Call::Stop(0)), "the handshake went to its end: {:?}", whole.1);
    for cut in 1..60 {
        assert_eq!(run(&|_| vec![cut]), whole, "cut after byte {cut}");
    }
    assert_eq!(run(&|_| vec![1; 60]), whole, "byte by byte");
    drop(handshake);
    drop((memory, bell));
    bench.check_recovered();
}

#[test]
fn p06_descriptors_stay_with_their_message_when_many_are_queued() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let bell = event();
    let mut raw = bench.negotiated();
    // All queued before the back end can read any: reads meet several descriptors in a row.
    let mut expected = 0;
    for round in 0..50u64 {
        let index = round % 4;
        for id in [id::SET_VRING_CALL, id::SET_VRING_ERR, id::SET_VRING_CALL] {
            raw.send_bytes(&message(id, NEED_REPLY, &index.to_ne_bytes()), &[bell.as_fd()]);
            raw.send_bytes(&message(id::SET_VRING_NUM, NEED_REPLY, &state(0, 64)), &[]);
            expected += 1;
        }
    }
    for _ in 0..expected / 3 {
        for id in [id::SET_VRING_CALL, id::SET_VRING_ERR, id::SET_VRING_CALL] {
            assert_eq!(raw.reply(id), ACK);
            assert_eq!(raw.reply(id::SET_VRING_NUM), ACK);
        }
    }
    drop((raw, memory, bell));
    bench.check_recovered();
}

#[test]
fn p07_a_peer_that_never_reads_is_ended_and_delays_nobody() {
    let deadline = Duration::from_millis(500);
    let bench = Bench::with_limits(Limits { reply_deadline: deadline, ..Limits::default() });
    let raw = bench.raw();
    let began = Instant::now();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let flood = message(id::GET_FEATURES, PLAIN, &[]).repeat(1000);
            for _ in 0..100 {
                if !raw.try_send_bytes(&flood, &[]) {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            bench.check_canary();
        }
    });
    wait_until("the end of the session", || bench.status().state == SessionState::Listening);
    assert!(began.elapsed() >= deadline);
    let error = bench.status().last_error.unwrap();
    assert!(error.contains("did not take its replies"), "{error}");
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p08_descriptors_on_a_message_that_takes_none_close() {
    let bench = Bench::new();
    let bell = event();
    for count in [1, 2, 3, 8, 9, 32, 33, 64, 252, 253] {
        let fds = vec![bell.as_fd(); count];
        for (id, payload) in [
            (id::GET_FEATURES, vec![]),
            (id::SET_FEATURES, vec![0; 8]),
            (id::SET_VRING_NUM, state(0, 64)),
            (99, vec![]),
        ] {
            check_closes_with(&bench, &message(id, NEED_REPLY, &payload), &fds, 1);
        }
    }
    // More than there should be: one for a ring, one for a channel, one (tolerated) for REM_MEM_REG.
    for (id, payload) in [
        (id::SET_VRING_KICK, vec![0; 8]),
        (id::SET_VRING_CALL, vec![0; 8]),
        (id::SET_VRING_ERR, vec![0; 8]),
        (id::SET_BACKEND_REQ_FD, vec![]),
        (id::ADD_MEM_REG, vec![0; 40]),
        (id::REM_MEM_REG, vec![0; 40]),
    ] {
        check_closes_with(&bench, &message(id, NEED_REPLY, &payload), &[bell.as_fd(); 2], 1);
    }
    // And too few.
    for (id, payload) in
        [(id::SET_VRING_KICK, vec![0; 8]), (id::SET_BACKEND_REQ_FD, vec![]), (id::ADD_MEM_REG, vec![0; 40])]
    {
        check_closes_with(&bench, &message(id, NEED_REPLY, &payload), &[], 1);
    }
    drop(bell);
    bench.check_recovered();
}

/// Like [`check_closes`], while the caller holds `held` descriptors more than the base.
#[track_caller]
fn check_closes_with(bench: &Bench, bytes: &[u8], fds: &[BorrowedFd<'_>], held: usize) {
    let mut raw = bench.negotiated();
    raw.try_send_bytes(bytes, fds);
    raw.closed();
    drop(raw);
    let base = Holdings { descriptors: bench.base.descriptors + held, ..bench.base };
    base.wait_for_return();
    bench.check_canary();
}

#[test]
fn p09_too_few_or_too_many_descriptors_for_a_memory_table_close() {
    let bench = Bench::new();
    let fd = memfd(1 << 20);
    for (regions, fds) in [(1, 0), (1, 2), (2, 1), (2, 3), (8, 7), (8, 9), (8, 32), (8, 33), (0, 1)] {
        let regions: Vec<Region> = (0..regions).map(|n| [n << 20, 1 << 20, n << 20, 0]).collect();
        let payload = table(u32::try_from(regions.len()).unwrap(), &regions);
        let message = message(id::SET_MEM_TABLE, NEED_REPLY, &payload);
        check_closes_with(&bench, &message, &vec![fd.as_fd(); fds], 1);
    }
    drop(fd);
    bench.check_recovered();
}

#[test]
fn p10_descriptors_in_the_middle_of_a_payload_close() {
    let bench = Bench::new();
    let bell = event();
    for cut in [12, 13, 19] {
        let message = message(id::SET_VRING_KICK, NEED_REPLY, &[0; 8]);
        let mut raw = bench.negotiated();
        raw.send_bytes(&message[..cut], &[]);
        raw.try_send_bytes(&message[cut..], &[bell.as_fd()]);
        raw.closed();
        // Also when the header's descriptor is there.
        let mut raw = bench.negotiated();
        raw.send_bytes(&message[..cut], &[bell.as_fd()]);
        raw.try_send_bytes(&message[cut..], &[bell.as_fd()]);
        raw.closed();
    }
    drop(bell);
    bench.check_recovered();
}

#[test]
fn p11_descriptors_lost_at_the_limit_close_that_session_only() {
    let bench = Bench::new();
    let bell = event();
    let raw = bench.negotiated();
    // Looked at without opening anything.
    let mut other = Raw::connect(&bench.canary);
    assert_eq!(other.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    let before = getrlimit(Resource::Nofile);
    let used = Holdings::now().descriptors as u64;
    setrlimit(Resource::Nofile, Rlimit { current: Some(used + 5), ..before }).unwrap();
    raw.try_send_bytes(&message(id::SET_MEM_TABLE, PLAIN, &[0; 8]), &[bell.as_fd(); 20]);
    let answer = other.ask(id::GET_FEATURES, &[]);
    setrlimit(Resource::Nofile, before).unwrap();
    assert_eq!(answer, OFFERED.to_ne_bytes());
    let mut raw = raw;
    raw.closed();
    let error = bench.status().last_error.unwrap();
    assert!(error.contains("too many open"), "{error}");
    drop((raw, other, bell));
    bench.check_recovered();
}

#[test]
fn p11_connections_wait_while_no_descriptor_is_free() {
    let bench = Bench::new();
    let before = getrlimit(Resource::Nofile);
    let used = Holdings::now().descriptors as u64;
    // One is left (the count itself needed it), and the peer takes it.
    setrlimit(Resource::Nofile, Rlimit { current: Some(used), ..before }).unwrap();
    let raw = UnixStream::connect(&bench.path);
    wait_until("the failed accept", || bench.status().last_error.is_some());
    setrlimit(Resource::Nofile, before).unwrap();
    let mut raw = Raw::new(raw.unwrap());
    assert_eq!(raw.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p12_half_close_reset_and_end_within_a_message() {
    let bench = Bench::new();
    let set_features = message(id::SET_FEATURES, PLAIN, &[0; 8]);
    for len in [0, 5, 12, 15] {
        // Half-closed: our end still could be written to.
        let mut raw = bench.negotiated();
        raw.send_bytes(&set_features[..len], &[]);
        raw.stream.shutdown(Shutdown::Write).unwrap();
        raw.closed();
        // Closed with a reply unread: a reset.
        let raw = bench.negotiated();
        raw.send(id::GET_FEATURES, &[], &[]);
        wait_until("the reply", || rustix::io::ioctl_fionread(&raw.stream).unwrap() > 0);
        raw.send_bytes(&set_features[..len], &[]);
        drop(raw);
        bench.wait_for_state(&SessionState::Listening);
        bench.check_canary();
    }
    bench.check_recovered();
}

#[test]
fn p13_a_peer_that_dies_at_any_message_boundary_leaves_nothing() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let bell = event();
    let handshake = handshake(&memory, &bell);
    let base = Holdings { descriptors: bench.base.descriptors + 2, ..bench.base };
    for count in 0..=handshake.len() {
        let raw = bench.raw();
        for (bytes, fd) in &handshake[..count] {
            let fds: Vec<_> = fd.iter().copied().collect();
            raw.send_bytes(bytes, &fds);
        }
        drop(raw);
        base.wait_for_return();
        assert!(bench.device.notes().running.is_empty());
    }
    drop(handshake);
    drop((memory, bell));
    bench.check_recovered();
}
