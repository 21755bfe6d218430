//! Interfaces that we did not make, of devices that a guest is to have: whether the host needs them itself, and their names.

use std::fmt;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use tracing::info;

use crate::error::{EBUSY, EEXIST};
use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::sysctl::{self, DISABLE_IPV6, Family};
use crate::{Error, HostNet};

/// What the host does with an interface, which it could not do any more without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// It is a port of this bridge or bond.
    Port(String),
    /// This interface is on top of it.
    Below(String),
    /// The host is reached at this address.
    Address(String),
    /// The host reaches the world through it.
    DefaultRoute,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(master) => write!(f, "it is a port of {master}"),
            Self::Below(upper) => write!(f, "{upper} is on top of it"),
            Self::Address(address) => write!(f, "it has address {address}"),
            Self::DefaultRoute => f.write_str("a default route leads through it"),
        }
    }
}

impl HostNet {
    /// What the host does with the interface. Addresses that the kernel made up (link-local ones) are no use.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::NoAnswer`], [`Error::Kernel`].
    pub async fn uses(&self, name: &str) -> Result<Vec<Use>, Error> {
        let link = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })?;
        let links = self.all_links().await?;
        let mut uses = Vec::new();
        for other in &links {
            if Some(other.ifindex) == link.master {
                uses.push(Use::Port(other.name.clone()));
            }
            // The other end of a pair is not on top of this one.
            if other.lower == Some(link.ifindex) && other.kind != Kind::Veth {
                uses.push(Use::Below(other.name.clone()));
            }
        }
        uses.extend(self.addresses(&link).await?.into_iter().map(Use::Address));
        if self.has_default_route(&link).await? {
            uses.push(Use::DefaultRoute);
        }
        Ok(uses)
    }

    /// Refuses an interface that the host uses.
    ///
    /// # Errors
    /// [`Error::InUse`]; as for [`uses`](Self::uses).
    pub async fn refuse_used(&self, name: &str) -> Result<(), Error> {
        let uses: Vec<String> = self.uses(name).await?.iter().map(ToString::to_string).collect();
        if uses.is_empty() {
            return Ok(());
        }
        Err(Error::InUse { name: name.to_owned(), uses: uses.join(", ") })
    }

    /// Gives the interface another name.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NameTaken`]; what the kernel refuses.
    pub async fn rename(&self, name: &str, to: &str) -> Result<(), Error> {
        sys::tap::check_name(to)?;
        let link = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })?;
        let renamed = match self.change("rename", &link, |message| message.name(to)).await {
            // Before Linux 6.2 one that is up keeps its name.
            Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(EBUSY) => {
                self.change("set down", &link, Message::down).await?;
                let renamed = self.change("rename", &link, |message| message.name(to)).await;
                self.change("set up", &link, Message::up).await?;
                renamed
            }
            renamed => renamed,
        };
        renamed.map_err(|error| match error {
            Error::Kernel { source, .. } if source.raw_os_error() == Some(EEXIST) => {
                Error::NameTaken { name: name.to_owned(), to: to.to_owned() }
            }
            error => error,
        })?;
        info!(from = name, to, ifindex = link.ifindex, "interface renamed");
        Ok(())
    }

    /// Sets the interface up or down, with this MTU in bytes, if it is not so.
    ///
    /// # Errors
    /// [`Error::Missing`]; what the kernel refuses.
    pub async fn set_interface(&self, name: &str, up: bool, mtu: u32) -> Result<(), Error> {
        let link = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })?;
        self.set_mtu(&link, Some(mtu)).await?;
        match (link.up, up) {
            (false, true) => self.set_up(&link).await,
            (true, false) => self.change("set down", &link, Message::down).await,
            _ => Ok(()),
        }
    }

    /// Whether the host speaks IPv6 on the interface. False in a kernel without IPv6.
    ///
    /// # Errors
    /// [`Error::Sysctl`].
    pub async fn speaks_ipv6(&self, name: &str) -> Result<bool, Error> {
        let disabled = sysctl::get(Family::V6, name, DISABLE_IPV6).await?;
        Ok(disabled.is_some_and(|disabled| disabled == "0"))
    }

    /// Has the host speak IPv6 on the interface, or not.
    ///
    /// # Errors
    /// [`Error::Sysctl`].
    pub async fn set_ipv6(&self, name: &str, speaks: bool) -> Result<(), Error> {
        sysctl::set(Family::V6, name, DISABLE_IPV6, if speaks { "0" } else { "1" }).await
    }

    async fn addresses(&self, link: &LinkState) -> Result<Vec<String>, Error> {
        let request = self.handle().address().get().set_link_index_filter(link.ifindex);
        let found: Vec<AddressMessage> =
            self.dump("list addresses of", &link.name, || request.execute()).await?;
        let given = found.iter().filter(|message| {
            message.header.index == link.ifindex && message.header.scope != AddressScope::Link
        });
        let text = |message: &AddressMessage| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(address.to_string()),
                _ => None,
            })
        };
        Ok(given.filter_map(text).collect())
    }

    async fn has_default_route(&self, link: &LinkState) -> Result<bool, Error> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let request = self.handle().route().get(message);
            let routes: Vec<RouteMessage> =
                self.dump("list routes through", &link.name, || request.execute()).await?;
            let leads = |route: &RouteMessage| {
                route.header.destination_prefix_length == 0
                    && route.attributes.iter().any(|attribute| match attribute {
                        RouteAttribute::Oif(index) => *index == link.ifindex,
                        RouteAttribute::MultiPath(hops) => {
                            hops.iter().any(|hop| hop.interface_index == link.ifindex)
                        }
                        _ => false,
                    })
            };
            if routes.iter().any(leads) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
