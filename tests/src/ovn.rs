//! Two hosts with OVN, as docs/ovn-two-hosts.sh makes them, and the daemon on each.
//!
//! The script runs in a mount namespace, where /run is empty, and in a pid namespace, whose end is the end of everything that it
//! started. Both end with the [`TwoHosts`], or when the test dies in any way. The hosts are network namespaces in there, and
//! the daemons run in these.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::netns::Netns;

/// What users run.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ovn-two-hosts.sh");

/// A namespace: `nsenter`'s option, and the file in /proc/PID/ns of the process that has made it.
type Namespace = (&'static str, &'static str);
const MOUNT: Namespace = ("mount", "mnt");
const PID: Namespace = ("pid", "pid_for_children");
const USER: Namespace = ("user", "user");

/// Two hosts. Dropping it kills everything on them.
#[derive(Debug)]
pub struct TwoHosts {
    /// The one where the databases of OVN are.
    pub a: Daemon,
    /// The other.
    pub b: Daemon,
    lab: Lab,
}

impl TwoHosts {
    /// Starts them, with an underlay whose frames carry so many bytes.
    pub fn start(underlay_mtu: u16) -> Result<Self> {
        let lab = Lab::start(underlay_mtu)?;
        let daemon = |host| {
            let configuration = lab.run(&["cat", &format!("/run/ovn-hosts/{host}/vhostd.toml")])?;
            Daemon::start_on(Arc::new(lab.host(host)?), &configuration)
        };
        Ok(Self { a: daemon("a")?, b: daemon("b")?, lab })
    }

    /// Runs a shell script on host `a` or `b`, where `ovs-vsctl` and the like find what is the host's, and `ovn-nbctl` and
    /// `ovn-sbctl` OVN's databases; gives what it prints. A failed line ends it with an error.
    pub fn on(&self, host: &str, script: &str) -> Result<String> {
        self.lab.run(&[SCRIPT, "in", host, "sh", "-e", "-c", script])
    }

    /// Kills a host's ovn-controller with SIGKILL.
    pub fn kill_controller(&self, host: &str) -> Result<()> {
        self.on(host, "kill -9 $(cat $OVN_RUNDIR/ovn-controller.pid)").map(drop)
    }

    /// Starts again what does not run.
    pub fn up(&self) -> Result<()> {
        self.lab.run(&[SCRIPT, "up"]).map(drop)
    }
}

/// Where the script runs.
#[derive(Debug)]
struct Lab {
    holder: Child,
    own_user: bool,
}

impl Lab {
    fn start(underlay_mtu: u16) -> Result<Self> {
        let own_user = !rustix::process::geteuid().is_root();
        let hold = format!("mount -t tmpfs run /run && {SCRIPT} up && echo ready && exec cat");
        let mut holder = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(own_user.then_some(["--user", "--map-root-user"]).into_iter().flatten())
            .args(["sh", "-c", &hold])
            .env("OVN_UNDERLAY_MTU", underlay_mtu.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("unshare")?;
        let mut line = String::new();
        let output = holder.stdout.take().context("unshare has no output")?;
        BufReader::new(output).read_line(&mut line)?;
        let lab = Self { holder, own_user };
        ensure!(line == "ready\n", "no hosts with OVN (installed by tests/setup.sh ovn)");
        Ok(lab)
    }

    /// A host of the lab. Whoever enters it sees the processes that the test sees.
    fn host(&self, name: &str) -> Result<Netns> {
        let mut enter = self.enter(&[MOUNT]);
        enter.args(["ip", "netns", "exec", &format!("ovn-{name}")]);
        Netns::held_by(&mut enter, "mount -t proc proc /proc", self.own_user)
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.enter(&[MOUNT, PID]).args(words).stdin(Stdio::null()).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}\n{errors}", output.status, words.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// A command that runs further arguments in these namespaces of the lab.
    fn enter(&self, namespaces: &[Namespace]) -> Command {
        let mut command = Command::new("nsenter");
        let user: &[_] = if self.own_user { &[USER] } else { &[] };
        for (option, file) in user.iter().chain(namespaces) {
            command.arg(format!("--{option}=/proc/{}/ns/{file}", self.holder.id()));
        }
        command.args(self.own_user.then_some("--preserve-credentials")).arg("--");
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
