//! A link as the kernel describes it.

use std::fmt;

use rtnetlink::packet_core::Nla;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use crate::macvtap::{self, MacvtapMode};
use crate::netlink::Message;
use crate::vlan;
use crate::{Error, HostNet};

/// One interface at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Its number: never reused while the interface lives, whatever its name.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Largest payload of a frame, in bytes.
    pub mtu: u32,
    /// The administrator wants it up.
    pub up: bool,
    /// Its other side is there; for a TAP, somebody holds it open. False while it is not up.
    pub carrier: bool,
    /// The number of the bridge or other device that it is a port of.
    pub master: Option<u32>,
    /// The number of the interface that it is on top of (macvtap, VLAN), or whose other end it is (veth).
    pub lower: Option<u32>,
    /// What somebody wrote about it.
    pub alias: Option<String>,
    /// The group that it is in (`ip link show`), 0 unless somebody put it into another.
    pub group: u32,
    /// Its link-layer address, as long as its kind has them.
    pub address: Vec<u8>,
}

/// What an interface is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TAP.
    Tap(TunState),
    /// A Linux bridge.
    Bridge,
    /// A macvtap, and its mode if it is one that we know.
    Macvtap(Option<MacvtapMode>),
    /// One end of a veth pair.
    Veth,
    /// A VLAN of another interface, by its number.
    Vlan(Option<u16>),
    /// Something else, by the kernel's name for it. Empty for a NIC and for the loopback, which have none.
    Other(String),
}

/// What the tun driver says of a TAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunState {
    /// It stays when nobody holds it.
    pub persistent: bool,
    /// It can have more than one queue.
    pub multi_queue: bool,
    /// Queues that somebody holds, switched on or off; 0 where the kernel does not tell (no multi-queue).
    pub queues: u32,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(_) => f.write_str("a TAP"),
            Self::Bridge => f.write_str("a bridge"),
            Self::Macvtap(_) => f.write_str("a macvtap"),
            Self::Veth => f.write_str("an end of a veth pair"),
            Self::Vlan(_) => f.write_str("a VLAN"),
            Self::Other(kind) if kind.is_empty() => f.write_str("a device of its own (NIC or loopback)"),
            Self::Other(kind) => write!(f, "of kind {kind}"),
        }
    }
}

impl HostNet {
    /// The link of that name, if there is one.
    ///
    /// # Errors
    /// A name that no interface can have; [`Error::NoAnswer`], [`Error::Kernel`].
    pub async fn link(&self, name: &str) -> Result<Option<LinkState>, Error> {
        sys::tap::check_name(name)?;
        let request = self.links().get().match_name(name);
        let answer = self.first("look at", name, request).await?;
        Ok(answer.map(|message| LinkState::from(&message)))
    }

    /// All links.
    ///
    /// # Errors
    /// [`Error::NoAnswer`], [`Error::Kernel`].
    pub async fn all_links(&self) -> Result<Vec<LinkState>, Error> {
        let all = self.every("list", "all interfaces", self.links().get()).await?;
        Ok(all.iter().map(LinkState::from).collect())
    }

    /// Sets the link up and gives it this MTU, where it has not.
    ///
    /// # Errors
    /// [`Error::Missing`]; what the kernel refuses.
    pub async fn set_right(&self, name: &str, mtu: Option<u32>) -> Result<(), Error> {
        let link = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })?;
        self.set_mtu(&link, mtu).await?;
        self.set_up(&link).await
    }

    /// Gives the link this MTU, if it has another.
    pub(crate) async fn set_mtu(&self, link: &LinkState, mtu: Option<u32>) -> Result<(), Error> {
        let Some(mtu) = mtu.filter(|&mtu| mtu != link.mtu) else { return Ok(()) };
        self.change("set the MTU of", link, |message| message.mtu(mtu)).await
    }

    /// Sets the link up, if it is not.
    pub(crate) async fn set_up(&self, link: &LinkState) -> Result<(), Error> {
        if link.up {
            return Ok(());
        }
        self.change("set up", link, Message::up).await
    }
}

impl From<&LinkMessage> for LinkState {
    fn from(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            ifindex: message.header.index,
            name: String::new(),
            kind: Kind::Other(String::new()),
            mtu: 0,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            master: None,
            lower: None,
            alias: None,
            group: 0,
            address: Vec::new(),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(0) => {}
                LinkAttribute::Controller(index) => link.master = Some(*index),
                LinkAttribute::Link(index) => link.lower = Some(*index),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Group(group) => link.group = *group,
                LinkAttribute::Address(address) => link.address.clone_from(address),
                LinkAttribute::LinkInfo(info) => link.kind = Kind::from(info.as_slice()),
                _ => {}
            }
        }
        link
    }
}

impl From<&[LinkInfo]> for Kind {
    fn from(info: &[LinkInfo]) -> Self {
        let kind = info.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        });
        match kind {
            Some(InfoKind::Bridge) => Self::Bridge,
            Some(InfoKind::MacVtap) => Self::Macvtap(info.iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::MacVtap(data)) => macvtap::mode_of(data),
                _ => None,
            })),
            Some(InfoKind::Veth) => Self::Veth,
            Some(InfoKind::Vlan) => Self::Vlan(info.iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::Vlan(data)) => vlan::id_of(data),
                _ => None,
            })),
            Some(InfoKind::Tun) => tun(info).map_or_else(|| Self::Other("tun".to_owned()), Self::Tap),
            Some(kind) => Self::Other(kind.to_string()),
            None => Self::Other(String::new()),
        }
    }
}

/// A TAP, or `None` for a device of the tun driver that carries IP packets instead of frames.
fn tun(info: &[LinkInfo]) -> Option<TunState> {
    // linux/if_link.h: IFLA_TUN_…; linux/if_tun.h: IFF_TAP.
    const TYPE: u16 = 3;
    const PERSIST: u16 = 6;
    const MULTI_QUEUE: u16 = 7;
    const NUM_QUEUES: u16 = 8;
    const NUM_DISABLED_QUEUES: u16 = 9;
    const IFF_TAP: u8 = 2;

    let mut state = TunState::default();
    let mut frames = false;
    let data = info.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Tun(data)) => Some(data),
        _ => None,
    });
    for attribute in data? {
        let InfoTun::Other(attribute) = attribute else { continue };
        let mut value = vec![0; attribute.value_len()];
        attribute.emit_value(&mut value);
        match (attribute.kind(), value.as_slice()) {
            (TYPE, [kind]) => frames = *kind == IFF_TAP,
            (PERSIST, [set]) => state.persistent = *set != 0,
            (MULTI_QUEUE, [set]) => state.multi_queue = *set != 0,
            (NUM_QUEUES | NUM_DISABLED_QUEUES, &[a, b, c, d]) => {
                state.queues = state.queues.saturating_add(u32::from_ne_bytes([a, b, c, d]));
            }
            _ => {}
        }
    }
    frames.then_some(state)
}
