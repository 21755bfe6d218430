//! News of the host's links, from the kernel.

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{Handle, MulticastGroup};
use tokio::task::JoinHandle;

use crate::link::LinkState;
use crate::{Error, HostNet};

/// What happened to a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is new, or changed; this is how it is now.
    Changed(LinkState),
    /// It is gone; this is how it was.
    Removed(LinkState),
    /// The kernel had more news than we took: look at everything again.
    Lost,
}

/// News from the moment it was opened. Its queue has no bound but the kernel's pace: guests cannot make links change.
#[derive(Debug)]
pub struct Watch {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>,
    connection: JoinHandle<()>,
    // The connection ends with its last handle.
    _handle: Handle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl HostNet {
    /// Watches all links of the network namespace, through a connection of its own.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn watch(&self) -> Result<Watch, Error> {
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link]).map_err(Error::Open)?;
        Ok(Watch { messages, connection: tokio::spawn(connection), _handle: handle })
    }
}

impl Watch {
    /// Waits for the next event; `None` when the connection has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<LinkEvent> {
        loop {
            let (message, _sender) = self.messages.next().await?;
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                    return Some(LinkEvent::Changed(LinkState::from(&link)));
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                    return Some(LinkEvent::Removed(LinkState::from(&link)));
                }
                NetlinkPayload::Overrun(_) => return Some(LinkEvent::Lost),
                _ => {}
            }
        }
    }
}
