//! `make demo`: two QEMU guests and the host on one network, and what becomes of them when the daemon dies.
//!
//! ```text
//!   vm1 ──(QEMU connects)──┐
//!                          vhostd, network "demo" ──uplink── TAP in bridge br-demo, 10.77.0.1: the host
//!   vm2 ──(QEMU listens)───┘
//! ```
//!
//! The bridge and the daemon are in a network namespace of their own, so this machine's network is not touched. Any step
//! that does not do what it should ends the demo with an error.
#![forbid(unsafe_code)]

use std::env;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::deadline::wait_for_some;
use e2e::netns::Netns;
use e2e::process::Process;
use e2e::qemu::{Guest, GuestConfig, Job, Nic, Role};
use serde_json::Value;
use tempfile::TempDir;

const HOST: &str = "10.77.0.1";
const VM1: &str = "10.77.0.11";
const VM2: &str = "10.77.0.12";

/// For a daemon to answer, and for a plug to forward.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Of one TCP measurement, seconds.
const TCP_SECONDS: u32 = 5;
/// Of the TCP stream that the daemon is killed under, seconds.
const KILL_TCP_SECONDS: u32 = 12;
/// Between two pings of the stream that measures the gap.
const PING_INTERVAL: Duration = Duration::from_millis(20);

fn main() -> Result<()> {
    let mut demo = Demo::start()?;
    let result = demo.run();
    if result.is_err() {
        eprintln!("---- what vhostd said ----\n{}----", demo.daemon.log()?);
    }
    result
}

struct Demo {
    start: Instant,
    rows: Vec<(String, String)>,
    daemon: Process,
    host: Netns,
    dir: TempDir,
}

impl Demo {
    /// The host's side, the daemon, and three plugs.
    fn start() -> Result<Self> {
        let start = Instant::now();
        progress(start, "a network namespace with the bridge br-demo");
        let host = Netns::new()?;
        host.run(&format!(
            "ip link add br-demo type bridge; ip addr add {HOST}/24 dev br-demo; ip link set br-demo up"
        ))?;
        let dir = tempfile::Builder::new().prefix("demo").tempdir()?;
        progress(start, "vhostd serve");
        let daemon = serve(&host, dir.path())?;
        let mut demo = Self { start, rows: Vec::new(), daemon, host, dir };
        demo.wait_for_daemon()?;

        let (vm1, vm2) = (demo.socket("vm1"), demo.socket("vm2"));
        let (vm1, vm2) = (vm1.to_string_lossy(), vm2.to_string_lossy());
        let plugs: [&[&str]; 3] = [
            &["plug", "vm1", "--listen", &vm1, "--network", "demo"],
            &["plug", "vm2", "--connect", &vm2, "--network", "demo"],
            &["plug", "uplink", "--to", "bridge:br-demo", "--network", "demo"],
        ];
        for plug in plugs {
            demo.progress(&format!("vhostd {}", plug.join(" ")));
            demo.vhostd(plug)?;
        }
        Ok(demo)
    }

    fn run(&mut self) -> Result<()> {
        let (vm1, vm2) = self.boot_guests()?;
        self.ping(&vm1, &vm2)?;
        self.throughput(&vm1, &vm2)?;
        self.kill_daemon(&vm1, &vm2)?;
        self.print_table();
        for command in ["ls", "stats", "workers"] {
            println!("\n$ vhostd {command}\n{}", self.vhostd(&[command])?.trim_end());
        }
        for plug in ["vm1", "vm2", "uplink"] {
            self.vhostd(&["unplug", plug])?;
        }
        Ok(())
    }

    fn boot_guests(&self) -> Result<(Guest, Guest)> {
        let vm1 = self.boot_guest("vm1", Role::Client, "52:54:00:77:00:11", VM1)?;
        let vm2 = self.boot_guest("vm2", Role::Server, "52:54:00:77:00:12", VM2)?;
        for plug in ["vm1", "vm2", "uplink"] {
            self.wait_for_forwarding(plug)?;
        }
        Ok((vm1, vm2))
    }

    fn boot_guest(&self, name: &str, role: Role, mac: &str, address: &str) -> Result<Guest> {
        let how = if role == Role::Client { "connects to" } else { "listens on" };
        self.progress(&format!("guest {name}: QEMU {how} its socket"));
        let guest = Guest::boot(&GuestConfig::new(name, vec![Nic::new(&self.socket(name), role, mac)]))?;
        guest.check(&format!("ip addr add {address}/24 dev eth0 && ip link set eth0 up"))?;
        Ok(guest)
    }

    fn ping(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let ping = |to| format!("ping -c 1 -W 10 {to} >/dev/null && ping -c 10 -i 0.1 -W 2 {to}");
        // The first one finds the way (ARP), and may be late.
        self.ping_row("ping vm1 → vm2", |_| vm1.check(&ping(VM2)))?;
        self.ping_row("ping vm1 → host", |_| vm1.check(&ping(HOST)))?;
        self.ping_row("ping vm2 → host", |_| vm2.check(&ping(HOST)))?;
        self.ping_row("ping host → vm2", |demo| demo.host.run(&ping(VM2).replace("ping", "busybox ping")))
    }

    fn ping_row(&mut self, what: &str, run: impl FnOnce(&Self) -> Result<String>) -> Result<()> {
        self.progress(what);
        let pings = Pings::parse(&run(self)?)?;
        ensure!(pings.received == pings.sent, "{what}: {} of {} answered", pings.received, pings.sent);
        self.row(what, format!("{}/{} answered, {}", pings.received, pings.sent, pings.times));
        Ok(())
    }

    fn throughput(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let _guest_server = vm2.spawn("iperf3 --server")?;
        let mut server = self.host.command("iperf3");
        server.arg("--server");
        let _host_server = Process::spawn("iperf3 on the host", &server)?;
        for (what, to, options) in
            [("vm1 → vm2", VM2, ""), ("vm1 → host", HOST, ""), ("host → vm1", HOST, "--reverse")]
        {
            self.progress(&format!("TCP {what}, {TCP_SECONDS} s"));
            let before = self.gso_frames()?;
            let rate = tcp_rate(&start_tcp(vm1, to, TCP_SECONDS, options)?, TCP_SECONDS)?;
            let frames = self.gso_frames()? - before;
            ensure!(frames > 0, "TCP {what}: no frame carried a segmentation request");
            self.row(&format!("TCP {what}"), format!("{rate}, {frames} GSO frames through the ports"));
        }
        Ok(())
    }

    /// Kills the daemon while TCP and pings run, starts it again, and sees how long the pings went unanswered.
    fn kill_daemon(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let server = vm2.spawn("iperf3 --server --port 5202")?;
        let tcp = start_tcp(vm1, VM2, KILL_TCP_SECONDS, "--port 5202")?;
        let ping = format!("ping -i {} {HOST}", PING_INTERVAL.as_secs_f32());
        let pings = [("QEMU connects", vm1.spawn(&ping)?), ("QEMU listens", vm2.spawn(&ping)?)];
        for (_, job) in &pings {
            self.wait_for_answers(job, 50)?;
        }

        self.progress("kill -9 vhostd, mid-traffic, and start it again");
        self.daemon.kill()?;
        let down = Instant::now();
        self.daemon = serve(&self.host, self.dir.path())?;
        self.wait_for_daemon()?;
        self.row("daemon killed and answering again", format!("{} ms", down.elapsed().as_millis()));
        for plug in ["vm1", "vm2", "uplink"] {
            self.wait_for_forwarding(plug)?;
        }

        for (role, job) in &pings {
            self.wait_for_answers(job, Pings::answers(&job.output(READY_TIMEOUT)?) + 50)?;
            job.signal("INT", READY_TIMEOUT)?;
            let pings = Pings::parse(&job.wait(READY_TIMEOUT)?.stdout)?;
            let gap = PING_INTERVAL * u32::try_from(pings.gap)?;
            self.row(
                &format!("kill -9 under ping, {role}"),
                format!(
                    "gap {} ms: {} of {} unanswered",
                    gap.as_millis(),
                    pings.sent - pings.received,
                    pings.sent
                ),
            );
        }
        self.progress("the TCP stream goes on to its end");
        let rate = tcp_rate(&tcp, KILL_TCP_SECONDS)?;
        self.row("kill -9 under TCP vm1 → vm2", format!("stream survived, {rate} over {KILL_TCP_SECONDS} s"));
        server.signal("TERM", READY_TIMEOUT)
    }

    /// Waits until a stream of pings has this many answers.
    fn wait_for_answers(&self, job: &Job, count: usize) -> Result<()> {
        wait_for_some(&format!("{count} answers to pings"), READY_TIMEOUT, || {
            Ok((Pings::answers(&job.output(READY_TIMEOUT)?) >= count).then_some(()))
        })
    }

    fn wait_for_daemon(&mut self) -> Result<()> {
        wait_for_some("vhostd to answer", READY_TIMEOUT, || {
            self.daemon.check_running()?;
            Ok(self.vhostd(&["ls"]).ok())
        })
        .map(drop)
    }

    fn wait_for_forwarding(&self, plug: &str) -> Result<()> {
        wait_for_some(&format!("{plug} to forward"), READY_TIMEOUT, || {
            let shown: Value = serde_json::from_str(&self.vhostd(&["show", plug, "-o", "json"])?)?;
            Ok((shown["status"]["phase"] == "forwarding").then_some(()))
        })
    }

    /// Frames with a segmentation request, of all ports and both directions.
    fn gso_frames(&self) -> Result<u64> {
        let stats: Value = serde_json::from_str(&self.vhostd(&["stats", "-o", "json"])?)?;
        let ports = stats.as_array().context("stats is not an array of ports")?;
        Ok(ports.iter().filter_map(|port| port["gso_frames"].as_u64()).sum())
    }

    fn vhostd(&self, arguments: &[&str]) -> Result<String> {
        vhostd(&self.host, self.dir.path(), arguments)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    fn progress(&self, what: &str) {
        progress(self.start, what);
    }

    fn row(&mut self, what: &str, result: String) {
        self.progress(&format!("  {result}"));
        self.rows.push((what.into(), result));
    }

    fn print_table(&self) {
        let width = self.rows.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
        println!();
        for (what, result) in &self.rows {
            println!("{what:width$}  {result}");
        }
    }
}

/// The program beside this one.
fn vhostd_path() -> Result<PathBuf> {
    Ok(env::current_exe()?.with_file_name("vhostd"))
}

/// Starts the daemon where the bridge is.
fn serve(host: &Netns, dir: &Path) -> Result<Process> {
    let mut command = host.command(vhostd_path()?.to_str().context("a path that is not UTF-8")?);
    command.arg("--api").arg(dir.join("api.sock")).arg("serve").arg("--state-dir").arg(dir.join("state"));
    Process::spawn("vhostd", &command)
}

/// Runs a command of the CLI and gives what it prints.
fn vhostd(host: &Netns, dir: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = host.command(vhostd_path()?.to_str().context("a path that is not UTF-8")?);
    let output = command.arg("--api").arg(dir.join("api.sock")).args(arguments).output()?;
    if !output.status.success() {
        bail!("vhostd {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts a TCP stream from the guest; the server may need a moment to listen.
fn start_tcp(guest: &Guest, to: &str, seconds: u32, options: &str) -> Result<Job> {
    let client = format!("iperf3 --json --client {to} --time {seconds} {options}");
    guest.spawn(&format!("for try in 1 2 3 4 5 6 7 8 9 10; do {client} && exit; sleep 0.2; done; exit 1"))
}

/// What the receiver of a TCP stream got, as text.
fn tcp_rate(job: &Job, seconds: u32) -> Result<String> {
    let output = job.wait(Duration::from_secs(u64::from(seconds)) + READY_TIMEOUT)?;
    ensure!(output.status == 0, "iperf3: {}", output.stdout);
    // Tries that found no server have printed a document of their own.
    let document = output.stdout.rfind("\n{").map_or(output.stdout.as_str(), |at| &output.stdout[at..]);
    let result: Value = serde_json::from_str(document).context("iperf3's result")?;
    let rate =
        result["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3's result has no rate")?;
    Ok(format!("{:.2} Gbit/s", rate / 1e9))
}

/// What busybox's ping printed.
#[derive(Debug, PartialEq, Eq)]
struct Pings {
    sent: usize,
    received: usize,
    /// Longest run of unanswered ones between two answers.
    gap: usize,
    /// "min/avg/max = ... ms"
    times: String,
}

impl Pings {
    fn parse(text: &str) -> Result<Self> {
        let summary =
            text.lines().find(|line| line.contains("packets transmitted")).context("no end of a ping")?;
        let sent = summary.split(' ').next().unwrap_or_default().parse()?;
        let mut sequences = sequences(text).collect::<Vec<usize>>();
        sequences.sort_unstable();
        let gap = sequences.windows(2).map(|pair| (pair[1] - pair[0]).saturating_sub(1)).max().unwrap_or(0);
        let times = text.lines().find_map(|line| line.strip_prefix("round-trip ")).unwrap_or("no answer");
        Ok(Self { sent, received: sequences.len(), gap, times: times.into() })
    }

    /// Answers so far.
    fn answers(text: &str) -> usize {
        sequences(text).count()
    }
}

/// Sequence numbers of the answers.
fn sequences(text: &str) -> impl Iterator<Item = usize> {
    text.lines().filter_map(|line| line.split_once(" seq=")?.1.split(' ').next()?.parse().ok())
}

fn progress(start: Instant, what: &str) {
    println!("{:6.1} s  {what}", start.elapsed().as_secs_f32());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_counted_and_their_gap_found() {
        let text = "PING 10.0.0.1 (10.0.0.1): 56 data bytes
64 bytes from 10.0.0.1: seq=0 ttl=64 time=8.225 ms
64 bytes from 10.0.0.1: seq=1 ttl=64 time=1.275 ms
64 bytes from 10.0.0.1: seq=5 ttl=64 time=8.330 ms

--- 10.0.0.1 ping statistics ---
7 packets transmitted, 3 packets received, 57% packet loss
round-trip min/avg/max = 1.275/5.943/8.330 ms
";
        let times = "min/avg/max = 1.275/5.943/8.330 ms".into();
        assert_eq!(Pings::parse(text).unwrap(), Pings { sent: 7, received: 3, gap: 3, times });
        assert!(Pings::parse("PING 10.0.0.1 (10.0.0.1): 56 data bytes\n").is_err());
    }
}
