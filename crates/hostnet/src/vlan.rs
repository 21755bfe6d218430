//! VLANs of an interface, as interfaces of their own.

use rtnetlink::LinkVlan;
use rtnetlink::packet_route::link::InfoVlan;
use tracing::info;

use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::sysctl::disable_ipv6;
use crate::tap::check_owner;
use crate::{BRIDGE_MARK, Error, HostNet};

/// Numbers that a VLAN can have (IEEE 802.1Q-2018, table 9-2: 0 is no VLAN, 4095 is reserved).
const IDS: std::ops::RangeInclusive<u16> = 1..=4094;

impl HostNet {
    /// Makes VLAN `id` of `device` if it is not there, and sets both up. One that is made bears our mark and has the MTU of
    /// `device`, no more than which it can have, or `mtu`. One that is there, whoever made it, is used as it is.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such device; [`Error::OtherVlan`], [`Error::VlanId`], [`Error::WrongKind`];
    /// [`Error::Unsupported`] by a kernel without VLANs; names out of range; what else the kernel refuses.
    pub async fn ensure_vlan(
        &self,
        name: &str,
        device: &str,
        id: u16,
        mtu: Option<u32>,
    ) -> Result<(), Error> {
        check_owner(name, BRIDGE_MARK)?;
        if !IDS.contains(&id) {
            return Err(Error::VlanId { name: name.to_owned(), id });
        }
        let _alone = self.making.lock().await;
        let below = self.link(device).await?.ok_or_else(|| Error::Missing { name: device.to_owned() })?;
        let link = match self.finished(name).await? {
            Some(link) => link,
            None => self.create_vlan(name, &below, id, mtu).await?,
        };
        match link.kind {
            Kind::Vlan(found) if found == Some(id) && link.lower == Some(below.ifindex) => {}
            Kind::Vlan(_) => {
                return Err(Error::OtherVlan { name: link.name, id, device: below.name });
            }
            kind => return Err(Error::WrongKind { name: link.name, kind, wanted: "a VLAN" }),
        }
        self.set_up(&below).await?;
        self.set_up(&link).await
    }

    /// Removes the VLAN if we made it. False if it was not removed.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_vlan(&self, name: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        match self.finished(name).await? {
            Some(LinkState { ifindex, kind: Kind::Vlan(_), alias: Some(alias), .. })
                if alias == BRIDGE_MARK =>
            {
                let removed = self.delete(name, ifindex).await?;
                if removed {
                    info!(vlan = name, ifindex, "VLAN removed");
                }
                Ok(removed)
            }
            _ => Ok(false),
        }
    }

    async fn create_vlan(
        &self,
        name: &str,
        below: &LinkState,
        id: u16,
        mtu: Option<u32>,
    ) -> Result<LinkState, Error> {
        let message = LinkVlan::new(name, below.ifindex, id).build();
        if !self.begin("make VLAN", name, message).await? {
            return Err(Error::Changed { name: name.to_owned() });
        }
        let link = self.link(name).await?.ok_or_else(|| Error::Changed { name: name.to_owned() })?;
        let edit = |message: Message| match mtu {
            Some(mtu) if mtu <= below.mtu => message.mtu(mtu),
            _ => message,
        };
        let marked = match disable_ipv6(name).await {
            Ok(()) => self.mark(&link, BRIDGE_MARK, edit).await,
            refused => refused,
        };
        if let Err(error) = marked {
            self.delete(name, link.ifindex).await?;
            return Err(error);
        }
        info!(vlan = name, ifindex = link.ifindex, device = below.name, id, "VLAN made");
        Ok(link)
    }
}

/// What the kernel says a VLAN's number is.
pub(crate) fn id_of(data: &[InfoVlan]) -> Option<u16> {
    data.iter().find_map(|info| match info {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })
}
