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
//! A virtual function has no driver of its own that would: its physical function's is told, by its number.
//!
//! Either takes the request at once, and is asked for the switch's response until there is one, at most
//! [`Listener::limit`] long. Associating once more what is associated is no change. By 802.1Qbg the switch may let go of a guest at
//! any time, which a [`SwitchWatch`] tells.

mod exchange;
mod message;
mod watch;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage, LinkVfPort, VfPort};
use tokio::time::{Instant, sleep};
use tracing::info;

use self::message::Port;
pub use self::message::{Request, Response};
pub use self::watch::{LetGo, SwitchWatch};
use crate::link::{Kind, LinkState};
use crate::{Error, Function, HostNet, Pci, PciError};

/// How often the switch's response is asked for.
const ASK_EVERY: Duration = Duration::from_millis(125);
const ENXIO: i32 = 6;
/// Interfaces below one another: more than any sane host has.
const CHAIN_MAX: usize = 8;

/// What the switch is told of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Association {
    /// The interface that the guest's macvtap is on, or whose virtual function the guest has.
    pub device: String,
    /// The number of that virtual function.
    pub function: Option<u32>,
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
    /// Where an interface's physical function is looked up.
    pub pci: Pci,
    /// The netlink port of the drivers: 0, the kernel's, unless a test plays it.
    pub kernel: u32,
    /// Where lldpad tells what the switch does later, a [`SwitchWatch::port`]; 0 for nowhere.
    pub told_at: u32,
}

impl Default for Listener {
    fn default() -> Self {
        let (pid_file, limit) = ("/run/lldpad.pid".into(), Duration::from_secs(10));
        Self { pid_file, limit, pci: Pci::default(), kernel: 0, told_at: 0 }
    }
}

/// Who speaks with the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// lldpad, by its process number, which is its netlink port.
    Lldpad(u32),
    /// A driver, by the kernel's netlink port.
    Driver(u32),
}

impl Agent {
    fn port(self) -> u32 {
        match self {
            Self::Lldpad(port) | Self::Driver(port) => port,
        }
    }
}

impl fmt::Display for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lldpad(pid) => write!(f, "lldpad (pid {pid})"),
            Self::Driver(_) => f.write_str("the kernel"),
        }
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
    /// It does not answer.
    #[error("{agent} has not answered a request for {device} within {} s: restart it", limit.as_secs())]
    Silent {
        /// The interface.
        device: String,
        /// Who.
        agent: Agent,
        /// How long.
        limit: Duration,
    },
    /// It answers something that is no answer.
    #[error("{agent} has answered a request for {device} with something else: {cause}")]
    Odd {
        /// The interface.
        device: String,
        /// Who.
        agent: Agent,
        /// What is wrong with it.
        cause: String,
    },
    /// It does not take the request.
    #[error("{agent} refuses to {request} {device}: {cause}; is the protocol enabled on that interface?")]
    Refused {
        /// Who.
        agent: Agent,
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
    /// The device, or its physical function.
    #[error(transparent)]
    Device(#[from] PciError),
}

/// The interface that faces the switch.
struct Facing {
    name: String,
    ifindex: u32,
    /// The VLAN in which the guest is there.
    vlan: Option<u16>,
    /// The virtual function of its that the guest is on.
    function: Option<u32>,
}

impl Facing {
    fn new(link: LinkState) -> Self {
        Self { name: link.name, ifindex: link.ifindex, vlan: None, function: None }
    }
}

impl HostNet {
    /// Has the switch know of the guest. If it does not want to, or says nothing, the request is taken back.
    ///
    /// # Errors
    /// [`AssociationError`].
    pub async fn associate(&self, to: &Listener, guest: &Association) -> Result<(), AssociationError> {
        let facing = self.facing(to, guest).await?;
        let agent = agent(to, guest).await?;
        if facing.function.is_some() && !message::has_ports(&known(to, agent, &facing).await?) {
            // It would set the function's address before it says that it cannot do more.
            return Err(AssociationError::NoHardware { device: facing.name });
        }
        let done = until_answered(to, agent, &facing, guest, Request::Associate).await;
        if let Err(AssociationError::TimedOut { .. } | AssociationError::Rejected { .. }) = done {
            // What matters to the caller is the switch's answer to the first request.
            let _ = tell(to, agent, &facing, guest, Request::Disassociate).await;
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
        let told = async {
            let facing = self.facing(to, guest).await?;
            tell(to, agent(to, guest).await?, &facing, guest, Request::Disassociate).await
        };
        match told.await {
            Err(
                AssociationError::Host(Error::Missing { .. })
                | AssociationError::NoAgent { .. }
                | AssociationError::NoHardware { .. },
            ) => Ok(()),
            // lldpad does not speak VDP there: not configured so, or the switch does not.
            Err(AssociationError::Refused { agent: Agent::Lldpad(_), cause, .. })
                if cause.raw_os_error() == Some(ENXIO) =>
            {
                Ok(())
            }
            told => told,
        }
    }

    /// The interface that faces the switch: for a driver, that of the physical function.
    async fn facing(&self, to: &Listener, guest: &Association) -> Result<Facing, AssociationError> {
        if guest.function.is_some() {
            let link = self.found(&guest.device).await?;
            return Ok(Facing { function: guest.function, ..Facing::new(link) });
        }
        let lowest = self.lowest(&guest.device).await?;
        match guest.profile {
            Profile::Qbg { .. } => Ok(lowest),
            Profile::Qbh { .. } => self.physical(to, lowest).await,
        }
    }

    /// The lowest interface that the device is on top of, and the first VLAN on the way.
    async fn lowest(&self, device: &str) -> Result<Facing, AssociationError> {
        let missing = || Error::Missing { name: device.to_owned() };
        let mut vlan = None;
        let mut link = self.found(device).await?;
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
        Ok(Facing { vlan, ..Facing::new(link) })
    }

    /// The physical function's interface, if this is a virtual function's.
    async fn physical(&self, to: &Listener, facing: Facing) -> Result<Facing, AssociationError> {
        let (pci, name) = (to.pci.clone(), facing.name.clone());
        let found = tokio::task::spawn_blocking(move || physical_of(&pci, &name)).await;
        let Some((physical, number)) = found.expect("looking at a device does not panic")? else {
            return Ok(facing);
        };
        Ok(Facing { function: Some(number), ..Facing::new(self.found(&physical).await?) })
    }

    async fn found(&self, name: &str) -> Result<LinkState, Error> {
        self.link(name).await?.ok_or_else(|| Error::Missing { name: name.to_owned() })
    }
}

/// The physical function's interface, and the virtual one's number there.
fn physical_of(pci: &Pci, interface: &str) -> Result<Option<(String, u32)>, PciError> {
    let Some(device) = pci.device_of(interface)? else { return Ok(None) };
    let Function::Virtual { of, number } = device.function else { return Ok(None) };
    Ok(Some((pci.device(of)?.interface()?.to_owned(), number)))
}

async fn agent(to: &Listener, guest: &Association) -> Result<Agent, AssociationError> {
    match guest.profile {
        Profile::Qbg { .. } => exchange::lldpad(to).await,
        Profile::Qbh { .. } => Ok(Agent::Driver(to.kernel)),
    }
}

async fn tell(
    to: &Listener,
    agent: Agent,
    facing: &Facing,
    guest: &Association,
    request: Request,
) -> Result<(), AssociationError> {
    exchange::tell(to, agent, facing, message::attributes(facing, guest, request), request).await
}

/// What is known of the interface. The kernel tells what drivers hold about ports when asked for virtual functions.
async fn known(to: &Listener, agent: Agent, facing: &Facing) -> Result<LinkMessage, AssociationError> {
    let all = match agent {
        Agent::Lldpad(_) => Vec::new(),
        Agent::Driver(_) => vec![LinkAttribute::ExtMask(vec![LinkExtentMask::Vf])],
    };
    exchange::ask(to, agent, facing, all).await
}

/// Tells the request, and asks for the switch's response until there is one.
async fn until_answered(
    to: &Listener,
    agent: Agent,
    facing: &Facing,
    guest: &Association,
    request: Request,
) -> Result<(), AssociationError> {
    let port = match (&guest.profile, facing.function) {
        (Profile::Qbg { instance, .. }, _) => Port::Instance(instance),
        (Profile::Qbh { .. }, Some(number)) => Port::Function(number),
        (Profile::Qbh { .. }, None) => Port::Itself,
    };
    let deadline = Instant::now() + to.limit;
    tell(to, agent, facing, guest, request).await?;
    loop {
        let device = || facing.name.clone();
        match message::response_in(&known(to, agent, facing).await?, port) {
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
