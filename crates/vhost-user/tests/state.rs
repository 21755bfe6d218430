//! What a front end may do in any order, and how everything is taken back: the state machine without a socket.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, BorrowedFd};

use support::*;
use vhost_user::Device;
use vhost_user::descriptor::Grave;
use vhost_user::message::{Header, Message};
use vhost_user::session::Session;

/// A session and its device.
struct Direct {
    session: Session,
    device: Recorder,
    grave: Grave,
}

impl Direct {
    fn new() -> Self {
        let device = Recorder::default();
        Self { session: Session::new(device.offer()), device, grave: Grave::new() }
    }

    /// With these protocol features and REPLY_ACK.
    fn negotiated(protocol_features: u64) -> Self {
        let mut direct = Self::new();
        direct.accepted(id::SET_PROTOCOL_FEATURES, &(protocol_features | REPLY_ACK).to_ne_bytes(), &[]);
        direct
    }

    /// Payload of the reply, if there is one; an error: the end.
    fn send(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>, String> {
        let header = Header { request: id, flags: NEED_REPLY, size: u32::try_from(payload.len()).unwrap() };
        header.check(fds.len()).map_err(|violation| violation.to_string())?;
        let received = |fd: &BorrowedFd<'_>| self.grave.receive(fd.try_clone_to_owned().unwrap());
        let descriptors = fds.iter().map(received).collect();
        let message = Message { header, payload: payload.to_vec(), descriptors };
        let mut reply = Vec::new();
        let handled = self.session.handle(&mut self.device, message, &mut reply);
        handled.map_err(|fatal| fatal.to_string())?;
        Ok(reply.split_off(12))
    }

    #[track_caller]
    fn accepted(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.send(id, payload, fds).unwrap(), ACK);
    }

    #[track_caller]
    fn refused(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.send(id, payload, fds).unwrap(), NACK);
    }

    fn number(&mut self, id: u32) -> u64 {
        u64::from_ne_bytes(self.send(id, &[], &[]).unwrap().try_into().unwrap())
    }

    /// Ring 0, all but DRIVER_OK.
    fn set_up(&mut self, memory: &Memory) {
        self.accepted(id::SET_FEATURES, &OFFERED.to_ne_bytes(), &[]);
        self.accepted(id::SET_MEM_TABLE, &table(1, &[memory.region]), &[memory.fd.as_fd()]);
        self.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
        self.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
        self.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
        self.accepted(id::SET_VRING_ENABLE, &state(0, 1), &[]);
    }

    fn running(&self) -> bool {
        self.device.notes().running.contains_key(&0)
    }
}

/// All orders of the numbers below `count`.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else { return vec![vec![]] };
    let insert = |order: Vec<usize>| {
        (0..=order.len()).map(move |at| {
            let mut longer = order.clone();
            longer.insert(at, last);
            longer
        })
    };
    orders(last).into_iter().flat_map(insert).collect()
}

#[test]
fn a_ring_can_be_set_up_in_any_order() {
    let memory = Memory::new(0);
    let (kick, call) = (event(), event());
    let steps: [(u32, Vec<u8>, Option<BorrowedFd<'_>>); 7] = [
        (id::SET_FEATURES, OFFERED.to_ne_bytes().to_vec(), None),
        (id::SET_MEM_TABLE, table(1, &[memory.region]), Some(memory.fd.as_fd())),
        (id::SET_VRING_NUM, state(0, 256), None),
        (id::SET_VRING_BASE, state(0, 99), None),
        (id::SET_VRING_ADDR, memory.ring_addr(0), None),
        (id::SET_VRING_KICK, 0u64.to_ne_bytes().to_vec(), Some(kick.as_fd())),
        (id::SET_VRING_CALL, 0u64.to_ne_bytes().to_vec(), Some(call.as_fd())),
    ];
    let orders = orders(steps.len());
    assert_eq!(orders.len(), 5040);
    for order in orders {
        let mut direct = Direct::negotiated(0);
        // Enabled before, between or after: by the order's first step.
        let enable = |direct: &mut Direct| direct.accepted(id::SET_VRING_ENABLE, &state(0, 1), &[]);
        for (place, step) in order.iter().enumerate() {
            if place == order[0] {
                enable(&mut direct);
            }
            let (id, payload, fd) = &steps[*step];
            let fds: Vec<_> = fd.iter().copied().collect();
            direct.accepted(*id, payload, &fds);
        }
        let ring = direct.session.rings()[0];
        assert!(ring.started && ring.enabled, "{order:?}");
        {
            let notes = direct.device.notes();
            let running = &notes.running[&0];
            assert_eq!((running.base(), running.call_fd().is_some()), (99, true), "{order:?}");
        }
        assert_eq!(direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap(), state(0, 99));
    }
}

#[test]
fn a_stopped_ring_needs_a_new_kick_and_nothing_else() {
    let memory = Memory::new(0);
    let mut direct = Direct::negotiated(0);
    direct.set_up(&memory);
    direct.device.notes().stop_at = Some(1234);
    assert_eq!(direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap(), state(0, 1234));
    assert!(!direct.running());
    // Again, and of a ring that nobody ever spoke of.
    assert_eq!(direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap(), state(0, 1234));
    assert_eq!(direct.send(id::GET_VRING_BASE, &state(77, 0), &[]).unwrap(), state(77, 0));
    direct.accepted(id::SET_VRING_NUM, &state(0, 128), &[]);
    assert!(!direct.running(), "the kick was forgotten");
    direct.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
    let start = Call::Start { index: 0, size: 128, base: 1234, enabled: true, kick: false, call: false };
    assert_eq!(direct.device.calls().last(), Some(&start));
}

#[test]
fn reset_device_stops_rings_and_keeps_memory() {
    let memory = Memory::new(0);
    let mut direct = Direct::negotiated(RESET_DEVICE);
    direct.set_up(&memory);
    let call = event();
    direct.accepted(id::SET_VRING_CALL, &0u64.to_ne_bytes(), &[call.as_fd()]);
    direct.accepted(id::RESET_DEVICE, &[], &[]);
    assert!(!direct.running());
    assert_eq!(direct.session.memory().regions().len(), 1);
    // The ring has to be set up again, but for the call descriptor, which front ends send once.
    direct.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
    assert!(!direct.running());
    direct.accepted(id::SET_VRING_NUM, &state(0, 256), &[]);
    direct.accepted(id::SET_VRING_ADDR, &memory.ring_addr(0), &[]);
    let start = Call::Start { index: 0, size: 256, base: 0, enabled: false, kick: false, call: true };
    assert_eq!(direct.device.calls().last(), Some(&start));
}

#[test]
fn with_status_rings_wait_for_driver_ok() {
    let memory = Memory::new(0);
    let mut direct = Direct::negotiated(STATUS);
    // FEATURES_OK is not ours to confirm before there are features.
    direct.accepted(id::SET_STATUS, &11u64.to_ne_bytes(), &[]);
    assert_eq!(direct.number(id::GET_STATUS), 3);
    direct.set_up(&memory);
    direct.accepted(id::SET_STATUS, &11u64.to_ne_bytes(), &[]);
    assert_eq!(direct.number(id::GET_STATUS), 11);
    assert!(!direct.running());
    direct.accepted(id::SET_STATUS, &15u64.to_ne_bytes(), &[]);
    assert!(direct.running());
    direct.refused(id::SET_STATUS, &256u64.to_ne_bytes(), &[]);
    assert_eq!(direct.number(id::GET_STATUS), 15);
    // Zero is a reset.
    direct.accepted(id::SET_STATUS, &0u64.to_ne_bytes(), &[]);
    assert!(!direct.running());
    assert_eq!(direct.number(id::GET_STATUS), 0);
    direct.set_up(&memory);
    assert!(!direct.running());
    direct.accepted(id::SET_STATUS, &15u64.to_ne_bytes(), &[]);
    assert!(direct.running());
}

#[test]
fn requests_of_a_feature_that_was_not_negotiated_are_refused() {
    let mut direct = Direct::negotiated(0);
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    let memory = Memory::new(0);
    direct.refused(id::SEND_RARP, &[2; 8], &[]);
    direct.refused(id::NET_SET_MTU, &1500u64.to_ne_bytes(), &[]);
    direct.refused(id::SET_BACKEND_REQ_FD, &[], &[socket.as_fd()]);
    direct.refused(id::SET_CONFIG, &config(0, 6, 1, &[0; 6]), &[]);
    direct.refused(id::RESET_DEVICE, &[], &[]);
    direct.refused(id::ADD_MEM_REG, &single(&memory.region), &[memory.fd.as_fd()]);
    direct.refused(id::REM_MEM_REG, &single(&memory.region), &[]);
    direct.refused(id::SET_STATUS, &15u64.to_ne_bytes(), &[]);
    // Nobody could tell a refusal from the answer here.
    for (id, payload) in [
        (id::GET_CONFIG, config(0, 6, 0, &[0; 6])),
        (id::GET_MAX_MEM_SLOTS, vec![]),
        (id::GET_STATUS, vec![]),
    ] {
        let error = Direct::negotiated(0).send(id, &payload, &[]).unwrap_err();
        assert!(error.contains("not negotiated"), "{error}");
    }
}

#[test]
fn a_new_base_moves_a_running_ring() {
    let memory = Memory::new(0);
    let mut direct = Direct::negotiated(0);
    direct.set_up(&memory);
    direct.refused(id::SET_VRING_BASE, &state(0, 0x1_0000), &[]);
    direct.accepted(id::SET_VRING_BASE, &state(0, 5), &[]);
    assert_eq!(direct.device.notes().running[&0].base(), 5);
}

/// Sizes and bases of packed rings: any size, and a position in each half, of which the upper one is where used descriptors
/// are written. Whether a base lies in the ring is known when the ring starts.
#[test]
fn sizes_and_bases_of_packed_rings() {
    let memory = Memory::new(0);
    let mut device = Recorder::default();
    device.features |= RING_PACKED;
    let session = Session::new(device.offer());
    let mut direct = Direct { session, device, grave: Grave::new() };
    direct.accepted(id::SET_PROTOCOL_FEATURES, &REPLY_ACK.to_ne_bytes(), &[]);
    direct.refused(id::SET_VRING_NUM, &state(0, 100), &[]);
    direct.set_up(&memory);
    let packed = (OFFERED | RING_PACKED).to_ne_bytes();
    direct.refused(id::SET_FEATURES, &packed, &[]);
    direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap();
    direct.accepted(id::SET_FEATURES, &packed, &[]);
    for size in [0, 32_769, 0x1_0040] {
        direct.refused(id::SET_VRING_NUM, &state(0, size), &[]);
    }
    direct.accepted(id::SET_VRING_NUM, &state(0, 100), &[]);
    for base in [0x8000_8000, 0x8063_8063, 0x0063_0063, 0x8000] {
        direct.accepted(id::SET_VRING_BASE, &state(0, base), &[]);
        direct.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
        let at = base & 0xffff;
        assert_eq!(direct.device.notes().running[&0].base(), at | at << 16, "{base:#x}");
        direct.device.notes().stop_at = Some(base);
        assert_eq!(direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap(), state(0, base));
    }
    for base in [100, 0x8064, 0x7fff, 0xffff_ffff] {
        direct.accepted(id::SET_VRING_BASE, &state(0, base), &[]);
        direct.refused(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
        assert!(!direct.running(), "{base:#x}");
        direct.send(id::GET_VRING_BASE, &state(0, 0), &[]).unwrap();
    }
    direct.accepted(id::SET_VRING_BASE, &state(0, 0x8000), &[]);
    direct.accepted(id::SET_VRING_KICK, &256u64.to_ne_bytes(), &[]);
    assert!(direct.running());
}
