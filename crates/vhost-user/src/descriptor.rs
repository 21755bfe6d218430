//! Descriptors that came from a peer.
//!
//! Closing a foreign descriptor can block: a TCP socket with SO_LINGER waits for its own peer, a FUSE file for its server,
//! and the last descriptor of a large memory file for the freeing of its pages. So the session thread never closes
//! one. [`Received`] puts it into the session's [`Grave`] instead, which a short-lived thread empties
//! (`burial`). The exception are proven eventfds, whose closing is nothing.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{OFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl};
use rustix::net::{AddressFamily, SocketType, sockopt};

/// Where a session's foreign descriptors wait to be closed.
#[derive(Clone, Debug, Default)]
pub struct Grave(Rc<RefCell<Vec<OwnedFd>>>);

impl Grave {
    /// A grave for one session.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a descriptor in.
    pub fn receive(&self, fd: OwnedFd) -> Received {
        Received { fd: Some(fd), grave: self.clone() }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.0.borrow().len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties the grave, for a thread that may block.
    pub fn take(&self) -> Vec<OwnedFd> {
        self.0.take()
    }
}

/// A peer's descriptor of unknown kind.
pub struct Received {
    fd: Option<OwnedFd>,
    grave: Grave,
}

/// Why a descriptor is not what the request needs.
#[derive(Debug, thiserror::Error)]
pub enum WrongKind {
    /// Kick, call and err must not be anything that can do more than count.
    #[error("the descriptor is no eventfd: kick, call and err descriptors must be")]
    EventFd,
    /// Memory that cannot be sealed is no shared memory.
    #[error("the descriptor is no shared memory: use a memfd, or a file on tmpfs or hugetlbfs")]
    Memory,
    /// SET_BACKEND_REQ_FD.
    #[error("the descriptor is no connected UNIX stream socket")]
    Channel,
    /// The check failed.
    #[error("the descriptor cannot be looked at: {0}")]
    Io(#[from] io::Error),
}

impl Received {
    /// The descriptor as an eventfd, made non-blocking.
    ///
    /// An eventfd has no system call of its own that tells it from other descriptors (and one from a signalfd by name
    /// only), but the kernel's description of it does.
    pub fn into_eventfd(mut self) -> Result<OwnedFd, WrongKind> {
        let fd = self.as_fd();
        if !fdinfo(fd)?.lines().any(|line| line.starts_with("eventfd-count:")) {
            return Err(WrongKind::EventFd);
        }
        let flags = fcntl_getfl(fd).map_err(io::Error::from)?;
        fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(self.fd.take().expect("taken only by value"))
    }

    /// A duplicate for mapping, if this is shared memory.
    ///
    /// F_GET_SEALS succeeds on tmpfs and hugetlbfs files only and asks no file system, so that a FUSE file cannot make
    /// the thread wait in a later fstat. The original stays for the grave: then no close within the mapping code is
    /// the last one.
    pub fn to_memory(&self) -> Result<OwnedFd, WrongKind> {
        fcntl_get_seals(self.as_fd()).map_err(|_| WrongKind::Memory)?;
        Ok(self.as_fd().try_clone_to_owned()?)
    }

    /// Checks for a connected AF_UNIX stream socket.
    pub fn check_channel(&self) -> Result<(), WrongKind> {
        let fd = self.as_fd();
        let unix = sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX);
        let stream = sockopt::socket_type(fd) == Ok(SocketType::STREAM);
        let listens = sockopt::socket_acceptconn(fd) == Ok(true);
        if unix && stream && !listens { Ok(()) } else { Err(WrongKind::Channel) }
    }
}

/// What the kernel says about an open descriptor. Never asks the file's own file system.
fn fdinfo(fd: BorrowedFd<'_>) -> io::Result<String> {
    let mut text = String::new();
    // An epoll descriptor's text grows with its contents: the line that matters is among the first.
    File::open(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?.take(512).read_to_string(&mut text)?;
    Ok(text)
}

impl AsFd for Received {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken only by value").as_fd()
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Received({:?})", self.fd)
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.grave.0.borrow_mut().push(fd);
        }
    }
}
