//! What a session knows of one ring.
//!
//! A ring collects size, addresses, base and descriptors in any order, and can start once size, addresses and kick are
//! there. It keeps its descriptors and hands out duplicates, so that it can be started again without being told
//! everything again.

use std::io;
use std::os::fd::OwnedFd;

use vring::RingSetup;

use crate::message::RingAddr;

/// How a guest tells us of new buffers.
#[derive(Debug)]
pub(crate) enum Kick {
    EventFd(OwnedFd),
    /// The front end passed no descriptor: the ring is polled.
    Poll,
}

/// State of one ring.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    pub(crate) size: Option<u16>,
    pub(crate) addr: Option<RingAddr>,
    /// Where to go on: from SET_VRING_BASE, or where the ring last stopped.
    pub(crate) base: u32,
    pub(crate) kick: Option<Kick>,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) err: Option<OwnedFd>,
    /// As the front end said last; `None`: it never did.
    pub(crate) enabled: Option<bool>,
    /// The device runs it (or it broke there).
    pub(crate) started: bool,
}

impl Ring {
    /// What the device needs to start the ring, or `None` if something is missing. `enabled`: what to assume if the
    /// front end never said.
    pub(crate) fn setup(&self, features: u64, enabled: bool) -> io::Result<Option<RingSetup>> {
        let (Some(size), Some(addr), Some(kick)) = (self.size, self.addr, &self.kick) else {
            return Ok(None);
        };
        let kick = match kick {
            Kick::EventFd(fd) => Some(fd.try_clone()?),
            Kick::Poll => None,
        };
        let call = self.call.as_ref().map(OwnedFd::try_clone).transpose()?;
        let err = self.err.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Some(RingSetup {
            size,
            desc_user_addr: addr.desc,
            avail_user_addr: addr.avail,
            used_user_addr: addr.used,
            base: self.base,
            features,
            kick,
            call,
            err,
            enabled: self.enabled.unwrap_or(enabled),
        }))
    }

    /// Back to the state before set-up. Call and err descriptors stay: front ends send them once, when they connect.
    pub(crate) fn reset(&mut self) {
        *self = Self { call: self.call.take(), err: self.err.take(), ..Self::default() };
    }
}
