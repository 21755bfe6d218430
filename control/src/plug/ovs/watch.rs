//! What becomes of Open vSwitch: its database followed, and whether ovs-vswitchd and OVN's ovn-controller run.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use ovsdb::{Address, Monitor, View};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

/// First and longest pause before the database is followed again.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(2);
/// How often a daemon is looked for while it is not there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is known of it.
pub(super) struct Seen {
    /// The database's content, or why it is not known.
    pub(super) view: Result<View, String>,
    /// ovs-vswitchd has ended.
    pub(super) switch_is_down: bool,
    /// ovn-controller has ended.
    pub(super) controller_is_down: bool,
}

/// Open vSwitch as it was last seen.
pub(super) struct Lookout {
    database: Address,
    seen: Mutex<Seen>,
    /// Counts what was seen.
    changes: watch::Sender<u64>,
    begun: OnceLock<()>,
}

impl Lookout {
    pub(super) fn new(database: Address) -> Self {
        let unknown = "its database has not been read yet".to_owned();
        Self {
            database,
            seen: Mutex::new(Seen { view: Err(unknown), switch_is_down: false, controller_is_down: false }),
            changes: watch::Sender::default(),
            begun: OnceLock::new(),
        }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no holder of this lock panics")
    }

    /// Tells when something was seen to have changed. Only the first time: whoever is given it has to run
    /// [`follow`](Self::follow). A host without Open vSwitch is never asked for its database.
    pub(super) fn begin(&self) -> Option<watch::Receiver<u64>> {
        self.begun.set(()).is_ok().then(|| self.changes.subscribe())
    }

    /// Follows the database, whatever becomes of it, for ever.
    pub(super) async fn follow(&self) {
        let Address::Unix(database) = &self.database else { return self.follow_database().await };
        // Open vSwitch keeps all that runs in one directory; OVN has one beside it, or the same.
        let beside = Path::new(database).parent().unwrap_or_else(|| Path::new("/"));
        let dirs = [beside.to_owned(), beside.with_file_name("ovn")];
        tokio::join!(
            self.follow_database(),
            self.look_for("ovs-vswitchd", &dirs[..1], |seen| &mut seen.switch_is_down),
            self.look_for("ovn-controller", &dirs, |seen| &mut seen.controller_is_down),
        );
    }

    async fn follow_database(&self) {
        let mut pause = RETRY_FIRST;
        loop {
            match Monitor::open(&self.database).await {
                Ok((mut monitor, view)) => {
                    pause = RETRY_FIRST;
                    self.see(|seen| seen.view = Ok(view));
                    let error = loop {
                        match monitor.next().await {
                            Ok(tables) => self.see(|seen| {
                                if let Ok(view) = &mut seen.view {
                                    view.apply(&tables);
                                }
                            }),
                            Err(error) => break error,
                        }
                    };
                    tracing::warn!("{error}");
                    self.see(|seen| seen.view = Err(error.to_string()));
                }
                Err(error) => self.see(|seen| seen.view = Err(error.to_string())),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }

    /// A daemon that answers once is missed when it does not any more; of one that was never seen nothing is said.
    async fn look_for(&self, daemon: &str, dirs: &[PathBuf], is_down: impl Fn(&mut Seen) -> &mut bool) {
        let note = |down| {
            if *is_down(&mut self.seen()) != down {
                self.see(|seen| *is_down(seen) = down);
            }
        };
        loop {
            match control_socket(daemon, dirs).await {
                ControlSocket::Connected(mut stream) => {
                    note(false);
                    // It says nothing unasked: this ends when it does.
                    let _ = stream.read(&mut [0]).await;
                    note(true);
                }
                ControlSocket::Dead => note(true),
                ControlSocket::Absent => {}
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// What there is of a daemon's control socket, `ovs-vswitchd.PID.ctl` and the like (ovs-vswitchd(8), `--unixctl`).
enum ControlSocket {
    Connected(UnixStream),
    /// Left behind by one that was killed.
    Dead,
    Absent,
}

async fn control_socket(daemon: &str, dirs: &[PathBuf]) -> ControlSocket {
    let mut found = ControlSocket::Absent;
    for dir in dirs {
        let Ok(mut entries) = tokio::fs::read_dir(dir).await else { continue };
        while let Ok(Some(entry)) = entries.next_entry().await {
            let name = entry.file_name();
            let is_control = |name: &str| name.starts_with(daemon) && name.ends_with(".ctl");
            if !name.to_str().is_some_and(is_control) {
                continue;
            }
            match UnixStream::connect(entry.path()).await {
                Ok(stream) => return ControlSocket::Connected(stream),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => found = ControlSocket::Dead,
                Err(_) => {}
            }
        }
    }
    found
}
