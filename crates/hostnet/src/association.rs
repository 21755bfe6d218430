//! Telling the switch outside of a guest: association of a port profile, as IEEE 802.1Qbg (VSI discovery) and 802.1Qbh (port
//! extension) have it.
//!
//! Both speak the same attributes of rtnetlink (linux/if_link.h, `IFLA_VF_PORTS`), and mean different listeners:
//!
//! ```text
//! 802.1Qbg   to lldpad, a process that speaks LLDP and VDP with the switch, found by its pid file
//! 802.1Qbh   to the kernel, whose driver speaks with the switch; one driver does, enic
//! ```
//!
//! Either takes the request at once, and is asked for the switch's response until there is one, at most
//! [`Listener::limit`] long. Associating once more what is associated is no change.

mod lldpad;
mod message;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage, LinkVfPort, VfPort};
use tokio::time::{Instant, sleep};
use tracing::info;

pub use self::message::{Request, Response};
use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::{Error, HostNet};

/// How often the switch's response is asked for.
const ASK_EVERY: Duration = Duration::from_millis(125);
/// Interfaces below one another: more than any sane host has.
const CHAIN_MAX: usize = 8;

/// What the switch is told of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Association {
    /// The interface that the guest's macvtap is on.
    pub device: String,
    /// The guest's address.
    pub address: [u8; 6],
    /// How the switch is to treat it.
    pub profile: Profile,
}

/// How the switch is to treat a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// IEEE 802.1Qbg: a virtual station instance (VSI) and its type.
    Qbg {
        /// Who defines the type.
        manager: u8,
        /// The type, 24 bits.
        type_id: u32,
        /// Its version.
        type_version: u8,
        /// The instance, a UUID.
        instance: [u8; 16],
    },
    /// IEEE 802.1Qbh: the name of a profile at the switch.
    Qbh {
        /// The name.
        profile: String,
        /// The guest, a UUID.
        guest: [u8; 16],
        /// The host, a UUID, if it has one.
        host: Option<[u8; 16]>,
    },
}

/// Who is asked, and for how long.
#[derive(Clone, Debug)]
pub struct Listener {
    /// lldpad's pid file.
    pub pid_file: PathBuf,
    /// Longest wait for the switch's response.
    pub limit: Duration,
}

impl Default for Listener {
    fn default() -> Self {
        Self { pid_file: "/run/lldpad.pid".into(), limit: Duration::from_secs(10) }
    }
}

/// Why the switch does not know of a guest.
#[derive(Debug, thiserror::Error)]
pub enum AssociationError {
    /// lldpad does not run.
    #[error("nobody speaks 802.1Qbg with the switch, {}: {cause}; start lldpad, and enable EVB on the device", pid_file.display())]
    NoAgent {
        /// Its pid file.
        pid_file: PathBuf,
        /// Why it is not there.
        cause: String,
    },
    /// lldpad does not answer.
    #[error("lldpad (pid {pid}) has not answered a request for {device} within {} s: restart it", limit.as_secs())]
    Silent {
        /// The interface.
        device: String,
        /// lldpad.
        pid: u32,
        /// How long.
        limit: Duration,
    },
    /// lldpad answers something that is no answer.
    #[error("lldpad (pid {pid}) has answered a request for {device} with something else: {cause}")]
    Odd {
        /// The interface.
        device: String,
        /// lldpad.
        pid: u32,
        /// What is wrong with it.
        cause: String,
    },
    /// The listener does not take the request.
    #[error("{listener} refuses to {request} {device}: {cause}; is the protocol enabled on that interface?")]
    Refused {
        /// Who.
        listener: &'static str,
        /// The interface.
        device: String,
        /// What was asked.
        request: Request,
        /// Why.
        cause: io::Error,
    },
    /// The driver has no port extension.
    #[error(
        "{device} cannot be told a port profile: its driver does not do 802.1Qbh, which takes hardware (enic)"
    )]
    NoHardware {
        /// The interface.
        device: String,
    },
    /// The switch says no.
    #[error("the switch at {device} has answered {request} with: {response}")]
    Rejected {
        /// The interface.
        device: String,
        /// What was asked.
        request: Request,
        /// What it said.
        response: Response,
    },
    /// The switch says nothing.
    #[error("the switch at {device} has not answered {request} within {} s: is the protocol enabled there?", limit.as_secs())]
    TimedOut {
        /// The interface.
        device: String,
        /// What was asked.
        request: Request,
        /// How long.
        limit: Duration,
    },
    /// The host's network.
    #[error(transparent)]
    Host(#[from] Error),
}

/// The interface that faces the switch.
struct Facing {
    name: String,
    ifindex: u32,
    /// The VLAN in which the guest is there.
    vlan: Option<u16>,
}

impl HostNet {
    /// Has the switch know of the guest. If it does not want to, or says nothing, the request is taken back.
    ///
    /// # Errors
    /// [`AssociationError`].
    pub async fn associate(&self, to: &Listener, guest: &Association) -> Result<(), AssociationError> {
        let facing = self.facing(&guest.device).await?;
        let done = self.ask(to, &facing, guest, Request::Associate).await;
        if let Err(AssociationError::TimedOut { .. } | AssociationError::Rejected { .. }) = done {
            // What matters to the caller is the switch's answer to the first request.
            let _ = self.tell(to, &facing, guest, Request::Disassociate).await;
        }
        done?;
        info!(device = guest.device, facing = facing.name, "port profile associated");
        Ok(())
    }

    /// Has the switch forget the guest. Success if there is nobody who would know of it, or no such interface any more.
    ///
    /// # Errors
    /// [`AssociationError`].
    pub async fn disassociate(&self, to: &Listener, guest: &Association) -> Result<(), AssociationError> {
        let facing = match self.facing(&guest.device).await {
            Err(AssociationError::Host(Error::Missing { .. })) => return Ok(()),
            facing => facing?,
        };
        match self.tell(to, &facing, guest, Request::Disassociate).await {
            Err(AssociationError::NoAgent { .. } | AssociationError::NoHardware { .. }) => Ok(()),
            told => told,
        }
    }

    /// The lowest interface that the device is on top of, and the first VLAN on the way.
    async fn facing(&self, device: &str) -> Result<Facing, AssociationError> {
        let missing = || Error::Missing { name: device.to_owned() };
        let mut vlan = None;
        let mut link = self.link(device).await?.ok_or_else(missing)?;
        for _ in 0..CHAIN_MAX {
            if let Kind::Vlan(number) = link.kind {
                vlan = vlan.or(number);
            }
            // The other end of a pair is not below this one.
            let Some(below) = link.lower.filter(|_| link.kind != Kind::Veth) else { break };
            let request = self.links().get().match_index(below);
            let found = self.first("look at what is below", device, request).await?;
            link = LinkState::from(&found.ok_or_else(missing)?);
        }
        Ok(Facing { name: link.name, ifindex: link.ifindex, vlan })
    }

    async fn ask(
        &self,
        to: &Listener,
        facing: &Facing,
        guest: &Association,
        request: Request,
    ) -> Result<(), AssociationError> {
        let deadline = Instant::now() + to.limit;
        self.tell(to, facing, guest, request).await?;
        loop {
            let device = || facing.name.clone();
            match self.response(to, facing, guest).await? {
                response if response.is_success() => return Ok(()),
                response if response.is_final() => {
                    return Err(AssociationError::Rejected { device: device(), request, response });
                }
                _ if Instant::now() >= deadline => {
                    return Err(AssociationError::TimedOut { device: device(), request, limit: to.limit });
                }
                _ => sleep(ASK_EVERY).await,
            }
        }
    }

    async fn tell(
        &self,
        to: &Listener,
        facing: &Facing,
        guest: &Association,
        request: Request,
    ) -> Result<(), AssociationError> {
        let attributes = message::attributes(facing.vlan, guest, request);
        if let Profile::Qbg { .. } = guest.profile {
            return lldpad::tell(to, facing, attributes, request).await;
        }
        let link = self.link(&facing.name).await?;
        let link = link.ok_or_else(|| Error::Missing { name: facing.name.clone() })?;
        let edit = |message: Message| attributes.into_iter().fold(message, Message::append_extra_attribute);
        let device = || facing.name.clone();
        self.change("set the port profile of", &link, edit).await.map_err(|error| match error {
            Error::Unsupported { .. } => AssociationError::NoHardware { device: device() },
            Error::Kernel { source, .. } => {
                AssociationError::Refused { listener: "the kernel", device: device(), request, cause: source }
            }
            error => error.into(),
        })
    }

    async fn response(
        &self,
        to: &Listener,
        facing: &Facing,
        guest: &Association,
    ) -> Result<Response, AssociationError> {
        match &guest.profile {
            Profile::Qbg { instance, .. } => {
                Ok(message::response_in(&lldpad::ask(to, facing).await?, Some(instance)))
            }
            Profile::Qbh { .. } => {
                let mut request = self.links().get().match_index(facing.ifindex);
                request.message_mut().attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
                let missing = || Error::Missing { name: facing.name.clone() };
                let link = self.first("look at the port profile of", &facing.name, request).await?;
                Ok(message::response_in(&link.ok_or_else(missing)?, None))
            }
        }
    }
}
