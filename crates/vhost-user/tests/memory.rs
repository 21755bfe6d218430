//! What memory a front end can offer (test ids M01-M17): taken or refused with a reason, never mapped in part, never kept.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{self, MemfdFlags, Mode, OFlags, SealFlags};
use support::*;

const MIB: u64 = 1 << 20;

/// One region that is refused because of its numbers.
#[track_caller]
fn check_refused(raw: &mut Raw, regions: &[Region], fd: &OwnedFd, reason: &str, bench: &Bench) {
    let payload = table(u32::try_from(regions.len()).unwrap(), regions);
    raw.refused(id::SET_MEM_TABLE, &payload, &vec![fd.as_fd(); regions.len()]);
    let status = bench.status();
    assert!(status.last_error.as_ref().unwrap().contains(reason), "{:?}", status.last_error);
    assert_eq!(status.memory_regions, 0);
}

#[test]
fn m01_number_of_regions() {
    let bench = Bench::new();
    let fd = memfd(64 * MIB);
    let regions: Vec<Region> = (0..32).map(|n| [n * MIB, MIB, n * MIB, n * MIB]).collect();
    let give = |raw: &mut Raw, count: usize| {
        let payload = table(u32::try_from(count).unwrap(), &regions[..count]);
        raw.request(id::SET_MEM_TABLE, &payload, &vec![fd.as_fd(); count])
    };
    // Eight without CONFIGURE_MEM_SLOTS.
    let mut raw = bench.raw();
    raw.number(id::SET_PROTOCOL_FEATURES, REPLY_ACK);
    assert_eq!(give(&mut raw, 0), NACK);
    for count in 1..=8 {
        assert_eq!(give(&mut raw, count), ACK);
        assert_eq!(bench.status().memory_regions, count);
    }
    assert_eq!(give(&mut raw, 9), NACK);
    assert_eq!(bench.status().memory_regions, 8, "a refused table changes nothing");
    drop(raw);
    let mut raw = bench.negotiated();
    assert_eq!(give(&mut raw, 32), ACK);
    drop(raw);
    // What the count and the length of the message contradict, or no message can hold.
    for (count, len) in [(0, 1), (1, 0), (2, 1), (510, 1), (u32::MAX, 1), (u32::MAX, 0), (0x0800_0001, 1)] {
        let mut raw = bench.negotiated();
        let payload = table(count, &regions[..len]);
        raw.try_send_bytes(&message(id::SET_MEM_TABLE, NEED_REPLY, &payload), &vec![fd.as_fd(); len]);
        raw.closed();
    }
    let mut raw = bench.negotiated();
    let many = vec![[0; 4]; 33];
    raw.try_send_bytes(&message(id::SET_MEM_TABLE, NEED_REPLY, &table(33, &many)), &[fd.as_fd(); 33]);
    raw.closed();
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m02_regions_must_not_overlap() {
    let bench = Bench::new();
    let fd = memfd(8 * MIB);
    let mut raw = bench.negotiated();
    let a: Region = [0, 2 * MIB, 0x1000_0000, 0];
    for b in [
        [MIB, 2 * MIB, 0x2000_0000, 0],
        [2 * MIB - 1, MIB, 0x2000_0000, 0],
        [4 * MIB, 2 * MIB, 0x1000_0000 + MIB, 0],
        [0, 2 * MIB, 0x1000_0000, 2 * MIB],
        a,
    ] {
        check_refused(&mut raw, &[a, b], &fd, "overlap", &bench);
        check_refused(&mut raw, &[b, a], &fd, "overlap", &bench);
    }
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m03_m05_sizes_and_sums_that_wrap() {
    let bench = Bench::new();
    let fd = memfd(8 * MIB);
    let mut raw = bench.negotiated();
    check_refused(&mut raw, &[[0, 0, 0, 0]], &fd, "empty", &bench);
    for region in [
        [u64::MAX - MIB, 2 * MIB, 0, 0],
        [0, 2 * MIB, u64::MAX - MIB, 0],
        [0, 2 * MIB, 0, u64::MAX - MIB],
        [0, u64::MAX, 0, 4096],
        [1, u64::MAX, 0, 0],
    ] {
        check_refused(&mut raw, &[region], &fd, "wraps", &bench);
    }
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m04_m08_region_beyond_the_end_of_its_file() {
    let bench = Bench::new();
    let fd = memfd(8 * MIB);
    let mut raw = bench.negotiated();
    for region in [[0, 8 * MIB + 1, 0, 0], [0, 8 * MIB, 0, 1], [0, 4096, 0, 8 * MIB], [0, 1 << 39, 0, 0]] {
        check_refused(&mut raw, &[region], &fd, "its file has", &bench);
    }
    // Shrunk between the front end's look at it and ours.
    fs::ftruncate(&fd, 0).unwrap();
    check_refused(&mut raw, &[[0, 8 * MIB, 0, 0]], &fd, "its file has", &bench);
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m06_offset_that_is_not_page_aligned_works() {
    let bench = Bench::new();
    let fd = memfd(8 * MIB);
    let mut raw = bench.negotiated();
    for offset in [1, 4095, 4097, MIB + 123] {
        let region = [0, MIB, 0x1000_0000, offset];
        raw.accepted(id::SET_MEM_TABLE, &table(1, &[region]), &[fd.as_fd()]);
    }
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m07_m17_descriptors_that_are_no_memory() {
    let bench = Bench::new();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let open = |path: &str| -> OwnedFd { std::fs::File::open(path).unwrap().into() };
    let on_disk = std::fs::File::create(dir.path().join("journal")).unwrap();
    on_disk.set_len(8 * MIB).unwrap();
    let again = |fd: &OwnedFd, flags: OFlags| {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
        fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let sealed = memfd(8 * MIB);
    fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let memory = memfd(8 * MIB);
    let mut strangers = vec![
        ("regular file on disk", OwnedFd::from(on_disk)),
        ("pipe", rustix::pipe::pipe().unwrap().0),
        ("socket", std::os::unix::net::UnixStream::pair().unwrap().0.into()),
        ("directory", std::fs::File::open(dir.path()).unwrap().into()),
        ("eventfd", event()),
        ("epoll", rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap()),
        ("zero device", open("/dev/zero")),
        ("O_PATH of memory", again(&memory, OFlags::PATH)),
        ("read-only memory", again(&memory, OFlags::RDONLY)),
        ("write-sealed memory", sealed),
        ("pidfd-like procfs file", open("/proc/self/status")),
    ];
    for path in ["/dev/mem", "/dev/loop0", "/dev/vda", "/dev/fuse"] {
        if let Ok(file) = std::fs::File::open(path) {
            strangers.push((path, file.into()));
        }
    }
    let mut raw = bench.negotiated();
    for (kind, fd) in &strangers {
        let region = [0, MIB, 0x1000_0000, 0];
        let answer = raw.request(id::SET_MEM_TABLE, &table(1, &[region]), &[fd.as_fd()]);
        assert_eq!(answer, NACK, "{kind} taken as memory");
        let answer = raw.request(id::ADD_MEM_REG, &single(&region), &[fd.as_fd()]);
        assert_eq!(answer, NACK, "{kind} taken as memory");
        assert!(bench.status().last_error.is_some());
        assert_eq!(bench.status().memory_regions, 0);
    }
    drop((raw, strangers, memory));
    bench.check_recovered();
}

#[test]
fn m11_more_memory_than_a_port_may_map() {
    let bench = Bench::new();
    let tib = 1u64 << 40;
    let fd = memfd(tib + 4096);
    let mut raw = bench.negotiated();
    check_refused(&mut raw, &[[0, tib + 1, 0, 0]], &fd, "may map", &bench);
    raw.accepted(id::SET_MEM_TABLE, &table(1, &[[0, tib, 0, 0]]), &[fd.as_fd()]);
    raw.refused(id::ADD_MEM_REG, &single(&[tib, 4096, tib, 0]), &[fd.as_fd()]);
    assert_eq!(bench.status().memory_bytes, tib);
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m12_table_replaced_again_and_again_under_a_running_ring() {
    let bench = Bench::new();
    let (a, b) = (Memory::new(0), Memory::new(0));
    let mut raw = bench.negotiated();
    a.give(&mut raw);
    let kick = raw.start_ring(0, &a);
    let began = Instant::now();
    let rounds = count(500, 5000);
    for _ in 0..rounds {
        b.give(&mut raw);
        a.give(&mut raw);
    }
    bench.check_canary();
    assert!(began.elapsed() < SOON * rounds / 500);
    let replaced = bench.device.calls().iter().filter(|call| **call == Call::SetMemory(1)).count();
    assert_eq!(replaced, 2 * rounds as usize);
    // The same table again is no replacement.
    a.give(&mut raw);
    let again = bench.device.calls().iter().filter(|call| **call == Call::SetMemory(1)).count();
    assert_eq!(again, replaced);
    assert_eq!(bench.status().memory_regions, 1);
    drop((raw, kick, a, b));
    bench.check_recovered();
}

#[test]
fn m13_slots_are_added_and_removed_one_by_one() {
    let bench = Bench::new();
    let fd = memfd(512 * MIB);
    let mut raw = bench.negotiated();
    let region = |n: u64| -> Region { [n * MIB, MIB, 0x1_0000_0000 + n * MIB, n * MIB] };
    assert_eq!(raw.ask(id::GET_MAX_MEM_SLOTS, &[]), 509u64.to_ne_bytes());
    for n in 0..509 {
        raw.accepted(id::ADD_MEM_REG, &single(&region(n)), &[fd.as_fd()]);
    }
    raw.refused(id::ADD_MEM_REG, &single(&region(509)), &[fd.as_fd()]);
    raw.accepted(id::REM_MEM_REG, &single(&region(7)), &[]);
    raw.refused(id::REM_MEM_REG, &single(&region(7)), &[]);
    // What fits in part only is not it.
    let [guest, size, user, offset] = region(8);
    raw.refused(id::REM_MEM_REG, &single(&[guest, size, user + 1, offset]), &[]);
    raw.refused(id::REM_MEM_REG, &single(&[guest, size - 1, user, offset]), &[]);
    // QEMU 7.2 adds and removes each region once for each queue pair.
    raw.accepted(id::ADD_MEM_REG, &single(&region(8)), &[fd.as_fd()]);
    raw.accepted(id::REM_MEM_REG, &single(&region(8)), &[]);
    raw.refused(id::ADD_MEM_REG, &single(&region(8)), &[memfd(512 * MIB).as_fd()]);
    raw.refused(id::ADD_MEM_REG, &single(&[guest + MIB / 2, size, user + MIB / 2, offset]), &[fd.as_fd()]);
    assert_eq!(bench.status().memory_regions, 508);
    // A descriptor with REM_MEM_REG is tolerated, and closed; and all may go.
    for n in (0..509).filter(|n| *n != 7) {
        raw.accepted(id::REM_MEM_REG, &single(&region(n)), &[fd.as_fd()]);
    }
    assert_eq!(bench.status().memory_regions, 0);
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m13_ring_that_lies_in_no_region_any_more_still_gives_its_base() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    raw.accepted(id::ADD_MEM_REG, &single(&memory.region), &[memory.fd.as_fd()]);
    raw.accepted(id::SET_VRING_BASE, &state(0, 42), &[]);
    raw.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
    raw.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
    raw.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
    assert!(bench.status().rings[0].started);
    raw.accepted(id::REM_MEM_REG, &single(&memory.region), &[]);
    assert_eq!(bench.device.calls().last(), Some(&Call::SetMemory(0)));
    // The device says that it broke: what the session knows is the answer.
    bench.device.notes().stop_at = None;
    assert_eq!(raw.ask(id::GET_VRING_BASE, &state(0, 0)), state(0, 42));
    drop((raw, memory));
    bench.check_recovered();
}

#[test]
fn m14_a_large_table_delays_nobody() {
    let bench = Bench::new();
    let gib = 1u64 << 30;
    let fd = memfd(16 * gib);
    let mut raw = bench.negotiated();
    let began = Instant::now();
    raw.accepted(id::SET_MEM_TABLE, &table(1, &[[0, 16 * gib, 0, 0]]), &[fd.as_fd()]);
    assert!(began.elapsed() < Duration::from_millis(100));
    bench.check_canary();
    drop((raw, fd));
    bench.check_recovered();
}

#[test]
fn m16_one_file_for_two_ports_and_twice_for_one() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let mut raw = bench.negotiated();
    let mut other = Raw::connect(&bench.canary);
    other.number(id::SET_PROTOCOL_FEATURES, PROTOCOL_OFFERED);
    memory.give(&mut raw);
    memory.give(&mut other);
    let alias = [1 << 32, memory.region[1], 1 << 40, 0];
    raw.accepted(id::ADD_MEM_REG, &single(&alias), &[memory.fd.as_fd()]);
    assert_eq!(bench.status().memory_regions, 2);
    drop((raw, other, memory));
    bench.check_recovered();
}

#[test]
fn last_reference_to_much_memory_is_let_go_beside_the_loop() {
    // 256 MiB that only the back end still holds take long to free; the thread must not be the one.
    let bench = Bench::new();
    let len = 256 * MIB;
    let mut raw = bench.negotiated();
    let fd = fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    fs::fallocate(&fd, fs::FallocateFlags::empty(), 0, len).unwrap();
    raw.accepted(id::SET_MEM_TABLE, &table(1, &[[0, len, 0, 0]]), &[fd.as_fd()]);
    drop((fd, raw));
    for _ in 0..20 {
        bench.check_canary();
    }
    bench.check_recovered();
}
