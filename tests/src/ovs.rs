//! Open vSwitch as a host runs it: a real `ovsdb-server` and a real `ovs-vswitchd`, in a directory and a network namespace of
//! the test's own.
//!
//! Bridges need `datapath_type=netdev`, the datapath in user space: no kernel module is asked for. Frames between ports
//! that are not DPDK's are moved by the switch's main thread. In a guest ([`MARK`]) the kernel has the module, and forwards.

mod host;
mod rows;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

pub use self::host::{Host, said};
pub use self::rows::{Rows, of_os_vif};
use crate::deadline::wait_for_some;
use crate::netns::Netns;
use crate::process::Process;
use crate::qemu::MARK;

/// The switch of Debian's packages, and the same built with DPDK.
const SWITCH: &str = "/usr/lib/openvswitch-switch/ovs-vswitchd";
const SWITCH_DPDK: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// For the database to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// For `ovs-vsctl`, which waits until the switch has done what is asked, seconds. Starting with DPDK takes one or two.
const VSCTL_TIMEOUT: u32 = 30;

/// Whether the switch has DPDK's port types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dpdk {
    /// No.
    Off,
    /// Yes, without huge pages and without devices of the host. Its ports are polled: that takes a core.
    On,
}

/// A running Open vSwitch without bridges. Dropping it kills both daemons.
#[derive(Debug)]
pub struct Ovs {
    switch: Option<Process>,
    database: Option<Process>,
    dpdk: Dpdk,
    host: Arc<Netns>,
    /// Holds the database and every socket.
    dir: TempDir,
}

/// What bridges are.
pub fn datapath_type() -> &'static str {
    if env::var_os(MARK).is_some() { "system" } else { "netdev" }
}

impl Ovs {
    /// Starts both daemons, the switch in the namespace `host`, and waits until they answer.
    pub fn start(host: &Arc<Netns>, dpdk: Dpdk) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ovs").tempdir()?;
        let mut ovs = Self { switch: None, database: None, dpdk, host: host.clone(), dir };
        let file = ovs.file("conf.db");
        run(ovs.command("ovsdb-tool").arg("create").arg(file).arg(SCHEMA))?;
        ovs.start_database()?;
        ovs.vsctl("--no-wait init")?;
        if dpdk == Dpdk::On {
            // Without --legacy-mem the switch adds --in-memory, which DPDK refuses together with --no-huge.
            // A pool of buffers for all ports would take half of a gigabyte, and not be made at all where that is in pieces.
            ovs.vsctl(
                "--no-wait set Open_vSwitch . other_config:dpdk-init=true other_config:per-port-memory=true \
                 other_config:dpdk-extra=--no-huge\\ --legacy-mem\\ --no-pci\\ --no-shconf\\ -m\\ 512",
            )?;
        }
        ovs.start_switch()?;
        Ok(ovs)
    }

    /// Where OVSDB answers.
    pub fn socket(&self) -> PathBuf {
        self.file("db.sock")
    }

    /// Where the daemon has the sockets that it shares with the switch.
    pub fn shared(&self) -> PathBuf {
        self.file("shared")
    }

    /// The namespace that the switch is in.
    pub fn host(&self) -> &Arc<Netns> {
        &self.host
    }

    /// Runs `ovs-vsctl` and gives what it prints, without the last line's end. Arguments end at spaces, a backslash makes a
    /// space part of one. It waits until the switch has done what is asked, unless told `--no-wait`.
    pub fn vsctl(&self, arguments: &str) -> Result<String> {
        let mut command = self.command("ovs-vsctl");
        command
            .arg(format!("--db=unix:{}", self.socket().display()))
            .arg(format!("--timeout={VSCTL_TIMEOUT}"));
        let arguments = arguments.replace("\\ ", "\0");
        run(command.args(arguments.split_whitespace().map(|word| word.replace('\0', " "))))
    }

    /// All rows with what decides how frames go, sorted.
    pub fn rows(&self) -> Result<String> {
        let tables = [
            ("Bridge", "name,datapath_type,external_ids"),
            ("Port", "name,tag,vlan_mode,trunks"),
            ("Interface", "name,type,options,mtu_request,external_ids"),
            ("QoS", "type"),
        ];
        let list = tables.map(|(table, columns)| format!("--columns={columns} list {table}")).join(" -- ");
        Ok(sorted(&self.vsctl(&format!("--no-wait --format=csv -- {list}"))?))
    }

    /// The host's state, all rows with what decides how frames go, and all sockets that are shared with the switch.
    pub fn state(&self) -> Result<String> {
        let shared = fs::read_dir(self.shared()).into_iter().flatten();
        let sockets = shared.map(|entry| Ok(entry?.file_name().display().to_string()));
        let sockets = sockets.collect::<Result<Vec<_>>>()?.join("\n");
        Ok(format!("{}\n{}\n{}", self.host().state()?, self.rows()?, sorted(&sockets)))
    }

    /// A program in the namespace that finds this Open vSwitch: `ovs-ofctl`, `ovs-appctl`, `ovn-controller` …
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.host.command(program);
        for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR", "XDG_RUNTIME_DIR"] {
            command.env(name, self.dir.path());
        }
        command.stdin(Stdio::null());
        command
    }

    /// Starts the switch again, and waits until it has taken the configuration.
    pub fn start_switch(&mut self) -> Result<()> {
        wait_for_some("the machine to be up long enough", START_TIMEOUT, can_count_processors)?;
        let program = if self.dpdk == Dpdk::On { SWITCH_DPDK } else { SWITCH };
        let mut command = self.command(program);
        command.arg("-vfile:off").arg(format!("unix:{}", self.socket().display()));
        let mut process = Process::spawn("ovs-vswitchd", &command)?;
        // Only a change makes ovs-vsctl wait for the switch.
        let mut change =
            |arguments| self.vsctl(arguments).or_else(|late| process.check_running().and(Err(late)));
        let started = change("set Open_vSwitch . external_ids:starting=true")
            .and_then(|_| change("remove Open_vSwitch . external_ids starting"));
        self.switch = Some(process);
        started.context("Open vSwitch (installed by tests/setup.sh ovs)").map(drop)
    }

    /// Kills the switch. The links of its bridges, which are persistent TAPs, stay.
    pub fn kill_switch(&mut self) -> Result<()> {
        self.switch.take().map_or(Ok(()), |mut switch| switch.kill().map(drop))
    }

    /// Starts the database again, and waits until it answers.
    pub fn start_database(&mut self) -> Result<()> {
        let mut command = self.command("ovsdb-server");
        let remote = format!("--remote=punix:{}", self.socket().display());
        command.arg("-vfile:off").arg(remote).arg(self.file("conf.db"));
        let mut process = Process::spawn("ovsdb-server", &command)?;
        let started = wait_for_some("ovsdb-server to answer", START_TIMEOUT, || {
            process.check_running()?;
            Ok(self.vsctl("--no-wait --retry show").ok())
        });
        self.database = Some(process);
        started.context("Open vSwitch (installed by tests/setup.sh ovs)").map(drop)
    }

    /// Kills the database, and takes its socket away as a clean end would.
    pub fn kill_database(&mut self) -> Result<()> {
        let _ = fs::remove_file(self.socket());
        self.database.take().map_or(Ok(()), |mut database| database.kill().map(drop))
    }

    /// The switch's process, while it runs.
    pub fn switch(&self) -> Option<&Process> {
        self.switch.as_ref()
    }

    /// The database's process, while it runs.
    pub fn database(&self) -> Option<&Process> {
        self.database.as_ref()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn sorted(text: &str) -> String {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// Runs a command that has to succeed and gives what it prints.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, errors.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Open vSwitch counts its processors at most every ten seconds, and takes the start of the machine for the last time that it did
/// (3.1, count_cpu_cores()). Before its eleventh second it finds none, and has no thread that takes frames from the kernel's
/// datapath. A test guest is up after five.
fn can_count_processors() -> Result<Option<()>> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split_whitespace().next().context("a number")?.parse()?;
    Ok((seconds > 11.0).then_some(()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn start(dpdk: Dpdk) -> Ovs {
        Ovs::start(&Arc::new(Netns::new().unwrap()), dpdk).unwrap()
    }

    #[test]
    fn a_bridge_is_in_the_namespace_and_its_rows_outlive_both_daemons() {
        let mut ovs = start(Dpdk::Off);
        ovs.vsctl("add-br br0 -- set Bridge br0 datapath_type=netdev external_ids:text=two\\ words").unwrap();
        assert!(ovs.host().run("ls /sys/class/net").unwrap().contains("br0"));
        assert!(!Path::new("/sys/class/net/br0").exists());

        ovs.kill_switch().unwrap();
        ovs.kill_database().unwrap();
        assert!(ovs.vsctl("--no-wait show").is_err());
        ovs.start_database().unwrap();
        ovs.start_switch().unwrap();
        assert_eq!(ovs.vsctl("get Bridge br0 external_ids:text").unwrap(), "\"two words\"");
        let flows = run(ovs.command("ovs-ofctl").args(["dump-flows", "br0"])).unwrap();
        assert!(flows.contains("actions=NORMAL"), "{flows}");
    }

    #[test]
    fn with_dpdk_it_has_vhost_user_ports() {
        let ovs = start(Dpdk::On);
        ovs.vsctl("add-br br0 -- set Bridge br0 datapath_type=netdev").unwrap();
        let path = ovs.file("vhu0");
        ovs.vsctl(&format!(
            "add-port br0 vhu0 -- set Interface vhu0 type=dpdkvhostuserclient options:vhost-server-path={}",
            path.display()
        ))
        .unwrap();
        assert_eq!(ovs.vsctl("get Interface vhu0 ofport error").unwrap(), "1\n[]");
    }
}
