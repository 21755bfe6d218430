//! Ports that are front ends: attached to a listening port of ours, and to a back end of other people's making (rust-vmm's
//! `vhost-user-backend`), which can be told to go away or to lie.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane::{Link, Move, PortId, PortSpec, RingReport};
use e2e::canary::Canary;
use e2e::deadline::wait_for;
use e2e::inproc::{Ledger, Plane, PortPlan, SOON, until};
use e2e::oracle::{Flow, Oracle};
use e2e::peer::{MERGEABLE, Peer, PeerConfig};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user::attachment::HANDSHAKE_MAX;
use vhost_user::{Endpoint, SessionState};
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vring::{HEADER_LEN, features};
use wire::Mac;
use wire::craft::{Craft, Tcp, leave_segments};

const MTU: u16 = 9216;
const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

fn front_end(plane: &Plane, network: &str, endpoint: Endpoint) -> Result<PortId> {
    multi_queue(plane, network, endpoint, 1)
}

fn multi_queue(plane: &Plane, network: &str, endpoint: Endpoint, queue_pairs: u16) -> Result<PortId> {
    let (name, network, link) = ("front".into(), network.into(), Link::FrontEnd { endpoint, queue_pairs });
    Ok(plane.dataplane().add_port(PortSpec { name, network, mtu: MTU, link })?)
}

fn guest(plane: &Plane, name: &str, network: &str) -> Result<Peer> {
    let offloads = 1 << features::CSUM
        | 1 << features::GUEST_CSUM
        | 1 << features::HOST_TSO4
        | 1 << features::GUEST_TSO4;
    plane.add(PortPlan { mtu: MTU, ..PortPlan::new(name, network) })?;
    let config = PeerConfig { features: MERGEABLE | offloads, tx_len: 66_000, ..PeerConfig::default() };
    plane.guest(name, config)
}

fn linked(plane: &Plane, port: PortId) -> bool {
    plane.port(port).is_ok_and(|port| port.linked)
}

fn last_error(plane: &Plane, port: PortId) -> String {
    let session = plane.port(port).ok().and_then(|port| port.session);
    session.and_then(|session| session.last_error).unwrap_or_default()
}

fn exchange(from: &mut Peer, to: &mut Peer, frame: &[u8]) -> Result<()> {
    ensure!(from.send_now(0, &PLAIN, frame), "buffers come back");
    ensure!(to.expect(0)?.1 == frame, "{} bytes", frame.len());
    Ok(())
}

/// Every byte of frames of all lengths, both ways, and of frames of 64 KiB that stay whole:
///
/// ```text
/// guest A ── network left ── back (a guest's port) ═══ front (a front-end port) ── network right ── guest B
/// ```
fn across(front_listens: bool) -> Result<()> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    let (mut a, mut b) = (guest(&plane, "a", "left")?, guest(&plane, "b", "right")?);
    let path = plane.path("cable");
    let (front, back);
    if front_listens {
        front = front_end(&plane, "right", Endpoint::listen(&path))?;
        let link =
            Link::VhostUser { endpoint: Endpoint::connect(&path), mac: None, queue_pairs: 1, policy: None };
        let spec = PortSpec { name: "cable".into(), network: "left".into(), mtu: MTU, link };
        back = plane.dataplane().add_port(spec)?;
    } else {
        back = plane.add(PortPlan { mtu: MTU, ..PortPlan::new("cable", "left") })?;
        front = front_end(&plane, "right", Endpoint::connect(&path))?;
    }
    until("the cable", || linked(&plane, front) && linked(&plane, back))?;
    let oracle = Oracle::new(std::process::id());
    let flows = [Flow { id: 0, src: A, dst: B }, Flow { id: 1, src: B, dst: A }];
    let mut sent = 0;
    for (sequence, len) in (0..).zip((60..2200).step_by(17).chain([1514, 9014, 9216])) {
        exchange(&mut a, &mut b, &oracle.frame(&flows[0], sequence, len))?;
        exchange(&mut b, &mut a, &oracle.frame(&flows[1], sequence, len))?;
        sent += 1;
    }
    let craft = Craft::v4(Mac::new(A), Mac::new(B), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    for sequence in 0..100 {
        let tcp = Tcp { sequence, ..Tcp::default() };
        let mut frame = craft.tcp(&tcp, &oracle.frame(&flows[0], sequence.into(), 65_000));
        let header = leave_segments(&mut frame, 1448).context("a TCP frame")?;
        ensure!(a.send_now(0, &header.to_bytes(), &frame), "buffers come back");
        let (got, bytes) = b.expect(0)?;
        ensure!(bytes == frame && got.is_gso(), "frame {sequence} of 64 KiB");
    }
    plane.expect_counters(front, &Ledger::new(sent + 100, sent))?;
    plane.expect_counters(back, &Ledger::new(sent, sent + 100))?;
    ensure!(plane.counters(front)?.gso_frames == 100);
    drop((a, b));
    canary.finish(&plane)?;
    plane.finish()
}

#[test]
fn frames_pass_whole_to_a_back_end_that_listens() -> Result<()> {
    across(false)
}

#[test]
fn frames_pass_whole_to_a_back_end_that_connects() -> Result<()> {
    across(true)
}

/// Frames of many flows through two queue pairs, between two front-end ports and their back ends:
///
/// ```text
/// guest A ── left ── back (a guest's port, 3 queue pairs) ═══ front (asks for 2) ── right ── guest B
/// ```
#[test]
fn flows_are_spread_over_queue_pairs_and_keep_their_order() -> Result<()> {
    const FLOWS: u16 = 64;
    let plane = Plane::start()?;
    let (mut a, mut b) = (guest(&plane, "a", "left")?, guest(&plane, "b", "right")?);
    let back = plane.add(PortPlan { mtu: MTU, queue_pairs: 3, ..PortPlan::new("cable", "left") })?;
    let front = multi_queue(&plane, "right", Endpoint::connect(plane.path("cable")), 2)?;
    until("the cable", || linked(&plane, front) && linked(&plane, back))?;
    let craft = |from: [u8; 6], to: [u8; 6]| {
        Craft::v4(Mac::new(from), Mac::new(to), [10, 0, 0, 1].into(), [10, 0, 0, 2].into())
    };
    for sequence in 0..8 {
        for flow in 0..FLOWS {
            let payload = [sequence; 100];
            exchange(&mut a, &mut b, &craft(A, B).udp(flow, 7, &payload))?;
            exchange(&mut b, &mut a, &craft(B, A).udp(7, flow, &payload))?;
        }
    }
    let frames = 8 * u64::from(FLOWS);
    for (port, kind) in [(front, "front"), (back, "back")] {
        plane.expect_counters(port, &Ledger::new(frames, frames))?;
        let rings = plane.port(port)?.rings;
        let carried = |ring: &RingReport| ring.counters.rx_frames + ring.counters.tx_frames;
        ensure!(rings.len() == 4 && rings.iter().all(|ring| carried(ring) > frames / 8), "{kind}: {rings:?}");
    }
    // Each worker polls one of them, if there are two.
    let workers = plane.dataplane().workers().len();
    let polled: BTreeSet<_> = plane.port(front)?.rings.iter().map(|ring| ring.worker).collect();
    ensure!(polled.len() == workers.min(2), "{polled:?}");
    drop((a, b));
    plane.finish()
}

/// A queue pair that is given to the other worker, and back again, while frames go through it, loses none.
#[test]
fn a_queue_pair_of_a_back_end_changes_workers_while_frames_pass() -> Result<()> {
    let plane = Plane::start()?;
    if plane.dataplane().workers().len() < 2 {
        return plane.finish();
    }
    let (mut a, mut b) = (guest(&plane, "a", "left")?, guest(&plane, "b", "right")?);
    let back = plane.add(PortPlan { mtu: MTU, ..PortPlan::new("cable", "left") })?;
    let front = front_end(&plane, "right", Endpoint::connect(plane.path("cable")))?;
    until("the cable", || linked(&plane, front) && linked(&plane, back))?;
    let oracle = Oracle::new(std::process::id());
    let worker = || plane.port(front).map(|port| port.rings[0].worker);
    for sequence in 0..200 {
        let from = worker()?;
        let to = Move { port: front, port_name: "front".into(), queue: 0, from, to: 1 - from, share: 0.5 };
        ensure!(plane.dataplane().move_queue(&to) && worker()? == 1 - from);
        ensure!(!plane.dataplane().move_queue(&to), "it is there already");
        exchange(&mut a, &mut b, &oracle.frame(&Flow { id: 0, src: A, dst: B }, sequence, 300))?;
        exchange(&mut b, &mut a, &oracle.frame(&Flow { id: 1, src: B, dst: A }, sequence, 300))?;
    }
    plane.expect_counters(front, &Ledger::new(200, 200))?;
    drop((a, b));
    plane.finish()
}

/// What is asked for and not there is no reason to fail.
#[test]
fn a_back_end_with_fewer_queue_pairs_gets_those() -> Result<()> {
    let plane = Plane::start()?;
    let back = plane.add(PortPlan { queue_pairs: 1, ..PortPlan::new("cable", "left") })?;
    let front = multi_queue(&plane, "right", Endpoint::connect(plane.path("cable")), 4)?;
    until("the cable", || linked(&plane, front) && linked(&plane, back))?;
    ensure!(plane.port(front)?.rings.len() == 2, "{:?}", plane.port(front)?.rings);
    plane.finish()
}

/// What a back end does instead of sending a frame back.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Returns a buffer twice.
    Twice,
    /// Says it wrote more than there was room for.
    Length,
    /// Jumps with the used index.
    Index,
}

/// Descriptors of its rings at the most, unless something else is said.
const RING_MAX: u16 = 1024;

/// Sends every frame back where it came from, or lies.
struct Echo {
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    lie: Arc<Mutex<Option<Lie>>>,
    ring_max: u16,
}

impl Echo {
    /// One frame from the TX ring into the RX ring.
    fn echo(&self, vrings: &[VringRwLock]) -> std::io::Result<bool> {
        let memory = self.memory.as_ref().unwrap().memory();
        let (rx, tx) = (&vrings[0], &vrings[1]);
        let next = |vring: &VringRwLock| vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone());
        let Some(chain) = next(tx) else { return Ok(false) };
        let (head, mut frame) = (chain.head_index(), Vec::new());
        for descriptor in chain {
            let at = frame.len();
            frame.resize(at + descriptor.len() as usize, 0);
            memory.read_slice(&mut frame[at..], descriptor.addr()).unwrap();
        }
        tx.add_used(head, 0).unwrap();
        let Some(chain) = next(rx) else { return Ok(true) };
        let (head, mut len) = (chain.head_index(), u32::try_from(frame.len()).unwrap());
        let buffer = chain.into_iter().next().unwrap();
        let (to, from) = frame[HEADER_LEN..].split_at_mut(6);
        to.swap_with_slice(&mut from[..6]);
        frame[10] = 1;
        memory.write_slice(&frame, buffer.addr()).unwrap();
        match self.lie.lock().unwrap().take() {
            Some(Lie::Twice) => rx.add_used(head, len).unwrap(),
            Some(Lie::Length) => len = 2049,
            Some(Lie::Index) => rx.set_queue_next_used(rx.queue_used_idx().unwrap() + 2 * RING_MAX),
            None => {}
        }
        rx.add_used(head, len).unwrap();
        rx.signal_used_queue()?;
        Ok(true)
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        self.ring_max.into()
    }

    fn features(&self) -> u64 {
        1 << features::VERSION_1 | 1 << features::MRG_RXBUF | 1 << features::PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        ring: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> std::io::Result<()> {
        while ring == 1 && self.echo(vrings)? {}
        Ok(())
    }
}

type Daemon = VhostUserDaemon<Arc<Mutex<Echo>>>;

/// A back end that serves one front end after the other, until it is dropped.
struct BackEnd {
    lie: Arc<Mutex<Option<Lie>>>,
    present: Arc<Mutex<Present>>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Present {
    session: Option<ShutdownHandle>,
    over: bool,
}

impl Present {
    fn begins(&mut self, session: Option<ShutdownHandle>) {
        self.session = session;
        if self.over {
            self.hang_up();
        }
    }

    fn hang_up(&self) {
        if let Some(session) = &self.session {
            session.shutdown();
        }
    }
}

impl BackEnd {
    fn listen(path: &Path) -> Self {
        Self::listen_with(path, RING_MAX)
    }

    fn listen_with(path: &Path, ring_max: u16) -> Self {
        let mut listener = Listener::new(path, false).unwrap();
        Self::run(path, ring_max, move |daemon| daemon.start(&mut listener))
    }

    fn connect(path: &Path) -> Self {
        let there = path.to_str().unwrap().to_owned();
        Self::run(path, RING_MAX, move |daemon| daemon.start_client(&there))
    }

    fn run(
        path: &Path,
        ring_max: u16,
        mut start: impl FnMut(&mut Daemon) -> vhost_user_backend::Result<()> + Send + 'static,
    ) -> Self {
        let (lie, present) = (Arc::<Mutex<Option<Lie>>>::default(), Arc::<Mutex<Present>>::default());
        let (to_tell, to_show) = (lie.clone(), present.clone());
        let thread = std::thread::spawn(move || {
            while !to_show.lock().unwrap().over {
                let echo = Arc::new(Mutex::new(Echo { memory: None, lie: to_tell.clone(), ring_max }));
                let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
                let mut daemon = Daemon::new("echo".into(), echo, memory).unwrap();
                if start(&mut daemon).is_ok() {
                    to_show.lock().unwrap().begins(daemon.shutdown_handle());
                    let _ = daemon.wait();
                } else {
                    // The front end is not there yet.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        });
        Self { lie, present, path: path.into(), thread: Some(thread) }
    }

    fn hang_up(&self) {
        self.present.lock().unwrap().hang_up();
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        {
            let mut present = self.present.lock().unwrap();
            present.over = true;
            present.hang_up();
        }
        // Perhaps it waits for the next one.
        drop(UnixStream::connect(&self.path));
        let _ = self.thread.take().unwrap().join();
    }
}

/// Sends a frame from the guest to the back end and waits for it to come back.
fn comes_back(peer: &mut Peer, sequence: u64) -> Result<()> {
    let oracle = Oracle::new(0);
    let flow = Flow { id: 7, src: A, dst: B };
    let len = 60 + usize::try_from(sequence * 97 % 1400)?;
    let frame = oracle.frame(&flow, sequence, len);
    ensure!(peer.send_now(0, &PLAIN, &frame));
    let (_, got) = peer.expect(0)?;
    ensure!(got[..6] == A && got[6..12] == B && got[12..] == frame[12..], "{len} bytes");
    Ok(())
}

fn connections(plane: &Plane, port: PortId) -> u64 {
    plane.port(port).ok().and_then(|port| port.session).map_or(0, |session| session.connections)
}

/// Waits until the port runs its session number `nth`.
fn session(plane: &Plane, port: PortId, nth: u64) -> Result<()> {
    wait_for("the next session", SOON, || connections(plane, port) >= nth && linked(plane, port))
        .with_context(|| last_error(plane, port))
}

fn comes_back_after_hanging_up(front_listens: bool) -> Result<()> {
    let plane = Plane::start()?;
    let path = plane.path("echo");
    let (front, back);
    if front_listens {
        front = front_end(&plane, "echo", Endpoint::listen(&path))?;
        back = BackEnd::connect(&path);
    } else {
        front = front_end(&plane, "echo", Endpoint::connect(&path))?;
        ensure!(!linked(&plane, front), "nobody is there yet");
        back = BackEnd::listen(&path);
    }
    let mut peer = guest(&plane, "a", "echo")?;
    for nth in 1..=3 {
        session(&plane, front, nth)?;
        for sequence in 0..300 {
            comes_back(&mut peer, sequence)?;
        }
        back.hang_up();
    }
    wait_for("the end to be seen", SOON, || last_error(&plane, front).contains("closed the connection"))?;
    plane.dataplane().remove_port(front);
    // Descriptors are not counted: that crate leaves some behind.
    drop(back);
    Ok(())
}

#[test]
fn a_back_end_of_another_make_that_listens_and_comes_back() -> Result<()> {
    comes_back_after_hanging_up(false)
}

#[test]
fn a_back_end_of_another_make_that_connects_and_comes_back() -> Result<()> {
    comes_back_after_hanging_up(true)
}

#[test]
fn a_back_end_that_refuses_long_rings_gets_short_ones() -> Result<()> {
    let plane = Plane::start()?;
    for (ring_max, size) in [(1024, 1024), (256, 256)] {
        let path = plane.path(&format!("echo{ring_max}"));
        let back = BackEnd::listen_with(&path, ring_max);
        let front = front_end(&plane, "echo", Endpoint::connect(&path))?;
        let mut peer = guest(&plane, &format!("a{ring_max}"), "echo")?;
        until("the session", || linked(&plane, front))?;
        (0..300).try_for_each(|sequence| comes_back(&mut peer, sequence))?;
        let rings = plane.port(front)?.rings;
        ensure!(rings.iter().all(|ring| ring.size == size), "{rings:?}");
        plane.dataplane().remove_port(front);
        drop((peer, back));
    }
    Ok(())
}

#[test]
fn a_back_end_that_lies_gets_a_new_session_and_disturbs_nobody() -> Result<()> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    let path = plane.path("echo");
    let back = BackEnd::listen(&path);
    let front = front_end(&plane, "echo", Endpoint::connect(&path))?;
    let mut peer = guest(&plane, "a", "echo")?;
    let lies = [
        (Lie::Twice, "which was not on its way"),
        (Lie::Length, "2049 bytes into a buffer of 2048"),
        (Lie::Index, "the used index jumped"),
    ];
    for (nth, (lie, error)) in (1..).zip(lies) {
        session(&plane, front, nth)?;
        comes_back(&mut peer, nth)?;
        *back.lie.lock().unwrap() = Some(lie);
        let frame = Oracle::new(0).frame(&Flow { id: 7, src: A, dst: B }, 0, 60);
        ensure!(peer.send_now(0, &PLAIN, &frame));
        session(&plane, front, nth + 1)?;
        ensure!(last_error(&plane, front).contains(error), "{lie:?}: {}", last_error(&plane, front));
        // The one that was returned twice may have come once.
        while peer.receive(0).is_some() {}
        comes_back(&mut peer, nth)?;
    }
    canary.finish(&plane)?;
    plane.dataplane().remove_port(front);
    // Descriptors are not counted: that crate leaves some behind.
    drop(back);
    Ok(())
}

#[test]
fn a_back_end_that_says_nothing_is_given_up_and_in_nobodys_way() -> Result<()> {
    let plane = Plane::start()?;
    let path = plane.path("silent");
    let listener = UnixListener::bind(&path)?;
    let front = front_end(&plane, "silent", Endpoint::connect(&path))?;
    let first = listener.accept()?;
    until("the handshake", || {
        plane.port(front).is_ok_and(|p| p.session.is_some_and(|s| s.state == SessionState::Negotiating))
    })?;
    let second = listener.accept()?;
    ensure!(
        last_error(&plane, front).contains(&format!("{HANDSHAKE_MAX:?}")),
        "{}",
        last_error(&plane, front)
    );
    // In the middle of the second handshake.
    let began = Instant::now();
    plane.dataplane().remove_port(front);
    ensure!(began.elapsed() < HANDSHAKE_MAX / 2, "{:?}", began.elapsed());
    drop((listener, first, second));
    plane.finish()
}
