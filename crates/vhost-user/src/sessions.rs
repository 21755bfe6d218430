//! The session thread: one epoll loop for every socket of every endpoint, and the handle that others hold.
//!
//! A turn of the loop waits for events, gives each endpoint that has any its bounded share of work, does what is due,
//! and takes commands. Nothing in it blocks: sockets are non-blocking in both directions, dialling too, descriptors
//! and memory are let go elsewhere, socket files are made and removed by the thread that asks for it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use epoll::Events;
use inotify::{EventMask, Inotify, WatchMask};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::burial::Stage;
use crate::device::Device;
use crate::endpoint::{Dialler, Endpoint, Live, Role, Source};
use crate::limits::Limits;
use crate::poll::Poll;
use crate::socket::{self, EndpointError, Place};
use crate::status::SessionStatus;

/// Connections to a socket that may wait to be accepted (or turned away).
const BACKLOG: i32 = 16;

/// An endpoint, for as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(u64);

/// Called by the session thread whenever an endpoint's status changed, for the first time before [`Sessions::add`]
/// returns. Must not call [`Sessions`], must not block.
pub type OnChange = Box<dyn Fn(EndpointId, &SessionStatus) + Send>;

/// The session thread and its endpoints. Dropping it ends all sessions and removes their socket files.
#[derive(Debug)]
pub struct Sessions {
    commands: Commands,
    next: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

impl Sessions {
    /// Starts the thread.
    pub fn start(limits: Limits, on_change: OnChange) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let commands = Commands { sender, wake };
        let (poll, directories) = open_poll(&commands.wake)?;
        let for_loop = commands.clone();
        let run = move || Loop::new(limits, on_change, for_loop, receiver, poll, directories).run();
        let thread = thread::Builder::new().name("session".into()).spawn(run)?;
        Ok(Self { commands, next: AtomicU64::new(0), thread: Some(thread) })
    }

    /// Adds an endpoint. When this returns, its socket accepts connections, or is being dialled.
    pub fn add(&self, endpoint: Endpoint, device: Box<dyn Device>) -> Result<EndpointId, EndpointError> {
        let (path, beneath) = (&endpoint.path, endpoint.beneath.as_deref());
        let source = match endpoint.role {
            Role::Listen(access) => {
                let (socket, published) = Place::open(path, beneath)?.publish(access, BACKLOG)?;
                Source::Listener { socket, published, paused_until: None }
            }
            Role::Connect => {
                socket::check_path(path, beneath)?;
                Source::Dialler(Dialler::new(Instant::now()))
            }
        };
        let path = path.clone();
        let id = EndpointId(self.next.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = mpsc::channel();
        let endpoint = Box::new(endpoint);
        self.commands.send(Command::Add { id, endpoint, source, device, reply })?;
        match answer.recv() {
            Ok(Ok(())) => Ok(id),
            Ok(Err(cause)) => Err(EndpointError::Io { path, what: "watch", cause }),
            Err(_) => Err(EndpointError::Ended),
        }
    }

    /// Removes an endpoint; one that is not there is removed already. When this returns, its rings are stopped, its
    /// front end's memory is unmapped and its socket file is gone.
    pub fn remove(&self, id: EndpointId) {
        let (reply, answer) = mpsc::channel();
        if self.commands.send(Command::Remove(id, reply)).is_ok() {
            // The socket file is removed here, by dropping what comes back, not in the loop.
            drop(answer.recv());
        }
    }

    /// An endpoint as it is now; `None` if it is not there.
    pub fn status(&self, id: EndpointId) -> Option<SessionStatus> {
        let (reply, answer) = mpsc::channel();
        self.commands.send(Command::Status(id, reply)).ok()?;
        answer.recv().ok()
    }

    /// Tells an endpoint's front end that [`Device::config`] has changed, if it can be told.
    pub fn config_changed(&self, id: EndpointId) {
        // If the thread is gone, so is the front end.
        let _ = self.commands.send(Command::ConfigChanged(id));
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        if self.commands.send(Command::Stop).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the session thread panicked");
        }
    }
}

/// What the loop can be asked.
enum Command {
    Add {
        id: EndpointId,
        endpoint: Box<Endpoint>,
        source: Source,
        device: Box<dyn Device>,
        reply: Sender<io::Result<()>>,
    },
    /// The answer is what the caller has to drop.
    Remove(EndpointId, Sender<Source>),
    Status(EndpointId, Sender<SessionStatus>),
    ConfigChanged(EndpointId),
    /// A burial has come this far.
    Burial(EndpointId, Stage),
    Stop,
}

/// The way into the loop.
#[derive(Clone, Debug)]
struct Commands {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    fn send(&self, command: Command) -> Result<(), EndpointError> {
        self.sender.send(command).map_err(|_| EndpointError::Ended)?;
        // Full means that the loop is about to wake anyway.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// Epoll tokens: an endpoint's listener is twice its id, its connection one more.
const WAKE: u64 = u64::MAX;
const DIRECTORIES: u64 = u64::MAX - 1;

/// The epoll instance, which the session thread's own descriptors are in already.
fn open_poll(wake: &EventFd) -> io::Result<(Poll, Option<Inotify>)> {
    let poll = Poll::new()?;
    poll.add(wake.as_raw_fd(), WAKE, Events::EPOLLIN)?;
    let directories = Inotify::init()
        .inspect_err(|error| tracing::warn!(%error, "no inotify: sockets to dial are found by trying only"))
        .ok();
    if let Some(directories) = &directories {
        poll.add(directories.as_raw_fd(), DIRECTORIES, Events::EPOLLIN)?;
    }
    Ok((poll, directories))
}

/// What the loop knows of an endpoint besides the endpoint.
struct Entry {
    live: Live,
    /// The deadline that is set for it.
    deadline: Option<Instant>,
    /// It is to go as soon as its memory is unmapped.
    leaving: Option<Sender<Source>>,
}

struct Loop {
    poll: Rc<Poll>,
    limits: Limits,
    on_change: OnChange,
    commands: Commands,
    inbox: Receiver<Command>,
    endpoints: HashMap<EndpointId, Entry>,
    deadlines: BTreeSet<(Instant, EndpointId)>,
    /// `None` if the system has no inotify instance left: then dialling relies on its pauses.
    directories: Option<Inotify>,
}

impl Loop {
    fn new(
        limits: Limits,
        on_change: OnChange,
        commands: Commands,
        inbox: Receiver<Command>,
        poll: Poll,
        directories: Option<Inotify>,
    ) -> Self {
        let (poll, endpoints, deadlines) = (Rc::new(poll), HashMap::new(), BTreeSet::new());
        Self { poll, limits, on_change, commands, inbox, endpoints, deadlines, directories }
    }

    fn run(mut self) {
        loop {
            let now = Instant::now();
            let timeout = self.deadlines.first().map(|(at, _)| at.saturating_duration_since(now));
            let events = match self.poll.wait(timeout) {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!(%error, "epoll failed: all vhost-user sessions end");
                    break;
                }
            };
            let now = Instant::now();
            for (token, events) in events {
                match token {
                    // The counter is only a bell; commands are looked for every turn.
                    WAKE => drop(self.commands.wake.read()),
                    DIRECTORIES => self.directories_changed(now),
                    token => self.endpoint_ready(token, events, now),
                }
            }
            let due: Vec<_> = self.deadlines.iter().take_while(|(at, _)| *at <= now).copied().collect();
            for (_, id) in due {
                self.watch_directory(id);
                self.with(id, |live, limits| live.expire(now, limits));
            }
            if !self.obey(now) {
                break;
            }
        }
        for (_, entry) in self.endpoints.drain() {
            entry.live.shut_down(Instant::now(), &self.limits);
        }
    }

    fn endpoint_ready(&mut self, token: u64, events: Events, now: Instant) {
        let id = EndpointId(token / 2);
        if token.is_multiple_of(2) {
            self.with(id, |live, limits| live.accept(now, limits));
        } else {
            self.with(id, |live, limits| live.pump(events, now, limits));
        }
    }

    /// Takes the commands that are there; false: stop.
    fn obey(&mut self, now: Instant) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Add { id, endpoint, source, device, reply } => {
                    let tokens = (id.0 * 2, id.0 * 2 + 1);
                    let live = Live::new(*endpoint, source, device, Rc::clone(&self.poll), tokens);
                    let added = live.map(|live| {
                        self.endpoints.insert(id, Entry { live, deadline: None, leaving: None });
                        self.watch_directory(id);
                        self.with(id, |live, limits| live.expire(now, limits));
                    });
                    let _ = reply.send(added);
                }
                Command::Remove(id, reply) => {
                    if let Some(entry) = self.endpoints.get_mut(&id) {
                        entry.leaving = Some(reply);
                    }
                    self.with(id, |live, limits| live.leave(now, limits));
                }
                Command::Status(id, reply) => {
                    if let Some(entry) = self.endpoints.get(&id) {
                        // The asker may have given up.
                        let _ = reply.send(entry.live.status());
                    }
                }
                Command::ConfigChanged(id) => self.with(id, |live, _| live.config_changed(now)),
                Command::Burial(id, stage) => self.with(id, |live, _| live.burial.reached(stage)),
                Command::Stop => return false,
            }
        }
        true
    }

    /// Lets an endpoint work, then brings epoll, deadline and burial in line with its new state.
    fn with(&mut self, id: EndpointId, work: impl FnOnce(&mut Live, &Limits)) {
        let Some(entry) = self.endpoints.get_mut(&id) else { return };
        work(&mut entry.live, &self.limits);
        let commands = self.commands.clone();
        let tell = move |stage| drop(commands.send(Command::Burial(id, stage)));
        entry.live.burial.start(entry.leaving.is_some(), tell);
        entry.live.watch();

        let deadline = entry.live.deadline(&self.limits).filter(|_| entry.leaving.is_none());
        if deadline != entry.deadline {
            if let Some(old) = entry.deadline {
                self.deadlines.remove(&(old, id));
            }
            if let Some(new) = deadline {
                self.deadlines.insert((new, id));
            }
            entry.deadline = deadline;
        }
        if entry.leaving.is_some() {
            if entry.live.burial.is_unmapped() {
                self.bid_farewell(id);
            }
        } else if entry.live.take_changed() {
            (self.on_change)(id, &entry.live.status());
        }
    }

    /// Forgets an endpoint that holds nothing of its front end's any more but descriptors on their way.
    fn bid_farewell(&mut self, id: EndpointId) {
        let Some(entry) = self.endpoints.remove(&id) else { return };
        if let Some(watch) = entry.live.directory_watch()
            && let Some(directories) = &self.directories
            && !self.endpoints.values().any(|other| other.live.directory_watch() == Some(watch))
        {
            // Fails if the directory is gone, and then so is the watch.
            let _ = directories.watches().remove(watch.clone());
        }
        if let Some(reply) = entry.leaving {
            // If the asker has given up, the socket file is removed here.
            let _ = reply.send(entry.live.into_source());
        }
    }

    /// Watches the directory of a socket to be dialled; before each attempt, so that none that appears is missed.
    fn watch_directory(&mut self, id: EndpointId) {
        let Some(directories) = &self.directories else { return };
        let Some(entry) = self.endpoints.get_mut(&id) else { return };
        let Some((path, beneath, dialler)) = entry.live.dialling() else { return };
        if dialler.watch.is_none()
            && let Ok(place) = Place::open(path, beneath)
        {
            let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
            // Fails if the directory does not exist yet, or all watches are used up.
            dialler.watch = directories.watches().add(place.directory(), mask).ok();
        }
    }

    /// Dials what has just appeared.
    fn directories_changed(&mut self, now: Instant) {
        let Some(directories) = &mut self.directories else { return };
        let mut buffer = [0; 4096];
        let Ok(events) = directories.read_events(&mut buffer) else { return };
        let (mut names, mut gone) = (HashSet::new(), HashSet::new());
        for event in events {
            if event.mask.contains(EventMask::IGNORED) {
                gone.insert(event.wd);
            } else {
                names.insert((event.wd, event.name));
            }
        }
        let mut appeared = Vec::new();
        for (id, entry) in &mut self.endpoints {
            let Some((path, _, dialler)) = entry.live.dialling() else { continue };
            let Some(watch) = dialler.watch.clone() else { continue };
            if gone.contains(&watch) {
                dialler.watch = None;
            } else if names.contains(&(watch, path.file_name())) {
                dialler.hurry(now);
                appeared.push(*id);
            }
        }
        for id in appeared {
            self.with(id, |live, limits| live.expire(now, limits));
        }
    }
}
