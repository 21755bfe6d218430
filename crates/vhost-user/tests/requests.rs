//! Requests that are well-formed and wrong, and connections beyond the first (test ids P14-P33): refused with a NACK, or
//! the end of that session, and nothing else.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use rustix::event::epoll;
use support::*;
use vhost_user::{Endpoint, Limits, SessionState};

#[test]
fn p14_ring_index_beyond_the_last_ring_is_refused() {
    let bench = Bench::with(Limits::default(), Recorder::with_queue_pairs(4));
    let bell = event();
    let mut raw = bench.negotiated();
    for index in [8, 255, 256, 0x10000, 0x10001, u32::MAX] {
        raw.refused(id::SET_VRING_NUM, &state(index, 256), &[]);
        raw.refused(id::SET_VRING_BASE, &state(index, 0), &[]);
        raw.refused(id::SET_VRING_ADDR, &addr(index, 0, [0; 3]), &[]);
        raw.refused(id::SET_VRING_ENABLE, &state(index, 1), &[]);
        // 256 is the flag that says there is no descriptor.
        if index != 256 {
            for id in [id::SET_VRING_KICK, id::SET_VRING_CALL, id::SET_VRING_ERR] {
                let fds: &[_] = if index & 256 == 0 { &[bell.as_fd()] } else { &[] };
                raw.refused(id, &u64::from(index).to_ne_bytes(), fds);
            }
        }
    }
    for word in [1 << 9, 1 << 32, 1 << 63] {
        raw.refused(id::SET_VRING_KICK, &u64::to_ne_bytes(word), &[bell.as_fd()]);
    }
    // Its answer is no acknowledgement, so there is no way to say no.
    raw.send_bytes(&message(id::GET_VRING_BASE, NEED_REPLY, &state(8, 0)), &[]);
    raw.closed();
    assert!(bench.device.notes().running.is_empty());
    drop((raw, bell));
    bench.check_recovered();
}

#[test]
fn p14_the_last_of_256_rings_works() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    memory.give(&mut raw);
    let kick = raw.start_ring(255, &memory);
    assert!(bench.device.notes().running.contains_key(&255));
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p15_features_that_were_not_offered_are_refused() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    for bit in [0, 26, 34, 38, 63] {
        raw.refused(id::SET_FEATURES, &(OFFERED | 1 << bit).to_ne_bytes(), &[]);
    }
    // A guest of before virtio 1.0 is served, too.
    raw.accepted(id::SET_FEATURES, &(OFFERED & !VERSION_1).to_ne_bytes(), &[]);
    assert_eq!(bench.status().features, Some(OFFERED & !VERSION_1));
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p16_features_cannot_change_under_a_running_ring() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    memory.give(&mut raw);
    let kick = raw.start_ring(0, &memory);
    raw.refused(id::SET_FEATURES, &(OFFERED & !(1 << 15)).to_ne_bytes(), &[]);
    raw.accepted(id::SET_FEATURES, &OFFERED.to_ne_bytes(), &[]);
    raw.ask(id::GET_VRING_BASE, &state(0, 0));
    raw.accepted(id::SET_FEATURES, &(OFFERED & !(1 << 15)).to_ne_bytes(), &[]);
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p17_protocol_features_that_were_not_offered_close() {
    let bench = Bench::new();
    for bits in [1 << 14, 1 << 14 | BACKEND_REQ | REPLY_ACK, 1 << 1, 1 << 63, u64::MAX] {
        let message = message(id::SET_PROTOCOL_FEATURES, NEED_REPLY, &bits.to_ne_bytes());
        bench.check_closes("protocol features", &message, &[]);
    }
    bench.check_recovered();
}

#[test]
fn p18_ring_sizes() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    for size in [0, 3, 255, 32767, 32769, 65536, 65537, u32::MAX] {
        raw.refused(id::SET_VRING_NUM, &state(0, size), &[]);
    }
    for size in [1, 2, 256, 32768] {
        raw.accepted(id::SET_VRING_NUM, &state(0, size), &[]);
    }
    memory.give(&mut raw);
    let kick = raw.start_ring(0, &memory);
    raw.refused(id::SET_VRING_NUM, &state(0, 128), &[]);
    raw.refused(id::SET_VRING_ADDR, &addr(0, 0, memory.ring_parts(1)), &[]);
    assert_eq!(bench.status().rings[0].size, 256);

    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let mut repeat = |times| (0..times).for_each(|_| raw.accepted(id::SET_VRING_NUM, &state(1, 256), &[]));
    repeat(1000);
    let before = resident();
    repeat(count(20_000, 1_000_000));
    assert!(resident() < before + (1 << 20), "memory grew from {before} to {}", resident());
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p19_a_ring_at_a_bad_address_never_starts() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    let [desc, avail, used] = memory.ring_parts(0);
    for (flags, parts) in [
        (0, [desc + 8, avail, used]),
        (0, [desc, avail + 1, used]),
        (0, [desc, avail, used + 2]),
        (1, [desc, avail, used]),
        (2, [desc, avail, used]),
        (u32::MAX, [desc, avail, used]),
    ] {
        raw.refused(id::SET_VRING_ADDR, &addr(0, flags, parts), &[]);
    }
    drop(raw);
    let end = memory.region[2] + memory.region[1];
    for parts in [
        [0, avail, used],
        [desc, end, used],
        [desc, avail, end - 4],
        [end - 16, avail, used],
        [u64::MAX - 15, avail, used],
    ] {
        let mut raw = bench.negotiated();
        // Before there is memory nothing can be said about it; then the ring does not start.
        raw.accepted(id::SET_VRING_ADDR, &addr(0, 0, parts), &[]);
        raw.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
        memory.give(&mut raw);
        let kick = event();
        raw.refused(id::SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_fd()]);
        assert!(bench.device.notes().running.is_empty());
        assert!(!bench.status().rings[0].started);
        // A good address is all that is missing.
        raw.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
        assert!(bench.status().rings[0].started);
        // Nor does it if memory comes last.
        drop(raw);
        let mut raw = bench.negotiated();
        raw.accepted(id::SET_VRING_ADDR, &addr(0, 0, parts), &[]);
        raw.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
        raw.accepted(id::SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_fd()]);
        memory.give(&mut raw);
        assert!(bench.device.notes().running.is_empty());
        assert!(bench.status().last_error.unwrap().contains("cannot start"));
        drop(raw);
    }
    drop(memory);
    bench.check_recovered();
}

/// Descriptors that are no eventfd.
fn strangers(dir: &std::path::Path) -> Vec<(&'static str, OwnedFd)> {
    let (pipe_read, pipe_write) = rustix::pipe::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    let open = |path: &str| std::fs::File::open(path).unwrap().into();
    let path_only = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    vec![
        ("pipe, read end", pipe_read),
        ("pipe, write end", pipe_write),
        ("regular file", std::fs::File::create(dir.join("file")).unwrap().into()),
        ("directory", std::fs::File::open(dir).unwrap().into()),
        ("socket whose peer is closed", socket.into()),
        ("listening socket", UnixListener::bind(dir.join("listener")).unwrap().into()),
        ("our kind of listening socket", std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()),
        ("epoll instance", epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
        ("memory", memfd(4096)),
        ("null device", open("/dev/null")),
        ("zero device", open("/dev/zero")),
        ("procfs file", open("/proc/self/maps")),
        ("path", rustix::fs::open(dir, path_only, rustix::fs::Mode::empty()).unwrap()),
    ]
}

#[test]
fn p20_kick_call_and_err_must_be_eventfds() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let mut raw = bench.negotiated();
    for (kind, fd) in strangers(dir.path()) {
        for id in [id::SET_VRING_KICK, id::SET_VRING_CALL, id::SET_VRING_ERR] {
            let answer = raw.request(id, &0u64.to_ne_bytes(), &[fd.as_fd()]);
            assert_eq!(answer, NACK, "{kind} taken as eventfd");
        }
        bench.check_canary();
    }
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p20_eventfds_become_non_blocking() {
    let bench = Bench::new();
    let blocking = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let mut raw = bench.negotiated();
    raw.accepted(id::SET_VRING_CALL, &0u64.to_ne_bytes(), &[blocking.as_fd()]);
    let flags = rustix::fs::fcntl_getfl(&blocking).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    // One eventfd for everything is strange, but works.
    let memory = Memory::new(0);
    memory.give(&mut raw);
    raw.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
    raw.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
    raw.accepted(id::SET_VRING_KICK, &0u64.to_ne_bytes(), &[blocking.as_fd()]);
    assert!(bench.status().rings[0].started);
    drop((raw, memory, blocking));
    bench.check_recovered();
}

#[test]
fn p21_polling_without_descriptor_and_with_a_wrong_one() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let bell = event();
    let mut raw = bench.negotiated();
    memory.give(&mut raw);
    raw.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
    raw.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
    raw.accepted(id::SET_VRING_CALL, &(256u64).to_ne_bytes(), &[]);
    raw.accepted(id::SET_VRING_KICK, &(256u64).to_ne_bytes(), &[]);
    let start = Call::Start { index: 0, size: 256, base: 0, enabled: false, kick: false, call: false };
    assert_eq!(bench.device.calls().last(), Some(&start));
    // The flag and a descriptor contradict each other.
    raw.try_send_bytes(&message(id::SET_VRING_KICK, NEED_REPLY, &256u64.to_ne_bytes()), &[bell.as_fd()]);
    raw.closed();
    drop((raw, memory, bell));
    bench.check_recovered();
}

#[test]
fn p22_p24_call_and_err_replaced_again_and_again() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    memory.give(&mut raw);
    let kick = raw.start_ring(0, &memory);
    let mut replace = |times| {
        for _ in 0..times {
            let bell = event();
            raw.accepted(id::SET_VRING_CALL, &0u64.to_ne_bytes(), &[bell.as_fd()]);
            raw.accepted(id::SET_VRING_ERR, &0u64.to_ne_bytes(), &[bell.as_fd()]);
            // A new kick means a new start, at the place where the ring was.
            raw.accepted(id::SET_VRING_KICK, &0u64.to_ne_bytes(), &[bell.as_fd()]);
        }
    };
    replace(1);
    let before = Holdings::now();
    replace(count(3000, 100_000));
    // The memory's own descriptor may still have been there.
    wait_until("descriptors to be no more than before", || Holdings::now().descriptors <= before.descriptors);
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p25_rings_are_enabled_and_disabled() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    memory.give(&mut raw);
    let kick = raw.start_ring(0, &memory);
    // With PROTOCOL_FEATURES a ring starts disabled.
    assert_eq!(bench.status().state, SessionState::Negotiating);
    let rounds = count(2000, 100_000);
    for _ in 0..rounds {
        raw.accepted(id::SET_VRING_ENABLE, &state(0, 1), &[]);
        raw.accepted(id::SET_VRING_ENABLE, &state(0, 0), &[]);
    }
    raw.refused(id::SET_VRING_ENABLE, &state(0, 2), &[]);
    raw.refused(id::SET_VRING_ENABLE, &state(0, u32::MAX), &[]);
    let enables = bench.device.calls().iter().filter(|call| matches!(call, Call::Enable(..))).count();
    assert_eq!(enables, 2 * rounds as usize);
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p25_without_protocol_features_rings_are_enabled_from_the_start() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let kick = event();
    let mut raw = bench.raw();
    raw.number(id::SET_FEATURES, VERSION_1);
    raw.send(id::SET_MEM_TABLE, &table(1, &[memory.region]), &[memory.fd.as_fd()]);
    raw.send(id::SET_VRING_NUM, &state(0, 256), &[]);
    raw.send(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
    raw.send(id::SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_fd()]);
    bench.wait_for_state(&SessionState::Linked);
    // RESET_OWNER disables; the next SET_FEATURES is the only way back.
    raw.send(id::RESET_OWNER, &[], &[]);
    bench.wait_for_state(&SessionState::Negotiating);
    raw.number(id::SET_FEATURES, VERSION_1);
    bench.wait_for_state(&SessionState::Linked);
    assert_eq!(raw.ask(id::GET_VRING_BASE, &state(0, 0)), state(0, 0));
    drop((raw, kick, memory));
    bench.check_recovered();
}

#[test]
fn p26_configuration_space_is_read_within_its_bounds() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    assert_eq!(raw.ask(id::GET_QUEUE_NUM, &[]), 128u64.to_ne_bytes());
    let whole = raw.ask(id::GET_CONFIG, &config(0, 12, 0, &[0; 12]));
    assert_eq!(whole[..12], config(0, 12, 0, &[]));
    assert_eq!(whole[12..], [0x52, 0x54, 0, 1, 2, 3, 1, 0, 128, 0, 0xdc, 5]);
    assert_eq!(raw.ask(id::GET_CONFIG, &config(10, 2, 0, &[0; 2]))[12..], [0xdc, 5]);
    assert_eq!(raw.ask(id::GET_CONFIG, &config(0, 256, 0, &[0; 256])).len(), 12 + 256);
    // An answer without payload says no.
    for (offset, size, len) in [
        (0, 0, 0),
        (0, 257, 257),
        (1, 256, 256),
        (256, 1, 1),
        (255, 2, 2),
        (u32::MAX, 1, 1),
        (u32::MAX, 2, 2),
        (0, u32::MAX, 12),
        (0, 12, 11),
        (0, 12, 13),
        (0, 12, 0),
    ] {
        let answer = raw.ask(id::GET_CONFIG, &config(offset, size, 0, &vec![0; len]));
        assert!(answer.is_empty(), "{size} bytes at {offset}");
    }
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p27_configuration_space_cannot_be_written_by_the_guest() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    for flags in [0, 2, 3, u32::MAX] {
        raw.refused(id::SET_CONFIG, &config(0, 6, flags, &[2; 6]), &[]);
    }
    raw.refused(id::SET_CONFIG, &config(255, 2, 1, &[0; 2]), &[]);
    raw.refused(id::SET_CONFIG, &config(0, 0, 1, &[]), &[]);
    // A migration may say what it likes; the port knows better.
    raw.accepted(id::SET_CONFIG, &config(0, 6, 1, &[2; 6]), &[]);
    assert_eq!(raw.ask(id::GET_CONFIG, &config(0, 6, 0, &[0; 6]))[12..], [0x52, 0x54, 0, 1, 2, 3]);
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p28_mtu_is_checked() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    for mtu in [0, 67, 1501, 65535, 65536, u64::MAX, 1 << 32 | 1500] {
        raw.refused(id::NET_SET_MTU, &u64::to_ne_bytes(mtu), &[]);
    }
    raw.accepted(id::NET_SET_MTU, &1400u64.to_ne_bytes(), &[]);
    assert_eq!(bench.device.calls().last(), Some(&Call::SetMtu(1400)));
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p29_rarp_for_a_group_address_is_refused() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    for mac in [[1, 0, 0x5e, 0, 0, 1, 0, 0], [0xff; 8], [0; 8]] {
        raw.refused(id::SEND_RARP, &mac, &[]);
    }
    raw.accepted(id::SEND_RARP, &[0x52, 0x54, 0, 1, 2, 3, 0, 0], &[]);
    assert_eq!(bench.device.calls().last(), Some(&Call::SendRarp([0x52, 0x54, 0, 1, 2, 3])));
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p30_back_end_channel_must_be_a_socket_and_must_be_read() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let mut raw = bench.negotiated();
    for (kind, fd) in strangers(dir.path()) {
        if kind != "socket whose peer is closed" {
            let answer = raw.request(id::SET_BACKEND_REQ_FD, &[], &[fd.as_fd()]);
            assert_eq!(answer, NACK, "{kind} taken as channel");
        }
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    raw.accepted(id::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    bench.sessions.config_changed(bench.id);
    let mut message = [0; 12];
    (&ours).read_exact(&mut message).unwrap();
    assert_eq!(message[..], support::message(2, PLAIN, &[])[..]);
    // Never read again: full at some time, then given up, and nobody waits.
    let began = Instant::now();
    while bench.status().last_error.as_deref().is_none_or(|error| !error.contains("given up")) {
        assert!(began.elapsed() < SOON);
        bench.sessions.config_changed(bench.id);
    }
    bench.check_canary();
    drop((ours, raw));
    bench.check_recovered();
}

#[test]
fn p31_iotlb_messages_are_refused() {
    let bench = Bench::new();
    let mut raw = bench.negotiated();
    raw.refused(id::IOTLB_MSG, &[0xff; 32], &[]);
    drop(raw);
    bench.check_recovered();
}

#[test]
fn p32_a_second_front_end_is_turned_away_until_the_first_is_gone() {
    let bench = Bench::new();
    let mut first = bench.negotiated();
    for round in 1..=20 {
        let mut second = bench.raw();
        second.closed();
        wait_until("the count", || bench.status().rejected == round);
        assert_eq!(first.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    }
    assert!(bench.status().last_error.unwrap().contains("another front end"));
    // However fast the next one comes, and whatever the last one left unread.
    for _ in 0..200 {
        first.send_bytes(&message(id::SET_OWNER, PLAIN, &[]).repeat(100), &[]);
        drop(first);
        first = bench.raw();
        assert_eq!(first.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    }
    assert_eq!(bench.status().rejected, 20);
    drop(first);
    bench.check_recovered();
}

#[test]
fn p33_reconnects_as_fast_as_they_come() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let bell = event();
    let handshake = handshake(&memory, &bell);
    let rounds = count(100, 3000);
    for round in 0..rounds {
        let mut raw = bench.raw();
        for (bytes, fd) in &handshake {
            let fds: Vec<_> = fd.iter().copied().collect();
            raw.send_bytes(bytes, &fds);
        }
        assert!(!read_all(&mut raw).is_empty());
        if round % 10 == 0 {
            bench.check_canary();
        }
    }
    wait_until("all", || bench.status().connections == u64::from(rounds));
    drop(handshake);
    drop((memory, bell));
    bench.check_recovered();
}

#[test]
fn user_that_may_not_is_turned_away() {
    let bench = Bench::new();
    let path = bench.path.with_file_name("private");
    let nobody_here = Endpoint { users: vec![4_000_000], ..Endpoint::listen(&path) };
    let id = bench.sessions.add(nobody_here, Box::new(Recorder::default())).unwrap();
    Raw::connect(&path).closed();
    let status = bench.sessions.status(id).unwrap();
    assert_eq!((status.connections, status.rejected), (0, 1));
    assert!(status.last_error.unwrap().contains("may not use"));
    bench.sessions.remove(id);
    bench.check_recovered();
}
