//! Macvtaps: a TAP on top of another interface, made, attached to again, removed.
//!
//! Unlike a TAP it is there until somebody removes it, whoever holds it open. It has no bridge: its mode says which frames
//! reach other macvtaps on the same device, and the device is brought up, never down. In passthrough mode it has the device
//! for itself, which takes its address; the kernel gives the device its own address back when the macvtap goes.

use std::fmt;

use rtnetlink::LinkMacVtap;
use rtnetlink::packet_route::link::{InfoMacVtap, MacVtapMode};
use sys::tap::{TapError, TapQueue};
use tracing::info;

use crate::error::{EADDRNOTAVAIL, EBUSY, EINVAL};
use crate::link::{Kind, LinkState};
use crate::netlink::Message;
use crate::sysctl::disable_ipv6;
use crate::tap::{check_owner, is_ours};
use crate::{Error, HostNet, QUEUES_MAX, Tap, tap_mark};

/// Which frames reach others on the same device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MacvtapMode {
    /// Those for another macvtap of the device, at once.
    Bridge,
    /// None: all leave, and the switch outside sends back what is for a neighbour (IEEE 802.1Qbg, VEPA).
    Vepa,
    /// There are no others: it has the device, and its address, for itself.
    Passthrough,
}

impl fmt::Display for MacvtapMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "bridge",
            Self::Vepa => "vepa",
            Self::Passthrough => "passthrough",
        })
    }
}

impl From<MacvtapMode> for MacVtapMode {
    fn from(mode: MacvtapMode) -> Self {
        match mode {
            MacvtapMode::Bridge => Self::Bridge,
            MacvtapMode::Vepa => Self::Vepa,
            MacvtapMode::Passthrough => Self::Passthrough,
        }
    }
}

/// The macvtap that has to be there.
#[derive(Clone, Debug)]
pub struct MacvtapSpec {
    /// The interface's name.
    pub name: String,
    /// The plug that needs it.
    pub owner: String,
    /// The interface that it is on top of.
    pub device: String,
    /// Which frames reach others there.
    pub mode: MacvtapMode,
    /// Queues to open, 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Its MTU in bytes, at most the device's; `None` leaves it as it is (the device's, when it is made).
    pub mtu: Option<u32>,
    /// The guest's address: frames to any other do not come. `None` lets the kernel pick one.
    pub address: Option<[u8; 6]>,
}

impl HostNet {
    /// Opens the macvtap, made if it is not there, and sets it and its device up. One that is there is never made again;
    /// its address and MTU are put right.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such device; [`Error::WrongKind`], [`Error::Foreign`], [`Error::OtherPlug`],
    /// [`Error::OtherDevice`], [`Error::DeviceTaken`], [`Error::DeviceMtu`], [`Error::AddressHeld`], [`Error::Changed`]; names
    /// and numbers out of range; what the kernel refuses. Nothing is left of a macvtap that was made in vain.
    pub async fn ensure_macvtap(&self, spec: &MacvtapSpec) -> Result<Tap, Error> {
        if !(1..=QUEUES_MAX).contains(&spec.queues) {
            return Err(Error::Queues { name: spec.name.clone(), queues: spec.queues });
        }
        let (link, created) = self.place_macvtap(spec).await?;
        let opened = open_queues(spec, &link).await;
        if opened.is_err() && created {
            self.delete(&spec.name, link.ifindex).await?;
        }
        Ok(Tap { queues: opened?, ifindex: link.ifindex, created, ours: true })
    }

    /// The same for a macvtap that somebody else opens, a guest's VMM: no queue of it is opened, since the kernel gives
    /// each that is open its share of the frames. Gives its number.
    ///
    /// # Errors
    /// As [`ensure_macvtap`](Self::ensure_macvtap), but for those about queues.
    pub async fn ensure_idle_macvtap(&self, spec: &MacvtapSpec) -> Result<u32, Error> {
        Ok(self.place_macvtap(spec).await?.0.ifindex)
    }

    /// Removes the macvtap if it was made for the plug `owner`. False if there is none, or if it was not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_macvtap(&self, name: &str, owner: &str) -> Result<bool, Error> {
        let _alone = self.making.lock().await;
        match self.finished(name).await? {
            Some(LinkState { ifindex, kind: Kind::Macvtap(_), alias: Some(alias), .. })
                if alias == tap_mark(owner) =>
            {
                let removed = self.delete(name, ifindex).await?;
                if removed {
                    info!(macvtap = name, ifindex, "macvtap removed");
                }
                Ok(removed)
            }
            _ => Ok(false),
        }
    }

    async fn create_macvtap(&self, spec: &MacvtapSpec, device: &LinkState) -> Result<LinkState, Error> {
        let name = &spec.name;
        let message = LinkMacVtap::new(name, device.ifindex, spec.mode.into()).build();
        let made = self.begin("make macvtap", name, message).await.map_err(|error| match error {
            // In passthrough mode there may be no other, of either kind, and a port of a bridge can have none.
            Error::Kernel { source, .. } if matches!(source.raw_os_error(), Some(EBUSY | EINVAL)) => {
                Error::DeviceTaken { name: name.clone(), device: device.name.clone(), mode: spec.mode }
            }
            error => error,
        })?;
        if !made {
            return Err(Error::Changed { name: name.clone() });
        }
        let link = self.link(name).await?.ok_or_else(|| Error::Changed { name: name.clone() })?;
        // In passthrough mode it is made with the device's address, whatever is asked for.
        let edit = |message: Message| match spec.address {
            Some(own) => message.address(own.to_vec()),
            None => message,
        };
        if let Err(error) = self.mark(&link, &tap_mark(&spec.owner), edit).await {
            self.delete(name, link.ifindex).await?;
            return Err(held(error, spec));
        }
        info!(macvtap = name, ifindex = link.ifindex, device = device.name, mode = %spec.mode, "macvtap made");
        Ok(link)
    }

    /// One that was there: ours, and as it would be made.
    async fn found_macvtap(
        &self,
        spec: &MacvtapSpec,
        link: LinkState,
        device: &LinkState,
    ) -> Result<LinkState, Error> {
        let name = || spec.name.clone();
        let Kind::Macvtap(mode) = link.kind else {
            return Err(Error::WrongKind { name: name(), kind: link.kind, wanted: "a macvtap" });
        };
        is_ours(&spec.name, &spec.owner, false, link.alias.as_deref())?;
        if link.lower != Some(device.ifindex) || mode != Some(spec.mode) {
            return Err(Error::OtherDevice { name: name(), device: device.name.clone(), mode: spec.mode });
        }
        match spec.address {
            Some(own) if link.address != own => {
                let edit = |message: Message| message.address(own.to_vec());
                self.change("set the address of", &link, edit).await.map_err(|error| held(error, spec))?;
            }
            _ => {}
        }
        Ok(link)
    }

    /// The macvtap, made or found, as it should be and up; and whether it was made.
    async fn place_macvtap(&self, spec: &MacvtapSpec) -> Result<(LinkState, bool), Error> {
        check_owner(&spec.name, &spec.owner)?;
        let device = self.link(&spec.device).await?;
        let device = device.ok_or_else(|| Error::Missing { name: spec.device.clone() })?;
        if let Some(mtu) = spec.mtu.filter(|mtu| *mtu > device.mtu) {
            let (name, device, most) = (spec.name.clone(), device.name, device.mtu);
            return Err(Error::DeviceMtu { name, mtu, device, most });
        }
        let _alone = self.making.lock().await;
        let (link, created) = match self.finished(&spec.name).await? {
            Some(link) => (self.found_macvtap(spec, link, &device).await?, false),
            None => (self.create_macvtap(spec, &device).await?, true),
        };
        let ready = self.set_up_macvtap(spec, &link, &device).await;
        if ready.is_err() && created {
            self.delete(&spec.name, link.ifindex).await?;
        }
        ready.map(|()| (link, created))
    }

    async fn set_up_macvtap(
        &self,
        spec: &MacvtapSpec,
        link: &LinkState,
        device: &LinkState,
    ) -> Result<(), Error> {
        self.set_mtu(link, spec.mtu).await?;
        disable_ipv6(&spec.name).await?;
        self.set_up(device).await?;
        self.set_up(link).await
    }
}

/// What a virtual function's driver says when the physical one does not let it have another address.
fn held(error: Error, spec: &MacvtapSpec) -> Error {
    match error {
        Error::Kernel { source, .. } if source.raw_os_error() == Some(EADDRNOTAVAIL) => {
            Error::AddressHeld { name: spec.name.clone(), device: spec.device.clone() }
        }
        error => error,
    }
}

async fn open_queues(spec: &MacvtapSpec, link: &LinkState) -> Result<Vec<TapQueue>, Error> {
    let (name, ifindex, count) = (spec.name.clone(), link.ifindex, spec.queues);
    let address = spec.address.map_or_else(|| link.address.clone(), |own| own.to_vec());
    let open = move || -> Result<Vec<TapQueue>, TapError> {
        (0..count).map(|_| TapQueue::open_macvtap(&name, ifindex, &address)).collect()
    };
    // The driver waits for the kernel's network lock.
    let opened = tokio::task::spawn_blocking(open).await.expect("opening a macvtap does not panic");
    Ok(opened?)
}

/// What the kernel says a macvtap's mode is; `None` for one that we do not make.
pub(crate) fn mode_of(data: &[InfoMacVtap]) -> Option<MacvtapMode> {
    data.iter().find_map(|info| match info {
        InfoMacVtap::Mode(MacVtapMode::Bridge) => Some(MacvtapMode::Bridge),
        InfoMacVtap::Mode(MacVtapMode::Vepa) => Some(MacvtapMode::Vepa),
        InfoMacVtap::Mode(MacVtapMode::Passthrough) => Some(MacvtapMode::Passthrough),
        _ => None,
    })
}
