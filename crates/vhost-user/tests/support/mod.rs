//! What the tests of this crate share: a device that notes what it is asked, a peer that can send anything, and a look at
//! the process's own descriptors, mappings and threads.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::enum_variant_names,
    reason = "shared by the test files, each of which uses its part"
)]

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_user::{
    Device, Endpoint, EndpointId, Limits, NetConfig, Offer, Peer, Refusal, SessionState, SessionStatus,
    Sessions,
};
use vring::{GuestMemory, RingError, RingSetup, TxRing};

pub const PROTOCOL_FEATURES: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;
pub const OFFERED: u64 = VERSION_1 | PROTOCOL_FEATURES | 1 << 15 | 1 << 21 | 1 << 22 | 1 << 3;

pub const MQ: u64 = 1;
pub const RARP: u64 = 1 << 2;
pub const REPLY_ACK: u64 = 1 << 3;
pub const NET_MTU: u64 = 1 << 4;
pub const BACKEND_REQ: u64 = 1 << 5;
pub const CONFIG: u64 = 1 << 9;
pub const RESET_DEVICE: u64 = 1 << 13;
pub const MEM_SLOTS: u64 = 1 << 15;
pub const STATUS: u64 = 1 << 16;
pub const PROTOCOL_OFFERED: u64 =
    MQ | RARP | REPLY_ACK | NET_MTU | BACKEND_REQ | CONFIG | RESET_DEVICE | MEM_SLOTS | STATUS;

/// Not offered by most.
pub const RING_PACKED: u64 = 1 << 34;

/// How long anything may take that should happen soon.
pub const SOON: Duration = Duration::from_secs(10);

/// `part`, or `whole` when the environment has `VHOSTD_SOAK` (`make soak`).
pub fn count(part: u32, whole: u32) -> u32 {
    if std::env::var_os("VHOSTD_SOAK").is_some() { whole } else { part }
}

/// What a [`Recorder`] was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Connected,
    SetFeatures(u64),
    SetMtu(u64),
    SendRarp([u8; 6]),
    Start { index: u16, size: u16, base: u32, enabled: bool, kick: bool, call: bool },
    Stop(u16),
    Enable(u16, bool),
    SetCall(u16, bool),
    SetErr(u16, bool),
    SetMemory(usize),
    Disconnected,
}

/// The recorder's notes.
#[derive(Default)]
pub struct Notes {
    pub calls: Vec<Call>,
    /// Rings that run, with what they hold.
    pub running: BTreeMap<u16, TxRing>,
    /// What stopping a ring returns; nothing: the ring broke.
    pub stop_at: Option<u32>,
}

/// A device that runs no rings but checks that it could.
#[derive(Clone)]
pub struct Recorder {
    notes: Arc<Mutex<Notes>>,
    queue_pairs: u16,
    /// Offered: [`OFFERED`], and more if a test says so.
    pub features: u64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::with_queue_pairs(128)
    }
}

impl Recorder {
    pub fn with_queue_pairs(queue_pairs: u16) -> Self {
        Self { notes: Arc::default(), queue_pairs, features: OFFERED }
    }

    pub fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.notes().calls.clone()
    }

    fn note(&self, call: Call) {
        let mut notes = self.notes();
        // Floods are counted elsewhere.
        if notes.calls.len() < 300_000 {
            notes.calls.push(call);
        }
    }
}

impl Device for Recorder {
    fn offer(&self) -> Offer {
        Offer { features: self.features, protocol_features: PROTOCOL_OFFERED, queue_pairs: self.queue_pairs }
    }

    fn config(&self) -> NetConfig {
        NetConfig { mac: Some([0x52, 0x54, 0, 1, 2, 3]), status: 1, max_queue_pairs: 128, mtu: Some(1500) }
    }

    fn connected(&mut self, _: Peer) {
        self.note(Call::Connected);
    }

    fn set_features(&mut self, features: u64) {
        assert!(self.notes().running.is_empty(), "features changed under a running ring");
        self.note(Call::SetFeatures(features));
    }

    fn set_mtu(&mut self, mtu: u64) -> Result<(), Refusal> {
        if !(68..=1500).contains(&mtu) {
            return Err(Refusal::Mtu { asked: mtu, min: 68, max: 1500 });
        }
        self.note(Call::SetMtu(mtu));
        Ok(())
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Refusal> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(Refusal::Mac(mac));
        }
        self.note(Call::SendRarp(mac));
        Ok(())
    }

    fn start_ring(
        &mut self,
        index: u16,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        // The real ring's checks, without keeping the ring.
        let (kick, call) = (setup.kick.is_some(), setup.call.is_some());
        let start =
            Call::Start { index, size: setup.size, base: setup.base, enabled: setup.enabled, kick, call };
        let ring = TxRing::start(setup, memory)?;
        let before = self.notes().running.insert(index, ring);
        assert!(before.is_none(), "ring {index} started twice");
        self.note(start);
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Option<u32> {
        assert!(self.notes().running.remove(&index).is_some(), "ring {index} stopped twice");
        self.note(Call::Stop(index));
        self.notes().stop_at
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) {
        assert!(self.notes().running.contains_key(&index));
        self.note(Call::Enable(index, enabled));
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        self.note(Call::SetCall(index, call.is_some()));
        self.notes().running.get_mut(&index).expect("only running rings are called").set_call(call);
    }

    fn set_err(&mut self, index: u16, err: Option<OwnedFd>) {
        self.note(Call::SetErr(index, err.is_some()));
        self.notes().running.get_mut(&index).expect("only running rings are called").set_err(err);
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        self.note(Call::SetMemory(memory.regions().len()));
    }

    fn disconnected(&mut self) {
        self.notes().running.clear();
        self.note(Call::Disconnected);
    }
}

/// Waits until something holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The tests of one file share a process, and look at what it holds: one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a process holds, to be the same before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: usize,
    pub mappings: usize,
    pub threads: usize,
}

impl Holdings {
    pub fn now() -> Self {
        let entries = |path| std::fs::read_dir(path).unwrap().map(Result::unwrap);
        // Ours only: the test harness comes and goes.
        let is_ours = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("session"))
        };
        // Only shared memory counts: the allocator maps for itself.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        Self {
            descriptors: entries("/proc/self/fd").count(),
            mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
            threads: entries("/proc/self/task").filter(|task| is_ours(task)).count(),
        }
    }

    /// Waits until the process holds this again.
    #[track_caller]
    pub fn wait_for_return(self) {
        let deadline = Instant::now() + SOON;
        while Self::now() != self {
            assert!(Instant::now() < deadline, "held {self:?}, now {:?}", Self::now());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// How long threads of this process were ready to run while others ran, in all (proc(5), schedstat).
fn run_delay() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let delay = |thread: std::fs::DirEntry| {
        let schedstat = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedstat.split(' ').nth(1)?.parse::<u64>().ok()
    };
    Duration::from_nanos(threads.flatten().filter_map(delay).sum())
}

/// A session thread with one endpoint under test and a canary beside it.
pub struct Bench {
    pub sessions: Sessions,
    pub device: Recorder,
    pub id: EndpointId,
    pub path: PathBuf,
    pub canary: PathBuf,
    /// Descriptors, mappings and threads with nobody connected.
    pub base: Holdings,
    _dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Limits::default(), Recorder::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        Self::with(limits, Recorder::default())
    }

    pub fn with(limits: Limits, device: Recorder) -> Self {
        let alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let sessions = Sessions::start(limits, Box::new(|_, _| {})).unwrap();
        let (path, canary) = (dir.path().join("port"), dir.path().join("canary"));
        let id = sessions.add(Endpoint::listen(&path), Box::new(device.clone())).unwrap();
        sessions.add(Endpoint::listen(&canary), Box::new(Recorder::default())).unwrap();
        Self { sessions, device, id, path, canary, base: Holdings::now(), _dir: dir, _alone: alone }
    }

    /// A peer that has said nothing yet.
    pub fn raw(&self) -> Raw {
        Raw::connect(&self.path)
    }

    /// A peer with REPLY_ACK and everything else that is offered negotiated.
    pub fn negotiated(&self) -> Raw {
        let mut raw = self.raw();
        raw.number(id::SET_PROTOCOL_FEATURES, PROTOCOL_OFFERED & !STATUS);
        raw.send(id::SET_OWNER, &[], &[]);
        raw.number(id::SET_FEATURES, OFFERED);
        assert_eq!(raw.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
        raw
    }

    pub fn status(&self) -> SessionStatus {
        self.sessions.status(self.id).unwrap()
    }

    pub fn wait_for_state(&self, state: &SessionState) {
        wait_until("state", || self.status().state == *state);
    }

    /// Somebody else must be served at once, whatever happens here. What the machine did meanwhile is not held against
    /// the session thread.
    #[track_caller]
    pub fn check_canary(&self) {
        let (began, delayed) = (Instant::now(), run_delay());
        let mut canary = Raw::connect(&self.canary);
        assert_eq!(canary.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
        let waited = began.elapsed().saturating_sub(run_delay().saturating_sub(delayed));
        assert!(waited < Duration::from_millis(100), "the canary waited {waited:?}");
    }

    /// Sends bytes on a fresh connection; the back end must end it.
    #[track_caller]
    pub fn check_closes(&self, what: &str, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut raw = self.negotiated();
        // It may be closed before all is sent.
        raw.try_send_bytes(bytes, fds);
        raw.closed();
        drop(raw);
        self.check_canary();
        assert!(self.status().last_error.is_some(), "{what}: no reason given");
        self.base.wait_for_return();
    }

    /// Everything of the last peer is gone, and the next one is served.
    #[track_caller]
    pub fn check_recovered(&self) {
        self.check_canary();
        self.base.wait_for_return();
        let mut next = self.raw();
        assert_eq!(next.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
        drop(next);
        self.base.wait_for_return();
    }
}

/// Messages of a whole set-up, with the descriptor that each brings.
pub fn handshake<'a>(memory: &'a Memory, bell: &'a OwnedFd) -> Vec<(Vec<u8>, Option<BorrowedFd<'a>>)> {
    let plain = |id, payload: &[u8]| (message(id, PLAIN, payload), None);
    let acked = |id, payload: &[u8]| (message(id, NEED_REPLY, payload), None);
    let with = |id, payload: &[u8], fd: &'a OwnedFd| (message(id, NEED_REPLY, payload), Some(fd.as_fd()));
    vec![
        plain(id::GET_FEATURES, &[]),
        plain(id::GET_PROTOCOL_FEATURES, &[]),
        plain(id::SET_PROTOCOL_FEATURES, &PROTOCOL_OFFERED.to_ne_bytes()),
        plain(id::GET_QUEUE_NUM, &[]),
        plain(id::SET_OWNER, &[]),
        with(id::SET_VRING_CALL, &0u64.to_ne_bytes(), bell),
        with(id::SET_VRING_ERR, &0u64.to_ne_bytes(), bell),
        acked(id::SET_FEATURES, &OFFERED.to_ne_bytes()),
        with(id::SET_MEM_TABLE, &table(1, &[memory.region]), &memory.fd),
        acked(id::SET_VRING_NUM, &state(0, 256)),
        acked(id::SET_VRING_BASE, &state(0, 3)),
        acked(id::SET_VRING_ADDR, &memory.ring_addr(0)),
        with(id::SET_VRING_KICK, &0u64.to_ne_bytes(), bell),
        acked(id::SET_STATUS, &15u64.to_ne_bytes()),
        acked(id::SET_VRING_ENABLE, &state(0, 1)),
        plain(id::GET_VRING_BASE, &state(0, 0)),
    ]
}

/// Reads until the other end has nothing more to say.
pub fn read_all(raw: &mut Raw) -> Vec<u8> {
    raw.stream.shutdown(Shutdown::Write).unwrap();
    let mut replies = Vec::new();
    raw.stream.read_to_end(&mut replies).expect("a clean end");
    replies
}

/// Request ids.
pub mod id {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

pub const ACK: [u8; 8] = 0u64.to_ne_bytes();
pub const NACK: [u8; 8] = 1u64.to_ne_bytes();
/// Header flags: version 1; with need reply.
pub const PLAIN: u32 = 1;
pub const NEED_REPLY: u32 = 1 | 8;

/// Bytes of a message.
pub fn message(id: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes: Vec<u8> = [id, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(payload);
    bytes
}

/// A peer that can send anything.
pub struct Raw {
    pub stream: UnixStream,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream }
    }

    /// Sends bytes with descriptors; false if the other end is closed.
    pub fn try_send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            match sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut control, SendFlags::NOSIGNAL) {
                Ok(len) => sent += len,
                Err(_) => return false,
            }
            control.clear();
        }
        true
    }

    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.try_send_bytes(bytes, fds), "the back end has closed the connection");
    }

    /// A request without acknowledgement.
    pub fn send(&self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&message(id, PLAIN, payload), fds);
    }

    /// The same with one number.
    pub fn number(&self, id: u32, value: u64) {
        self.send(id, &value.to_ne_bytes(), &[]);
    }

    /// The payload of the next reply, which must be one to `id`.
    #[track_caller]
    pub fn reply(&mut self, id: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).expect("a reply");
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (id, 1 | 4), "reply to another request");
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload).expect("the reply's payload");
        payload
    }

    /// A request that has an answer of its own.
    #[track_caller]
    pub fn ask(&mut self, id: u32, payload: &[u8]) -> Vec<u8> {
        self.send(id, payload, &[]);
        self.reply(id)
    }

    /// A request with acknowledgement; what was answered.
    #[track_caller]
    pub fn request(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        self.send_bytes(&message(id, NEED_REPLY, payload), fds);
        self.reply(id)
    }

    #[track_caller]
    pub fn accepted(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.request(id, payload, fds), ACK, "request {id} was refused");
    }

    #[track_caller]
    pub fn refused(&mut self, id: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.request(id, payload, fds), NACK, "request {id} was accepted");
        // And the session lives.
        assert_eq!(self.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    }

    /// The back end has closed the connection without another word.
    #[track_caller]
    pub fn closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Ok(_) => panic!("a reply instead of the end"),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(e) => panic!("no end: {e}"),
        }
    }

    /// Sets a ring up so that it runs (with memory and features there).
    pub fn start_ring(&mut self, index: u32, memory: &Memory) -> OwnedFd {
        let kick = event();
        self.accepted(id::SET_VRING_NUM, &state(index, 256), &[]);
        self.accepted(id::SET_VRING_BASE, &state(index, 0), &[]);
        self.accepted(id::SET_VRING_ADDR, &memory.ring_addr(index), &[]);
        self.accepted(id::SET_VRING_KICK, &u64::from(index).to_ne_bytes(), &[kick.as_fd()]);
        kick
    }
}

/// Payload of the messages about one ring.
pub fn state(index: u32, num: u32) -> Vec<u8> {
    [index, num].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Payload of SET_VRING_ADDR.
pub fn addr(index: u32, flags: u32, [desc, avail, used]: [u64; 3]) -> Vec<u8> {
    let mut payload = state(index, flags);
    for word in [desc, used, avail, 0] {
        payload.extend_from_slice(&word.to_ne_bytes());
    }
    payload
}

/// One region: guest address, size, user address, offset.
pub type Region = [u64; 4];

/// Payload of SET_MEM_TABLE.
pub fn table(count: u32, regions: &[Region]) -> Vec<u8> {
    let mut payload = state(count, 0);
    payload.extend(regions.iter().flatten().flat_map(|word| word.to_ne_bytes()));
    payload
}

/// Payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single(region: &Region) -> Vec<u8> {
    let mut payload = vec![0; 8];
    payload.extend(region.iter().flat_map(|word| word.to_ne_bytes()));
    payload
}

/// Payload of GET_CONFIG and SET_CONFIG.
pub fn config(offset: u32, size: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let mut payload: Vec<u8> = [offset, size, flags].iter().flat_map(|word| word.to_ne_bytes()).collect();
    payload.extend_from_slice(data);
    payload
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

/// One region of guest memory.
pub struct Memory {
    pub fd: OwnedFd,
    pub region: Region,
}

impl Memory {
    /// 2 MiB at guest address `at`.
    pub fn new(at: u64) -> Self {
        let len = 2 << 20;
        Self { fd: memfd(len), region: [at, len, 0x7000_0000_0000 + at, 0] }
    }

    /// Makes it the peer's table.
    pub fn give(&self, raw: &mut Raw) {
        raw.accepted(id::SET_MEM_TABLE, &table(1, &[self.region]), &[self.fd.as_fd()]);
    }

    /// Payload of SET_VRING_ADDR for a ring of up to 256 in here.
    pub fn ring_addr(&self, index: u32) -> Vec<u8> {
        addr(index, 0, self.ring_parts(index))
    }

    pub fn ring_parts(&self, index: u32) -> [u64; 3] {
        Self::parts_at(self.region[2], index)
    }

    pub fn parts_at(user_addr: u64, index: u32) -> [u64; 3] {
        let at = user_addr + u64::from(index) * 0x2000;
        [at, at + 0x1000, at + 0x1400]
    }
}
