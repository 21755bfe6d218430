//! Two hosts and OVN's logical switches across them, as docs/ovn-two-hosts.sh makes them: a vhostd on each, os-vif's objects
//! plugged into `br-int`, Geneve in between.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::PLAIN;
use e2e::osvif::envelope;
use e2e::ovn::TwoHosts;
use e2e::peer::{Peer, PeerConfig};
use e2e::process::Process;
use e2e::qemu::{self, GuestConfig, Nic, Role};
use e2e::traffic::TcpStream;
use serde_json::{Value, json};

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);
/// Of the underlay.
const UNDERLAY_MTU: u16 = 1500;
/// What Geneve leaves of it.
const MTU: u16 = UNDERLAY_MTU - 58;
/// Exit code of the command line: time-out.
const TIMEOUT: i32 = 5;

/// A port of a logical switch, and the guest behind it.
struct Port {
    /// Of the port, the plug and the socket.
    name: &'static str,
    switch: &'static str,
    mac: &'static str,
    ip: &'static str,
    /// os-vif's port profile.
    profile: &'static str,
}

const ONE: Port = Port {
    name: "one",
    switch: "net",
    mac: "52:54:00:00:00:01",
    ip: "10.0.0.1",
    profile: "VIFPortProfileFPOpenVSwitch",
};
const TWO: Port = Port {
    name: "two",
    mac: "52:54:00:00:00:02",
    ip: "10.0.0.2",
    profile: "VIFPortProfileOpenVSwitch",
    ..ONE
};
/// Of another logical switch, with the same addresses.
const STRANGER: Port = Port { name: "stranger", switch: "other", ..TWO };

impl Port {
    /// Makes it, in OVN's northbound database.
    fn make(&self, hosts: &TwoHosts) -> Result<()> {
        let Self { name, switch, mac, ip, .. } = self;
        let add = format!("-- lsp-add {switch} {name} -- lsp-set-addresses {name} \"{mac} {ip}\"");
        hosts.on("a", &format!("ovn-nbctl --may-exist ls-add {switch} {add}")).map(drop)
    }

    /// Plugs what nova gives os-vif for it.
    fn plug(&self, daemon: &Daemon, more: &[&str]) -> Result<std::process::Output> {
        let network = envelope("Network", "1.1", &json!({"bridge": "br-int", "mtu": MTU}));
        let profile = json!({"interface_id": self.name, "datapath_type": "netdev"});
        let data = json!({"id": self.name, "address": self.mac, "vif_name": format!("vhu{}", self.name),
                          "path": daemon.socket(self.name), "mode": "client", "network": network,
                          "port_profile": envelope(self.profile, "1.1", &profile)});
        let instance = envelope("InstanceInfo", "1.0", &json!({"uuid": format!("vm-{}", self.name)}));
        let document = json!({"vif": envelope("VIFVHostUser", "1.1", &data), "instance_info": instance});
        let file = daemon.socket(self.name).with_extension("json");
        fs::write(&file, document.to_string())?;
        daemon.command(&[&["plug", "-f", file.to_str().context("a path")?], more].concat())
    }

    fn plugged(&self, daemon: &Daemon) -> Result<()> {
        let output = self.plug(daemon, &[])?;
        ensure!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// A guest with the kernel's TCP/IP: the TAP `eth0` in a namespace, and a vhostd that drives the port's rings for it.
struct Guest(Daemon);

impl Guest {
    /// Starts it. It goes on dialling until the port's socket is there.
    fn start(port: &Port, host: &Daemon) -> Result<Self> {
        let guest = Daemon::start()?;
        let (socket, mtu) = (host.socket(port.name), MTU.to_string());
        let socket = socket.to_str().context("a path")?;
        guest.run(&["plug", "card", "--frontend-connect", socket, "--to", "tap:eth0", "--mtu", &mtu])?;
        let Port { mac, ip, .. } = port;
        guest.host().run(&format!("ip link set eth0 address {mac} up; ip addr add {ip}/24 dev eth0"))?;
        Ok(Self(guest))
    }

    fn run(&self, script: &str) -> Result<String> {
        self.0.host().run(script)
    }
}

/// Waits until the plug is in this phase, and its conditions contain this text.
fn wait_for(daemon: &Daemon, plug: &str, phase: &str, text: &str) -> Result<()> {
    let look = || daemon.json(&["show", plug]);
    wait_for_some(&format!("{plug} to be {phase}: {text}"), SOON, || {
        // It may not be there yet.
        let status = look().unwrap_or_default()["status"].take();
        Ok((status["phase"] == phase && status["conditions"].to_string().contains(text)).then_some(()))
    })
    .with_context(|| look().unwrap_or_default().to_string())
}

#[test]
fn guests_reach_each_other_across_hosts_and_nobody_else() -> Result<()> {
    let hosts = TwoHosts::start(UNDERLAY_MTU)?;
    let ports = [(&ONE, &hosts.a), (&TWO, &hosts.b), (&STRANGER, &hosts.b)];
    let mut guests = Vec::new();
    for (port, host) in ports {
        port.make(&hosts)?;
        guests.push(Guest::start(port, host)?);
        // Success is forwarding: OVN's flows are there, and the guest's rings run.
        let output = port.plug(host, &["--wait", "forwarding"])?;
        ensure!(output.status.success(), "{}: {}", port.name, String::from_utf8_lossy(&output.stderr));
        ensure!(hosts.on("a", &format!("ovn-nbctl lsp-get-up {}", port.name))? == "up");
    }
    let [one, two, stranger] = &guests[..] else { unreachable!("three ports") };

    // The first may be lost while the tunnel looks for its other end.
    one.run(&format!("ping -c 1 -w 10 {}", TWO.ip))?;
    // Frames as large as they may be, and not a byte larger: nothing on the way cuts them.
    let largest = MTU - 28;
    one.run(&format!("ping -c 5 -i 0.05 -W 5 -M do -s {largest} {}", TWO.ip))?;
    two.run(&format!("ping -c 5 -i 0.05 -W 5 -M do -s {largest} {}", ONE.ip))?;

    let mut server = two.0.host().command("iperf3");
    server.arg("--server");
    let _server = Process::spawn("iperf3", &server)?;
    for options in ["", "--reverse"] {
        let client = format!("iperf3 --json --client {} --bytes 20M {options}", TWO.ip);
        // The server may not listen yet, or be busy with the end of another stream: some versions call that success.
        let sums = wait_for_some("a TCP stream", SOON, || {
            let report = one.run(&client).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
            Ok(report.map(|mut report| report["end"].take()).filter(|sums| sums["sum_received"].is_object()))
        })?;
        let rate = sums["sum_received"]["bits_per_second"].as_f64().context("no rate")? / 1e9;
        println!("TCP {options}: {rate:.2} Gbit/s, {} sent again", sums["sum_sent"]["retransmits"]);
    }

    // To everybody, to an address that the other switch has, too, and to one that nobody has.
    one.run("ping -b -c 3 -i 0.05 -W 1 10.0.0.255 || true; ping -c 1 -W 1 10.0.0.9 || true")?;
    ensure!(stranger.run(&format!("ping -c 2 -i 0.1 -W 1 {}", ONE.ip)).is_err(), "another logical switch");
    let heard = stranger.run("cat /sys/class/net/eth0/statistics/rx_packets")?;
    ensure!(heard.trim() == "0", "{heard} frames went to another logical switch");
    Ok(())
}

/// The same for Linux guests under QEMU; then one of them ends on a, and is started on b, where its port was made ready as for a
/// migration: what brings its frames there is that it is heard of.
#[test]
fn linux_guests_reach_each_other_across_hosts_also_when_one_is_started_on_the_other() -> Result<()> {
    let hosts = TwoHosts::start(UNDERLAY_MTU)?;
    for (port, host) in [(&ONE, &hosts.a), (&TWO, &hosts.b)] {
        port.make(&hosts)?;
        port.plugged(host)?;
    }
    let (one, two) = (boot(&ONE, &hosts.a)?, boot(&TWO, &hosts.b)?);
    ping(&one, TWO.ip)?;
    ping(&two, ONE.ip)?;
    let _server = two.spawn("iperf3 --server")?;
    for options in ["", "--reverse"] {
        let rate = TcpStream::start(&one, TWO.ip, 1, options)?.rate()?;
        println!("TCP {options}: {rate:.2} Gbit/s");
    }

    hosts.on("a", "ovn-nbctl lsp-set-options one requested-chassis=a,b activation-strategy=rarp")?;
    ONE.plugged(&hosts.b)?;
    wait_for(&hosts.b, ONE.name, "attached", "waiting for a front end")?;
    one.kill()?;
    let one = boot(&ONE, &hosts.b)?;
    ping(&two, ONE.ip)?;
    let activated = "ovn-sbctl get Port_Binding one options:additional-chassis-activated";
    ensure!(!hosts.on("a", activated)?.is_empty());
    hosts.on("a", "ovn-nbctl lsp-set-options one requested-chassis=b")?;
    hosts.a.run(&["unplug", ONE.name])?;
    ping(&one, TWO.ip)
}

/// A Linux guest whose card is the port's.
fn boot(port: &Port, host: &Daemon) -> Result<qemu::Guest> {
    let Port { name, mac, ip, .. } = port;
    let nic = Nic { mtu: Some(MTU), ..Nic::new(&host.socket(name), Role::Client, mac) };
    let guest = qemu::Guest::boot(&GuestConfig::new(name, vec![nic]))?;
    guest.check(&format!("ip addr add {ip}/24 dev eth0 && ip link set eth0 up"))?;
    host.wait_for_forwarding(&[name])?;
    Ok(guest)
}

/// Frames as large as they may be; the first may be lost while the tunnel looks for its other end.
fn ping(guest: &qemu::Guest, to: &str) -> Result<()> {
    let largest = format!("-s {} {to}", MTU - 28);
    guest.check(&format!("ping -c 1 -w 10 {largest} && ping -c 5 -i 0.05 -W 5 {largest}")).map(drop)
}

#[test]
fn without_ovn_controller_no_port_is_said_to_forward() -> Result<()> {
    let hosts = TwoHosts::start(UNDERLAY_MTU)?;
    ONE.make(&hosts)?;
    TWO.make(&hosts)?;
    let _guests = [Guest::start(&ONE, &hosts.a)?, Guest::start(&TWO, &hosts.a)?];

    // Before.
    hosts.kill_controller("a")?;
    let output = ONE.plug(&hosts.a, &["--wait", "forwarding", "--timeout", "1s"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(TIMEOUT) && errors.contains("ovn-controller"), "{errors}");
    wait_for(&hosts.a, ONE.name, "linked", "ovn-controller")?;

    // During: it comes when a plug is waited for.
    let wait = ["--wait", "forwarding"];
    thread::scope(|scope| {
        let plug = scope.spawn(|| TWO.plug(&hosts.a, &wait));
        wait_for(&hosts.a, TWO.name, "linked", "ovn-controller")?;
        hosts.up()?;
        let output = plug.join().unwrap()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    })?;
    hosts.a.wait_for_forwarding(&[ONE.name])?;

    // After.
    hosts.kill_controller("a")?;
    for port in [&ONE, &TWO] {
        wait_for(&hosts.a, port.name, "linked", "ovn-controller")?;
    }
    hosts.up()?;
    hosts.a.wait_for_forwarding(&[ONE.name, TWO.name])
}

/// As nova and Neutron do it: the port is made ready on b, where it stays silent until the guest runs there and its address is
/// announced; then a is told to let go of it. The neighbour keeps sending all the time.
#[test]
fn a_guest_that_moves_is_heard_of_when_it_is_there() -> Result<()> {
    let hosts = TwoHosts::start(UNDERLAY_MTU)?;
    for port in [&ONE, &TWO] {
        port.make(&hosts)?;
        port.plugged(&hosts.a)?;
    }
    let mut stream = Stream { neighbour: connect(&TWO, &hosts.a)?, sent: 0 };
    let mut guest = connect(&ONE, &hosts.a)?;
    hosts.a.wait_for_forwarding(&[ONE.name, TWO.name])?;
    stream.until_heard(&mut guest)?;

    hosts.on("a", "ovn-nbctl lsp-set-options one requested-chassis=a,b activation-strategy=rarp")?;
    ONE.plugged(&hosts.b)?;
    wait_for(&hosts.b, ONE.name, "attached", "waiting for a front end")?;
    wait_for_some("OVN's flows on b", SOON, || {
        let ids = hosts.on("b", "ovs-vsctl get Interface vhuone external_ids")?;
        Ok(ids.contains("ovn-installed=").then_some(()))
    })?;
    ensure!(stream.send_many(&mut guest)? == FRAMES, "on a all is as it was");
    ensure!(hosts.b.stats(ONE.name)?["rx_frames"] == 0, "a frame came to b: {}", hosts.b.stats(ONE.name)?);

    drop(guest);
    let mut guest = connect(&ONE, &hosts.b)?;
    let (waited, lost) = stream.until_heard(&mut guest)?;
    println!("heard on b {} ms after the guest came, {lost} frames lost", waited.as_millis());
    let activated = "ovn-sbctl get Port_Binding one options:additional-chassis-activated";
    ensure!(!hosts.on("a", activated)?.is_empty());

    let before = stream.sent;
    let mut heard = stream.send_many(&mut guest)?;
    hosts.on("a", "ovn-nbctl lsp-set-options one requested-chassis=b")?;
    heard += stream.send_many(&mut guest)?;
    hosts.a.run(&["unplug", ONE.name])?;
    heard += stream.send_many(&mut guest)?;
    println!("of {} frames while a let go of the port, {heard} came", stream.sent - before);
    ensure!(stream.send_many(&mut guest)? == FRAMES, "nothing is lost, and nothing comes twice");
    hosts.b.wait_for_forwarding(&[ONE.name])
}

fn connect(port: &Port, host: &Daemon) -> Result<Peer> {
    wait_for(host, port.name, "attached", "waiting for a front end")?;
    let mut guest = Peer::connect(host.socket(port.name), PeerConfig::default())?;
    guest.offer_all();
    Ok(guest)
}

/// Frames of [`Stream::send_many`].
const FRAMES: u64 = 50;
/// Between two frames.
const PACE: Duration = Duration::from_millis(1);
/// For frames on their way.
const LATE: Duration = Duration::from_millis(200);

/// Numbered frames from the guest of one port to that of another.
struct Stream {
    neighbour: Peer,
    sent: u64,
}

impl Stream {
    fn send(&mut self) -> Result<()> {
        let addresses = [ONE.mac, TWO.mac].map(|mac| mac.split(':').map(|byte| u8::from_str_radix(byte, 16)));
        let mut frame = addresses.into_iter().flatten().collect::<Result<Vec<_>, _>>()?;
        // An EtherType for experiments.
        frame.extend([0x88, 0xb5]);
        frame.extend(self.sent.to_be_bytes());
        frame.resize(60, 0);
        ensure!(self.neighbour.send_now(0, &PLAIN, &frame), "buffers come back");
        self.sent += 1;
        thread::sleep(PACE);
        Ok(())
    }

    /// Sends until a frame comes: how long it took, and how many before it are lost.
    fn until_heard(&mut self, guest: &mut Peer) -> Result<(Duration, u64)> {
        let (began, first) = (Instant::now(), self.sent);
        while began.elapsed() < SOON {
            self.send()?;
            if let Some(number) = hear(guest) {
                return Ok((began.elapsed(), number - first));
            }
        }
        bail!("none of {} frames has come", self.sent - first)
    }

    /// Sends some: how many of them come.
    fn send_many(&mut self, guest: &mut Peer) -> Result<u64> {
        let (first, mut count) = (self.sent, 0);
        for _ in 0..FRAMES {
            self.send()?;
        }
        let sent = Instant::now();
        while count < FRAMES && sent.elapsed() < LATE {
            count += u64::from(hear(guest).is_some_and(|number| number >= first));
        }
        Ok(count)
    }
}

/// The number of a frame of the stream, if one is there.
fn hear(guest: &mut Peer) -> Option<u64> {
    let (_, frame) = guest.receive(0)?;
    let (head, number) = frame.split_at_checked(14)?;
    (head[12..] == [0x88, 0xb5]).then(|| u64::from_be_bytes(number[..8].try_into().unwrap()))
}
