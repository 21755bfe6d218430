//! The netlink connection, and the few requests that everything here is made of.

use std::io;
use std::time::Duration;

use futures::{TryStream, TryStreamExt};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkGetRequest, LinkHandle, LinkMessageBuilder, LinkUnspec};
use sys::fail_point;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;

use crate::Error;
use crate::error::EEXIST;
use crate::link::LinkState;

/// Longest wait for the kernel's answer. It answers at once, unless the answer is one that cannot be decoded.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Requests about links that are on their way at one time. A connection in which hundreds stood was seen to stand still until
/// another request woke it: netlink-proto sends one of them each time that it is woken.
const REQUESTS_MAX: usize = 16;

pub(crate) type Message = LinkMessageBuilder<LinkUnspec>;

/// The group of a link that is being made. The kernel takes a group when it makes a link, a mark only afterwards: by the
/// group one is known that we were killed over.
const BEING_MADE: u32 = u32::from_be_bytes(*b"vhst");

/// The host's links, bridges and TAPs, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct HostNet {
    handle: Handle,
    connection: JoinHandle<()>,
    requests: Semaphore,
    /// Held while the kernel lists something.
    listing: Mutex<()>,
    /// Held from looking for a link until it is made and marked.
    pub(crate) making: Mutex<()>,
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
        let connection = tokio::spawn(connection);
        let requests = Semaphore::new(REQUESTS_MAX);
        Ok(Self { handle, connection, requests, listing: Mutex::new(()), making: Mutex::new(()) })
    }

    /// Waits until one more request may be on its way.
    async fn turn(&self) -> SemaphorePermit<'_> {
        self.requests.acquire().await.expect("nobody closes it")
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
        let _turn = self.turn().await;
        let mut answers = std::pin::pin!(request.execute());
        match answer(doing, name, answers.try_next()).await {
            Err(Error::Missing { .. }) => Ok(None),
            result => result,
        }
    }

    /// The link of that name, unless we were killed while making it: then it is taken away.
    pub(crate) async fn finished(&self, name: &str) -> Result<Option<LinkState>, Error> {
        match self.link(name).await? {
            Some(link) if link.group == BEING_MADE && link.alias.is_none() => {
                self.delete(name, link.ifindex).await?;
                Ok(None)
            }
            found => Ok(found),
        }
    }

    /// Makes a link that is to be marked. False if there is one of that name.
    pub(crate) async fn begin(
        &self,
        doing: &'static str,
        name: &str,
        mut message: LinkMessage,
    ) -> Result<bool, Error> {
        message.attributes.push(LinkAttribute::Group(BEING_MADE));
        match self.add(doing, name, message).await {
            Ok(()) => Ok(true),
            Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Marks a link that was made, and whatever else `edit` says.
    pub(crate) async fn mark(
        &self,
        link: &LinkState,
        mark: &str,
        edit: impl FnOnce(Message) -> Message,
    ) -> Result<(), Error> {
        self.change("mark", link, |message| edit(message.alias(mark).link_group(0))).await
    }

    /// Makes a link.
    pub(crate) async fn add(
        &self,
        doing: &'static str,
        name: &str,
        message: LinkMessage,
    ) -> Result<(), Error> {
        self.alter(doing, name, self.links().add(message).execute()).await
    }

    /// Changes a link as `edit` says.
    pub(crate) async fn change(
        &self,
        doing: &'static str,
        link: &LinkState,
        edit: impl FnOnce(Message) -> Message,
    ) -> Result<(), Error> {
        let message = edit(LinkUnspec::new_with_index(link.ifindex)).build();
        self.alter(doing, &link.name, self.links().change(message).execute()).await
    }

    /// Deletes a link; false if it is gone already.
    pub(crate) async fn delete(&self, name: &str, ifindex: u32) -> Result<bool, Error> {
        match self.alter("remove", name, self.links().del(ifindex).execute()).await {
            Ok(()) => Ok(true),
            Err(Error::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes any change.
    pub(crate) async fn alter(
        &self,
        doing: &'static str,
        name: &str,
        request: impl Future<Output = Result<(), rtnetlink::Error>>,
    ) -> Result<(), Error> {
        let _turn = self.turn().await;
        fail_point::pass(format_args!("{doing} {name}"));
        answer(doing, name, request).await
    }

    /// All links that are ports of `master`.
    pub(crate) async fn ports_of(&self, name: &str, master: u32) -> Result<Vec<LinkMessage>, Error> {
        let mut request = self.links().get();
        // The kernel filters by this; one that does not sends all.
        request.message_mut().attributes.push(LinkAttribute::Controller(master));
        let all = self.every("list the ports of", name, request).await?;
        let is_port = |link: &LinkMessage| link.attributes.contains(&LinkAttribute::Controller(master));
        Ok(all.into_iter().filter(is_port).collect())
    }

    /// All links of an answer.
    pub(crate) async fn every(
        &self,
        doing: &'static str,
        name: &str,
        request: LinkGetRequest,
    ) -> Result<Vec<LinkMessage>, Error> {
        self.dump(doing, name, || request.execute()).await
    }

    /// The whole of an answer that lists things. The kernel gives a connection one list at a time, and refuses a second with
    /// EBUSY.
    pub(crate) async fn dump<T, S>(
        &self,
        doing: &'static str,
        name: &str,
        request: impl FnOnce() -> S,
    ) -> Result<Vec<T>, Error>
    where
        S: TryStream<Ok = T, Error = rtnetlink::Error>,
    {
        let _alone = self.listing.lock().await;
        let _turn = self.turn().await;
        answer(doing, name, request().try_collect()).await
    }
}

/// Waits for the kernel's answer, not for ever.
async fn answer<T>(
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
