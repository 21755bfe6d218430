//! Network namespaces that vanish with the test.
//!
//! A namespace has no name in /run/netns, where it could be left behind. A process holds it: `cat`, reading a pipe of ours, so
//! it ends when the [`Netns`] is dropped or the test dies in any way, and the namespace with everything in it goes too.
//! The namespace comes with a mount namespace whose /sys shows its links, and for an ordinary user with a user namespace
//! in which he is root.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Links, one JSON text in a line, then the host's addresses and routes, and what its IP stack does on each link.
const LOOK: &str = "ip -json -details link; ip -oneline addr show scope global | cut -d' ' -f2-; ip route; \
                    ip -6 route | grep -v fe80 || true; cd /proc/sys/net; \
                    grep . ipv6/conf/*/disable_ipv6 ipv4/conf/*/arp_ignore ipv4/conf/*/arp_announce || true";

/// Set in a test's process of its own.
const INSIDE: &str = "E2E_INSIDE";

/// True in a namespace made for the test of this name. Outside, runs it there, in a process of its own, and gives false.
pub fn inside(test: &str) -> Result<bool> {
    if env::var_os(INSIDE).is_some() {
        return Ok(true);
    }
    let netns = Netns::new()?;
    let mut child = netns.command(env::current_exe()?);
    let output = child.args(["--exact", test, "--nocapture"]).env(INSIDE, "1").output()?;
    ensure!(output.status.success(), "inside:\n{}", String::from_utf8_lossy(&output.stderr));
    let ran = String::from_utf8_lossy(&output.stdout).contains("1 passed");
    ensure!(ran, "no test is named {test}");
    Ok(false)
}

/// A network namespace with its loopback up. Another thread may use it while it lives.
#[derive(Debug)]
pub struct Netns {
    holder: Child,
    own_user: bool,
}

impl Netns {
    /// Makes a namespace.
    pub fn new() -> Result<Self> {
        let own_user = !rustix::process::geteuid().is_root();
        let unshare: &[&str] =
            if own_user { &["--user", "--map-root-user", "--net", "--mount"] } else { &["--net", "--mount"] };
        Self::held_by(Command::new("unshare").args(unshare), "mount -t sysfs sysfs /sys", own_user)
    }

    /// The namespace that we are in, where the interface of a device comes when a driver takes it. It is not made for the
    /// test: only for one that has its machine for itself, in a guest.
    pub fn own() -> Result<Self> {
        Self::held_by(Command::new("unshare").arg("--mount"), "true", false)
    }

    /// Holds the namespaces that `enter` runs further arguments in, without a process in between, once the shell has done
    /// there what `first` says.
    pub(crate) fn held_by(enter: &mut Command, first: &str, own_user: bool) -> Result<Self> {
        let hold = format!("{first} && ip link set lo up && echo ready && exec cat");
        let holder = enter.args(["sh", "-c", &hold]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut holder = holder.with_context(|| format!("{enter:?}"))?;
        let mut line = String::new();
        let output = holder.stdout.take().context("the holder has no output")?;
        BufReader::new(output).read_line(&mut line)?;
        // Owned from here on, so that a failure reaps the holder.
        let netns = Self { holder, own_user };
        ensure!(line == "ready\n", "no network namespace: {enter:?} failed");
        Ok(netns)
    }

    /// The process that holds it: `ip link set DEV netns PID` moves a link here.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs `program` inside, with the same process id.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.pid().to_string()).args(["--net", "--mount"]);
        if self.own_user {
            command.args(["--user", "--preserve-credentials"]);
        }
        // Entering a mount namespace goes to its root directory: come back.
        if let Ok(dir) = env::current_dir() {
            let mut wdns = OsString::from("--wdns=");
            wdns.push(dir);
            command.arg(wdns);
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs a shell script inside and gives its standard output. A failed line ends it with an error.
    pub fn run(&self, script: &str) -> Result<String> {
        let output = self.command("sh").args(["-e", "-c", script]).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {script}\n{errors}", output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// All that a plug can change of a host, in sorted lines: each link with its kind and options, what it is a port of, its
    /// MTU, marks and being up; addresses and routes; what the IP stack does on each link. No numbers and no addresses of links,
    /// which differ when one is made anew.
    pub fn state(&self) -> Result<String> {
        let look = self.run(LOOK)?;
        let (links, rest) = look.split_once('\n').context("a line of links")?;
        let links: Value = serde_json::from_str(links)?;
        let mut lines: Vec<String> = links.as_array().context("an array")?.iter().map(link).collect();
        // A route is marked when its link's carrier goes, and goes on being one.
        lines.extend(rest.lines().map(|line| line.replace(" linkdown", "")));
        // Open vSwitch keeps ovs-netdev for itself, from its first bridge in user space on.
        lines.retain(|line| !line.contains("ovs-netdev"));
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }
}

/// A link in one line.
fn link(link: &Value) -> String {
    let [name, master, mtu, alias, group] =
        ["ifname", "master", "mtu", "ifalias", "group"].map(|key| &link[key]);
    let (kind, data) = (&link["linkinfo"]["info_kind"], &link["linkinfo"]["info_data"]);
    let options = [
        "stp_state",
        "forward_delay",
        "ageing_time",
        "mcast_snooping",
        "mode",
        "id",
        "persist",
        "multi_queue",
    ];
    let options = options.map(|key| data[key].to_string()).join(" ");
    let flags = link["flags"].as_array().map(Vec::as_slice).unwrap_or_default();
    let [up, promiscuous] = ["UP", "PROMISC"].map(|flag| flags.iter().any(|set| set == flag));
    format!("{name} {master} {mtu} {kind} {alias} {group} {options} up {up} promiscuous {promiscuous}")
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_namespace_has_only_what_was_made_in_it() {
        let netns = Netns::new().unwrap();
        netns
            .run("ip link add br0 type bridge; ip addr add 10.1.2.3/24 dev br0; ip link set br0 up")
            .unwrap();
        let links = netns.run("ls /sys/class/net").unwrap();
        assert!(links.contains("br0") && links.contains("lo"), "{links}");
        assert!(!Path::new("/sys/class/net/br0").exists());
        let other = Netns::new().unwrap();
        assert!(!other.run("ls /sys/class/net").unwrap().contains("br0"));
    }

    #[test]
    fn a_failed_line_is_an_error_with_its_reason() {
        let error = Netns::new().unwrap().run("ip link show nosuch; true").unwrap_err().to_string();
        assert!(error.contains("nosuch") && error.contains("exist"), "{error}");
    }

    #[test]
    fn the_working_directory_stays() {
        let here = env::current_dir().unwrap();
        assert_eq!(Netns::new().unwrap().run("pwd").unwrap().trim_end(), here.to_str().unwrap());
    }
}
