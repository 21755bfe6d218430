//! The daemon: starts everything in order, says when it is ready, and ends in order.
//!
//! ```text
//! configuration → log → store (one daemon a state directory) → dataplane → API → stored plugs → ready
//! ```
//!
//! The API answers before the stored plugs are back: whoever asks for one of them gets its turn after its restoration.
//! SIGTERM and SIGINT close the API's socket and the sessions; plugs stay recorded, TAPs stay where they are.

mod health;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dataplane::{Dataplane, Poll};
use hostnet::HostNet;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use self::health::Health;
use crate::api::{self, Info};
use crate::cli::{PollMode, ServeArgs};
use crate::config::{Config, ConfigError, DataplaneConfig, SocketsConfig};
use crate::events::Events;
use crate::logging::{self, FilterError, LogControl};
use crate::plug::{Plugs, SocketRules};
use crate::server::{self, Access, PublishError, group_id};
use crate::store::{Store, StoreError};

/// Threads that serve the API. The dataplane has its own.
const API_THREADS: usize = 2;
/// Of each such thread. The deepest future is a plug's steps, far below.
const API_STACK_BYTES: usize = 512 << 10;
/// Threads for calls that wait for the dataplane.
const BLOCKING_THREADS: usize = 8;
/// How long an idle one of them stays.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The log's filter.
    #[error("log.filter: {0}")]
    Filter(#[from] FilterError),
    /// The state directory.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The API's socket, or a group in the configuration.
    #[error("{0}")]
    Publish(#[from] PublishError),
    /// The dataplane.
    #[error("cannot start the dataplane: {0} (lcores come from --cpus)")]
    Dataplane(#[from] dataplane::Error),
    /// The host's network.
    #[error("{0}")]
    Host(#[from] hostnet::Error),
    /// The system.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

impl ServeError {
    /// What the command line exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Filter(_) => 2,
            Self::Store(StoreError::InUse(_)) | Self::Publish(PublishError::InUse(_)) => 4,
            Self::Store(_) | Self::Publish(_) => 7,
            Self::Dataplane(_) | Self::Host(_) | Self::System(_) => 1,
        }
    }
}

/// What every part of the API works on.
pub struct Daemon {
    /// The plugs.
    pub plugs: Arc<Plugs>,
    /// Workers, sessions, networks.
    pub dataplane: Arc<Dataplane>,
    /// What changed.
    pub events: Arc<Events>,
    /// What is logged.
    pub log: LogControl,
    /// Whether it is well.
    pub health: Health,
    /// What it is.
    pub info: Info,
}

/// Runs the daemon until it is told to end.
pub fn serve(args: &ServeArgs, api: Option<&Path>) -> Result<(), ServeError> {
    let config = Config::load(args, api)?;
    let log = logging::start(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(API_THREADS)
        .thread_stack_size(API_STACK_BYTES)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .thread_name("api")
        .enable_all()
        .build()?;
    raise_descriptor_limit();
    runtime.block_on(run(config, log))
}

async fn run(config: Config, log: LogControl) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let store = Store::open(&config.state.dir)?;
    let events = Arc::new(Events::default());
    let dataplane = Arc::new(Dataplane::start(dataplane_config(&config.dataplane, &events))?);
    let rules = socket_rules(&config.sockets)?;
    let (host, configs) = (HostNet::open()?, (config.ovs.clone(), config.devices.clone()));
    let daemon = Arc::new(Daemon {
        plugs: Arc::new(Plugs::new(dataplane.clone(), host, configs, rules, store, events.clone())),
        info: info(&config, &events),
        health: Health::new(dataplane.clone()),
        dataplane,
        events,
        log,
    });

    let gid = config.api.group.as_deref().map(group_id).transpose()?;
    let access = vhost_user::Access { mode: config.api.mode, owner: None, group: gid };
    let (listener, socket) = server::publish(&config.api.socket, access)?;
    let server = server::serve(listener, api::router(daemon.clone()), Access { uids: config.api.uids });
    let mut server = tokio::spawn(server);
    tracing::info!(api = %config.api.socket.display(), state = %config.state.dir.display(), "started");

    let watch = tokio::spawn(bring_back(daemon));

    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = &mut server => ended.expect("the server does not panic"),
    };
    notify(&[NotifyState::Stopping]);
    tracing::info!("stopping; plugs stay recorded");
    drop(socket);
    server.abort();
    watch.abort();
    Ok(ended?)
}

/// Brings the stored plugs back, says so, and watches over the workers from then on.
async fn bring_back(daemon: Arc<Daemon>) {
    daemon.plugs.restore().await;
    daemon.health.set_restored();
    let plugs = daemon.plugs.count();
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("{plugs} plugs"))]);
    tracing::info!(plugs, "ready");
    tokio::join!(health::feed_watchdog(daemon.clone()), api::keep_balanced(daemon));
}

fn dataplane_config(config: &DataplaneConfig, events: &Arc<Events>) -> dataplane::Config {
    let events = events.clone();
    dataplane::Config {
        cpus: config.cpus.0.clone(),
        poll: match config.poll {
            PollMode::Adaptive => Poll::Adaptive,
            PollMode::Busy => Poll::Busy,
        },
        ageing: config.ageing,
        fdb_port_max: config.fdb_port_max,
        on_event: Box::new(move |event| events.publish_port(&event)),
    }
}

fn socket_rules(config: &SocketsConfig) -> Result<SocketRules, PublishError> {
    let gid = config.group.as_deref().map(group_id).transpose()?;
    Ok(SocketRules { dirs: config.dirs.clone(), mode: config.mode, gid })
}

fn info(config: &Config, events: &Events) -> Info {
    Info {
        version: env!("CARGO_PKG_VERSION").into(),
        api: vec!["v1".into()],
        deprecations: Vec::new(),
        epoch: events.epoch(),
        pid: std::process::id(),
        started: jiff::Timestamp::now().to_string(),
        state_dir: config.state.dir.display().to_string(),
        cpus: config.dataplane.cpus.0.clone(),
        poll: config.dataplane.poll,
    }
}

/// Every port needs descriptors (socket, memory regions, two eventfds a ring); the soft limit is usually 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
}

/// Tells the service manager, if there is one.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot notify the service manager: {error}");
    }
}
