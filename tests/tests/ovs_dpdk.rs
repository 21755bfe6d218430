//! Plugs into Open vSwitch with DPDK: joined with it by vhost-user, where nothing else is asked for.
//!
//! ```text
//! guest a ── vhostd ══ vhost-user ══ br0 ══ vhost-user ══ vhostd ── guest b
//!                                     └──── TAP ───────── vhostd ── guest c
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use anyhow::{Result, ensure};
use e2e::exchange::{GUESTS, exchange, exchange_as};
use e2e::kill::killed_at_every_step;
use e2e::osvif::in_open_vswitch;
use e2e::ovs::{Dpdk, Host, of_os_vif};
use serde_json::json;

const MAC: &str = "52:54:00:00:00:01";
/// Exit codes of the command line.
const CONFLICT: i32 = 4;
const PRECONDITION: i32 = 7;

fn frames_flow(host: &Host) -> Result<()> {
    let (mut a, mut b, mut c) = (host.guest("a")?, host.guest("b")?, host.guest("c")?);
    exchange(&mut a, &mut b)?;
    exchange_as([[2, 0, 0, 0, 0, 0xc], GUESTS[1]], &mut c, &mut b)
}

// One test, because DPDK's ports are polled: only one such switch at a time.
#[test]
fn a_plug_is_a_guest_of_the_switch_through_every_restart_and_leaves_nothing() -> Result<()> {
    let mut host = Host::start_with(Dpdk::On, "")?;
    let before = host.state()?;
    let ids = ["--iface-id", "lsp1", "--mac", MAC, "--mtu", "1600"];
    host.plug("a", "br0", &ids)?;
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
    let plugged = host.generation()?;
    host.plug("a", "br0", &ids)?;
    host.plug("a", "br0", &[&ids[..], &["--attach", "vhost-user"]].concat())?;
    let error = host.refused("a", "br0", &[&ids[..], &["--attach", "tap"]].concat(), CONFLICT)?;
    ensure!(error.contains("differs in to.attach"), "{error}");
    let error = host.refused("b", "br0", &["--iface-id", "lsp1"], CONFLICT)?;
    ensure!(error.contains("logical port lsp1 belongs to plug a"), "{error}");
    assert_eq!(host.generation()?, plugged);

    host.plug("b", "br0", &["--mtu", "1600"])?;
    host.plug("c", "br0", &["--mtu", "1600", "--attach", "tap"])?;
    frames_flow(&host)?;
    let all = host.state()?;

    host.daemon.kill_and_restart()?;
    frames_flow(&host)?;

    host.ovs.kill_switch()?;
    host.wait_for("a", "attached", &format!("waiting for a back end to connect to {}", socket.display()))?;
    // The daemon comes back without it, and knows how it was.
    host.ovs.kill_database()?;
    host.daemon.kill_and_restart()?;
    host.wait_for("a", "attached", "cannot connect to Open vSwitch's database")?;
    host.ovs.start_database()?;
    host.ovs.start_switch()?;
    frames_flow(&host)?;

    // What somebody else takes away comes back.
    host.ovs.vsctl("del-port vhd-a")?;
    host.wait_for_state(&all)?;
    frames_flow(&host)?;

    // A bridge that forwards in the kernel has no such ports.
    host.ovs.vsctl("--no-wait add-br br9")?;
    let error = host.refused("d", "br9", &["--attach", "vhost-user"], PRECONDITION)?;
    ensure!(error.contains("a bridge with datapath_type netdev"), "{error}");
    host.ovs.vsctl("--no-wait del-br br9")?;

    for plug in ["a", "b", "c"] {
        host.daemon.run(&["unplug", plug])?;
    }
    assert_eq!(host.state()?, before);
    rows_are_those_of_os_vif(&mut host)?;
    assert_eq!(host.state()?, before);
    let socket = json!({"role": "listen", "path": host.socket("vm1")});
    let to = json!({"kind": "ovs", "bridge": "br0", "iface_id": "lsp1", "attach": "vhost_user"});
    let Host { daemon, ovs } = &mut host;
    killed_at_every_step(daemon, &json!({"socket": socket, "to": to}), || ovs.state())
}

/// But for the one in table QoS, which is of no use to such a port: os-vif makes it where the profile does not say what
/// forwards, and leaves it when the port goes.
fn rows_are_those_of_os_vif(host: &mut Host) -> Result<()> {
    let socket = json!({"path": host.socket("vif"), "mode": "client"});
    let plain = json!({});
    for (case, isolate, profile) in [
        ("vhostuser_server", false, &json!({"datapath_type": "netdev"})),
        ("vhostuser_server_isolated", true, &plain),
    ] {
        host.restart_with(&format!("isolate = {isolate}"))?;
        let vif = in_open_vswitch("VIFVHostUser", "br-int", &socket, profile);
        host.plug_vif(&vif)?;
        let mut wanted = of_os_vif(case)?;
        wanted.insert("QoS".into(), Vec::new());
        for port in wanted.get_mut("Port").into_iter().flatten() {
            port.insert("qos".into(), json!(false));
        }
        assert_eq!(host.ovs.comparable_rows()?, wanted, "{case}");
        host.unplug_vif(&vif)?;
    }
    Ok(())
}
