//! Veth pairs: a cable between two places of the host, a Linux bridge and Open vSwitch above all.

use rtnetlink::LinkVeth;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use tracing::info;

use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::sysctl::disable_ipv6;
use crate::tap::{check_owner, is_ours};
use crate::{Error, HostNet, tap_mark};

/// The pair that has to be there.
#[derive(Clone, Debug)]
pub struct VethSpec {
    /// Names of its two ends.
    pub ends: [String; 2],
    /// The plug that needs it.
    pub owner: String,
    /// MTU of both, in bytes; `None` leaves it as it is (1500 on a pair that is made).
    pub mtu: Option<u32>,
}

/// A pair that is there, both ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Veth {
    /// Numbers of the ends.
    pub ifindexes: [u32; 2],
    /// It was made just now.
    pub created: bool,
}

impl HostNet {
    /// Makes the pair if it is not there, with our mark on both ends, no IPv6 of the host's, and every frame taken in
    /// whatever its address. One that is there is made anew only if one of its ends has gone elsewhere; otherwise only its
    /// MTU and its being up are changed.
    ///
    /// # Errors
    /// [`Error::WrongKind`], [`Error::Foreign`], [`Error::OtherPlug`], [`Error::Changed`]; names out of range; what the
    /// kernel refuses. Nothing is left of a pair that was made in vain.
    pub async fn ensure_veth(&self, spec: &VethSpec) -> Result<Veth, Error> {
        for end in &spec.ends {
            check_owner(end, &spec.owner)?;
        }
        let _alone = self.making.lock().await;
        let found = [self.veth_end(spec, 0).await?, self.veth_end(spec, 1).await?];
        let (ends, created) = match found {
            [Some(a), Some(b)] if a.lower == Some(b.ifindex) => ([a, b], false),
            // The end that stayed goes, and its peer with it, wherever that is.
            halves => {
                for half in halves.iter().flatten() {
                    self.delete(&half.name, half.ifindex).await?;
                }
                (self.create_veth(spec).await?, true)
            }
        };
        for end in &ends {
            self.set_mtu(end, spec.mtu).await?;
            self.set_up(end).await?;
        }
        Ok(Veth { ifindexes: [ends[0].ifindex, ends[1].ifindex], created })
    }

    /// Removes the pair if it was made for the plug `owner`, by either end. False if there is none, or if it was not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_veth(&self, ends: &[String; 2], owner: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        let mut removed = false;
        for end in ends {
            match self.finished(end).await? {
                Some(LinkState { ifindex, kind: Kind::Veth, alias: Some(alias), .. })
                    if alias == tap_mark(owner) =>
                {
                    removed |= self.delete(end, ifindex).await?;
                }
                _ => {}
            }
        }
        if removed {
            info!(ends = ends.join(" "), "veth pair removed");
        }
        Ok(removed)
    }

    /// An end that is there, if it is ours.
    async fn veth_end(&self, spec: &VethSpec, end: usize) -> Result<Option<LinkState>, Error> {
        let Some(link) = self.finished(&spec.ends[end]).await? else { return Ok(None) };
        if link.kind != Kind::Veth {
            return Err(Error::WrongKind {
                name: link.name,
                kind: link.kind,
                wanted: "an end of a veth pair",
            });
        }
        is_ours(&link.name, &spec.owner, false, link.alias.as_deref())?;
        Ok(Some(link))
    }

    async fn create_veth(&self, spec: &VethSpec) -> Result<[LinkState; 2], Error> {
        let [name, peer] = &spec.ends;
        if !self.begin("make veth pair", name, message(spec)).await? {
            return Err(Error::Changed { name: name.clone() });
        }
        match self.mark_veth(spec).await {
            Ok(ends) => {
                info!(ends = format!("{name} {peer}"), "veth pair made");
                Ok(ends)
            }
            Err(error) => {
                if let Some(link) = self.link(name).await? {
                    self.delete(name, link.ifindex).await?;
                }
                Err(error)
            }
        }
    }

    async fn mark_veth(&self, spec: &VethSpec) -> Result<[LinkState; 2], Error> {
        let mut ends = Vec::new();
        // The first end last: until it bears its mark the pair is one that is being made.
        for name in spec.ends.iter().rev() {
            let link = self.link(name).await?.ok_or_else(|| Error::Changed { name: name.clone() })?;
            disable_ipv6(name).await?;
            let edit = |message: Message| message.promiscuous(true);
            self.mark(&link, &tap_mark(&spec.owner), edit).await?;
            ends.push(link);
        }
        ends.reverse();
        Ok(ends.try_into().expect("a pair has two ends"))
    }
}

fn message(spec: &VethSpec) -> LinkMessage {
    let [name, peer] = &spec.ends;
    let mut message = LinkVeth::new(name, peer).build();
    let Some(mtu) = spec.mtu else { return message };
    // Both at once: the kernel passes no frame between ends of different MTUs.
    message.attributes.push(LinkAttribute::Mtu(mtu));
    for attribute in &mut message.attributes {
        let LinkAttribute::LinkInfo(info) = attribute else { continue };
        for info in info {
            if let LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))) = info {
                peer.attributes.push(LinkAttribute::Mtu(mtu));
            }
        }
    }
    message
}
