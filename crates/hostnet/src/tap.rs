//! TAPs: made, attached to again, removed.

use sys::tap::{TapError, TapQueue};
use tracing::info;

use crate::error::EBUSY;
use crate::link::{Kind, LinkState, TunState};
use crate::netlink::Message;
use crate::sysctl::disable_ipv6;
use crate::{Error, HostNet};

/// Most queues of one TAP (the kernel's MAX_TAP_QUEUES).
pub const QUEUES_MAX: u16 = 256;

/// Longest plug name in a mark; the kernel has 255 bytes for an alias.
const OWNER_MAX: usize = 200;

/// The TAP that has to be there.
#[derive(Clone, Debug)]
pub struct TapSpec {
    /// The interface's name.
    pub name: String,
    /// The plug that needs it.
    pub owner: String,
    /// Queues to open, 1 to [`QUEUES_MAX`]. A TAP made with one is made without multi-queue.
    pub queues: u16,
    /// Its MTU in bytes; `None` leaves it as it is (1500 on a TAP that is made).
    pub mtu: Option<u32>,
    /// Address that a TAP gets when it is made; `None` gives it one that leaves a bridge's alone.
    pub address: Option<[u8; 6]>,
    /// Whether a TAP that is made stays when its queues are closed. Without, it goes with this process.
    pub persistent: bool,
    /// Whether to use a TAP that we did not make, if there is one.
    pub adopt: bool,
}

/// A TAP that is there, and up.
#[derive(Debug)]
pub struct Tap {
    /// Its queues, as many as asked for, all switched on; no offload is set.
    pub queues: Vec<TapQueue>,
    /// Its number.
    pub ifindex: u32,
    /// It was made just now.
    pub created: bool,
    /// It bears the plug's mark, so [`HostNet::remove_tap`] will remove it.
    pub ours: bool,
}

/// The alias of a TAP that was made for the plug `owner`.
pub fn tap_mark(owner: &str) -> String {
    format!("{MARK}{owner}")
}

const MARK: &str = "vhostd:";

impl HostNet {
    /// Opens the TAP, made if it is not there, and sets it up. One that is there is never made again, and only its
    /// MTU and its being up are changed. One that is made gets our mark, an address that does not make a bridge
    /// change its own, and no IPv6 of the host's (the host must not speak on a guest's link).
    ///
    /// A TAP is free when nobody holds it open: that counts the caller, who keeps the queues it got.
    ///
    /// # Errors
    /// [`Error::WrongKind`], [`Error::Busy`], [`Error::Foreign`], [`Error::OtherPlug`], [`Error::OneQueue`],
    /// [`Error::Changed`]; names and numbers out of range; what the kernel refuses. Nothing is left of a TAP that was
    /// made in vain.
    pub async fn ensure_tap(&self, spec: &TapSpec) -> Result<Tap, Error> {
        check(spec)?;
        match self.link(&spec.name).await? {
            None => self.create_tap(spec).await,
            Some(link) => self.attach_tap(spec, link).await,
        }
    }

    /// The same for a TAP that somebody else opens, a guest's VMM: it is made persistent with as many queues as it may have,
    /// and left. One that is there may be in use. Gives its number.
    ///
    /// # Errors
    /// As [`ensure_tap`](Self::ensure_tap), but for those about holders.
    pub async fn ensure_idle_tap(&self, spec: &TapSpec) -> Result<u32, Error> {
        check(spec)?;
        let Some(link) = self.link(&spec.name).await? else {
            let made = TapSpec { persistent: true, ..spec.clone() };
            return Ok(self.create_tap(&made).await?.ifindex);
        };
        let Kind::Tap(tun) = link.kind else {
            return Err(Error::WrongKind { name: link.name, kind: link.kind, wanted: "a TAP" });
        };
        is_ours(&spec.name, &spec.owner, spec.adopt, link.alias.as_deref())?;
        if spec.queues > 1 && !tun.multi_queue {
            return Err(Error::OneQueue { name: link.name, queues: spec.queues });
        }
        self.set_mtu(&link, spec.mtu).await?;
        self.set_up(&link).await?;
        Ok(link.ifindex)
    }

    /// Removes the TAP if it was made for the plug `owner`. False if there is none, or if it was not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_tap(&self, name: &str, owner: &str) -> Result<bool, Error> {
        match self.link(name).await? {
            Some(LinkState { ifindex, kind: Kind::Tap(_), alias: Some(alias), .. })
                if alias == tap_mark(owner) =>
            {
                let removed = self.delete(name, ifindex).await?;
                if removed {
                    info!(tap = name, ifindex, "TAP removed");
                }
                Ok(removed)
            }
            _ => Ok(false),
        }
    }

    /// The TAP is made persistent last: until then it vanishes with its queues, whatever fails or crashes.
    async fn create_tap(&self, spec: &TapSpec) -> Result<Tap, Error> {
        let name = &spec.name;
        let queues = open_queues(spec, spec.queues > 1, true).await?;
        let link = self.link(name).await?.ok_or_else(|| Error::Missing { name: name.clone() })?;
        let address = spec.address.map_or_else(|| high_address(link.address.clone()), |own| own.to_vec());
        let edit = |message: Message| {
            let message = message.alias(tap_mark(&spec.owner)).address(address);
            if let Some(mtu) = spec.mtu { message.mtu(mtu) } else { message }
        };
        self.change("set address and MTU of", &link, edit).await?;
        disable_ipv6(name).await?;
        self.set_up(&link).await?;
        if spec.persistent {
            queues[0].set_persist(true)?;
        }
        info!(tap = name, ifindex = link.ifindex, queues = spec.queues, "TAP made");
        Ok(Tap { queues, ifindex: link.ifindex, created: true, ours: true })
    }

    async fn attach_tap(&self, spec: &TapSpec, link: LinkState) -> Result<Tap, Error> {
        let name = &spec.name;
        let Kind::Tap(tun) = link.kind else {
            return Err(Error::WrongKind { name: name.clone(), kind: link.kind, wanted: "a TAP" });
        };
        let ours = is_ours(&spec.name, &spec.owner, spec.adopt, link.alias.as_deref())?;
        // Without multi-queue the kernel refuses a second holder itself; with it, the two would share the frames. So
        // look before attaching, and again after it, for one that came between.
        if tun.queues > 0 {
            return Err(Error::Busy { name: name.clone() });
        }
        if spec.queues > 1 && !tun.multi_queue {
            return Err(Error::OneQueue { name: name.clone(), queues: spec.queues });
        }
        let queues = open_queues(spec, tun.multi_queue, false).await?;
        let now = self.link(name).await?.filter(|now| now.ifindex == link.ifindex);
        let now = now.ok_or_else(|| Error::Changed { name: name.clone() })?;
        if matches!(now.kind, Kind::Tap(TunState { queues, .. }) if queues > u32::from(spec.queues)) {
            return Err(Error::Busy { name: name.clone() });
        }
        self.set_mtu(&now, spec.mtu).await?;
        self.set_up(&now).await?;
        Ok(Tap { queues, ifindex: now.ifindex, created: false, ours })
    }
}

fn check(spec: &TapSpec) -> Result<(), Error> {
    check_owner(&spec.name, &spec.owner)?;
    if !(1..=QUEUES_MAX).contains(&spec.queues) {
        return Err(Error::Queues { name: spec.name.clone(), queues: spec.queues });
    }
    Ok(())
}

/// Whether an interface can have this name and bear that plug's mark.
pub(crate) fn check_owner(name: &str, owner: &str) -> Result<(), Error> {
    sys::tap::check_name(name)?;
    if owner.is_empty() || owner.len() > OWNER_MAX {
        return Err(Error::Owner { name: name.to_owned(), owner: owner.to_owned() });
    }
    Ok(())
}

/// Whether an interface with this alias is ours; an error if the plug may not use it.
pub(crate) fn is_ours(name: &str, owner: &str, adopt: bool, alias: Option<&str>) -> Result<bool, Error> {
    let name = name.to_owned();
    match alias.and_then(|alias| alias.strip_prefix(MARK)) {
        Some(other) if other == owner => Ok(true),
        Some(other) => Err(Error::OtherPlug { name, owner: other.to_owned() }),
        None if adopt => Ok(false),
        None => Err(Error::Foreign { name }),
    }
}

async fn open_queues(spec: &TapSpec, multi_queue: bool, create: bool) -> Result<Vec<TapQueue>, Error> {
    let (name, count) = (spec.name.clone(), spec.queues);
    let open = move || -> Result<Vec<TapQueue>, TapError> {
        (0..count)
            .map(|index| {
                if create && index == 0 {
                    TapQueue::create(&name, multi_queue)
                } else {
                    TapQueue::open(&name, multi_queue)
                }
            })
            .collect()
    };
    // The tun driver waits for the kernel's network lock.
    let opened = tokio::task::spawn_blocking(open).await.expect("opening a TAP does not panic");
    opened.map_err(|error| match error {
        TapError::Attach { name, source } if source.raw_os_error() == Some(EBUSY) => Error::Busy { name },
        TapError::Attach { name, source } => Error::kernel("attach to TAP", &name, source),
        other => Error::Tap(other),
    })
}

/// A bridge without an address of its own takes its ports' lowest, and the host's peers lose it when that changes.
/// `fe` is the highest first byte of a unicast address, and marks it as locally administered.
fn high_address(mut address: Vec<u8>) -> Vec<u8> {
    if let Some(first) = address.first_mut() {
        *first = 0xfe;
    }
    address
}
