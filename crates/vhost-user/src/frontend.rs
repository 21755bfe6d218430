//! The other end: a front end for tests, benches, the demo and ports that attach to somebody else's back end.
//!
//! A thin layer over the `vhost` crate's [`Frontend`] that speaks in QEMU's order and adds the requests that the crate
//! does not have. It blocks until the back end answers. The driver's side of the rings is not in here.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vring::RegionSpec;

use crate::message::HEADER_LEN;

/// Rings that the wrapper lets through; the back end has its own opinion.
const RINGS_MAX: u64 = 256;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why a back end did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The socket failed.
    #[error("vhost-user socket: {0}")]
    Io(#[from] io::Error),
    /// The crate says so: refused by the back end, answer malformed, connection lost.
    #[error("vhost-user back end: {0}")]
    Protocol(#[from] vhost::Error),
    /// A request without an answer of its own was answered with a NACK.
    #[error("vhost-user back end refuses {0:?}")]
    Refused(FrontendReq),
    /// The answer belongs to something else, or has another length.
    #[error("vhost-user back end answers {0:?} with something else")]
    Answer(FrontendReq),
    /// It offers too little.
    #[error("vhost-user back end does not offer {0}, which is needed")]
    Lacks(&'static str),
    /// It took too long.
    #[error("vhost-user back end has not set everything up after {0:?}")]
    Slow(std::time::Duration),
}

impl FrontEndError {
    /// Whether the back end understood a request and will not do it.
    pub fn is_refusal(&self) -> bool {
        use vhost::vhost_user::Error::BackendInternalError;
        matches!(
            self,
            Self::Refused(_) | Self::Protocol(vhost::Error::VhostUserProtocol(BackendInternalError))
        )
    }
}

type Result<T> = std::result::Result<T, FrontEndError>;

/// Where a ring is, in this process's addresses, and how to go on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table, available ring, used ring.
    pub user_addrs: [u64; 3],
    /// Next available index.
    pub base: u16,
}

/// The eventfds of a ring that was set up.
#[derive(Debug)]
pub struct Bells {
    /// Driver → device.
    pub kick: EventFd,
    /// Device → driver.
    pub call: EventFd,
    /// Signalled when the ring breaks.
    pub err: EventFd,
}

/// A connected front end.
pub struct FrontEnd {
    vhost: Frontend,
    /// The same socket, for requests that the crate lacks.
    stream: UnixStream,
    /// Acknowledged features.
    features: u64,
    /// Acknowledged protocol features.
    protocol_features: VhostUserProtocolFeatures,
}

impl FrontEnd {
    /// Connects to a listening back end.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Waits for a back end that connects to us.
    pub fn accept(listener: &UnixListener) -> Result<Self> {
        Self::from_stream(listener.accept()?.0)
    }

    /// A front end on a connected socket.
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        let vhost = Frontend::from_stream(stream.try_clone()?, RINGS_MAX);
        Ok(Self { vhost, stream, features: 0, protocol_features: VhostUserProtocolFeatures::empty() })
    }

    /// Negotiates as QEMU does: what is wanted and offered is acknowledged, and every request asks for an
    /// acknowledgement from then on if the back end has them. Returns the virtio features acknowledged.
    pub fn negotiate(&mut self, features: u64, protocol_features: u64) -> Result<u64> {
        let offered = self.vhost.get_features()?;
        if offered & features & PROTOCOL_FEATURES != 0 {
            let offered = self.vhost.get_protocol_features()?;
            self.protocol_features =
                offered & VhostUserProtocolFeatures::from_bits_truncate(protocol_features);
            self.vhost.set_protocol_features(self.protocol_features)?;
        }
        self.vhost.set_owner()?;
        if self.protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.set_features(offered & features)?;
        Ok(self.features)
    }

    /// SET_FEATURES, with whatever bits.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.vhost.set_features(features)?;
        self.features = features;
        Ok(())
    }

    /// Acknowledged virtio features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Acknowledged protocol features.
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features.bits()
    }

    /// Queue pairs that the back end has.
    pub fn queue_pairs(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_QUEUE_NUM)
    }

    /// SET_MEM_TABLE.
    pub fn set_memory(&self, regions: &[(RegionSpec, BorrowedFd<'_>)]) -> Result<()> {
        let regions: Vec<_> = regions.iter().map(|(spec, fd)| region_info(spec, Some(*fd))).collect();
        self.vhost.set_mem_table(&regions)?;
        Ok(())
    }

    /// ADD_MEM_REG.
    pub fn add_memory(&mut self, region: &RegionSpec, fd: BorrowedFd<'_>) -> Result<()> {
        self.vhost.add_mem_region(&region_info(region, Some(fd)))?;
        Ok(())
    }

    /// REM_MEM_REG.
    pub fn remove_memory(&mut self, region: &RegionSpec) -> Result<()> {
        self.vhost.remove_mem_region(&region_info(region, None))?;
        Ok(())
    }

    /// Sets a ring up in QEMU's order: err, size, base, addresses, kick, call. It runs when this returns, but passes
    /// no frames before [`Self::enable`] if PROTOCOL_FEATURES was negotiated.
    pub fn start_ring(&self, index: u16, place: RingPlace) -> Result<Bells> {
        let bell = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let bells = Bells { kick: bell()?, call: bell()?, err: bell()? };
        self.start_ring_with(index, place, &bells)?;
        Ok(bells)
    }

    /// As [`Self::start_ring`], with eventfds that are there already.
    pub fn start_ring_with(&self, index: u16, place: RingPlace, bells: &Bells) -> Result<()> {
        let ring = usize::from(index);
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = place.user_addrs;
        self.vhost.set_vring_err(ring, &bells.err)?;
        self.vhost.set_vring_num(ring, place.size)?;
        self.vhost.set_vring_base(ring, place.base)?;
        let config = VringConfigData {
            queue_max_size: place.size,
            queue_size: place.size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        self.vhost.set_vring_addr(ring, &config)?;
        self.vhost.set_vring_kick(ring, &bells.kick)?;
        self.vhost.set_vring_call(ring, &bells.call)?;
        Ok(())
    }

    /// SET_VRING_ENABLE; without PROTOCOL_FEATURES rings are always enabled and this does nothing.
    pub fn enable(&mut self, index: u16, enabled: bool) -> Result<()> {
        if self.features & PROTOCOL_FEATURES != 0 {
            self.vhost.set_vring_enable(index.into(), enabled)?;
        }
        Ok(())
    }

    /// GET_VRING_BASE: stops the ring; returns where it was. Split ring: the next available index. Packed ring: positions
    /// of the next available and, in the upper half, of the next used descriptor.
    pub fn stop_ring(&self, index: u16) -> Result<u32> {
        Ok(self.vhost.get_vring_base(index.into())?)
    }

    /// RESET_DEVICE.
    pub fn reset(&mut self) -> Result<()> {
        Ok(self.vhost.reset_device()?)
    }

    /// GET_CONFIG.
    pub fn config(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        use vhost::vhost_user::message::VhostUserConfigFlags;
        let size = u32::try_from(len).map_err(|_| FrontEndError::Answer(FrontendReq::GET_CONFIG))?;
        let (_, bytes) = self.vhost.get_config(offset, size, VhostUserConfigFlags::empty(), &vec![0; len])?;
        Ok(bytes)
    }

    /// SET_BACKEND_REQ_FD; returns our end of the channel.
    pub fn open_channel(&mut self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.vhost.set_backend_request_fd(&theirs)?;
        Ok(ours)
    }

    /// SEND_RARP.
    pub fn send_rarp(&self, mac: [u8; 6]) -> Result<()> {
        let [a, b, c, d, e, f] = mac;
        self.tell(FrontendReq::SEND_RARP, u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]))
    }

    /// NET_SET_MTU.
    pub fn set_mtu(&self, mtu: u64) -> Result<()> {
        self.tell(FrontendReq::NET_SET_MTU, mtu)
    }

    /// SET_STATUS.
    pub fn set_status(&self, status: u8) -> Result<()> {
        self.tell(FrontendReq::SET_STATUS, status.into())
    }

    /// GET_STATUS.
    pub fn status(&self) -> Result<u64> {
        self.ask(FrontendReq::GET_STATUS)
    }

    /// The crate's front end, for what is not wrapped.
    pub fn vhost(&mut self) -> &mut Frontend {
        &mut self.vhost
    }

    /// A request with one number, acknowledged if that was negotiated.
    fn tell(&self, request: FrontendReq, value: u64) -> Result<()> {
        let acknowledged = self.protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let flags = if acknowledged { VhostUserHeaderFlag::NEED_REPLY.bits() } else { 0 };
        self.send(request, flags, &value.to_ne_bytes())?;
        match acknowledged {
            true if self.answer(request)? != 0 => Err(FrontEndError::Refused(request)),
            _ => Ok(()),
        }
    }

    /// A request that is answered with one number.
    fn ask(&self, request: FrontendReq) -> Result<u64> {
        self.send(request, 0, &[])?;
        self.answer(request)
    }

    fn send(&self, request: FrontendReq, flags: u32, payload: &[u8]) -> Result<()> {
        let size = u32::try_from(payload.len()).map_err(|_| FrontEndError::Answer(request))?;
        let mut message: Vec<u8> =
            [u32::from(request), 1 | flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
        message.extend_from_slice(payload);
        Ok((&self.stream).write_all(&message)?)
    }

    fn answer(&self, request: FrontendReq) -> Result<u64> {
        let mut answer = [0; HEADER_LEN + 8];
        (&self.stream).read_exact(&mut answer)?;
        let (header, value) = answer.split_at(HEADER_LEN);
        let reply = 1 | VhostUserHeaderFlag::REPLY.bits();
        let expected = [u32::from(request), reply, 8].map(u32::to_ne_bytes).concat();
        if header != expected {
            return Err(FrontEndError::Answer(request));
        }
        Ok(u64::from_ne_bytes(value.try_into().expect("eight bytes behind the header")))
    }
}

fn region_info(spec: &RegionSpec, fd: Option<BorrowedFd<'_>>) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: spec.guest_addr,
        memory_size: spec.size,
        userspace_addr: spec.user_addr,
        mmap_offset: spec.mmap_offset,
        mmap_handle: fd.map_or(-1, |fd| fd.as_raw_fd()),
    }
}
