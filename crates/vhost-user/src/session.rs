//! The state of one connection: what was negotiated, the front end's memory, its rings. Input is a [`Message`], output
//! are reply bytes and calls to the [`Device`]; there is no socket and no clock in here.
//!
//! A request is either done, refused or a violation. A refused request is answered with a NACK if the front end asked for
//! an answer (NEED_REPLY, with REPLY_ACK negotiated) and ends the session otherwise, because a front end that believes
//! it was obeyed is worse than one that has to connect again. A violation ends the session.
//!
//! A ring starts as soon as everything it needs is there, whatever came last: features, memory, size, addresses, kick,
//! and DRIVER_OK if STATUS was negotiated.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::{BackendReq, VhostUserProtocolFeatures as P, VhostUserVirtioFeatures};
use vring::{GuestMemory, MemoryError, RegionSpec, RingError};

use crate::config::config_space;
use crate::descriptor::{Received, WrongKind};
use crate::device::{Device, Offer, Refusal};
use crate::message::{
    Config, Message, Request, RequestName, RingAddr, Undecodable, Violation, config_reply, encode_reply,
    ring_state_reply,
};
use crate::ring::{Kick, Ring};
use crate::status::RingStatus;

/// Rings of a port at the most: SET_VRING_KICK has eight bits for the index.
pub const RINGS_MAX: u16 = 256;
/// Regions in SET_MEM_TABLE without CONFIGURE_MEM_SLOTS (VHOST_MEMORY_BASELINE_NREGIONS).
const TABLE_REGIONS_BASELINE: usize = 8;
const RING_SIZE_MAX: u32 = 32768;
/// virtio 1.2, 6: VIRTIO_F_RING_PACKED.
const RING_PACKED: u64 = 1 << 34;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// virtio 1.2, 2.1: device status bits.
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// SET_CONFIG by a migration, not by the guest (VHOST_SET_CONFIG_TYPE_MIGRATION).
const CONFIG_BY_MIGRATION: u32 = 1;

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Refused {
    #[error("not supported")]
    Unknown,
    #[error("needs protocol feature {0:?}, which was not negotiated")]
    Inactive(P),
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("features cannot change while rings run: stop them with GET_VRING_BASE first")]
    FeaturesRunning,
    #[error("there is no ring {index}: the port has {rings}")]
    RingIndex { index: u64, rings: u16 },
    #[error("ring {index} is running: stop it with GET_VRING_BASE first")]
    RingRunning { index: u16 },
    #[error("{0} descriptors: use a power of two up to 32768")]
    RingSize(u32),
    #[error("ring address flags {0:#x} are not supported")]
    RingFlags(u32),
    #[error("{part} at {addr:#x} is not aligned to {align} bytes")]
    RingAlignment { part: &'static str, addr: u64, align: u64 },
    #[error("ring base {0:#x} is no split ring index")]
    RingBase(u32),
    #[error("{0} means neither enable (1) nor disable (0)")]
    Enable(u32),
    #[error("ring {index} cannot start: {cause}")]
    RingStart { index: u16, cause: RingError },
    #[error("{0} regions in one table: 8 at the most without CONFIGURE_MEM_SLOTS")]
    Regions(usize),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Descriptor(#[from] WrongKind),
    #[error("descriptors cannot be duplicated: {0}")]
    Duplicate(#[source] std::io::Error),
    #[error(transparent)]
    Device(#[from] Refusal),
    #[error("configuration space is read-only for the guest")]
    ConfigReadOnly,
    #[error("bytes {offset}+{size} are outside of the configuration space of 256")]
    ConfigRange { offset: u32, size: u32 },
    #[error("status {0:#x} has more than eight bits")]
    Status(u64),
}

/// Why a session has to end because of what a front end sent.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// Framing or contract broken.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// A refusal that nobody would hear.
    #[error("{request} refused: {cause}")]
    Refused {
        /// Which request.
        request: RequestName,
        /// Why.
        cause: Refused,
    },
}

/// A refusal that the front end was told of.
#[derive(Debug, thiserror::Error)]
#[error("{request} refused: {cause}")]
pub struct Nack {
    /// Which request.
    pub request: RequestName,
    /// Why.
    pub cause: Refused,
}

/// How a request can fail.
enum Fault {
    Refused(Refused),
    Violation(Violation),
}

impl<T: Into<Refused>> From<T> for Fault {
    fn from(refused: T) -> Self {
        Self::Refused(refused.into())
    }
}

/// Payload of a request's own answer, or `None` if it has none.
type Answer = Result<Option<Vec<u8>>, Fault>;

/// One connection's protocol state.
#[derive(Debug)]
pub struct Session {
    offer: Offer,
    /// As acknowledged; `None` before SET_FEATURES.
    features: Option<u64>,
    protocol_features: P,
    status: u8,
    memory: Arc<GuestMemory>,
    /// Grows to the highest index that was used.
    rings: Vec<Ring>,
    /// SET_BACKEND_REQ_FD: our requests to the front end.
    channel: Option<Received>,
    /// Replaced memory, to be unmapped by a thread that may take its time.
    old_memory: Vec<Arc<GuestMemory>>,
    changed: bool,
    trouble: Option<String>,
}

impl Session {
    /// The state of a fresh connection.
    pub fn new(offer: Offer) -> Self {
        Self {
            offer,
            features: None,
            protocol_features: P::empty(),
            status: 0,
            memory: Arc::default(),
            rings: Vec::new(),
            channel: None,
            old_memory: Vec::new(),
            changed: false,
            trouble: None,
        }
    }

    /// Handles one message. Replies are appended to `replies`; `Ok(Some)` is a refusal that was answered.
    pub fn handle(
        &mut self,
        device: &mut dyn Device,
        message: Message,
        replies: &mut Vec<u8>,
    ) -> Result<Option<Nack>, Fatal> {
        let header = message.header;
        let answer = match message.decode(self.protocol_features) {
            Ok(request) => self.dispatch(device, request),
            Err(Undecodable::Violation(v)) => Err(Fault::Violation(v)),
            Err(Undecodable::Unknown) => Err(Refused::Unknown.into()),
            Err(Undecodable::Inactive(feature)) => Err(Refused::Inactive(feature).into()),
            Err(Undecodable::RingIndex(index)) => Err(self.no_ring(index).into()),
        };
        // Looked at afterwards: SET_PROTOCOL_FEATURES may itself ask for the acknowledgement it switches on.
        let acknowledge = header.wants_acknowledgement() && self.protocol_features.contains(P::REPLY_ACK);
        match answer {
            Ok(Some(payload)) => encode_reply(header.request, &payload, replies),
            Ok(None) if acknowledge => encode_reply(header.request, &0u64.to_ne_bytes(), replies),
            Ok(None) => {}
            Err(Fault::Violation(violation)) => return Err(violation.into()),
            Err(Fault::Refused(cause)) if acknowledge => {
                encode_reply(header.request, &1u64.to_ne_bytes(), replies);
                return Ok(Some(Nack { request: header.name(), cause }));
            }
            Err(Fault::Refused(cause)) => return Err(Fatal::Refused { request: header.name(), cause }),
        }
        Ok(None)
    }

    fn dispatch(&mut self, device: &mut dyn Device, request: Request) -> Answer {
        match request {
            Request::GetFeatures => return number(self.offer.features),
            Request::GetProtocolFeatures => return number(self.offer.protocol_features),
            Request::GetQueueNum => return number(self.offer.queue_pairs.into()),
            Request::GetMaxMemSlots => return number(GuestMemory::REGIONS_MAX as u64),
            Request::GetStatus => return number(self.status.into()),
            Request::GetVringBase { index } => return self.stop_ring(device, index),
            Request::GetConfig(config) => return Ok(Some(read_config(device, &config))),

            // Front ends negotiate before they claim ownership, and there is only one of them on a connection.
            Request::SetOwner => {}
            Request::ResetOwner => self.disable_rings(device),
            Request::SetFeatures(features) => self.set_features(device, features)?,
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits)?,
            Request::SetMemTable(table) => self.set_mem_table(device, &table)?,
            Request::AddMemReg(region, fd) => {
                let memory = self.memory.with_region(region, fd.to_memory()?.as_fd())?;
                self.replace_memory(device, memory);
            }
            Request::RemMemReg(region) => {
                let memory = self.memory.without_region(&region)?;
                self.replace_memory(device, memory);
            }
            Request::SetVringNum { index, size } => {
                let packed = self.is_packed();
                let ring = self.stopped_ring(index)?;
                if !(1..=RING_SIZE_MAX).contains(&size) || !(packed || size.is_power_of_two()) {
                    return Err(Refused::RingSize(size).into());
                }
                ring.size = u16::try_from(size).ok();
                self.start_ring(device, index)?;
            }
            Request::SetVringAddr { index, addr } => {
                let ring = self.stopped_ring(index)?;
                check_ring_addr(&addr)?;
                ring.addr = Some(addr);
                self.start_ring(device, index)?;
            }
            Request::SetVringBase { index, base } => self.set_base(device, index, base)?,
            Request::SetVringKick { index, fd } => self.set_kick(device, index, fd)?,
            Request::SetVringCall { index, fd } => {
                let ring = self.ring(index)?;
                let (fd, copy) = eventfd_pair(fd)?;
                ring.call = fd;
                if ring.started {
                    device.set_call(narrow(index), copy);
                }
            }
            Request::SetVringErr { index, fd } => {
                let ring = self.ring(index)?;
                let (fd, copy) = eventfd_pair(fd)?;
                ring.err = fd;
                if ring.started {
                    device.set_err(narrow(index), copy);
                }
            }
            Request::SetVringEnable { index, enable } => self.enable_ring(device, index, enable)?,
            Request::SendRarp(mac) => device.send_rarp(mac)?,
            Request::NetSetMtu(mtu) => device.set_mtu(mtu)?,
            Request::SetBackendReqFd(fd) => {
                fd.check_channel()?;
                self.channel = Some(fd);
            }
            Request::SetConfig(config) => write_config(&config)?,
            Request::ResetDevice => self.reset(device),
            Request::SetStatus(status) => self.set_status(device, status)?,
        }
        Ok(None)
    }

    fn set_features(&mut self, device: &mut dyn Device, features: u64) -> Result<(), Refused> {
        let unknown = features & !self.offer.features;
        if unknown != 0 {
            return Err(Refused::Features(unknown));
        }
        if self.rings.iter().any(|ring| ring.started) {
            if self.features != Some(features) {
                return Err(Refused::FeaturesRunning);
            }
        } else {
            device.set_features(features);
            self.features = Some(features);
            self.changed = true;
        }
        if features & PROTOCOL_FEATURES == 0 {
            // Such a front end has no SET_VRING_ENABLE to undo RESET_OWNER with.
            for index in 0..self.rings.len() {
                self.switch_ring(device, index, true);
            }
        }
        self.start_rings(device);
        Ok(())
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<(), Fault> {
        let unknown = bits & !self.offer.protocol_features;
        if unknown != 0 {
            return Err(Fault::Violation(Violation::ProtocolFeatures(unknown)));
        }
        self.protocol_features = P::from_bits_retain(bits);
        self.changed = true;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        device: &mut dyn Device,
        table: &[(RegionSpec, Received)],
    ) -> Result<(), Refused> {
        if table.len() > TABLE_REGIONS_BASELINE && !self.protocol_features.contains(P::CONFIGURE_MEM_SLOTS) {
            return Err(Refused::Regions(table.len()));
        }
        let files: Result<Vec<_>, WrongKind> =
            table.iter().map(|(spec, fd)| Ok((*spec, fd.to_memory()?))).collect();
        let files = files?;
        // An empty table is refused, not "the same as none".
        if files.is_empty() || !self.memory.is_same(&files) {
            let memory = GuestMemory::map(&files)?;
            self.replace_memory(device, memory);
        }
        Ok(())
    }

    /// Whether rings are packed, as negotiated.
    fn is_packed(&self) -> bool {
        self.features.is_some_and(|features| features & RING_PACKED != 0)
    }

    /// Puts new memory in place; running rings move over before the old is let go.
    fn replace_memory(&mut self, device: &mut dyn Device, memory: GuestMemory) {
        let memory = Arc::new(memory);
        if self.rings.iter().any(|ring| ring.started) {
            device.set_memory(&memory);
        }
        self.old_memory.push(std::mem::replace(&mut self.memory, memory));
        self.changed = true;
        self.start_rings(device);
    }

    fn set_base(&mut self, device: &mut dyn Device, index: u32, base: u32) -> Result<(), Refused> {
        let packed = self.is_packed();
        let ring = self.ring(index)?;
        // A packed ring has two positions there, 15 bits and a wrap counter each.
        if !packed && base > u16::MAX.into() {
            return Err(Refused::RingBase(base));
        }
        let restart = ring.started;
        if restart {
            // Some front ends send KICK before BASE.
            device.stop_ring(narrow(index));
            ring.started = false;
        }
        ring.base = base;
        if restart { self.start_ring(device, index) } else { Ok(()) }
    }

    fn set_kick(&mut self, device: &mut dyn Device, index: u32, fd: Option<Received>) -> Result<(), Refused> {
        let ring = self.ring(index)?;
        let kick = match fd {
            Some(fd) => Kick::EventFd(fd.into_eventfd()?),
            None => Kick::Poll,
        };
        if ring.started {
            if let Some(base) = device.stop_ring(narrow(index)) {
                ring.base = base;
            }
            ring.started = false;
        }
        ring.kick = Some(kick);
        self.start_ring(device, index)
    }

    /// GET_VRING_BASE: this ring and no other.
    fn stop_ring(&mut self, device: &mut dyn Device, index: u32) -> Answer {
        let ring = self.ring(index)?;
        if std::mem::take(&mut ring.started)
            && let Some(base) = device.stop_ring(narrow(index))
        {
            ring.base = base;
        }
        ring.kick = None;
        let base = ring.base;
        self.changed = true;
        Ok(Some(ring_state_reply(index, base)))
    }

    fn enable_ring(&mut self, device: &mut dyn Device, index: u32, enable: u32) -> Result<(), Refused> {
        self.ring(index)?;
        let enable = match enable {
            0 => false,
            1 => true,
            other => return Err(Refused::Enable(other)),
        };
        self.switch_ring(device, narrow(index).into(), enable);
        Ok(())
    }

    fn switch_ring(&mut self, device: &mut dyn Device, index: usize, enable: bool) {
        let ring = &mut self.rings[index];
        if ring.enabled.replace(enable) != Some(enable) {
            self.changed = true;
            if ring.started {
                device.enable_ring(index_of(index), enable);
            }
        }
    }

    fn disable_rings(&mut self, device: &mut dyn Device) {
        for index in 0..self.rings.len() {
            self.switch_ring(device, index, false);
        }
    }

    /// Stops all rings and forgets their set-up; memory, ownership and negotiation stay.
    fn reset(&mut self, device: &mut dyn Device) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if ring.started {
                device.stop_ring(index_of(index));
            }
            ring.reset();
        }
        self.status = 0;
        self.changed = true;
    }

    fn set_status(&mut self, device: &mut dyn Device, status: u64) -> Result<(), Refused> {
        let mut status = u8::try_from(status).map_err(|_| Refused::Status(status))?;
        if status == 0 {
            self.reset(device);
            return Ok(());
        }
        if self.features.is_none() {
            // virtio 1.2, 3.1.1: a device that cannot take the features leaves FEATURES_OK off.
            status &= !FEATURES_OK;
        }
        self.status = status;
        self.start_rings(device);
        Ok(())
    }

    /// Starts whatever can start. The message that led here concerns all rings, so one that cannot start only waits.
    fn start_rings(&mut self, device: &mut dyn Device) {
        for index in 0..self.rings.len() {
            if let Err(cause) = self.start_ring(device, u32::from(index_of(index))) {
                self.trouble = Some(cause.to_string());
            }
        }
    }

    fn start_ring(&mut self, device: &mut dyn Device, index: u32) -> Result<(), Refused> {
        let ready = !self.protocol_features.contains(P::STATUS) || self.status & DRIVER_OK != 0;
        let (Some(features), true, false) = (self.features, ready, self.memory.regions().is_empty()) else {
            return Ok(());
        };
        let index = narrow(index);
        let ring = &mut self.rings[usize::from(index)];
        if ring.started {
            return Ok(());
        }
        // Specification, "Ring states": with PROTOCOL_FEATURES rings start disabled, without they cannot be disabled.
        let enabled = features & PROTOCOL_FEATURES == 0;
        let Some(setup) = ring.setup(features, enabled).map_err(Refused::Duplicate)? else { return Ok(()) };
        device.start_ring(index, setup, &self.memory).map_err(|cause| Refused::RingStart { index, cause })?;
        ring.started = true;
        self.changed = true;
        Ok(())
    }

    /// The ring at an index from the wire.
    fn ring(&mut self, index: u32) -> Result<&mut Ring, Refused> {
        if index >= u32::from(self.ring_count()) {
            return Err(self.no_ring(index.into()));
        }
        let index = usize::from(narrow(index));
        if index >= self.rings.len() {
            self.rings.resize_with(index + 1, Ring::default);
        }
        Ok(&mut self.rings[index])
    }

    fn stopped_ring(&mut self, index: u32) -> Result<&mut Ring, Refused> {
        let ring = self.ring(index)?;
        if ring.started { Err(Refused::RingRunning { index: narrow(index) }) } else { Ok(ring) }
    }

    fn no_ring(&self, index: u64) -> Refused {
        Refused::RingIndex { index, rings: self.ring_count() }
    }

    fn ring_count(&self) -> u16 {
        self.offer.queue_pairs.saturating_mul(2).min(RINGS_MAX)
    }

    /// Tells the front end to read the configuration space again, if it wants to know. A channel that does not take
    /// the message at once is given up: nothing here waits for a front end.
    pub fn config_changed(&mut self) {
        let Some(channel) = &self.channel else { return };
        if !self.protocol_features.contains(P::CONFIG) {
            return;
        }
        let mut message = Vec::new();
        for word in [u32::from(BackendReq::CONFIG_CHANGE_MSG), 1, 0] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        let sent = send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if sent != Ok(message.len()) {
            self.channel = None;
            self.trouble = Some("the front end does not read its back-end channel: given up".into());
        }
    }

    /// Ends the session: the device lets go of everything. Returns what is left to be unmapped.
    pub fn close(mut self, device: &mut dyn Device) -> Vec<Arc<GuestMemory>> {
        device.disconnected();
        self.old_memory.push(self.memory);
        self.old_memory
    }

    /// Memory that was replaced since the last call.
    pub fn take_old_memory(&mut self) -> Vec<Arc<GuestMemory>> {
        std::mem::take(&mut self.old_memory)
    }

    /// Whether something that a [`crate::SessionStatus`] shows changed since the last call.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What went wrong without a message to blame, since the last call.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// Acknowledged feature bits; `None` before SET_FEATURES.
    pub fn features(&self) -> Option<u64> {
        self.features
    }

    /// Negotiated protocol feature bits.
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features.bits()
    }

    /// The front end's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The rings that were talked about.
    pub fn rings(&self) -> Vec<RingStatus> {
        let default = self.features.is_some_and(|features| features & PROTOCOL_FEATURES == 0);
        let status = |(index, ring): (usize, &Ring)| RingStatus {
            index: index_of(index),
            size: ring.size.unwrap_or(0),
            started: ring.started,
            enabled: ring.enabled.unwrap_or(default),
        };
        self.rings.iter().enumerate().map(status).collect()
    }
}

fn number(value: u64) -> Answer {
    Ok(Some(value.to_ne_bytes().to_vec()))
}

/// A ring index that [`Session::ring`] has checked.
fn narrow(index: u32) -> u16 {
    u16::try_from(index).expect("ring indices are checked against the number of rings")
}

fn index_of(index: usize) -> u16 {
    u16::try_from(index).expect("there are at most 256 rings")
}

/// A checked eventfd and its duplicate for the device.
type EventFdPair = (Option<OwnedFd>, Option<OwnedFd>);

fn eventfd_pair(fd: Option<Received>) -> Result<EventFdPair, Refused> {
    let Some(fd) = fd else { return Ok((None, None)) };
    let fd = fd.into_eventfd()?;
    let copy = fd.try_clone().map_err(Refused::Duplicate)?;
    Ok((Some(fd), Some(copy)))
}

/// virtio 1.2, 2.7: alignment of the parts of a split ring.
fn check_ring_addr(addr: &RingAddr) -> Result<(), Refused> {
    // VHOST_VRING_F_LOG is the only flag there is, and it needs dirty logging.
    if addr.flags != 0 {
        return Err(Refused::RingFlags(addr.flags));
    }
    let parts =
        [("descriptor table", addr.desc, 16), ("available ring", addr.avail, 2), ("used ring", addr.used, 4)];
    for (part, addr, align) in parts {
        if addr % align != 0 {
            return Err(Refused::RingAlignment { part, addr, align });
        }
    }
    Ok(())
}

/// Payload of the answer to GET_CONFIG; empty is how the protocol says no.
fn read_config(device: &dyn Device, config: &Config) -> Vec<u8> {
    match config.range() {
        Some(range) => config_reply(config, &config_space(&device.config())[range]),
        None => Vec::new(),
    }
}

/// Nothing in the configuration space of a network card can be written by the guest (virtio 1.2, 5.1.4), and a
/// migration brings what the port knows better.
fn write_config(config: &Config) -> Result<(), Refused> {
    if config.range().is_none() {
        return Err(Refused::ConfigRange { offset: config.offset, size: config.size });
    }
    if config.flags == CONFIG_BY_MIGRATION { Ok(()) } else { Err(Refused::ConfigReadOnly) }
}
