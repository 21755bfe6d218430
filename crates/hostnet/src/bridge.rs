//! Linux bridges: made, joined, removed.

use rtnetlink::packet_route::link::BridgeStpState;
use rtnetlink::{LinkBridge, LinkMessageBuilder};
use tracing::info;

use crate::error::EEXIST;
use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::{Error, HostNet};

/// The alias of a bridge that we made.
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
    /// that a port forwards at once; bears our mark; and keeps its address whatever ports come and go. Of one that
    /// is there nothing else is changed.
    ///
    /// # Errors
    /// [`Error::WrongKind`]; what the kernel refuses.
    pub async fn ensure_bridge(&self, name: &str) -> Result<Bridge, Error> {
        let (link, created) = match self.link(name).await? {
            Some(link) => (bridge(link)?, false),
            None => self.create_bridge(name).await?,
        };
        self.set_up(&link).await?;
        let ours = created || link.alias.as_deref() == Some(BRIDGE_MARK);
        Ok(Bridge { ifindex: link.ifindex, created, ours })
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

    /// Removes the bridge if we made it and it has no ports. False if it was not removed.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_bridge(&self, name: &str) -> Result<bool, Error> {
        match self.link(name).await? {
            Some(LinkState { ifindex, kind: Kind::Bridge, alias: Some(alias), .. })
                if alias == BRIDGE_MARK && self.ports_of(name, ifindex).await?.is_empty() =>
            {
                let removed = self.delete(name, ifindex).await?;
                if removed {
                    info!(bridge = name, ifindex, "bridge removed");
                }
                Ok(removed)
            }
            _ => Ok(false),
        }
    }

    /// The bridge, and whether it was we who made it.
    async fn create_bridge(&self, name: &str) -> Result<(LinkState, bool), Error> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .build();
        let created = match self.add("make bridge", name, message).await {
            Ok(()) => true,
            Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(EEXIST) => false,
            Err(error) => return Err(error),
        };
        let link = self.link(name).await?.ok_or_else(|| Error::Changed { name: name.to_owned() })?;
        let link = bridge(link)?;
        if created {
            // An address that was set, even to what it is, stays.
            let edit = |message: Message| message.alias(BRIDGE_MARK).address(link.address.clone());
            if let Err(error) = self.change("mark bridge", &link, edit).await {
                self.delete(name, link.ifindex).await?;
                return Err(error);
            }
            info!(bridge = name, ifindex = link.ifindex, "bridge made");
        }
        Ok((link, created))
    }

    /// The name of a link by its number, for people.
    async fn name_of(&self, ifindex: u32) -> Result<String, Error> {
        let number = format!("interface {ifindex}");
        let found = self.first("look at", &number, self.links().get().match_index(ifindex)).await?;
        Ok(found.map_or(number, |message| LinkState::from(&message).name))
    }
}

fn bridge(link: LinkState) -> Result<LinkState, Error> {
    match link.kind {
        Kind::Bridge => Ok(link),
        kind => Err(Error::WrongKind { name: link.name, kind, wanted: "a bridge" }),
    }
}
