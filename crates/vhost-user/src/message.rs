//! The codec: bytes and descriptors in, typed [`Request`]s out; replies back into bytes. No input or output of its own.
//!
//! A message is a header of three native-endian words (request, flags, size), `size` bytes of payload, and descriptors
//! that travel with the header. What a message must look like is one row of the table in `rule`: how long its payload
//! may be, how many descriptors it brings, whether it has an answer of its own, and which protocol feature it needs. An id
//! without a row is not supported, and nothing else has to know.
//!
//! The request ids, feature bits and payload structures are those of the `vhost` crate. Its `BackendReqHandler` is not
//! used, because it cannot be made tight from outside: a malformed message is consumed without an answer to NEED_REPLY,
//! half a message blocks the thread for as long as the peer likes, rejected features are stored as if accepted,
//! and SEND_RARP, NET_SET_MTU, SET_STATUS and GET_STATUS are refused.

use std::fmt;
use std::ops::RangeInclusive;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;
use vring::RegionSpec;

use crate::descriptor::Received;

/// Bytes of a message header.
pub const HEADER_LEN: usize = 12;
/// Payload bytes that any message may have; a longer one is not read.
pub const PAYLOAD_MAX: usize = 4096;
/// Descriptors that one message may bring: the kernel's limit per sendmsg (SCM_MAX_FD).
pub const DESCRIPTORS_MAX: usize = 253;
/// Regions in one SET_MEM_TABLE, with CONFIGURE_MEM_SLOTS negotiated; 8 without.
pub const TABLE_REGIONS_MAX: usize = 32;
/// Bytes of the virtio configuration space that the protocol can address (VHOST_USER_MAX_CONFIG_SIZE).
pub const CONFIG_SPACE_LEN: usize = 256;

const VERSION: u32 = 1;
const REGION_LEN: usize = size_of::<VhostUserMemoryRegion>();
const TABLE_HEADER_LEN: usize = size_of::<VhostUserMemory>();
/// offset, size and flags of GET_CONFIG and SET_CONFIG.
const CONFIG_HEADER_LEN: usize = 12;
/// In the payload of SET_VRING_{KICK,CALL,ERR}: bits 0-7 are the ring, bit 8 says that no descriptor comes along.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// The first 12 bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request id, known or not.
    pub request: u32,
    /// Version (bits 0-1), reply (2), need reply (3); the rest reserved.
    pub flags: u32,
    /// Payload bytes that follow.
    pub size: u32,
}

/// A whole message, not yet understood.
#[derive(Debug)]
pub struct Message {
    /// Its header, checked.
    pub header: Header,
    /// As many bytes as the header says.
    pub payload: Vec<u8>,
    /// What came with the header.
    pub descriptors: Vec<Received>,
}

/// What breaks the framing or the contract of a message so that the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not version 1.
    #[error("{0}: version {1}, the protocol has only version 1")]
    Version(RequestName, u32),
    /// A front end sends requests only.
    #[error("{0}: the reply flag is set on a request")]
    ReplyFlag(RequestName),
    /// Bits 4-31.
    #[error("{0}: reserved flags {1:#x} are set")]
    Flags(RequestName, u32),
    /// Payload length does not fit the request.
    #[error("{0}: payload of {1} bytes, expected {2:?}")]
    Size(RequestName, u32, RangeInclusive<usize>),
    /// Region count and payload length of SET_MEM_TABLE contradict each other.
    #[error("SET_MEM_TABLE: {regions} regions in {size} bytes")]
    Table {
        /// What the payload says.
        regions: u32,
        /// Its length in bytes.
        size: usize,
    },
    /// Descriptor count does not fit the request.
    #[error("{0}: {1} descriptors, expected {2}")]
    Descriptors(RequestName, usize, usize),
    /// Descriptors belong to the header.
    #[error("{0}: descriptors in the middle of the payload")]
    DescriptorsInPayload(RequestName),
    /// SET_PROTOCOL_FEATURES beyond the offer.
    #[error("SET_PROTOCOL_FEATURES: bits {0:#x} were not offered")]
    ProtocolFeatures(u64),
}

/// A request id that prints as the specification's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestName(pub u32);

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match FrontendReq::try_from(self.0) {
            Ok(request) => write!(f, "{request:?}"),
            Err(_) => write!(f, "request {}", self.0),
        }
    }
}

/// How many descriptors a request brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descriptors {
    None,
    One,
    /// As the payload says: NOFD flag or region count.
    ByPayload,
    /// None; one is tolerated and closed (specification, REM_MEM_REG).
    Tolerated,
}

/// Whether a request has an answer besides the acknowledgement that NEED_REPLY asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Own,
    Ack,
}

/// What a well-formed request looks like.
#[derive(Clone, Debug)]
struct Rule {
    request: FrontendReq,
    payload: RangeInclusive<usize>,
    descriptors: Descriptors,
    answer: Answer,
    feature: VhostUserProtocolFeatures,
}

/// The requests this back end supports.
#[rustfmt::skip]
fn rule(id: u32) -> Option<Rule> {
    use Answer::{Ack, Own};
    use Descriptors::{ByPayload, None as NoFd, One, Tolerated};
    use FrontendReq as R;
    use VhostUserProtocolFeatures as P;
    const TABLE_MAX: usize = TABLE_HEADER_LEN + TABLE_REGIONS_MAX * REGION_LEN;
    const CONFIG_MAX: usize = PAYLOAD_MAX;

    let request = R::try_from(id).ok()?;
    let (payload, descriptors, answer, feature) = match request {
        R::GET_FEATURES          => (0..=0,            NoFd,      Own, P::empty()),
        R::SET_FEATURES          => (8..=8,            NoFd,      Ack, P::empty()),
        R::SET_OWNER             => (0..=0,            NoFd,      Ack, P::empty()),
        R::RESET_OWNER           => (0..=0,            NoFd,      Ack, P::empty()),
        R::SET_MEM_TABLE         => (8..=TABLE_MAX,    ByPayload, Ack, P::empty()),
        R::SET_VRING_NUM         => (8..=8,            NoFd,      Ack, P::empty()),
        R::SET_VRING_ADDR        => (40..=40,          NoFd,      Ack, P::empty()),
        R::SET_VRING_BASE        => (8..=8,            NoFd,      Ack, P::empty()),
        R::GET_VRING_BASE        => (8..=8,            NoFd,      Own, P::empty()),
        R::SET_VRING_KICK        => (8..=8,            ByPayload, Ack, P::empty()),
        R::SET_VRING_CALL        => (8..=8,            ByPayload, Ack, P::empty()),
        R::SET_VRING_ERR         => (8..=8,            ByPayload, Ack, P::empty()),
        R::GET_PROTOCOL_FEATURES => (0..=0,            NoFd,      Own, P::empty()),
        R::SET_PROTOCOL_FEATURES => (8..=8,            NoFd,      Ack, P::empty()),
        // The specification allows it once MQ is *offered*; answering always hurts nobody.
        R::GET_QUEUE_NUM         => (0..=0,            NoFd,      Own, P::empty()),
        R::SET_VRING_ENABLE      => (8..=8,            NoFd,      Ack, P::empty()),
        R::SEND_RARP             => (8..=8,            NoFd,      Ack, P::RARP),
        R::NET_SET_MTU           => (8..=8,            NoFd,      Ack, P::MTU),
        R::SET_BACKEND_REQ_FD    => (0..=0,            One,       Ack, P::BACKEND_REQ),
        R::GET_CONFIG            => (12..=CONFIG_MAX,  NoFd,      Own, P::CONFIG),
        R::SET_CONFIG            => (12..=CONFIG_MAX,  NoFd,      Ack, P::CONFIG),
        R::RESET_DEVICE          => (0..=0,            NoFd,      Ack, P::RESET_DEVICE),
        R::GET_MAX_MEM_SLOTS     => (0..=0,            NoFd,      Own, P::CONFIGURE_MEM_SLOTS),
        R::ADD_MEM_REG           => (40..=40,          One,       Ack, P::CONFIGURE_MEM_SLOTS),
        R::REM_MEM_REG           => (40..=40,          Tolerated, Ack, P::CONFIGURE_MEM_SLOTS),
        R::SET_STATUS            => (8..=8,            NoFd,      Ack, P::STATUS),
        R::GET_STATUS            => (0..=0,            NoFd,      Own, P::STATUS),
        _ => return None,
    };
    Some(Rule { request, payload, descriptors, answer, feature })
}

impl Header {
    /// Reads the three words.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
        Self {
            request: u32::from_ne_bytes([a, b, c, d]),
            flags: u32::from_ne_bytes([e, f, g, h]),
            size: u32::from_ne_bytes([i, j, k, l]),
        }
    }

    /// Name of the request.
    pub fn name(&self) -> RequestName {
        RequestName(self.request)
    }

    /// Whether a front end that negotiated REPLY_ACK waits for an acknowledgement of this request. With an answer of its
    /// own, NEED_REPLY changes nothing (specification, "REPLY_ACK"): an acknowledgement would be taken for the answer.
    pub fn wants_acknowledgement(&self) -> bool {
        let need_reply = self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0;
        need_reply && rule(self.request).is_none_or(|rule| rule.answer == Answer::Ack)
    }

    /// Checks everything that can be known before the payload is read.
    pub fn check(&self, descriptors: usize) -> Result<(), Violation> {
        let name = self.name();
        let version = self.flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(Violation::Version(name, version));
        }
        if self.flags & VhostUserHeaderFlag::REPLY.bits() != 0 {
            return Err(Violation::ReplyFlag(name));
        }
        let reserved = self.flags & VhostUserHeaderFlag::RESERVED_BITS.bits();
        if reserved != 0 {
            return Err(Violation::Flags(name, reserved));
        }
        let rule = rule(self.request);
        let payload = rule.as_ref().map_or(0..=PAYLOAD_MAX, |rule| rule.payload.clone());
        if !usize::try_from(self.size).is_ok_and(|size| payload.contains(&size)) {
            return Err(Violation::Size(name, self.size, payload));
        }
        let most = match rule.map(|rule| rule.descriptors) {
            None | Some(Descriptors::None) => 0,
            Some(Descriptors::One | Descriptors::Tolerated) => 1,
            Some(Descriptors::ByPayload) => TABLE_REGIONS_MAX,
        };
        if descriptors > most { Err(Violation::Descriptors(name, descriptors, most)) } else { Ok(()) }
    }
}

/// Where a ring lies, in the front end's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddr {
    /// VHOST_VRING_F_*.
    pub flags: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
}

/// What a front end asks for. Ring indices are as wide as on the wire: they are checked before they are narrowed.
#[derive(Debug)]
#[allow(missing_docs, reason = "each variant is the message of that name in the specification")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionSpec, Received)>),
    SetVringNum { index: u32, size: u32 },
    SetVringAddr { index: u32, addr: RingAddr },
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringKick { index: u32, fd: Option<Received> },
    SetVringCall { index: u32, fd: Option<Received> },
    SetVringErr { index: u32, fd: Option<Received> },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { index: u32, enable: u32 },
    SendRarp([u8; 6]),
    NetSetMtu(u64),
    SetBackendReqFd(Received),
    GetConfig(Config),
    SetConfig(Config),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec, Received),
    RemMemReg(RegionSpec),
    SetStatus(u64),
    GetStatus,
}

/// Payload of GET_CONFIG and SET_CONFIG.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// First byte of the configuration space.
    pub offset: u32,
    /// Number of bytes, as claimed.
    pub size: u32,
    /// 0: written by the guest; 1: written by a migration.
    pub flags: u32,
    /// The bytes, as many as there really are.
    pub data: Vec<u8>,
}

impl Config {
    /// The part of the configuration space that is meant, if there is one.
    pub fn range(&self) -> Option<std::ops::Range<usize>> {
        let (offset, size) = (usize::try_from(self.offset).ok()?, usize::try_from(self.size).ok()?);
        let end = offset.checked_add(size)?;
        (size > 0 && end <= CONFIG_SPACE_LEN && self.data.len() == size).then_some(offset..end)
    }
}

/// Why a message gave no [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// The connection must end.
    Violation(Violation),
    /// No rule for this id.
    Unknown,
    /// Needs a protocol feature that was not negotiated.
    Inactive(VhostUserProtocolFeatures),
    /// Bits beyond ring index and NOFD flag, or an index that cannot be.
    RingIndex(u64),
}

impl From<Violation> for Undecodable {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl Message {
    /// Understands a message whose header passed [`Header::check`]. `active`: the negotiated protocol features.
    pub fn decode(self, active: VhostUserProtocolFeatures) -> Result<Request, Undecodable> {
        let rule = rule(self.header.request).ok_or(Undecodable::Unknown)?;
        if !active.contains(rule.feature) {
            return Err(Undecodable::Inactive(rule.feature));
        }
        let Self { header, payload, mut descriptors } = self;
        match rule.descriptors {
            Descriptors::One if descriptors.len() != 1 => {
                return Err(Violation::Descriptors(header.name(), descriptors.len(), 1).into());
            }
            Descriptors::Tolerated => descriptors.clear(),
            _ => {}
        }

        use FrontendReq as R;
        Ok(match rule.request {
            R::GET_FEATURES => Request::GetFeatures,
            R::SET_FEATURES => Request::SetFeatures(word(&payload)),
            R::SET_OWNER => Request::SetOwner,
            R::RESET_OWNER => Request::ResetOwner,
            R::SET_MEM_TABLE => Request::SetMemTable(table(&payload, descriptors)?),
            R::SET_VRING_NUM => {
                let (index, size) = ring_state(&payload);
                Request::SetVringNum { index, size }
            }
            R::SET_VRING_ADDR => {
                let (index, addr) = ring_addr(&payload);
                Request::SetVringAddr { index, addr }
            }
            R::SET_VRING_BASE => {
                let (index, base) = ring_state(&payload);
                Request::SetVringBase { index, base }
            }
            R::GET_VRING_BASE => Request::GetVringBase { index: ring_state(&payload).0 },
            R::SET_VRING_KICK => {
                let (index, fd) = ring_fd(header.name(), &payload, descriptors)?;
                Request::SetVringKick { index, fd }
            }
            R::SET_VRING_CALL => {
                let (index, fd) = ring_fd(header.name(), &payload, descriptors)?;
                Request::SetVringCall { index, fd }
            }
            R::SET_VRING_ERR => {
                let (index, fd) = ring_fd(header.name(), &payload, descriptors)?;
                Request::SetVringErr { index, fd }
            }
            R::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            R::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(word(&payload)),
            R::GET_QUEUE_NUM => Request::GetQueueNum,
            R::SET_VRING_ENABLE => {
                let (index, enable) = ring_state(&payload);
                Request::SetVringEnable { index, enable }
            }
            R::SEND_RARP => {
                // The address is the first six bytes in memory, not a number.
                let [a, b, c, d, e, f, ..] = word(&payload).to_ne_bytes();
                Request::SendRarp([a, b, c, d, e, f])
            }
            R::NET_SET_MTU => Request::NetSetMtu(word(&payload)),
            R::SET_BACKEND_REQ_FD => Request::SetBackendReqFd(only(descriptors)),
            R::GET_CONFIG => Request::GetConfig(config(payload)),
            R::SET_CONFIG => Request::SetConfig(config(payload)),
            R::RESET_DEVICE => Request::ResetDevice,
            R::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            // A single region has eight bytes of padding in front.
            R::ADD_MEM_REG => Request::AddMemReg(region(&payload[8..]), only(descriptors)),
            R::REM_MEM_REG => Request::RemMemReg(region(&payload[8..])),
            R::SET_STATUS => Request::SetStatus(word(&payload)),
            R::GET_STATUS => Request::GetStatus,
            _ => return Err(Undecodable::Unknown),
        })
    }
}

/// Appends a reply to `request` with `payload` (at most [`PAYLOAD_MAX`] bytes).
pub fn encode_reply(request: u32, payload: &[u8], out: &mut Vec<u8>) {
    let size = u32::try_from(payload.len()).expect("no reply is longer than a message may be");
    for word in [request, VERSION | VhostUserHeaderFlag::REPLY.bits(), size] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    out.extend_from_slice(payload);
}

/// Answer to GET_VRING_BASE.
pub fn ring_state_reply(index: u32, num: u32) -> Vec<u8> {
    VhostUserVringState::new(index, num).as_slice().to_vec()
}

/// Answer to GET_CONFIG.
pub fn config_reply(config: &Config, data: &[u8]) -> Vec<u8> {
    let mut reply = Vec::with_capacity(CONFIG_HEADER_LEN + data.len());
    for word in [config.offset, config.size, config.flags] {
        reply.extend_from_slice(&word.to_ne_bytes());
    }
    reply.extend_from_slice(data);
    reply
}

const LENGTH_CHECKED: &str = "the payload length was checked against the rule";

fn word(payload: &[u8]) -> u64 {
    u64::from_ne_bytes(payload[..8].try_into().expect(LENGTH_CHECKED))
}

fn ring_state(payload: &[u8]) -> (u32, u32) {
    let state = VhostUserVringState::from_slice(payload).expect(LENGTH_CHECKED);
    (state.index, state.num)
}

fn ring_addr(payload: &[u8]) -> (u32, RingAddr) {
    let addr = VhostUserVringAddr::from_slice(payload).expect(LENGTH_CHECKED);
    (
        addr.index,
        RingAddr { flags: addr.flags, desc: addr.descriptor, used: addr.used, avail: addr.available },
    )
}

fn ring_fd(
    name: RequestName,
    payload: &[u8],
    mut descriptors: Vec<Received>,
) -> Result<(u32, Option<Received>), Undecodable> {
    let word = word(payload);
    let expected = usize::from(word & NO_DESCRIPTOR == 0);
    if descriptors.len() != expected {
        return Err(Violation::Descriptors(name, descriptors.len(), expected).into());
    }
    let index = word & !NO_DESCRIPTOR;
    let index = u8::try_from(index).map_err(|_| Undecodable::RingIndex(index))?;
    Ok((u32::from(index), descriptors.pop()))
}

fn only(mut descriptors: Vec<Received>) -> Received {
    descriptors.pop().expect("the number of descriptors was checked against the rule")
}

fn region(payload: &[u8]) -> RegionSpec {
    let region = VhostUserMemoryRegion::from_slice(payload).expect(LENGTH_CHECKED);
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
    }
}

fn table(payload: &[u8], descriptors: Vec<Received>) -> Result<Vec<(RegionSpec, Received)>, Violation> {
    let (head, regions) = payload.split_at(TABLE_HEADER_LEN);
    let count = VhostUserMemory::from_slice(head).expect(LENGTH_CHECKED).num_regions;
    if usize::try_from(count).ok().and_then(|n| n.checked_mul(REGION_LEN)) != Some(regions.len()) {
        return Err(Violation::Table { regions: count, size: payload.len() });
    }
    let expected = regions.len() / REGION_LEN;
    if descriptors.len() != expected {
        let name = RequestName(FrontendReq::SET_MEM_TABLE.into());
        return Err(Violation::Descriptors(name, descriptors.len(), expected));
    }
    Ok(regions.chunks_exact(REGION_LEN).map(region).zip(descriptors).collect())
}

fn config(mut payload: Vec<u8>) -> Config {
    let data = payload.split_off(CONFIG_HEADER_LEN);
    let field = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().expect(LENGTH_CHECKED));
    Config { offset: field(0), size: field(4), flags: field(8), data }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::descriptor::Grave;

    fn header(request: u32, size: usize) -> Header {
        Header { request, flags: VERSION, size: u32::try_from(size).unwrap() }
    }

    /// A message of the least length that its rule allows, with the descriptors it must have.
    fn least(rule: &Rule, grave: &Grave) -> Message {
        let descriptors = match rule.descriptors {
            Descriptors::One => 1,
            Descriptors::ByPayload if rule.request != FrontendReq::SET_MEM_TABLE => 1,
            _ => 0,
        };
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        Message {
            header: header(rule.request.into(), *rule.payload.start()),
            payload: vec![0; *rule.payload.start()],
            descriptors: (0..descriptors).map(|_| grave.receive(null())).collect(),
        }
    }

    #[test]
    fn every_rule_decodes() {
        let grave = Grave::new();
        let rules: Vec<_> = (0..100).filter_map(rule).collect();
        assert_eq!(rules.len(), 27);
        for rule in &rules {
            let message = least(rule, &grave);
            message.header.check(message.descriptors.len()).unwrap();
            let request = message.decode(VhostUserProtocolFeatures::all());
            assert!(request.is_ok(), "{:?}: {request:?}", rule.request);
        }
    }

    #[test]
    fn requests_of_a_feature_need_it() {
        let grave = Grave::new();
        for rule in (0..100).filter_map(rule).filter(|rule| !rule.feature.is_empty()) {
            let others = VhostUserProtocolFeatures::all() - rule.feature;
            let refused = least(&rule, &grave).decode(others).unwrap_err();
            assert_eq!(refused, Undecodable::Inactive(rule.feature));
        }
    }

    #[test]
    fn replies_are_what_the_specification_draws() {
        let mut reply = Vec::new();
        encode_reply(11, &ring_state_reply(3, 0x1_0002), &mut reply);
        let words: Vec<_> =
            reply.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [11, 0b101, 8, 3, 0x1_0002]);
    }

    #[test]
    fn names_are_the_specifications_or_the_number() {
        assert_eq!(RequestName(5).to_string(), "SET_MEM_TABLE");
        assert_eq!(RequestName(4711).to_string(), "request 4711");
    }
}
