//! The netlink connection, and the few requests that everything here is made of.

use std::io;
use std::time::Duration;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::{Handle, LinkGetRequest, LinkHandle, LinkMessageBuilder, LinkUnspec};
use tokio::task::JoinHandle;

use crate::Error;
use crate::link::LinkState;

/// Longest wait for the kernel's answer. It answers at once, unless the answer is one that cannot be decoded.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) type Message = LinkMessageBuilder<LinkUnspec>;

/// The host's links, bridges and TAPs, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct HostNet {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for HostNet {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl HostNet {
    /// Connects to the kernel. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _unsolicited) = rtnetlink::new_connection().map_err(Error::Open)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn links(&self) -> LinkHandle {
        self.handle.link()
    }

    /// The first link of an answer; `None` if the kernel has no such device.
    pub(crate) async fn first(
        &self,
        doing: &'static str,
        name: &str,
        request: LinkGetRequest,
    ) -> Result<Option<LinkMessage>, Error> {
        let mut answers = std::pin::pin!(request.execute());
        match answer(doing, name, answers.try_next()).await {
            Err(Error::Missing { .. }) => Ok(None),
            result => result,
        }
    }

    /// Makes a link.
    pub(crate) async fn add(
        &self,
        doing: &'static str,
        name: &str,
        message: LinkMessage,
    ) -> Result<(), Error> {
        answer(doing, name, self.links().add(message).execute()).await
    }

    /// Changes a link as `edit` says.
    pub(crate) async fn change(
        &self,
        doing: &'static str,
        link: &LinkState,
        edit: impl FnOnce(Message) -> Message,
    ) -> Result<(), Error> {
        let message = edit(LinkUnspec::new_with_index(link.ifindex)).build();
        answer(doing, &link.name, self.links().change(message).execute()).await
    }

    /// Deletes a link; false if it is gone already.
    pub(crate) async fn delete(&self, name: &str, ifindex: u32) -> Result<bool, Error> {
        match answer("remove", name, self.links().del(ifindex).execute()).await {
            Ok(()) => Ok(true),
            Err(Error::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All links that are ports of `master`.
    pub(crate) async fn ports_of(&self, name: &str, master: u32) -> Result<Vec<LinkMessage>, Error> {
        use rtnetlink::packet_route::link::LinkAttribute::Controller;
        let mut request = self.links().get();
        // The kernel filters by this; one that does not sends all.
        request.message_mut().attributes.push(Controller(master));
        let all: Vec<LinkMessage> =
            answer("list the ports of", name, request.execute().try_collect()).await?;
        Ok(all.into_iter().filter(|link| link.attributes.contains(&Controller(master))).collect())
    }
}

/// Waits for the kernel's answer, not for ever.
pub(crate) async fn answer<T>(
    doing: &'static str,
    name: &str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(rtnetlink::Error::NetlinkError(error))) => Err(Error::kernel(doing, name, error.to_io())),
        Ok(Err(other)) => {
            Err(Error::Kernel { doing, name: name.to_owned(), source: io::Error::other(other) })
        }
        Err(_elapsed) => Err(Error::NoAnswer { doing, name: name.to_owned() }),
    }
}
