//! A bridge's uplink: the interface of the host through which it reaches the network outside.
//!
//! A port of a bridge has no use for addresses: what comes in by it is the bridge's. So an uplink hands its own to the bridge,
//! with the routes through it and its link-layer address, by which the neighbours know the host, and gets them back when it
//! leaves. Both ways everything is added where it goes before it is taken away where it was, and all of it may be repeated:
//! whoever is killed in the middle leaves the host with its addresses twice, never without.
//!
//! Which interface it is stands in the bridge's mark from before it joins until after it has left. Only a bridge that we
//! made gets one.

use futures::StreamExt;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use tracing::info;

use crate::bridge::{bridge, is_shared};
use crate::error::{EADDRNOTAVAIL, EEXIST, ESRCH};
use crate::link::LinkState;
use crate::sysctl::{self, DISABLE_IPV6, Family};
use crate::{BRIDGE_MARK, Error, HostNet};

/// The routing table of addresses, which the kernel keeps itself (linux/rtnetlink.h, RT_TABLE_LOCAL).
const TABLE_LOCAL: u8 = 255;

/// The uplink's name in what follows [`BRIDGE_MARK`] in a bridge's alias.
pub(crate) fn in_mark(rest: &str) -> Option<&str> {
    rest.strip_prefix(" uplink ")
}

fn mark(device: &str) -> String {
    format!("{BRIDGE_MARK} uplink {device}")
}

impl HostNet {
    /// Makes `device` the uplink of a bridge that we made: its port, up, with its addresses and routes the bridge's. False
    /// if that was so already, and nothing was moved.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::WrongKind`], [`Error::Enslaved`], [`Error::OtherUplink`]; [`Error::ForeignBridge`] if
    /// the bridge is an administrator's and the device not in it; what the kernel refuses.
    pub async fn ensure_uplink(&self, device: &str, bridge_name: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        let missing = |name: &str| Error::Missing { name: name.to_owned() };
        let port = self.link(device).await?.ok_or_else(|| missing(device))?;
        let link = bridge(self.link(bridge_name).await?.ok_or_else(|| missing(bridge_name))?)?;
        if !is_shared(&link) {
            if port.master == Some(link.ifindex) {
                return Ok(false);
            }
            return Err(Error::ForeignBridge { bridge: link.name, device: port.name });
        }
        match named(&link) {
            Some(named) if named == device => {}
            Some(other) => {
                let (bridge, uplink) = (link.name.clone(), other.to_owned());
                return Err(Error::OtherUplink { bridge, device: port.name, uplink });
            }
            None => self.change("mark", &link, |message| message.alias(mark(device))).await?,
        }
        let joined = self.enslave(device, bridge_name).await?;
        self.set_up(&port).await?;
        if link.address != port.address {
            let edit = |message: crate::netlink::Message| message.address(port.address.clone());
            self.change("set the address of", &link, edit).await?;
        }
        // The host speaks on the bridge now as it did on the device.
        if let Some(value) = sysctl::get(Family::V6, device, DISABLE_IPV6).await? {
            sysctl::set(Family::V6, bridge_name, DISABLE_IPV6, &value).await?;
        }
        let moved = self.move_addresses(&port, &link).await?;
        if joined {
            info!(bridge = bridge_name, device, addresses = moved, "uplink joined");
        }
        Ok(joined || moved > 0)
    }

    /// Gives a bridge's uplink back what was its, and takes it out of the bridge. False if the bridge has none of our making.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn release_uplink(&self, bridge_name: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        match self.link(bridge_name).await? {
            Some(link) if is_shared(&link) => self.release_uplink_of(&link).await,
            _ => Ok(false),
        }
    }

    pub(crate) async fn release_uplink_of(&self, link: &LinkState) -> Result<bool, Error> {
        if named(link).is_none() {
            return Ok(false);
        }
        if let Some(device) = self.uplink_of(link).await? {
            if device.master == Some(link.ifindex) {
                self.change("take out of its bridge", &device, |message| message.nocontroller()).await?;
            }
            let moved = self.move_addresses(link, &device).await?;
            info!(bridge = link.name, device = device.name, addresses = moved, "uplink released");
        }
        sysctl::disable_ipv6(&link.name).await?;
        self.change("mark", link, |message| message.alias(BRIDGE_MARK)).await?;
        Ok(true)
    }

    /// The interface that the bridge's mark names.
    pub(crate) async fn uplink_of(&self, link: &LinkState) -> Result<Option<LinkState>, Error> {
        match named(link) {
            Some(device) => self.link(device).await,
            None => Ok(None),
        }
    }

    /// Moves global addresses and the routes through the device; gives how many addresses.
    async fn move_addresses(&self, from: &LinkState, to: &LinkState) -> Result<usize, Error> {
        let addresses = self.addresses_of(from).await?;
        let routes = self.routes_through(from, to).await?;
        for address in &addresses {
            let request = RouteNetlinkMessage::NewAddress(readdressed(address, from, to));
            self.append("give an address to", &to.name, request).await?;
        }
        for route in &routes {
            let request = RouteNetlinkMessage::NewRoute(rerouted(route, to));
            self.append("give a route to", &to.name, request).await?;
        }
        for route in routes {
            let request = self.handle().route().del(route).execute();
            gone(self.alter("take a route from", &from.name, request).await)?;
        }
        for address in &addresses {
            let request = self.handle().address().del(address.clone()).execute();
            gone(self.alter("take an address from", &from.name, request).await)?;
        }
        Ok(addresses.len())
    }

    async fn addresses_of(&self, link: &LinkState) -> Result<Vec<AddressMessage>, Error> {
        let request = self.handle().address().get().set_link_index_filter(link.ifindex);
        let all: Vec<_> = self.dump("list the addresses of", &link.name, || request.execute()).await?;
        Ok(all.into_iter().filter(|address| address.header.scope == AddressScope::Universe).collect())
    }

    /// The routes through a link that somebody set, those first that others need for their gateways. Routes of several
    /// paths, and those by a next hop object, are not of one link, and stay; but for one that was on its way `to` another.
    async fn routes_through(&self, link: &LinkState, to: &LinkState) -> Result<Vec<RouteMessage>, Error> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let request = self.handle().route().get(request);
            let all: Vec<RouteMessage> =
                self.dump("list the routes of", &link.name, || request.execute()).await?;
            let single = all.into_iter().map(|route| half_moved(&route, link, to).unwrap_or(route));
            routes.extend(single.filter(|route| is_through(route, link.ifindex)));
        }
        routes.sort_by_key(|route| {
            route.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
        });
        Ok(routes)
    }

    /// Adds an address or a route beside those that are there. One that is there already is no error.
    async fn append(
        &self,
        doing: &'static str,
        name: &str,
        request: RouteNetlinkMessage,
    ) -> Result<(), Error> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let send = async {
            let mut answers = self.handle().clone().request(message)?;
            while let Some(message) = answers.next().await {
                if let rtnetlink::packet_core::NetlinkPayload::Error(error) = message.payload
                    && error.code.is_some()
                {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
            }
            Ok(())
        };
        match self.alter(doing, name, send).await {
            Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(EEXIST) => Ok(()),
            result => result,
        }
    }
}

/// The uplink that a bridge's mark names.
fn named(link: &LinkState) -> Option<&str> {
    link.alias.as_deref()?.strip_prefix(BRIDGE_MARK).and_then(in_mark)
}

/// The path through `from` of a route of two, the other of which is the same through `to`. As which the kernel has an IPv6 route
/// that was added there and not yet taken away here: it joins those of one destination that have gateways. Either path can be
/// taken away by itself.
fn half_moved(route: &RouteMessage, from: &LinkState, to: &LinkState) -> Option<RouteMessage> {
    let hops = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops.as_slice()),
        _ => None,
    })?;
    let through = |link: &LinkState| hops.iter().find(|hop| hop.interface_index == link.ifindex);
    let (here, there) = (through(from)?, through(to)?);
    if hops.len() != 2 || here.attributes != there.attributes {
        return None;
    }
    let mut path = route.clone();
    path.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::MultiPath(_)));
    path.attributes.push(RouteAttribute::Oif(from.ifindex));
    path.attributes.extend(here.attributes.iter().cloned());
    Some(path)
}

fn is_through(route: &RouteMessage, ifindex: u32) -> bool {
    let RouteHeader { protocol, kind, table, flags, .. } = route.header;
    let by_hop = |a: &RouteAttribute| matches!(a, RouteAttribute::NhId(_) | RouteAttribute::MultiPath(_));
    route.attributes.contains(&RouteAttribute::Oif(ifindex))
        && !route.attributes.iter().any(by_hop)
        && kind == RouteType::Unicast
        && table != TABLE_LOCAL
        && !flags.contains(RouteFlags::Cloned)
        // The kernel's own come and go with the addresses.
        && !matches!(protocol, RouteProtocol::Kernel | RouteProtocol::IcmpRedirect)
}

/// The address, as it is to be on another link.
fn readdressed(address: &AddressMessage, from: &LinkState, to: &LinkState) -> AddressMessage {
    let mut moved = address.clone();
    moved.header.index = to.ifindex;
    // What the kernel says of an address that it has, and not what one can ask for. It is known to be nobody else's.
    let state = AddressFlags::Permanent
        | AddressFlags::Secondary
        | AddressFlags::Tentative
        | AddressFlags::Deprecated
        | AddressFlags::Dadfailed;
    moved.header.flags = AddressHeaderFlags::empty();
    for attribute in &mut moved.attributes {
        match attribute {
            AddressAttribute::Flags(flags) => *flags = flags.difference(state) | AddressFlags::Nodad,
            // Old programs know an address by its label, which begins with the link's name.
            AddressAttribute::Label(label) if *label == from.name => label.clone_from(&to.name),
            _ => {}
        }
    }
    moved
}

/// The route, as it is to be through another link.
fn rerouted(route: &RouteMessage, to: &LinkState) -> RouteMessage {
    let mut moved = route.clone();
    moved.header.flags &= RouteFlags::Onlink;
    for attribute in &mut moved.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            *index = to.ifindex;
        }
    }
    moved.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    moved
}

/// What was to be taken away may have gone by itself.
fn gone(removed: Result<(), Error>) -> Result<(), Error> {
    match removed {
        Err(Error::Kernel { source, .. }) if matches!(source.raw_os_error(), Some(ESRCH | EADDRNOTAVAIL)) => {
            Ok(())
        }
        result => result,
    }
}
