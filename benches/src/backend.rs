//! Back ends: processes with vhost-user ports and TAPs that forward between them.
//!
//! Each lives in a directory of its own, where its sockets are, and dies with the thread that started it, however that ends.

mod cloud_hypervisor;
mod ourselves;
mod ovs;
pub mod testpmd;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tempfile::TempDir;

pub use ourselves::serve_if_asked;

/// Names a program for [`Kind::Before`].
pub const BEFORE: &str = "BENCH_BEFORE";

/// How long a back end may take until its sockets and TAPs are there.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kind {
    /// vhostd's dataplane: a learning switch with every check, one worker that polls for ever.
    Vhostd,
    /// The same of another build, of this very bench: the program that [`BEFORE`] names.
    Before,
    /// The same, but the worker sleeps when there is nothing to do: the daemon's default.
    VhostdAdaptive,
    /// `dpdk-testpmd` in io mode: it passes every frame from one port of a pair to the other and looks at none.
    Dpdk,
    /// The bare loop between two ports ([`vring::limit`]): one copy a frame and nothing else.
    Limit,
    /// OVS-DPDK as a learning switch.
    Ovs,
    /// OVS-DPDK with one rule each way between two ports.
    OvsFlows,
    /// The same, its TAPs with segmentation left to whoever can do it late (`userspace-tso-enable`).
    OvsTso,
    /// Cloud Hypervisor's `vhost_user_net`: one guest and one TAP, woken for each burst.
    CloudHypervisor,
    /// Two of vhostd that sleep when there is nothing to do, a TAP each, and a front-end port of the one on a socket of
    /// the other between them.
    Cable,
}

impl Kind {
    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vhostd => "vhostd",
            Self::Before => "before",
            Self::VhostdAdaptive => "adaptive",
            Self::Dpdk => "DPDK io",
            Self::Limit => "limit",
            Self::Ovs => "OVS NORMAL",
            Self::OvsFlows => "OVS flows",
            Self::OvsTso => "OVS TSO",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Cable => "2 x vhostd",
        }
    }

    /// What has to be installed for it, if it is not.
    pub fn missing(self) -> Option<&'static str> {
        let there = |file: &str| Path::new(file).exists();
        match self {
            Self::Dpdk => (!there("/usr/bin/dpdk-testpmd")).then_some("apt-get install dpdk-dev"),
            Self::Ovs | Self::OvsFlows | Self::OvsTso => {
                (!there(ovs::SWITCH)).then_some("apt-get install openvswitch-switch-dpdk")
            }
            Self::CloudHypervisor => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let found =
                    std::env::split_paths(&path).any(|dir| dir.join(cloud_hypervisor::PROGRAM).exists());
                (!found)
                    .then_some("build vhost_user_net in Cloud Hypervisor's source tree, and put it into PATH")
            }
            Self::Before => std::env::var_os(BEFORE)
                .is_none()
                .then_some("set BENCH_BEFORE to this bench as built before a change"),
            Self::Vhostd | Self::VhostdAdaptive | Self::Limit | Self::Cable => None,
        }
    }
}

/// How a back end is to be.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How many ports with a socket.
    pub ports: usize,
    /// How many TAPs beside them: none for the bare loop.
    pub taps: usize,
    /// Number of the first of these: they are called [`tap`]`(first_tap)` and so on.
    pub first_tap: usize,
    /// The longest frame that will come.
    pub frame_max: usize,
    /// Use huge pages (DPDK and OVS; the others have no buffers of their own).
    pub huge_pages: bool,
}

impl Shape {
    fn tap_names(&self) -> impl Iterator<Item = String> + use<> {
        (self.first_tap..self.first_tap + self.taps).map(tap)
    }
}

/// A running back end; ended when dropped.
pub struct Backend {
    kind: Kind,
    children: Vec<Child>,
    dir: TempDir,
    ports: usize,
}

impl Backend {
    /// Starts one and waits for its sockets and TAPs.
    pub fn start(kind: Kind, shape: &Shape) -> Result<Self> {
        let mut backend =
            Self { kind, children: Vec::new(), dir: TempDir::with_prefix("bench-")?, ports: shape.ports };
        match kind {
            Kind::Vhostd | Kind::Before | Kind::VhostdAdaptive | Kind::Limit => {
                let child = ourselves::command(kind, backend.dir.path(), shape)?;
                backend.spawn(child)?;
            }
            Kind::Cable => {
                for child in ourselves::cable(backend.dir.path())? {
                    backend.spawn(child)?;
                }
            }
            Kind::Dpdk => backend.spawn(testpmd::command(backend.dir.path(), shape))?,
            Kind::CloudHypervisor => backend.spawn(cloud_hypervisor::command(backend.dir.path(), shape))?,
            Kind::Ovs | Kind::OvsFlows | Kind::OvsTso => ovs::start(&mut backend, shape)?,
        }
        let taps = shape.tap_names().map(|name| Path::new("/proc/sys/net/ipv4/conf").join(name));
        backend.wait_for(&backend.sockets().into_iter().chain(taps).collect::<Vec<_>>())?;
        if kind == Kind::OvsFlows {
            ovs::add_flows(&mut backend)?;
        }
        Ok(backend)
    }

    /// Its sockets, one a port.
    pub fn sockets(&self) -> Vec<PathBuf> {
        (0..self.ports).map(|n| socket(self.dir.path(), n)).collect()
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                bail!("the back end {} ended: {status}", self.kind.name());
            }
        }
        Ok(())
    }

    /// Stops its processes where they are, until [`resume`](Self::resume): another back end has the core. An error if one has
    /// ended.
    pub fn pause(&mut self) -> Result<()> {
        for child in &self.children {
            let pid = Pid::from_child(child);
            kill_process(pid, Signal::STOP)?;
            // Or it has ended, which stays to be found.
            waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
        }
        self.check()
    }

    /// Lets them go on.
    pub fn resume(&self) -> Result<()> {
        for child in &self.children {
            kill_process(Pid::from_child(child), Signal::CONT)?;
        }
        Ok(())
    }

    /// Whether it takes a core all the time.
    pub fn polls(&self) -> bool {
        !matches!(self.kind, Kind::VhostdAdaptive | Kind::Cable | Kind::CloudHypervisor)
    }

    /// Processor time that it has had so far.
    pub fn cpu_time(&self) -> Duration {
        self.children.iter().map(|child| cpu_time(child.id())).sum()
    }

    fn spawn(&mut self, mut command: Command) -> Result<()> {
        command.stdin(Stdio::piped()).stdout(Stdio::null()).env("XDG_RUNTIME_DIR", self.dir.path());
        let child = command.spawn().with_context(|| format!("starting {}", self.kind.name()))?;
        self.children.push(child);
        Ok(())
    }

    fn wait_for(&mut self, files: &[PathBuf]) -> Result<()> {
        let start = Instant::now();
        while !files.iter().all(|file| file.exists()) {
            self.check()?;
            if start.elapsed() > START_TIMEOUT {
                bail!("the back end {} made no ports in {START_TIMEOUT:?}", self.kind.name());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A program that the kernel kills when the thread that started it ends.
pub fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Processor time of a process's threads so far (Linux, Documentation/scheduler/sched-stats.rst: the first number of a thread's
/// `schedstat`, nanoseconds). None if it has ended.
pub fn cpu_time(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let time = |thread: std::fs::DirEntry| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(threads.filter_map(time).sum())
}

/// The name of a back end's TAP.
pub fn tap(n: usize) -> String {
    format!("tap{n}")
}

fn socket(dir: &Path, port: usize) -> PathBuf {
    dir.join(format!("p{port}"))
}
