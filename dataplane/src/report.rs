//! What the dataplane tells: states, counters, events. Data only, taken without stopping a worker.

use vhost_user::SessionStatus;

use crate::drops::DropReason;

/// A port's number, unique for the life of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u32);

/// Something changed.
#[derive(Clone, Debug)]
pub struct Event {
    /// The port.
    pub port: PortId,
    /// Its name.
    pub name: String,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A front end connected.
    Connected,
    /// The front end is gone.
    Disconnected,
    /// At least one RX and one TX ring run and are enabled.
    Linked,
    /// Not any more.
    Unlinked,
    /// A ring was stopped because of its content.
    RingBroken {
        /// Vring index.
        ring: u16,
        /// What was wrong.
        reason: String,
    },
    /// The front end announced the guest's address.
    Announced([u8; 6]),
}

/// Frames and bytes of a port or of one ring, in the switch's view: rx came from the port, tx went to it.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Frames taken from the port.
    pub rx_frames: u64,
    /// Their bytes, without vnet header.
    pub rx_bytes: u64,
    /// Frames delivered to the port.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Of rx + tx: frames that carried a segmentation request (GSO).
    pub gso_frames: u64,
    /// Frames given up at this port, by reason; reasons that never happened are left out.
    pub drops: Vec<(DropReason, u64)>,
}

impl Counters {
    /// Adds another ring's.
    pub fn add(&mut self, other: &Self) {
        self.rx_frames += other.rx_frames;
        self.rx_bytes += other.rx_bytes;
        self.tx_frames += other.tx_frames;
        self.tx_bytes += other.tx_bytes;
        self.gso_frames += other.gso_frames;
        for (reason, n) in &other.drops {
            self.count_drop(*reason, *n);
        }
    }

    /// Adds to one reason's number.
    pub fn count_drop(&mut self, reason: DropReason, n: u64) {
        match self.drops.iter_mut().find(|(have, _)| *have == reason) {
            Some((_, have)) => *have += n,
            None => self.drops.push((reason, n)),
        }
    }
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A guest.
    VhostUser,
    /// A back end, whose front end we are.
    FrontEnd,
    /// The host.
    Tap,
}

/// One vring (or TAP queue) of a port.
#[derive(Clone, Debug)]
pub struct RingReport {
    /// Vring index: 2n receive, 2n+1 transmit in the view of the guest, which we play for a back end. For a TAP: queue
    /// number.
    pub index: u16,
    /// Running and not broken.
    pub started: bool,
    /// Enabled by the front end.
    pub enabled: bool,
    /// Why it was stopped, if it broke.
    pub broken: Option<String>,
    /// Descriptors.
    pub size: u16,
    /// Worker that polls it (index into the worker list).
    pub worker: usize,
    /// Frames, bytes, drops of this ring alone.
    pub counters: Counters,
    /// Wake-ups by the other side.
    pub kicks: u64,
    /// Notifications sent to the other side.
    pub calls: u64,
    /// Bursts that carried at least one frame.
    pub bursts: u64,
}

/// One port, now.
#[derive(Clone, Debug)]
pub struct PortReport {
    /// Number.
    pub id: PortId,
    /// Name.
    pub name: String,
    /// Network.
    pub network: String,
    /// What is behind it.
    pub kind: PortKind,
    /// MTU in force, bytes.
    pub mtu: u16,
    /// Rings run and are enabled (guest, back end), or the TAP is open.
    pub linked: bool,
    /// Linked, and every worker that serves it has it in its list.
    pub forwarding: bool,
    /// The session, for a port with a socket.
    pub session: Option<SessionStatus>,
    /// Sums over the rings.
    pub counters: Counters,
    /// Each ring or TAP queue that ever ran.
    pub rings: Vec<RingReport>,
}

/// One worker, since it started.
#[derive(Clone, Debug)]
pub struct WorkerReport {
    /// Pinned to this lcore, if at all.
    pub cpu: Option<usize>,
    /// NUMA node of that lcore, if it is known.
    pub node: Option<u32>,
    /// Passes over its rings.
    pub turns: u64,
    /// Time spent in turns that moved frames, of all; 0.0..=1.0.
    pub busy_ratio: f64,
    /// Frames taken from ports.
    pub frames: u64,
    /// Mean frames per burst that had any.
    pub frames_per_burst: f64,
    /// Mean TSC cycles per frame in turns with work.
    pub cycles_per_frame: f64,
    /// "port/index" of what it polls.
    pub vrings: Vec<String>,
}

/// One learned address.
#[derive(Clone, Debug)]
pub struct FdbEntry {
    /// Network.
    pub network: String,
    /// Address.
    pub mac: [u8; 6],
    /// Port it was seen on.
    pub port: PortId,
    /// Name of that port.
    pub port_name: String,
    /// Seconds since the last frame from it (coarse).
    pub age_s: u32,
}
