//! One endpoint: a listening socket or a path to dial, at most one connection at a time, and the device behind it.
//!
//! States: waiting for a front end (listening, or dialling with growing pauses) → connected → letting go (see
//! [`crate::burial`]) → waiting again. Everything here is called by the session thread and does a bounded amount of
//! work: so many messages, so many accepts, then it is another endpoint's turn.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use epoll::Events;
use inotify::WatchDescriptor;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::Shutdown;

use crate::burial::Burial;
use crate::descriptor::Grave;
use crate::device::{Device, Peer};
use crate::limits::{Limits, LogLimit};
use crate::outbox::Outbox;
use crate::poll::Poll;
use crate::receive::{Progress, ReceiveError, Receiver};
use crate::session::{Fatal, Session};
use crate::socket::{self, Access, Published};
use crate::status::{SessionState, SessionStatus};

/// Connections accepted (or turned away) in one turn.
const ACCEPTS_PER_TURN: usize = 8;
/// How long not to accept after a failure that has nothing to do with the connection, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket to serve: where, from which side, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Path of the socket file.
    pub path: PathBuf,
    /// Directory beneath which it has to be, whoever writes there; `None`: anywhere.
    pub beneath: Option<PathBuf>,
    /// Our side of it.
    pub role: Role,
    /// Users that a front end may run as; empty: whoever the file's permissions let in.
    pub users: Vec<u32>,
}

/// Our side of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We make the socket, front ends connect to it.
    Listen(Access),
    /// The front end makes the socket, we connect to it.
    Connect,
}

impl Endpoint {
    /// A socket that we make, with mode 0660.
    pub fn listen(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), beneath: None, role: Role::Listen(Access::default()), users: Vec::new() }
    }

    /// A socket that the front end makes.
    pub fn connect(path: impl Into<PathBuf>) -> Self {
        Self { role: Role::Connect, ..Self::listen(path) }
    }
}

/// How front ends come in.
#[derive(Debug)]
pub(crate) enum Source {
    Listener {
        socket: OwnedFd,
        #[expect(dead_code, reason = "removes the socket file when dropped")]
        published: Published,
        paused_until: Option<Instant>,
    },
    Dialler(Dialler),
}

/// A path that is dialled again and again.
#[derive(Debug)]
pub(crate) struct Dialler {
    /// When to try again.
    pub(crate) at: Instant,
    pause: Duration,
    /// Attempts since there was last a session worth the name.
    attempts: u64,
    last_error: Option<String>,
    /// Watch on the directory, to dial as soon as the socket appears.
    pub(crate) watch: Option<WatchDescriptor>,
}

impl Dialler {
    pub(crate) fn new(now: Instant) -> Self {
        Self { at: now, pause: Duration::ZERO, attempts: 0, last_error: None, watch: None }
    }

    /// Sets the next attempt, later each time.
    fn back_off(&mut self, now: Instant, limits: &Limits) {
        self.pause = (self.pause * 2).clamp(limits.dial_pause_min, limits.dial_pause_max);
        // Up to a quarter more, so that endpoints that failed together do not dial together.
        let jitter = socket::random() % 256;
        self.at = now + self.pause + self.pause.mul_f32(jitter as f32 / 1024.0);
    }

    /// The socket has just appeared (perhaps before its owner listens): try now and often.
    pub(crate) fn hurry(&mut self, now: Instant) {
        self.at = now;
        self.pause = Duration::ZERO;
    }
}

/// A connected front end.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    peer: Peer,
    receiver: Receiver,
    outbox: Outbox,
    session: Session,
    /// What epoll watches the socket for.
    watched: Events,
    /// At least one message was handled, so the other end is alive.
    talked: bool,
    /// The other end is closed; there may be messages to read before that.
    hung_up: bool,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Goodbye {
    #[error("front end closed the connection")]
    Closed,
    #[error("front end closed the connection in the middle of a message")]
    Torn,
    #[error("a message was not complete after {0:?}")]
    SlowMessage(Duration),
    #[error("front end did not take its replies for {0:?}")]
    NotReading(Duration),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("sending failed: {0}")]
    Send(#[from] io::Error),
    #[error(transparent)]
    Fatal(#[from] Fatal),
    #[error("endpoint removed")]
    Removed,
}

/// An endpoint in the session thread.
pub(crate) struct Live {
    path: PathBuf,
    beneath: Option<PathBuf>,
    users: Vec<u32>,
    device: Box<dyn Device>,
    source: Source,
    poll: Rc<Poll>,
    /// What epoll calls our listener and our connection.
    tokens: (u64, u64),
    /// What epoll watches the listener for.
    listening: Events,
    connection: Option<Connection>,
    grave: Grave,
    pub(crate) burial: Burial,
    log: LogLimit,
    changed: bool,
    last_error: Option<String>,
    connections: u64,
    rejected: u64,
    messages: u64,
    nacks: u64,
}

impl Live {
    pub(crate) fn new(
        endpoint: Endpoint,
        source: Source,
        device: Box<dyn Device>,
        poll: Rc<Poll>,
        tokens: (u64, u64),
    ) -> io::Result<Self> {
        if let Source::Listener { socket, .. } = &source {
            poll.add(socket.as_raw_fd(), tokens.0, Events::EPOLLIN)?;
        }
        Ok(Self {
            path: endpoint.path,
            beneath: endpoint.beneath,
            users: endpoint.users,
            device,
            source,
            poll,
            tokens,
            listening: Events::EPOLLIN,
            connection: None,
            grave: Grave::new(),
            burial: Burial::default(),
            log: LogLimit::default(),
            changed: true,
            last_error: None,
            connections: 0,
            rejected: 0,
            messages: 0,
            nacks: 0,
        })
    }

    /// The dialler, its path and what that has to be beneath, if this endpoint dials and has no connection.
    pub(crate) fn dialling(&mut self) -> Option<(&Path, Option<&Path>, &mut Dialler)> {
        match &mut self.source {
            Source::Dialler(dialler) if self.connection.is_none() => {
                Some((&self.path, self.beneath.as_deref(), dialler))
            }
            _ => None,
        }
    }

    /// The directory watch that this endpoint holds.
    pub(crate) fn directory_watch(&self) -> Option<&WatchDescriptor> {
        match &self.source {
            Source::Dialler(dialler) => dialler.watch.as_ref(),
            Source::Listener { .. } => None,
        }
    }

    /// Whether a front end may come in now.
    fn has_room(&self) -> bool {
        self.connection.is_none() && self.burial.is_done()
    }

    /// Tells epoll what to watch for in the present state.
    pub(crate) fn watch(&mut self) {
        let behind = self.burial.is_behind();
        let open = match &self.connection {
            Some(connection) => !connection.hung_up,
            None => self.burial.is_done(),
        };
        if let Source::Listener { socket, paused_until, .. } = &self.source {
            // Closed, the next front end waits in the backlog.
            let wanted =
                if open && !behind && paused_until.is_none() { Events::EPOLLIN } else { Events::empty() };
            if wanted != self.listening {
                self.listening = wanted;
                self.rewatch(socket.as_raw_fd(), self.tokens.0, wanted);
            }
        }
        if let Some(connection) = &mut self.connection {
            let wanted = match connection.outbox.since() {
                Some(_) => Events::EPOLLOUT,
                None if behind => Events::empty(),
                None => Events::EPOLLIN,
            };
            if std::mem::replace(&mut connection.watched, wanted) != wanted {
                let socket = connection.socket.as_raw_fd();
                self.rewatch(socket, self.tokens.1, wanted);
            }
        }
    }

    fn rewatch(&self, socket: RawFd, token: u64, wanted: Events) {
        if let Err(error) = self.poll.modify(socket, token, wanted) {
            tracing::error!(path = %self.path.display(), %error, "socket cannot be watched");
        }
    }

    /// When [`Self::expire`] is due.
    pub(crate) fn deadline(&self, limits: &Limits) -> Option<Instant> {
        if let Some(connection) = &self.connection {
            let message = connection.receiver.began().map(|began| began + limits.message_deadline);
            let reply = connection.outbox.since().map(|since| since + limits.reply_deadline);
            return [message, reply, self.pause_end()].into_iter().flatten().min();
        }
        match &self.source {
            Source::Dialler(dialler) if self.burial.is_done() => Some(dialler.at),
            _ => self.pause_end(),
        }
    }

    fn pause_end(&self) -> Option<Instant> {
        match &self.source {
            Source::Listener { paused_until, .. } => *paused_until,
            Source::Dialler(_) => None,
        }
    }

    /// Does what is due at `now`.
    pub(crate) fn expire(&mut self, now: Instant, limits: &Limits) {
        if let Source::Listener { paused_until, .. } = &mut self.source
            && paused_until.is_some_and(|until| until <= now)
        {
            *paused_until = None;
        }
        let due = |since: Option<Instant>, limit: Duration| since.is_some_and(|since| since + limit <= now);
        match &self.connection {
            Some(connection) if due(connection.receiver.began(), limits.message_deadline) => {
                self.close(&Goodbye::SlowMessage(limits.message_deadline), now, limits);
            }
            Some(connection) if due(connection.outbox.since(), limits.reply_deadline) => {
                self.close(&Goodbye::NotReading(limits.reply_deadline), now, limits);
            }
            Some(_) => {}
            None => self.dial(now, limits),
        }
    }

    fn dial(&mut self, now: Instant, limits: &Limits) {
        let has_room = self.has_room();
        let Source::Dialler(dialler) = &mut self.source else { return };
        if !has_room || dialler.at > now {
            return;
        }
        dialler.attempts += 1;
        match socket::dial(&self.path, self.beneath.as_deref()) {
            Ok(socket) => self.admit(socket, now, limits),
            Err(error) => {
                dialler.back_off(now, limits);
                let error = error.to_string();
                // Once per reason, not once per attempt.
                if dialler.last_error.as_ref() != Some(&error) {
                    let report = format!("no front end to connect to yet: {error}");
                    dialler.last_error = Some(error);
                    self.changed = true;
                    self.report(&report, now);
                }
            }
        }
    }

    /// Takes what waits at the listener.
    pub(crate) fn accept(&mut self, now: Instant, limits: &Limits) {
        for _ in 0..ACCEPTS_PER_TURN {
            // The next front end may be faster than the last one's end, which is behind its last messages: it waits.
            match &mut self.connection {
                Some(connection) if hung_up(&connection.socket) => {
                    connection.hung_up = true;
                    return;
                }
                None if !self.burial.is_done() => return,
                _ => {}
            }
            let Source::Listener { socket: listener, paused_until, .. } = &mut self.source else { return };
            match socket::accept(&*listener) {
                Ok(Some(socket)) if self.connection.is_none() => self.admit(socket, now, limits),
                Ok(Some(socket)) => {
                    self.turn_away(socket, "another front end is connected", now, limits);
                }
                Ok(None) => return,
                Err(error) => {
                    *paused_until = Some(now + ACCEPT_PAUSE);
                    self.complain(format!("connections cannot be accepted: {error}"), now);
                    return;
                }
            }
        }
    }

    /// Makes a connected socket the session's, if its user may.
    fn admit(&mut self, socket: OwnedFd, now: Instant, limits: &Limits) {
        let peer = match socket::peer(&socket) {
            Ok(peer) if self.users.is_empty() || self.users.contains(&peer.uid) => peer,
            outcome => {
                let reason = match outcome {
                    Ok(peer) => format!("user {} (process {}) may not use this endpoint", peer.uid, peer.pid),
                    Err(error) => format!("front end cannot be identified: {error}"),
                };
                return self.turn_away(socket, &reason, now, limits);
            }
        };
        if let Err(error) = self.poll.add(socket.as_raw_fd(), self.tokens.1, Events::EPOLLIN) {
            return self.turn_away(socket, &format!("it cannot be watched: {error}"), now, limits);
        }
        self.report(&format!("front end connected: process {}, user {}", peer.pid, peer.uid), now);
        self.connections += 1;
        self.changed = true;
        self.device.connected(peer);
        self.connection = Some(Connection {
            socket,
            peer,
            receiver: Receiver::new(self.grave.clone()),
            outbox: Outbox::default(),
            session: Session::new(self.device.offer()),
            watched: Events::EPOLLIN,
            talked: false,
            hung_up: false,
        });
    }

    fn turn_away(&mut self, socket: OwnedFd, reason: &str, now: Instant, limits: &Limits) {
        self.rejected += 1;
        self.changed = true;
        self.complain(format!("connection refused: {reason}"), now);
        let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        self.burial.add([socket]);
        if let Source::Dialler(dialler) = &mut self.source {
            dialler.back_off(now, limits);
        }
    }

    /// Moves messages in and replies out.
    pub(crate) fn pump(&mut self, events: Events, now: Instant, limits: &Limits) {
        let reads = self.connection.as_ref().is_some_and(|connection| connection.watched == Events::EPOLLIN);
        // Nobody is there any more to take the replies or to send what stops us reading.
        if !reads && events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
            self.close(&Goodbye::Closed, now, limits);
        } else if let Err(goodbye) = self.converse(now, limits) {
            self.close(&goodbye, now, limits);
        }
    }

    fn converse(&mut self, now: Instant, limits: &Limits) -> Result<(), Goodbye> {
        for _ in 0..limits.messages_per_turn {
            let Some(connection) = &mut self.connection else { return Ok(()) };
            if !connection.outbox.flush(&connection.socket, now)? || self.burial.is_behind() {
                return Ok(());
            }
            let message = match connection.receiver.receive(&connection.socket, now)? {
                Progress::Message(message) => message,
                Progress::Pending => return Ok(()),
                Progress::End(false) => return Err(Goodbye::Closed),
                Progress::End(true) => return Err(Goodbye::Torn),
            };
            self.messages += 1;
            connection.talked = true;
            let nack = connection.session.handle(&mut *self.device, message, connection.outbox.replies())?;
            let trouble = connection.session.take_trouble();
            self.changed |= connection.session.take_changed();
            self.burial.add_memory(connection.session.take_old_memory());
            self.burial.add(self.grave.take());
            if let Some(nack) = nack {
                self.nacks += 1;
                self.complain(nack.to_string(), now);
            }
            if let Some(trouble) = trouble {
                self.complain(trouble, now);
            }
        }
        if let Some(connection) = &mut self.connection {
            connection.outbox.flush(&connection.socket, now)?;
        }
        Ok(())
    }

    /// Ends the connection; the next one may come once everything of this one is gone.
    fn close(&mut self, goodbye: &Goodbye, now: Instant, limits: &Limits) {
        let Some(connection) = self.connection.take() else { return };
        let Connection { socket, receiver, session, talked, .. } = connection;
        // Before the burial: epoll follows the open file, which may outlive the number.
        let _ = self.poll.delete(socket.as_raw_fd());
        self.burial.add_memory(session.close(&mut *self.device));
        drop(receiver);
        // The peer is told now, not when the burial comes to it.
        let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        self.burial.add(self.grave.take());
        self.burial.add([socket]);
        self.changed = true;
        let reason = goodbye.to_string();
        match goodbye {
            Goodbye::Closed | Goodbye::Removed => self.report(&format!("session ended: {reason}"), now),
            _ => self.complain(format!("session ended: {reason}"), now),
        }
        if let Source::Dialler(dialler) = &mut self.source {
            // A connect can succeed against a listener whose owner is dying: only a message proves a front end.
            if talked {
                dialler.attempts = 0;
                dialler.pause = Duration::ZERO;
            }
            dialler.last_error = Some(reason);
            dialler.back_off(now, limits);
        }
    }

    /// Ends the connection because the endpoint goes; afterwards only the unmapping is left to wait for.
    pub(crate) fn leave(&mut self, now: Instant, limits: &Limits) {
        self.close(&Goodbye::Removed, now, limits);
        if let Source::Listener { socket, paused_until, .. } = &mut self.source {
            *paused_until = Some(now);
            self.listening = Events::empty();
            let _ = self.poll.delete(socket.as_raw_fd());
        }
    }

    /// The end of the session thread: nobody is left to wait for.
    pub(crate) fn shut_down(mut self, now: Instant, limits: &Limits) {
        self.close(&Goodbye::Removed, now, limits);
        self.burial.start(true, |_| ());
    }

    /// What brought front ends in, to be dropped by whoever may touch the file system.
    pub(crate) fn into_source(self) -> Source {
        self.source
    }

    pub(crate) fn config_changed(&mut self, now: Instant) {
        if let Some(connection) = &mut self.connection {
            connection.session.config_changed();
            if let Some(trouble) = connection.session.take_trouble() {
                self.complain(trouble, now);
            }
        }
    }

    /// Logs what went right, unless this endpoint has logged too much.
    fn report(&mut self, what: &str, now: Instant) {
        if let Some(suppressed) = self.log.permit(now) {
            tracing::info!(path = %self.path.display(), suppressed, "{what}");
        }
    }

    /// Notes what went wrong, and logs it unless this endpoint has logged too much.
    fn complain(&mut self, what: String, now: Instant) {
        if let Some(suppressed) = self.log.permit(now) {
            tracing::warn!(path = %self.path.display(), suppressed, "{what}");
        }
        self.last_error = Some(what);
        self.changed = true;
    }

    /// Whether the status changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let session = self.connection.as_ref().map(|connection| &connection.session);
        let rings = session.map(Session::rings).unwrap_or_default();
        let state = match &self.source {
            _ if rings.iter().any(|ring| ring.started && ring.enabled) => SessionState::Linked,
            _ if session.is_some() => SessionState::Negotiating,
            Source::Listener { .. } => SessionState::Listening,
            Source::Dialler(dialler) => {
                SessionState::Dialling { attempts: dialler.attempts, last_error: dialler.last_error.clone() }
            }
        };
        SessionStatus {
            path: self.path.clone(),
            state,
            peer: self.connection.as_ref().map(|connection| connection.peer),
            features: session.and_then(Session::features),
            protocol_features: session.map_or(0, Session::protocol_features),
            memory_regions: session.map_or(0, |session| session.memory().regions().len()),
            memory_bytes: session.map_or(0, |session| session.memory().bytes()),
            rings,
            last_error: self.last_error.clone(),
            connections: self.connections,
            rejected: self.rejected,
            messages: self.messages,
            nacks: self.nacks,
        }
    }
}

/// Whether the other end of a connection is closed, even if messages of its are still unread.
fn hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
}
