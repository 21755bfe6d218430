//! Two hosts and OVN's logical switches across them, as docs/ovn-two-hosts.sh makes them: a vhostd on each, os-vif's objects
//! plugged into `br-int`, Geneve in between.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::ovn::TwoHosts;
use e2e::process::Process;
use serde_json::{Value, json};

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);
/// Of the underlay.
const UNDERLAY_MTU: u16 = 1500;
/// What Geneve leaves of it.
const MTU: u16 = UNDERLAY_MTU - 58;

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
}

fn envelope(class: &str, version: &str, data: &Value) -> Value {
    json!({"versioned_object.name": class, "versioned_object.namespace": "os_vif",
           "versioned_object.version": version, "versioned_object.data": data})
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
        let report = wait_for_some("a TCP stream", SOON, || Ok(one.run(&client).ok()))?;
        let sums = serde_json::from_str::<Value>(&report)?["end"].take();
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
