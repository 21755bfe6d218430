//! Telling control what happened.

use vring::RingFault;

use crate::port::{Port, PortLink};
use crate::report::{Event, EventKind};

/// Where events go.
pub(crate) struct Events {
    pub(crate) sink: Box<dyn Fn(Event) + Send + Sync>,
}

impl Events {
    pub(crate) fn tell(&self, port: &Port, kind: EventKind) {
        (self.sink)(Event { port: port.id, name: port.name.clone(), kind });
    }

    /// A ring was stopped because of its content. Once per ring and start, so it cannot flood a log.
    pub(crate) fn ring_broken(&self, port: &Port, ring: u16, fault: RingFault) {
        if let PortLink::FrontEnd(front) = &port.link {
            tracing::warn!(port = port.name, ring, %fault, "vring stopped: the session with the back end begins anew");
            front.bell.ring();
        } else {
            tracing::warn!(port = port.name, ring, %fault, "vring stopped: the front end must set it up again");
        }
        self.tell(port, EventKind::RingBroken { ring, reason: fault.to_string() });
    }
}
