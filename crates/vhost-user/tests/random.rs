//! Random messages against the state machine, without a socket: nothing panics, nothing leaks, and how the bytes come in
//! pieces makes no difference.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use support::*;
use vhost_user::Device;
use vhost_user::descriptor::Grave;
use vhost_user::message::Message;
use vhost_user::receive::Assembler;
use vhost_user::session::Session;

/// Where the regions are for the front end.
const USER: u64 = 0x7000_0000_0000;

/// What comes along with a message.
#[derive(Clone, Copy, Debug)]
enum Fd {
    Event,
    Memory,
    Null,
    Socket,
}

/// One message: id, flags, payload, descriptors.
type Sent = (u32, u32, Vec<u8>, Vec<Fd>);

/// Numbers at the edges of what is checked.
fn edgy() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4u64,
        Just(255),
        Just(256),
        Just(OFFERED),
        Just(PROTOCOL_OFFERED),
        Just(REPLY_ACK),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..64u32).prop_map(|bit| (1 << bit) - 1),
        (0..2u64, 0..0x8000u64).prop_map(|(region, offset)| USER + (region << 20) + offset * 16),
        any::<u64>(),
    ]
}

/// One of four neighbouring regions, or nonsense.
fn region() -> impl Strategy<Value = Region> {
    let usual = (0..4u64).prop_map(|n| [n << 20, 1 << 20, USER + (n << 20), 0]);
    prop_oneof![9 => usual, 1 => [edgy(), edgy(), edgy(), edgy()]]
}

/// Mostly the right descriptor.
fn fd(right: Fd) -> impl Strategy<Value = Fd> {
    let any = prop::sample::select(vec![Fd::Event, Fd::Memory, Fd::Null, Fd::Socket]);
    prop_oneof![15 => Just(right), 1 => any]
}

/// What a front end really sends: id, payload, descriptors.
fn usual() -> impl Strategy<Value = (u32, Vec<u8>, Vec<Fd>)> {
    let index = || 0..3u32;
    let about_ring = prop::sample::select(vec![
        (id::SET_VRING_NUM, 256),
        (id::SET_VRING_NUM, 256),
        (id::SET_VRING_BASE, 7),
        (id::SET_VRING_ENABLE, 1),
        (id::SET_VRING_ENABLE, 0),
        (id::GET_VRING_BASE, 0),
    ]);
    let bells = prop::sample::select(vec![id::SET_VRING_KICK, id::SET_VRING_CALL, id::SET_VRING_ERR]);
    let bare = prop::sample::select(vec![
        id::GET_FEATURES,
        id::SET_OWNER,
        id::RESET_OWNER,
        id::GET_PROTOCOL_FEATURES,
        id::GET_QUEUE_NUM,
        id::RESET_DEVICE,
        id::GET_MAX_MEM_SLOTS,
    ]);
    let regions = prop::collection::btree_map(0..4u64, fd(Fd::Memory), 1..4);
    prop_oneof![
        2 => bare.prop_map(|id| (id, vec![], vec![])),
        1 => Just((id::SET_FEATURES, OFFERED.to_ne_bytes().to_vec(), vec![])),
        6 => (about_ring, index()).prop_map(|((id, num), index)| (id, state(index, num), vec![])),
        5 => (bells, index(), any::<bool>(), fd(Fd::Event)).prop_map(|(id, index, with, fd)| {
            let word = u64::from(index) | if with { 0 } else { 256 };
            (id, word.to_ne_bytes().to_vec(), if with { vec![fd] } else { vec![] })
        }),
        5 => index().prop_map(|index| {
            (id::SET_VRING_ADDR, addr(index, 0, Memory::parts_at(USER, index)), vec![])
        }),
        2 => regions.prop_map(|regions| {
            let table_regions: Vec<_> =
                regions.keys().map(|n| [n << 20, 1 << 20, USER + (n << 20), 0]).collect();
            let count = u32::try_from(table_regions.len()).unwrap();
            (id::SET_MEM_TABLE, table(count, &table_regions), regions.into_values().collect())
        }),
        2 => (region(), fd(Fd::Memory)).prop_map(|(region, fd)| (id::ADD_MEM_REG, single(&region), vec![fd])),
        1 => region().prop_map(|region| (id::REM_MEM_REG, single(&region), vec![])),
        1 => fd(Fd::Socket).prop_map(|fd| (id::SET_BACKEND_REQ_FD, vec![], vec![fd])),
        1 => (0..30u32, 1..30u32).prop_map(|(offset, size)| {
            (id::GET_CONFIG, config(offset, size, 0, &vec![0; size as usize]), vec![])
        }),
    ]
}

/// The same requests with numbers at the edges, and anything else.
fn wild() -> impl Strategy<Value = (u32, Vec<u8>, Vec<Fd>)> {
    let fds = || prop::collection::vec(fd(Fd::Event), 0..4);
    let word = prop::sample::select(vec![
        id::SET_FEATURES,
        id::SET_PROTOCOL_FEATURES,
        id::SEND_RARP,
        id::NET_SET_MTU,
        id::SET_STATUS,
        id::SET_VRING_NUM,
        id::SET_VRING_BASE,
        id::GET_VRING_BASE,
        id::SET_VRING_ENABLE,
    ]);
    let small = || prop_oneof![4 => 0..3u32, 1 => any::<u32>()];
    let regions = prop::collection::vec((region(), fd(Fd::Memory)), 0..10);
    prop_oneof![
        (word, edgy()).prop_map(|(id, word)| (id, word.to_ne_bytes().to_vec(), vec![])),
        (small(), small(), [edgy(), edgy(), edgy()]).prop_map(|(index, flags, parts)| (
            id::SET_VRING_ADDR,
            addr(index, flags, parts),
            vec![]
        )),
        regions.prop_map(|regions| {
            let (regions, fds): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
            (id::SET_MEM_TABLE, table(u32::try_from(regions.len()).unwrap(), &regions), fds)
        }),
        (small(), 0..300u32, small(), 0..300usize).prop_map(|(offset, size, flags, len)| {
            let id = if flags == 0 { id::GET_CONFIG } else { id::SET_CONFIG };
            (id, config(offset, size, flags, &vec![0; len]), vec![])
        }),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..50), fds()),
        (0..50u32, prop::collection::vec(any::<u8>(), 0..50), fds()),
    ]
}

/// Mostly well-formed, so that it gets beyond the framing.
fn sent() -> impl Strategy<Value = Sent> {
    let message = prop_oneof![15 => usual(), 1 => wild()];
    let flags = prop_oneof![50 => Just(NEED_REPLY), 5 => Just(PLAIN), 1 => any::<u32>()];
    (message, flags).prop_map(|((id, payload, fds), flags)| (id, flags, payload, fds))
}

/// One descriptor of each kind, to be duplicated.
struct Stock {
    event: OwnedFd,
    memory: OwnedFd,
    null: OwnedFd,
    socket: OwnedFd,
}

impl Stock {
    fn new() -> Self {
        Self {
            event: event(),
            memory: memfd(4 << 20),
            null: std::fs::File::open("/dev/null").unwrap().into(),
            socket: std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        }
    }

    fn get(&self, fd: Fd) -> OwnedFd {
        let fd = match fd {
            Fd::Event => &self.event,
            Fd::Memory => &self.memory,
            Fd::Null => &self.null,
            Fd::Socket => &self.socket,
        };
        fd.as_fd().try_clone_to_owned().unwrap()
    }
}

/// A peer that never gives up: after an end a new session begins.
struct Peer {
    /// Whether each session begins with the usual negotiation and memory.
    polite: bool,
    device: Recorder,
    grave: Grave,
    assembler: Assembler,
    session: Option<Session>,
    replies: Vec<u8>,
    ends: Vec<String>,
}

impl Peer {
    fn new(polite: bool) -> Self {
        Self {
            polite,
            device: Recorder::default(),
            grave: Grave::new(),
            assembler: Assembler::default(),
            session: None,
            replies: Vec::new(),
            ends: Vec::new(),
        }
    }

    fn end(&mut self, reason: String) {
        self.ends.push(reason);
        self.assembler = Assembler::default();
        if let Some(session) = self.session.take() {
            drop(session.close(&mut self.device));
        }
        assert!(self.device.notes().running.is_empty());
        drop(self.grave.take());
    }

    fn handle(&mut self, message: Message) -> Result<(), String> {
        let device = &mut self.device;
        let session = self.session.get_or_insert_with(|| Session::new(device.offer()));
        let outcome =
            session.handle(device, message, &mut self.replies).map_err(|fatal| fatal.to_string())?;
        if let Some(nack) = outcome {
            assert!(!nack.to_string().is_empty());
        }
        drop((session.take_old_memory(), session.rings(), session.take_trouble()));
        Ok(())
    }

    /// Sends a message in pieces of the given length. Descriptors travel with the first.
    fn send(&mut self, sent: &Sent, stock: &Stock, piece: usize) {
        if self.polite && self.session.is_none() {
            let protocol_features = (PROTOCOL_OFFERED & !STATUS).to_ne_bytes().to_vec();
            let memory = [0, 1 << 20, USER, 0];
            for preface in [
                (id::SET_PROTOCOL_FEATURES, PLAIN, protocol_features, vec![]),
                (id::SET_FEATURES, PLAIN, OFFERED.to_ne_bytes().to_vec(), vec![]),
                (id::SET_MEM_TABLE, PLAIN, table(1, &[memory]), vec![Fd::Memory]),
            ] {
                self.feed(&preface, stock, piece);
            }
        }
        self.feed(sent, stock, piece);
    }

    fn feed(&mut self, (id, flags, payload, fds): &Sent, stock: &Stock, piece: usize) {
        let bytes = message(*id, *flags, payload);
        let mut fds: Vec<_> = fds.iter().map(|fd| self.grave.receive(stock.get(*fd))).collect();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let space = self.assembler.space();
            let len = space.len().min(rest.len()).min(piece);
            space[..len].copy_from_slice(&rest[..len]);
            rest = &rest[len..];
            let outcome = match self.assembler.advance(len, std::mem::take(&mut fds)) {
                Ok(Some(message)) => self.handle(message),
                Ok(None) => Ok(()),
                Err(violation) => Err(violation.to_string()),
            };
            if let Err(reason) = outcome {
                return self.end(reason);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sequences_neither_panic_nor_leak(
        sequence in prop::collection::vec(sent(), 1..60),
        piece in 1..40usize,
        polite: bool,
    ) {
        let _alone = alone();
        let stock = Stock::new();
        let base = Holdings::now();
        let (mut whole, mut pieces) = (Peer::new(polite), Peer::new(polite));
        for sent in &sequence {
            whole.send(sent, &stock, usize::MAX);
            pieces.send(sent, &stock, piece);
        }
        whole.end(String::new());
        pieces.end(String::new());
        prop_assert_eq!(&whole.replies, &pieces.replies);
        prop_assert_eq!(&whole.ends, &pieces.ends);
        prop_assert_eq!(whole.device.calls(), pieces.device.calls());
        drop((whole, pieces));
        prop_assert_eq!(Holdings::now(), base);
    }

    #[test]
    fn any_bytes_at_all(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let mut peer = Peer::new(false);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let space = peer.assembler.space();
            let len = space.len().min(rest.len());
            space[..len].copy_from_slice(&rest[..len]);
            rest = &rest[len..];
            match peer.assembler.advance(len, Vec::new()) {
                Ok(Some(message)) => if let Err(reason) = peer.handle(message) { peer.end(reason) },
                Ok(None) => {}
                Err(violation) => peer.end(violation.to_string()),
            }
        }
    }
}

#[test]
fn the_random_sequences_get_somewhere() {
    // Otherwise the property above would hold because everything ends at once.
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let _alone = alone();
    let stock = Stock::new();
    let mut runner = TestRunner::deterministic();
    let (mut started, mut moved, mut enabled) = (0, 0, 0);
    for _ in 0..300 {
        let sequence = prop::collection::vec(sent(), 60).new_tree(&mut runner).unwrap().current();
        let mut peer = Peer::new(true);
        for sent in &sequence {
            peer.send(sent, &stock, usize::MAX);
        }
        peer.end(String::new());
        for call in peer.device.calls() {
            match call {
                Call::Start { .. } => started += 1,
                Call::SetMemory(_) => moved += 1,
                Call::Enable(..) => enabled += 1,
                _ => {}
            }
        }
    }
    assert!(
        started > 100 && moved > 100 && enabled > 20,
        "{started} starts, {moved} moves, {enabled} switches"
    );
}
