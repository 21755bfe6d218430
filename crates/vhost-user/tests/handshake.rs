//! Front ends that mean well: the whole way from socket to running rings and back, in both roles.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::net::UnixListener;

use support::{Call, Holdings, OFFERED, PROTOCOL_OFFERED, Recorder, STATUS, alone, wait_until};
use vhost_user::{Endpoint, FrontEnd, Limits, RingPlace, SessionState, Sessions};
use vring::driver::{DriverMemory, DriverRing};

/// Everything QEMU does, by the `vhost` crate.
fn handshake(front_end: &mut FrontEnd) {
    assert_eq!(front_end.negotiate(!0, PROTOCOL_OFFERED & !STATUS).unwrap(), OFFERED);
    assert_eq!(front_end.queue_pairs().unwrap(), 128);
    let memory = DriverMemory::new(1 << 20).unwrap();
    front_end.set_memory(&[(memory.region(), memory.fd())]).unwrap();
    for index in 0..2u16 {
        let ring = DriverRing::new(&memory, usize::from(index) * 0x4000, 256, 0);
        let place = RingPlace { size: 256, user_addrs: ring.user_addrs(), base: 7 };
        front_end.start_ring(index, place).unwrap();
    }
    for index in 0..2 {
        front_end.enable(index, true).unwrap();
    }
}

#[test]
fn a_front_end_connects_to_us() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let base = Holdings::now();
    let sessions = Sessions::start(Limits::default(), Box::new(|_, _| {})).unwrap();
    let device = Recorder::default();
    let path = dir.path().join("port");
    let id = sessions.add(Endpoint::listen(&path), Box::new(device.clone())).unwrap();
    assert_eq!(sessions.status(id).unwrap().state, SessionState::Listening);

    let mut front_end = FrontEnd::connect(&path).unwrap();
    handshake(&mut front_end);
    let status = sessions.status(id).unwrap();
    assert_eq!(status.state, SessionState::Linked);
    assert_eq!(status.features, Some(OFFERED));
    assert_eq!(status.peer.unwrap().pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!((status.memory_regions, status.memory_bytes), (1, 1 << 20));
    assert!(status.rings.iter().all(|ring| ring.started && ring.enabled && ring.size == 256));

    let started = |index| Call::Start { index, size: 256, base: 7, enabled: false, kick: true, call: false };
    let expected = vec![
        Call::Connected,
        Call::SetFeatures(OFFERED),
        started(0),
        Call::SetCall(0, true),
        started(1),
        Call::SetCall(1, true),
        Call::Enable(0, true),
        Call::Enable(1, true),
    ];
    assert_eq!(device.calls(), expected);

    device.notes().stop_at = Some(4711);
    assert_eq!(front_end.stop_ring(0).unwrap(), 4711);
    assert!(device.notes().running.contains_key(&1), "only that ring stops");

    drop(front_end);
    wait_until("the end of the session", || sessions.status(id).unwrap().state == SessionState::Listening);
    sessions.remove(id);
    assert!(!path.exists());
    drop(sessions);
    base.wait_for_return();
}

#[test]
fn we_connect_to_a_front_end() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let base = Holdings::now();
    let path = dir.path().join("port");
    let sessions = Sessions::start(Limits::default(), Box::new(|_, _| {})).unwrap();
    let device = Recorder::default();
    let id = sessions.add(Endpoint::connect(&path), Box::new(device.clone())).unwrap();
    assert!(matches!(sessions.status(id).unwrap().state, SessionState::Dialling { .. }));

    for round in 1..=3 {
        let listener = UnixListener::bind(&path).unwrap();
        let mut front_end = FrontEnd::accept(&listener).unwrap();
        handshake(&mut front_end);
        let status = sessions.status(id).unwrap();
        assert_eq!((status.state, status.connections), (SessionState::Linked, round));
        drop((front_end, listener));
        std::fs::remove_file(&path).unwrap();
    }
    sessions.remove(id);
    drop(sessions);
    base.wait_for_return();
}
