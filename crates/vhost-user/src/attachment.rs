//! Sessions on which we are the front end, for a port that attaches to somebody else's back end.
//!
//! ```text
//!      ┌──────── pause, longer each time a session did not last ◄────────┐
//!      ▼                                                                 │
//! accept, or dial ──► handshake ──► rings run ──► back end gone, or one of its rings makes no sense
//! ```
//!
//! Each [`Attachment`] has a thread of its own, which nearly always sleeps in `poll`. A front end speaks by question and
//! answer, so a handshake is plain blocking code ([`Driver::start`]), and a back end that does not answer keeps its own port
//! waiting and nobody else: that is why it is neither the session thread nor one thread for all. The handshake runs on a
//! helper thread; if it is not done after [`HANDSHAKE_MAX`], or the port goes, its socket is shut down, which ends whatever
//! it waits for.
//!
//! Each session begins anew, with new memory: a back end that went wrong, or is still there somewhere, has nothing of the
//! next one's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::Shutdown;

use crate::device::Peer;
use crate::endpoint::{Endpoint, Role};
use crate::frontend::{FrontEnd, FrontEndError};
use crate::limits::LogLimit;
use crate::socket::{self, EndpointError, Place, Published};
use crate::status::{RingStatus, SessionState, SessionStatus};

/// Time for a handshake.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Pause before the next session or dial: at least, and at the most after several that failed. A session that lasted longer
/// than the longest pause did not fail.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Back ends that may wait to be accepted.
const BACKLOG: i32 = 4;

/// The rings of the port that attaches. All calls come from one thread at a time.
pub trait Driver: Send {
    /// A back end is there: negotiates, shares memory, starts the rings and lets frames pass. Blocks as long as the back end
    /// does not answer.
    fn start(&mut self, front: &mut FrontEnd) -> Result<Started, FrontEndError>;
    /// What made no sense in a ring, if something did: the session ends.
    fn broken(&self) -> Option<String>;
    /// The session is over: nothing touches the rings any more when this returns. Also called if [`Self::start`] failed.
    fn stop(&mut self);
}

/// What runs after a handshake.
#[derive(Debug)]
pub struct Started {
    /// Signalled by the back end when a ring breaks on its side.
    pub err: Vec<OwnedFd>,
    /// Descriptors of each ring, by index.
    pub ring_sizes: Vec<u16>,
    /// Bytes of memory shared.
    pub memory_bytes: u64,
}

/// Wakes an attachment's thread.
#[derive(Clone, Debug)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    /// One that has not been rung.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// Something has changed: a ring broke. Never blocks, since no peer holds the descriptor.
    pub fn ring(&self) {
        // Full means that it was rung already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    fn was_rung(&self) -> bool {
        rustix::io::read(&*self.0, &mut [0; 8]).is_ok()
    }
}

/// A port's way to a back end, for as long as it is not ended.
#[derive(Debug)]
pub struct Attachment {
    shared: Arc<Shared>,
    bell: Bell,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    leaving: AtomicBool,
    status: Mutex<SessionStatus>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, SessionStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}

impl Attachment {
    /// Starts the thread. When this returns, back ends can connect, or theirs is being dialled. `bell` is to be rung when
    /// [`Driver::broken`] has something to say.
    pub fn start(endpoint: Endpoint, driver: Box<dyn Driver>, bell: Bell) -> Result<Self, EndpointError> {
        let (path, beneath) = (&endpoint.path, endpoint.beneath.as_deref());
        let source = match endpoint.role {
            Role::Listen(access) => {
                let (listener, published) = Place::open(path, beneath)?.publish(access, BACKLOG)?;
                Source::Listener { socket: listener, published }
            }
            Role::Connect => {
                socket::check_path(path, beneath)?;
                Source::Dialler
            }
        };
        let status = Mutex::new(SessionStatus {
            path: path.clone(),
            state: waiting(&source, 0, None),
            peer: None,
            features: None,
            protocol_features: 0,
            memory_regions: 0,
            memory_bytes: 0,
            rings: Vec::new(),
            last_error: None,
            connections: 0,
            rejected: 0,
            messages: 0,
            nacks: 0,
        });
        let shared = Arc::new(Shared { leaving: AtomicBool::new(false), status });
        let path = path.clone();
        let mut run = Run {
            endpoint,
            source,
            driver,
            bell: bell.clone(),
            shared: shared.clone(),
            pause: Duration::ZERO,
            attempts: 0,
            log: LogLimit::default(),
        };
        let thread = thread::Builder::new().name("attachment".into()).spawn(move || run.run());
        let thread = thread.map_err(|cause| EndpointError::Io { path, what: "start a thread for", cause })?;
        Ok(Self { shared, bell, thread: Mutex::new(Some(thread)) })
    }

    /// How it is now.
    pub fn status(&self) -> SessionStatus {
        self.shared.status().clone()
    }

    /// Ends it. When this returns, the rings are stopped and the socket file, if it was ours, is gone.
    pub fn end(&self) {
        self.shared.leaving.store(true, Ordering::Release);
        self.bell.ring();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(path = %self.shared.status().path.display(), "the attachment's thread panicked");
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.end();
    }
}

/// How back ends come.
enum Source {
    Listener {
        socket: OwnedFd,
        #[expect(dead_code, reason = "removes the socket file when dropped")]
        published: Published,
    },
    Dialler,
}

/// What status says while there is no back end.
fn waiting(source: &Source, attempts: u64, last_error: Option<String>) -> SessionState {
    match source {
        Source::Listener { .. } => SessionState::Listening,
        Source::Dialler => SessionState::Dialling { attempts, last_error },
    }
}

/// The thread.
struct Run {
    endpoint: Endpoint,
    source: Source,
    driver: Box<dyn Driver>,
    bell: Bell,
    shared: Arc<Shared>,
    /// The last one.
    pause: Duration,
    /// Dials since there was last a session.
    attempts: u64,
    log: LogLimit,
}

impl Run {
    fn run(&mut self) {
        while !self.shared.is_leaving() {
            let begun = Instant::now();
            match self.connection() {
                Ok(Some(socket)) => self.session(socket),
                Ok(None) => continue,
                Err(error) => self.complain(&format!("no back end to connect to yet: {error}")),
            }
            let lasted = begun.elapsed() > PAUSE_MAX;
            self.pause = if lasted { PAUSE_MIN } else { (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) };
            let last_error = self.shared.status().last_error.clone();
            self.shared.status().state = waiting(&self.source, self.attempts, last_error);
            self.wait(&[], Some(self.pause));
        }
    }

    /// The next back end; `None` if there was something else to wake up for.
    fn connection(&mut self) -> io::Result<Option<OwnedFd>> {
        let Source::Listener { socket, .. } = &self.source else {
            self.attempts += 1;
            return socket::dial(&self.endpoint.path, self.endpoint.beneath.as_deref()).map(Some);
        };
        self.wait(&[(socket.as_fd(), PollFlags::IN)], None);
        socket::accept(socket)
    }

    /// Sleeps until one of these has an event, the bell is rung or the time is over. True if it was one of these.
    fn wait(&self, fds: &[(BorrowedFd<'_>, PollFlags)], timeout: Option<Duration>) -> bool {
        let bell = PollFd::new(&*self.bell.0, PollFlags::IN);
        let others = fds.iter().map(|(fd, events)| PollFd::from_borrowed_fd(*fd, *events));
        let mut polled: Vec<_> = [bell].into_iter().chain(others).collect();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        // An interrupted wait is one that found nothing: whoever waits looks again.
        let _ = poll(&mut polled, timeout.as_ref());
        self.bell.was_rung();
        polled[1..].iter().any(|fd| !fd.revents().is_empty())
    }

    fn session(&mut self, socket: OwnedFd) {
        let peer = match socket::peer(&socket) {
            Ok(peer) if self.endpoint.users.is_empty() || self.endpoint.users.contains(&peer.uid) => peer,
            outcome => {
                self.shared.status().rejected += 1;
                let reason = match outcome {
                    Ok(peer) => format!("user {} (process {}) may not use this endpoint", peer.uid, peer.pid),
                    Err(error) => format!("back end cannot be identified: {error}"),
                };
                return self.complain(&format!("connection refused: {reason}"));
            }
        };
        {
            let mut status = self.shared.status();
            status.connections += 1;
            status.peer = Some(peer);
            status.state = SessionState::Negotiating;
        }
        let stream = UnixStream::from(socket);
        let ended = match self.handshake(&stream) {
            Ok((front, started)) => {
                self.attempts = 0;
                self.report(peer);
                self.note(&front, &started);
                self.watch(&stream, &started)
            }
            Err(error) => error.to_string(),
        };
        self.driver.stop();
        let _ = rustix::net::shutdown(&stream, Shutdown::Both);
        {
            let mut status = self.shared.status();
            (status.peer, status.features, status.protocol_features) = (None, None, 0);
            (status.memory_regions, status.memory_bytes, status.rings) = (0, 0, Vec::new());
        }
        if !self.shared.is_leaving() {
            self.complain(&format!("session ended: {ended}"));
        }
    }

    /// Lets the driver speak with the back end, but not for ever.
    fn handshake(&mut self, stream: &UnixStream) -> Result<(FrontEnd, Started), FrontEndError> {
        stream.set_nonblocking(false)?;
        let mut front = FrontEnd::from_stream(stream.try_clone()?)?;
        let done = Bell::new()?;
        let (driver, tell) = (&mut self.driver, done.clone());
        let (bell, shared) = (&self.bell, &self.shared);
        let (started, slow) = thread::scope(|scope| {
            let helper = thread::Builder::new().name("handshake".into()).spawn_scoped(scope, || {
                let started = driver.start(&mut front);
                tell.ring();
                started
            })?;
            let slow = !finishes(&done, bell, shared);
            if slow {
                let _ = rustix::net::shutdown(stream, Shutdown::Both);
            }
            let panicked = |_| Err(io::Error::other("the handshake panicked").into());
            Ok::<_, io::Error>((helper.join().unwrap_or_else(panicked), slow))
        })?;
        match started {
            Ok(started) => Ok((front, started)),
            Err(_) if slow => Err(FrontEndError::Slow(HANDSHAKE_MAX)),
            Err(error) => Err(error),
        }
    }

    /// Waits for the end of a session; why it ended.
    fn watch(&self, stream: &UnixStream, started: &Started) -> String {
        let mut fds = vec![(stream.as_fd(), PollFlags::IN | PollFlags::RDHUP)];
        fds.extend(started.err.iter().map(|err| (err.as_fd(), PollFlags::IN)));
        loop {
            let heard = self.wait(&fds, None);
            if self.shared.is_leaving() {
                return "endpoint removed".into();
            }
            if let Some(fault) = self.driver.broken() {
                return fault;
            }
            // Nothing was asked, so there is nothing to be read but the end.
            if heard {
                return "back end closed the connection, spoke unasked, or gave up a ring".into();
            }
        }
    }

    /// What runs, for those who ask.
    fn note(&self, front: &FrontEnd, started: &Started) {
        let ring =
            |(index, size): (u16, &u16)| RingStatus { index, size: *size, started: true, enabled: true };
        let mut status = self.shared.status();
        status.state = SessionState::Linked;
        status.features = Some(front.features());
        status.protocol_features = front.protocol_features();
        (status.memory_regions, status.memory_bytes) = (1, started.memory_bytes);
        status.rings = (0..).zip(&started.ring_sizes).map(ring).collect();
    }

    fn report(&mut self, peer: Peer) {
        if let Some(suppressed) = self.log.permit(Instant::now()) {
            let path = self.endpoint.path.display();
            tracing::info!(%path, suppressed, "attached to a back end: process {}, user {}", peer.pid, peer.uid);
        }
    }

    /// Notes what went wrong, and logs it once a reason.
    fn complain(&mut self, what: &str) {
        let news = self.shared.status().last_error.replace(what.to_owned()).is_none_or(|old| old != what);
        if let Some(suppressed) = news.then(|| self.log.permit(Instant::now())).flatten() {
            tracing::warn!(path = %self.endpoint.path.display(), suppressed, "{what}");
        }
    }
}

/// Whether a handshake is done in time.
fn finishes(done: &Bell, bell: &Bell, shared: &Shared) -> bool {
    let deadline = Instant::now() + HANDSHAKE_MAX;
    while !shared.is_leaving() {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(left) = Timespec::try_from(left).ok().filter(|_| !left.is_zero()) else { return false };
        let mut fds = [PollFd::new(&*done.0, PollFlags::IN), PollFd::new(&*bell.0, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&left));
        if done.was_rung() {
            return true;
        }
        bell.was_rung();
    }
    false
}
