//! Plugs into Open vSwitch: a real database, a real switch, the daemon and its command line. What is compared before and
//! after is all there is: links of the namespace, and rows of the database.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use e2e::deadline::wait_for_some;
use e2e::exchange::exchange;
use e2e::kill::killed_at_every_step;
use e2e::osvif::envelope;
use e2e::ovs::{Host, datapath_type, said};
use e2e::peer::{Peer, PeerConfig};
use rustix::process::Signal;
use serde_json::{Value, json};

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);
const MAC: &str = "52:54:00:00:00:01";

/// Exit codes of the command line.
const CONFLICT: i32 = 4;
const PRECONDITION: i32 = 7;

#[test]
fn a_plug_is_one_port_however_often_it_is_asked_for_and_its_unplug_leaves_nothing() -> Result<()> {
    let mut host = Host::start()?;
    let before = host.state()?;
    let more = ["--mac", MAC, "--iface-id", "lsp1", "--mtu", "1450"];
    host.plug("vm1", "br0", &more)?;
    assert_eq!(host.ovs.vsctl("list-ports br0")?, "vhd-vm1");
    assert_eq!(
        host.ovs.vsctl("get Bridge br0 datapath_type external_ids")?,
        format!("{}\n{{vhostd=made}}", datapath_type())
    );
    let columns = "get Interface vhd-vm1 type mtu mtu_request external_ids:iface-id external_ids:iface-status \
                   external_ids:attached-mac";
    assert_eq!(host.ovs.vsctl(columns)?, format!("\"\"\n1450\n1450\nlsp1\nactive\n\"{MAC}\""));
    host.wait_for("vm1", "attached", "waiting for a front end")?;

    let (plugged, generation) = (host.state()?, host.generation()?);
    host.plug("vm1", "br0", &more)?;
    host.daemon.kill_and_restart()?;
    host.wait_for("vm1", "attached", "waiting for a front end")?;
    host.plug("vm1", "br0", &more)?;
    assert_eq!((host.state()?, host.generation()?), (plugged, generation), "nothing is touched");

    host.daemon.run(&["unplug", "vm1"])?;
    assert_eq!(host.state()?, before);
    host.daemon.run(&["unplug", "vm1"])?;
    Ok(())
}

/// In a guest of ours, where bridges are the kernel's, too.
#[test]
fn two_guests_reach_each_other_through_either_datapath() -> Result<()> {
    let host = Host::start()?;
    host.plug("a", "br0", &[])?;
    host.plug("b", "br0", &[])?;
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    exchange(&mut a, &mut b)?;
    assert_eq!(host.ovs.vsctl("get Bridge br0 datapath_type")?, datapath_type());
    Ok(())
}

#[test]
fn guests_of_two_plugs_reach_each_other_through_the_bridge_also_after_every_restart() -> Result<()> {
    let mut host = Host::start()?;
    host.plug("a", "br0", &[])?;
    host.plug("b", "br0", &[])?;
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    exchange(&mut a, &mut b)?;

    host.ovs.kill_switch()?;
    host.wait_for("a", "linked", "ovs-vswitchd, which forwards for bridge br0, does not run")?;
    host.ovs.start_switch()?;
    host.daemon.wait_for_forwarding(&["a", "b"])?;
    exchange(&mut a, &mut b)?;

    host.daemon.kill_and_restart()?;
    drop((a, b));
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    exchange(&mut a, &mut b)?;

    // A TAP that was made anew under its name: the switch has to let the former one go first.
    drop((a, b));
    host.daemon.run(&["unplug", "a"])?;
    host.plug("a", "br0", &[])?;
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    exchange(&mut a, &mut b)
}

#[test]
fn a_tap_that_somebody_removed_is_made_again_and_the_switch_takes_the_new_one() -> Result<()> {
    let mut host = Host::start()?;
    host.plug("a", "br0", &[])?;
    host.plug("b", "br0", &[])?;
    // The switch does not run meanwhile: it sees the same name again, and another device behind it.
    host.ovs.switch().context("it runs")?.signal(Signal::STOP)?;
    host.daemon.kill_and_restart_after(|| host.ovs.host().run("ip link del vhd-a").map(drop))?;
    host.ovs.switch().context("it runs")?.signal(Signal::CONT)?;
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    exchange(&mut a, &mut b)
}

#[test]
fn what_is_somebody_elses_is_refused_and_left_alone() -> Result<()> {
    let host = Host::start()?;
    host.ovs.host().run("ip link add lbr type bridge; ip tuntap add foreign mode tap")?;
    host.ovs.vsctl("add-br br1 -- set Bridge br1 datapath_type=netdev")?;
    host.ovs.vsctl("add-br br2 -- set Bridge br2 datapath_type=netdev")?;
    host.ovs.host().run("ip tuntap add vhd-vm3 mode tap; ip link set vhd-vm3 alias vhostd:vm3")?;
    host.ovs.vsctl("add-port br2 vhd-vm3")?;
    let before = host.state()?;

    let error = host.refused("vm1", "lbr", &[], CONFLICT)?;
    assert!(error.contains("lbr exists and is a bridge, not an Open vSwitch bridge"), "{error}");
    let error = host.refused("vm3", "br1", &[], CONFLICT)?;
    assert!(error.contains("vhd-vm3 is in Open vSwitch bridge br2, not in br1"), "{error}");
    let socket = json!({"role": "listen", "path": host.socket("vm1")});
    let to = json!({"kind": "ovs", "bridge": "br1", "datapath_type": "system"});
    let output = host.plug_document("vm1", &json!({"socket": socket, "to": to}))?;
    let error = said(&output, CONFLICT)?;
    assert!(error.contains("br1 has datapath_type netdev, not system"), "{error}");
    if !fs::exists("/sys/module/openvswitch")? {
        let to = json!({"kind": "ovs", "bridge": "br9", "datapath_type": "system"});
        let output = host.plug_document("vm1", &json!({"socket": socket, "to": to}))?;
        let error = said(&output, PRECONDITION)?;
        assert!(error.contains("datapath_type system needs the kernel module"), "{error}");
    }
    let to = json!({"kind": "ovs", "bridge": "br1", "tap": "foreign"});
    let error = said(&host.plug_document("vm1", &json!({"socket": socket, "to": to}))?, CONFLICT)?;
    assert!(error.contains("foreign exists and was not made by vhostd"), "{error}");
    assert_eq!(host.daemon.run(&["ls", "-o", "name"])?, "");
    // The TAP of a plug that never was is taken away with it, as are its rows; the rest stays.
    let without =
        |state: &str| state.lines().filter(|line| !line.contains("vhd-vm3")).collect::<Vec<_>>().join("\n");
    assert_eq!(without(&host.state()?), without(&before));

    // A bridge that was there stays when the last plug leaves it.
    host.plug("vm1", "br1", &[])?;
    host.daemon.run(&["unplug", "vm1"])?;
    assert_eq!(without(&host.state()?), without(&before));
    Ok(())
}

#[test]
fn without_open_vswitch_a_plug_fails_at_once_and_nothing_is_left() -> Result<()> {
    let mut host = Host::start()?;
    let (before, socket) = (host.state()?, host.ovs.socket());
    host.ovs.kill_database()?;
    let start = Instant::now();
    let error = host.refused("vm1", "br0", &[], PRECONDITION)?;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(error.contains("Open vSwitch") && error.contains(socket.to_str().context("a path")?), "{error}");
    assert_eq!(host.daemon.run(&["ls", "-o", "name"])?, "");
    host.ovs.start_database()?;
    assert_eq!(host.state()?, before);
    Ok(())
}

#[test]
fn a_switch_that_does_not_take_up_the_port_is_no_success() -> Result<()> {
    let mut host = Host::start()?;
    let before = host.state()?;
    host.ovs.kill_switch()?;
    let error = host.refused("vm1", "br0", &[], PRECONDITION)?;
    assert!(error.contains("ovs-vswitchd has not taken up vhd-vm1"), "{error}");
    assert_eq!(host.daemon.run(&["ls", "-o", "name"])?, "");
    host.ovs.start_switch()?;
    assert_eq!(host.state()?, before);
    host.plug("vm1", "br0", &[])?;
    Ok(())
}

#[test]
fn a_database_that_goes_away_is_a_condition_until_it_is_back() -> Result<()> {
    let mut host = Host::start()?;
    let before = host.state()?;
    host.plug("vm1", "br0", &[])?;
    let guest = host.guest("vm1")?;
    host.ovs.kill_database()?;
    host.wait_for("vm1", "linked", "Open vSwitch's database at")?;
    // The daemon comes back without it: the guest's port does not wait.
    host.daemon.kill_and_restart()?;
    drop(guest);
    host.wait_for("vm1", "attached", "waiting for a front end")?;
    let guest = Peer::connect(host.daemon.socket("vm1"), PeerConfig::default())?;
    host.wait_for("vm1", "linked", "cannot connect to Open vSwitch's database")?;
    host.ovs.start_database()?;
    host.daemon.wait_for_forwarding(&["vm1"])?;

    host.ovs.kill_database()?;
    let error = said(&host.daemon.command(&["unplug", "vm1"])?, PRECONDITION)?;
    assert!(error.contains("tried again") && error.contains("Open vSwitch"), "{error}");
    drop(guest);
    host.ovs.start_database()?;
    host.wait_for_state(&before)?;
    wait_for_some("the plug to be forgotten", SOON, || {
        Ok(host.daemon.run(&["ls", "-o", "name"])?.is_empty().then_some(()))
    })?;
    Ok(())
}

#[test]
fn what_somebody_else_removes_is_put_back_and_told() -> Result<()> {
    let host = Host::start()?;
    host.plug("a", "br0", &["--iface-id", "lsp1"])?;
    host.plug("b", "br0", &[])?;
    let (mut a, mut b) = (host.guest("a")?, host.guest("b")?);
    let plugged = host.state()?;
    for (times, removal) in [(1, "del-port vhd-a"), (2, "--no-wait del-port vhd-a"), (4, "del-br br0")] {
        host.ovs.vsctl(removal)?;
        wait_for_some("the repairs to be told", SOON, || {
            Ok((host.events("repaired")? >= times).then_some(()))
        })?;
        host.wait_for_state(&plugged)?;
        host.daemon.wait_for_forwarding(&["a", "b"])?;
        exchange(&mut a, &mut b)?;
    }
    Ok(())
}

#[test]
fn a_logical_port_forwards_when_ovn_says_so() -> Result<()> {
    let host = Host::start()?;
    host.ovs.vsctl("set Open_vSwitch . external_ids:ovn-bridge=br0")?;
    host.plug("vm1", "br0", &["--iface-id", "lsp1"])?;
    let _guest = Peer::connect(host.daemon.socket("vm1"), PeerConfig::default())?;
    host.wait_for("vm1", "linked", "OVN has no flows for logical port lsp1")?;
    host.ovs.vsctl("--no-wait set Interface vhd-vm1 external_ids:ovn-installed=true")?;
    host.daemon.wait_for_forwarding(&["vm1"])?;
    // Without an iface-id it is no logical port.
    host.plug("vm2", "br0", &[])?;
    let _guest = host.guest("vm2")?;
    Ok(())
}

#[test]
fn another_mtu_is_a_condition() -> Result<()> {
    let host = Host::start()?;
    host.plug("vm1", "br0", &[])?;
    let _guest = host.guest("vm1")?;
    host.ovs.vsctl("set Interface vhd-vm1 mtu_request=1400")?;
    host.wait_for("vm1", "linked", "vhd-vm1 has MTU 1400 in Open vSwitch, the plug 1500")?;
    host.ovs.vsctl("set Interface vhd-vm1 mtu_request=1500")?;
    host.daemon.wait_for_forwarding(&["vm1"])
}

#[test]
fn a_card_that_is_a_tap_is_left_to_its_guest() -> Result<()> {
    let mut host = Host::start()?;
    let before = host.state()?;
    let profile = |more: Value| {
        let mut data = json!({"interface_id": "lsp1", "datapath_type": "netdev"});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        envelope("VIFPortProfileOpenVSwitch", "1.4", &data)
    };
    let vif = |more: Value| {
        let network = envelope("Network", "1.1", &json!({"bridge": "br0", "mtu": 1450}));
        let data = json!({"id": "vif1", "address": MAC, "vif_name": "tapvif1", "bridge_name": "br0",
                          "network": network, "port_profile": profile(more)});
        json!({"vif": envelope("VIFOpenVSwitch", "1.0", &data),
               "instance_info": envelope("InstanceInfo", "1.0", &json!({"uuid": "vm1"}))})
        .to_string()
    };
    let all = vif(json!({"create_tap": true, "create_port": true, "multiqueue": true}));
    for _ in 0..2 {
        let answer = host.daemon.http("POST", "/v1/os-vif/plug?wait=forwarding", &all)?;
        assert!(answer.contains("\"phase\":\"forwarding\""), "{answer}");
        let ids =
            "get Interface tapvif1 external_ids:iface-id external_ids:attached-mac external_ids:vm-uuid mtu";
        assert_eq!(host.ovs.vsctl(ids)?, format!("lsp1\n\"{MAC}\"\nvm1\n1450"));
        let link = host.ovs.host().run("ip -details link show tapvif1")?;
        assert!(link.contains(MAC) && link.contains("multi_queue"), "{link}");
        host.daemon.kill_and_restart()?;
    }
    assert!(host.daemon.http("POST", "/v1/os-vif/unplug", &all)?.contains("\"existed\":true"));
    assert_eq!(host.state()?, before);

    // libvirt makes both, os-vif only the bridge.
    let none = vif(json!({}));
    let answer = host.daemon.http("POST", "/v1/os-vif/plug?wait=forwarding", &none)?;
    assert!(answer.contains("\"phase\":\"forwarding\""), "{answer}");
    assert_eq!(host.ovs.vsctl("list-br")?, "br0");
    assert_eq!(host.ovs.vsctl("list-ports br0")?, "");
    host.daemon.http("POST", "/v1/os-vif/unplug", &none)?;
    assert_eq!(host.state()?, before);

    // A port that waits for its device.
    let port = vif(json!({"create_port": true}));
    host.daemon.http("POST", "/v1/os-vif/plug", &port)?;
    host.wait_for("vif1", "linked", "tapvif1")?;
    host.ovs.host().run("ip tuntap add tapvif1 mode tap; ip link set tapvif1 up")?;
    host.daemon.wait_for_forwarding(&["vif1"])?;
    host.daemon.http("POST", "/v1/os-vif/unplug", &port)?;
    host.ovs.host().run("ip link del tapvif1")?;
    assert_eq!(host.state()?, before);
    Ok(())
}

#[test]
fn an_isolated_port_starts_in_the_dead_vlan_and_stays_where_somebody_puts_it() -> Result<()> {
    let mut host = Host::start()?;
    let socket = json!({"role": "listen", "path": host.socket("vm1")});
    let to = json!({"kind": "ovs", "bridge": "br0", "isolated": true});
    let spec = json!({"socket": socket, "to": to});
    assert!(host.plug_document("vm1", &spec)?.status.success());
    assert_eq!(host.ovs.vsctl("get Port vhd-vm1 tag vlan_mode trunks")?, "4095\ntrunk\n[4095]");
    host.ovs.vsctl("set Port vhd-vm1 tag=7 -- clear Port vhd-vm1 vlan_mode trunks")?;
    host.daemon.kill_and_restart()?;
    assert!(host.plug_document("vm1", &spec)?.status.success());
    assert_eq!(host.ovs.vsctl("get Port vhd-vm1 tag vlan_mode trunks")?, "7\n[]\n[]");
    Ok(())
}

/// Whatever step the daemon is at when it is killed, what it wrote down before decides: it goes on, or there is nothing.
#[test]
fn a_daemon_killed_at_every_step_of_a_plug_or_unplug_leaves_neither_gaps_nor_leftovers() -> Result<()> {
    let mut host = Host::start()?;
    let spec = json!({"socket": {"role": "listen", "path": host.socket("vm1")},
                      "to": {"kind": "ovs", "bridge": "br0", "iface_id": "lsp1"}});
    let Host { daemon, ovs } = &mut host;
    killed_at_every_step(daemon, &spec, || ovs.state())
}

#[test]
fn many_plugs_at_once_share_a_bridge_that_goes_with_the_last() -> Result<()> {
    const PLUGS: usize = 24;
    let host = Host::start()?;
    let before = host.state()?;
    let names: Vec<_> = (0..PLUGS).map(|n| format!("vm{n}")).collect();
    let all = |act: &(dyn Fn(&str) -> Result<()> + Sync)| {
        std::thread::scope(|scope| {
            let acts: Vec<_> = names.iter().map(|name| scope.spawn(move || act(name))).collect();
            acts.into_iter().try_for_each(|act| act.join().unwrap())
        })
    };
    all(&|name| host.plug(name, "br0", &[]).map(drop))?;
    assert_eq!(host.ovs.vsctl("list-ports br0")?.lines().count(), PLUGS);
    all(&|name| host.daemon.run(&["unplug", name]).map(drop))?;
    assert_eq!(host.state()?, before);
    Ok(())
}
