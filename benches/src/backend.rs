//! Back ends with two vhost-user ports that forward between them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dataplane::{Config, Dataplane, Link, Poll, PortSpec};
use tempfile::TempDir;

use crate::BACKEND_CPU;
use crate::limit::LimitPort;

/// How long a back end may take until its sockets are there.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running back end; ended when dropped.
pub struct Backend {
    child: Child,
    dir: TempDir,
}

impl Backend {
    /// vhostd's dataplane: a learning switch with every check, busy polling, one worker. It is the calling program
    /// itself, started again with `--backend DIR`, for which its `main` must call [`serve`].
    pub fn vhostd() -> Result<Self> {
        Self::ourselves("--vhostd")
    }

    /// The bare loop ([`vring::limit`]): one copy a frame and nothing else.
    pub fn limit() -> Result<Self> {
        Self::ourselves("--limit")
    }

    fn ourselves(kind: &str) -> Result<Self> {
        let dir = TempDir::new()?;
        let child = Command::new(std::env::current_exe()?)
            .arg(kind)
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .context("starting ourselves as back end")?;
        Self { child, dir }.ready()
    }

    /// `dpdk-testpmd` with two vhost ports in io mode: it passes every frame from one port to the other and looks at none.
    pub fn testpmd() -> Result<Self> {
        let dir = TempDir::new()?;
        let vdev =
            |n: usize| format!("--vdev=net_vhost{n},iface={},queues=1", dir.path().join(NAMES[n]).display());
        let child = Command::new("dpdk-testpmd")
            .args([
                "--no-pci",
                "--no-huge",
                "--no-shconf",
                "--no-telemetry",
                "-m",
                "512",
                "--log-level=error",
            ])
            .args([format!("--lcores=1@{},0@{BACKEND_CPU}", crate::FRONTEND_CPU), "--main-lcore=1".into()])
            .args([vdev(0), vdev(1)])
            .args(["--", "--forward-mode=io", "--auto-start", "--burst=32", "-i", "--total-num-mbufs=16384"])
            .env("XDG_RUNTIME_DIR", dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting dpdk-testpmd (apt-get install dpdk)")?;
        Self { child, dir }.ready()
    }

    /// Its two sockets.
    pub fn sockets(&self) -> [PathBuf; 2] {
        NAMES.map(|name| self.dir.path().join(name))
    }

    fn ready(mut self) -> Result<Self> {
        let start = Instant::now();
        while !self.sockets().iter().all(|socket| socket.exists()) {
            if let Some(status) = self.child.try_wait()? {
                bail!("the back end ended at once: {status}");
            }
            if start.elapsed() > START_TIMEOUT {
                bail!("the back end made no sockets in {START_TIMEOUT:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(self)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const NAMES: [&str; 2] = ["a", "b"];

/// Serves two ports in `dir` by the bare loop until it is killed.
pub fn serve_limit(dir: &Path) -> Result<()> {
    let sessions = vhost_user::Sessions::start(vhost_user::Limits::default(), Box::new(|_, _| {}))?;
    let ports = [LimitPort::default(), LimitPort::default()];
    for (name, port) in NAMES.iter().zip(&ports) {
        sessions.add(vhost_user::Endpoint::listen(dir.join(name)), Box::new(port.clone()))?;
    }
    crate::pin(BACKEND_CPU);
    loop {
        ports[0].forward(&ports[1]);
        ports[1].forward(&ports[0]);
    }
}

/// Serves two ports in `dir` by vhostd's dataplane until standard input ends.
pub fn serve(dir: &Path) -> Result<()> {
    let config = Config {
        cpus: vec![BACKEND_CPU],
        poll: Poll::Busy,
        ageing: Duration::from_secs(300),
        fdb_port_max: 256,
        on_event: Box::new(|_| {}),
    };
    let plane = Dataplane::start(config)?;
    for name in NAMES {
        let endpoint = vhost_user::Endpoint::listen(dir.join(name));
        let link = Link::VhostUser { endpoint, mac: None, queue_pairs: 1 };
        plane.add_port(PortSpec { name: name.into(), network: "bench".into(), mtu: 9216, link })?;
    }
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
