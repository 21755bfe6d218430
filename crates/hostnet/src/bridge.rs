//! Linux bridges: made, joined, removed.

use rtnetlink::packet_route::link::BridgeStpState;
use rtnetlink::{LinkBridge, LinkMessageBuilder};
use tracing::info;

use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::sysctl::{self, Family, disable_ipv6};
use crate::tap::{check_owner, is_ours};
use crate::{Error, HostNet, tap_mark, uplink};

/// The alias of a bridge that we made, up to what it says of an uplink.
pub const BRIDGE_MARK: &str = "vhostd";

/// A bridge that is there, and up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its number.
    pub ifindex: u32,
    /// It was made just now.
    pub created: bool,
    /// It bears our mark, so [`HostNet::remove_bridge`] will remove it.
    pub ours: bool,
}

impl HostNet {
    /// Makes the bridge if it is not there, and sets it up. One that is made has STP off and no forward delay, so
    /// that a port forwards at once; has no IPv6 of the host's and answers no ARP for addresses of its other links; bears
    /// our mark; and keeps its address whatever ports come and go. Of one that is there nothing else is changed.
    ///
    /// # Errors
    /// [`Error::WrongKind`], [`Error::OtherPlug`]; what the kernel refuses.
    pub async fn ensure_bridge(&self, name: &str) -> Result<Bridge, Error> {
        self.place_bridge(name, None).await
    }

    /// The same for a bridge that one plug has for itself, between two ports: what one sends is for the other, so one that
    /// is made forgets every address at once and does not look into multicast.
    ///
    /// # Errors
    /// As [`ensure_bridge`](Self::ensure_bridge); a plug's name that does not fit into a mark.
    pub async fn ensure_own_bridge(&self, name: &str, owner: &str) -> Result<Bridge, Error> {
        check_owner(name, owner)?;
        self.place_bridge(name, Some(owner)).await
    }

    /// Makes `name` a port of the bridge. False if it is that already.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::WrongKind`], [`Error::Enslaved`]; what the kernel refuses.
    pub async fn enslave(&self, name: &str, bridge_name: &str) -> Result<bool, Error> {
        let port = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })?;
        let bridge = match self.link(bridge_name).await? {
            Some(link) => bridge(link)?,
            None => return Err(Error::Missing { name: bridge_name.to_owned() }),
        };
        match port.master {
            Some(master) if master == bridge.ifindex => return Ok(false),
            Some(master) => {
                let (name, bridge) = (name.to_owned(), bridge.name);
                return Err(Error::Enslaved { name, bridge, master: self.name_of(master).await? });
            }
            None => {}
        }
        self.change("join a bridge with", &port, |message| message.controller(bridge.ifindex)).await?;
        info!(port = name, bridge = bridge_name, "joined");
        Ok(true)
    }

    /// Removes the bridge if we made it and it has no ports but its uplink, which gets back what the bridge had of it. False
    /// if it was not removed.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_bridge(&self, name: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        let Some(link) = self.finished(name).await? else { return Ok(false) };
        if link.kind != Kind::Bridge || !is_shared(&link) {
            return Ok(false);
        }
        let uplink = self.uplink_of(&link).await?.map(|uplink| uplink.ifindex);
        let ports = self.ports_of(name, link.ifindex).await?;
        if ports.iter().any(|port| Some(port.header.index) != uplink) {
            return Ok(false);
        }
        self.release_uplink_of(&link).await?;
        self.delete_bridge(&link).await
    }

    /// Removes a bridge that was made for the plug `owner` alone, whatever ports it has. False if there is none, or if it
    /// was not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_own_bridge(&self, name: &str, owner: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        match self.finished(name).await? {
            Some(link) if link.kind == Kind::Bridge && link.alias == Some(tap_mark(owner)) => {
                self.delete_bridge(&link).await
            }
            _ => Ok(false),
        }
    }

    async fn delete_bridge(&self, link: &LinkState) -> Result<bool, Error> {
        let removed = self.delete(&link.name, link.ifindex).await?;
        if removed {
            info!(bridge = link.name, ifindex = link.ifindex, "bridge removed");
        }
        Ok(removed)
    }

    async fn place_bridge(&self, name: &str, owner: Option<&str>) -> Result<Bridge, Error> {
        let _alone = self.making.lock().await;
        let (link, created) = match self.finished(name).await? {
            Some(link) => (bridge(link)?, false),
            None => self.create_bridge(name, owner).await?,
        };
        let is_owners = is_ours(name, owner.unwrap_or_default(), true, link.alias.as_deref())?;
        self.set_up(&link).await?;
        let ours = if owner.is_some() { is_owners } else { is_shared(&link) };
        Ok(Bridge { ifindex: link.ifindex, created, ours: created || ours })
    }

    /// The bridge, and whether it was we who made it.
    async fn create_bridge(&self, name: &str, owner: Option<&str>) -> Result<(LinkState, bool), Error> {
        let message =
            LinkMessageBuilder::<LinkBridge>::new(name).stp_state(BridgeStpState::Disabled).forward_delay(0);
        let message = if owner.is_some() { message.ageing_time(0).mcast_snooping(false) } else { message };
        let created = self.begin("make bridge", name, message.build()).await?;
        let link = self.link(name).await?.ok_or_else(|| Error::Changed { name: name.to_owned() })?;
        let link = bridge(link)?;
        if created {
            let mark = owner.map_or_else(|| BRIDGE_MARK.to_owned(), tap_mark);
            if let Err(error) = self.settle_bridge(&link, &mark).await {
                self.delete(name, link.ifindex).await?;
                return Err(error);
            }
            info!(bridge = name, ifindex = link.ifindex, "bridge made");
        }
        Ok((link, created))
    }

    async fn settle_bridge(&self, link: &LinkState, mark: &str) -> Result<(), Error> {
        disable_ipv6(&link.name).await?;
        // The host answers ARP on the bridge for addresses of the bridge only, and asks with those only: guests are to
        // learn nothing of its other links (Documentation/networking/ip-sysctl.rst).
        sysctl::set(Family::V4, &link.name, "arp_ignore", "1").await?;
        sysctl::set(Family::V4, &link.name, "arp_announce", "2").await?;
        // An address that was set, even to what it is, stays.
        self.mark(link, mark, |message: Message| message.address(link.address.clone())).await
    }

    /// The name of a link by its number, for people.
    async fn name_of(&self, ifindex: u32) -> Result<String, Error> {
        let number = format!("interface {ifindex}");
        let found = self.first("look at", &number, self.links().get().match_index(ifindex)).await?;
        Ok(found.map_or(number, |message| LinkState::from(&message).name))
    }
}

/// Whether it is a bridge that we made, for whoever needs it.
pub(crate) fn is_shared(link: &LinkState) -> bool {
    let mark = link.alias.as_deref().and_then(|alias| alias.strip_prefix(BRIDGE_MARK));
    mark.is_some_and(|rest| rest.is_empty() || uplink::in_mark(rest).is_some())
}

pub(crate) fn bridge(link: LinkState) -> Result<LinkState, Error> {
    match link.kind {
        Kind::Bridge => Ok(link),
        kind => Err(Error::WrongKind { name: link.name, kind, wanted: "a bridge" }),
    }
}
