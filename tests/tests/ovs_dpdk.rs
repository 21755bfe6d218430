//! Plugs into Open vSwitch with DPDK: joined with it by vhost-user, where nothing else is asked for.
//!
//! ```text
//! guest a ── vhostd ══ vhost-user ══ br0 ══ vhost-user ══ vhostd ── guest b
//!                                     └──── TAP ───────── vhostd ── guest c
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::{GUESTS, exchange, exchange_as};
use e2e::ovs::{Dpdk, Ovs};
use e2e::peer::{Peer, PeerConfig};

const SOON: Duration = Duration::from_secs(30);
const MAC: &str = "52:54:00:00:00:01";
/// Exit codes of the command line.
const CONFLICT: i32 = 4;
const PRECONDITION: i32 = 7;

struct Host {
    daemon: Daemon,
    ovs: Ovs,
}

impl Host {
    fn plug(&self, name: &str, more: &[&str]) -> Result<String> {
        self.daemon.run(&self.arguments(name, "br0", more).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn refused(&self, name: &str, bridge: &str, more: &[&str], code: i32) -> Result<String> {
        let arguments = self.arguments(name, bridge, more);
        let output = self.daemon.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(code), "{:?}, not {code}: {errors}", output.status);
        Ok(errors)
    }

    fn arguments(&self, name: &str, bridge: &str, more: &[&str]) -> Vec<String> {
        let socket = self.daemon.socket(name).display().to_string();
        let to = format!("ovs:{bridge}");
        let plug = ["plug", name, "--listen", &socket, "--to", &to];
        plug.iter().chain(more).map(ToString::to_string).collect()
    }

    fn guest(&self, plug: &str) -> Result<Peer> {
        let path = self.daemon.socket(plug);
        let config = PeerConfig::default();
        let mut guest = wait_for_some("the socket", SOON, || Ok(Peer::connect(&path, config).ok()))?;
        guest.offer_all();
        self.daemon.wait_for_forwarding(&[plug])?;
        Ok(guest)
    }

    fn wait_for(&self, plug: &str, text: &str) -> Result<()> {
        let look = || self.daemon.json(&["show", plug]);
        wait_for_some(&format!("{plug}: {text}"), SOON, || {
            Ok(look()?["status"]["conditions"].to_string().contains(text).then_some(()))
        })
        .with_context(|| look().unwrap_or_default().to_string())
    }

    /// Rows of the database, sockets that are shared with the switch, and links.
    fn state(&self) -> Result<String> {
        let rows = self
            .ovs
            .vsctl("--no-wait --format=csv --columns=name,type,options,external_ids list Interface")?;
        let qos = self.ovs.vsctl("--no-wait --format=csv --columns=type list QoS")?;
        let links = self.ovs.host().run("ip -oneline link | cut -d: -f2 | grep -v ovs-netdev")?;
        let sockets = fs::read_dir(self.ovs.shared()).into_iter().flatten();
        let mut lines: Vec<_> =
            [rows, qos, links].iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
        lines.extend(sockets.map(|socket| socket.unwrap().path().display().to_string()));
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }
}

// One test, because DPDK's ports are polled: only one such switch at a time.
#[test]
fn a_plug_is_a_guest_of_the_switch_through_every_restart_and_leaves_nothing() -> Result<()> {
    let (daemon, ovs) = e2e::ovs::host_with(Dpdk::On, "")?;
    let mut host = Host { daemon, ovs };
    let before = host.state()?;
    let ids = ["--iface-id", "lsp1", "--mac", MAC, "--mtu", "1600"];
    host.plug("a", &ids)?;
    let socket = host.ovs.shared().join("vhd-a");
    let spec = &host.daemon.json(&["show", "a"])?["spec"]["to"];
    ensure!(spec["attach"] == "vhost_user" && spec["socket"] == socket.display().to_string(), "{spec}");
    let columns =
        "get Interface vhd-a type options:vhost-server-path mtu_request external_ids:iface-id error";
    let row = format!("dpdkvhostuserclient\n\"{}\"\n1600\nlsp1\n[]", socket.display());
    assert_eq!(host.ovs.vsctl(columns)?, row);
    assert_eq!(host.ovs.vsctl("get Port vhd-a qos other_config")?, "[]\n{transient=\"true\"}");
    assert_eq!(host.ovs.vsctl("get Bridge br0 datapath_type")?, "netdev");

    // The same again, also when it says what was decided; another way is another plug.
    let generation = || host.ovs.vsctl("--no-wait get Open_vSwitch . next_cfg");
    let plugged = generation()?;
    host.plug("a", &ids)?;
    host.plug("a", &[&ids[..], &["--attach", "vhost-user"]].concat())?;
    let error = host.refused("a", "br0", &[&ids[..], &["--attach", "tap"]].concat(), CONFLICT)?;
    ensure!(error.contains("differs in to.attach"), "{error}");
    let error = host.refused("b", "br0", &["--iface-id", "lsp1"], CONFLICT)?;
    ensure!(error.contains("logical port lsp1 belongs to plug a"), "{error}");
    assert_eq!(generation()?, plugged);

    host.plug("b", &["--mtu", "1600"])?;
    host.plug("c", &["--mtu", "1600", "--attach", "tap"])?;
    let exchanges = |host: &Host| -> Result<()> {
        let (mut a, mut b, mut c) = (host.guest("a")?, host.guest("b")?, host.guest("c")?);
        exchange(&mut a, &mut b)?;
        exchange_as([[2, 0, 0, 0, 0, 0xc], GUESTS[1]], &mut c, &mut b)
    };
    exchanges(&host)?;

    host.daemon.kill_and_restart()?;
    exchanges(&host)?;

    host.ovs.kill_switch()?;
    host.wait_for("a", &format!("waiting for a back end to connect to {}", socket.display()))?;
    // The daemon comes back without it, and knows how it was.
    host.ovs.kill_database()?;
    host.daemon.kill_and_restart()?;
    host.wait_for("a", "cannot connect to Open vSwitch's database")?;
    host.ovs.start_database()?;
    host.ovs.start_switch()?;
    exchanges(&host)?;

    // A bridge that forwards in the kernel has no such ports.
    host.ovs.vsctl("--no-wait add-br br9")?;
    let error = host.refused("d", "br9", &["--attach", "vhost-user"], PRECONDITION)?;
    ensure!(error.contains("a bridge with datapath_type netdev"), "{error}");
    host.ovs.vsctl("--no-wait del-br br9")?;

    for plug in ["a", "b", "c"] {
        host.daemon.run(&["unplug", plug])?;
    }
    assert_eq!(host.state()?, before);
    Ok(())
}
