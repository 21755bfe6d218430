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

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::daemon::Daemon;
use e2e::process::Process;
use e2e::qemu::{Guest, GuestConfig, Nic, Role};
use e2e::traffic::{PingStream, Pings, TcpStream};

const HOST: &str = "10.77.0.1";
const VM1: &str = "10.77.0.11";
const VM2: &str = "10.77.0.12";

/// All plugs.
const PLUGS: [&str; 3] = ["vm1", "vm2", "uplink"];
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
    daemon: Daemon,
}

impl Demo {
    /// The host's side, the daemon, and three plugs.
    fn start() -> Result<Self> {
        let start = Instant::now();
        progress(start, "vhostd serve, in a network namespace with the bridge br-demo");
        let daemon = Daemon::start()?;
        daemon.host().run(&format!(
            "ip link add br-demo type bridge; ip addr add {HOST}/24 dev br-demo; ip link set br-demo up"
        ))?;
        let demo = Self { start, rows: Vec::new(), daemon };

        let (vm1, vm2) = (demo.daemon.socket("vm1"), demo.daemon.socket("vm2"));
        let (vm1, vm2) = (vm1.to_string_lossy(), vm2.to_string_lossy());
        let plugs: [&[&str]; 3] = [
            &["plug", "vm1", "--listen", &vm1, "--network", "demo"],
            &["plug", "vm2", "--connect", &vm2, "--network", "demo"],
            &["plug", "uplink", "--to", "bridge:br-demo", "--network", "demo"],
        ];
        for plug in plugs {
            demo.progress(&format!("vhostd {}", plug.join(" ")));
            demo.daemon.run(plug)?;
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
            println!("\n$ vhostd {command}\n{}", self.daemon.run(&[command])?.trim_end());
        }
        PLUGS.iter().try_for_each(|plug| self.daemon.run(&["unplug", plug]).map(drop))
    }

    fn boot_guests(&self) -> Result<(Guest, Guest)> {
        let vm1 = self.boot_guest("vm1", Role::Client, "52:54:00:77:00:11", VM1)?;
        let vm2 = self.boot_guest("vm2", Role::Server, "52:54:00:77:00:12", VM2)?;
        self.daemon.wait_for_forwarding(&PLUGS)?;
        Ok((vm1, vm2))
    }

    fn boot_guest(&self, name: &str, role: Role, mac: &str, address: &str) -> Result<Guest> {
        let how = if role == Role::Client { "connects to" } else { "listens on" };
        self.progress(&format!("guest {name}: QEMU {how} its socket"));
        let mut nic = Nic::new(&self.daemon.socket(name), role, mac);
        if role == Role::Server {
            // A guest that sees its link go down forgets its neighbours, and misses them for a second.
            nic.properties = vec!["status=off".into()];
        }
        let guest = Guest::boot(&GuestConfig::new(name, vec![nic]))?;
        guest.check(&format!("ip addr add {address}/24 dev eth0 && ip link set eth0 up"))?;
        Ok(guest)
    }

    fn ping(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let ping = |to| format!("ping -c 1 -W 10 {to} >/dev/null && ping -c 10 -i 0.1 -W 2 {to}");
        // The first one finds the way (ARP), and may be late.
        self.ping_row("ping vm1 → vm2", |_| vm1.check(&ping(VM2)))?;
        self.ping_row("ping vm1 → host", |_| vm1.check(&ping(HOST)))?;
        self.ping_row("ping vm2 → host", |_| vm2.check(&ping(HOST)))?;
        self.ping_row("ping host → vm2", |demo| {
            demo.daemon.host().run(&ping(VM2).replace("ping", "busybox ping"))
        })
    }

    fn ping_row(&mut self, what: &str, run: impl FnOnce(&Self) -> Result<String>) -> Result<()> {
        self.progress(what);
        let pings = Pings::parse(&run(self)?)?;
        ensure!(pings.received == pings.sent, "{what}: {} of {} answered", pings.received, pings.sent);
        self.row(what, pings.to_string());
        Ok(())
    }

    fn throughput(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let _guest_server = vm2.spawn("iperf3 --server")?;
        let mut server = self.daemon.host().command("iperf3");
        server.arg("--server");
        let _host_server = Process::spawn("iperf3 on the host", &server)?;
        for (what, to, options) in
            [("vm1 → vm2", VM2, ""), ("vm1 → host", HOST, ""), ("host → vm1", HOST, "--reverse")]
        {
            self.progress(&format!("TCP {what}, {TCP_SECONDS} s"));
            let before = self.daemon.gso_frames()?;
            let rate = TcpStream::start(vm1, to, TCP_SECONDS, options)?.rate()?;
            let frames = self.daemon.gso_frames()? - before;
            ensure!(frames > 0, "TCP {what}: no frame carried a segmentation request");
            self.row(
                &format!("TCP {what}"),
                format!("{rate:.2} Gbit/s, {frames} GSO frames through the ports"),
            );
        }
        Ok(())
    }

    /// Kills the daemon while TCP and pings run, starts it again, and sees how long the pings went unanswered.
    fn kill_daemon(&mut self, vm1: &Guest, vm2: &Guest) -> Result<()> {
        let _server = vm2.spawn("iperf3 --server --port 5202")?;
        let tcp = TcpStream::start(vm1, VM2, KILL_TCP_SECONDS, "--port 5202")?;
        let pings = [
            ("QEMU connects", PingStream::start(vm1, HOST, PING_INTERVAL)?),
            ("QEMU listens", PingStream::start(vm2, HOST, PING_INTERVAL)?),
        ];

        self.progress("kill -9 vhostd, mid-traffic, and start it again");
        let down = self.daemon.kill_and_restart()?;
        self.row("daemon killed and answering again", format!("{} ms", down.as_millis()));
        self.daemon.wait_for_forwarding(&PLUGS)?;

        for (role, stream) in pings {
            stream.wait_for_more(50)?;
            let (pings, gap) = stream.stop()?;
            let unanswered = pings.sent - pings.received;
            self.row(
                &format!("kill -9 under ping, {role}"),
                format!("gap {} ms: {unanswered} of {} unanswered", gap.as_millis(), pings.sent),
            );
        }
        self.progress("the TCP stream goes on to its end");
        let rate = tcp.rate()?;
        self.row(
            "kill -9 under TCP vm1 → vm2",
            format!("stream survived, {rate:.2} Gbit/s over {KILL_TCP_SECONDS} s"),
        );
        Ok(())
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

fn progress(start: Instant, what: &str) {
    println!("{:6.1} s  {what}", start.elapsed().as_secs_f32());
}
