//! VIFs of os-vif in Open vSwitch: what is left in the database, row for row as os-vif's own plug-in leaves it, and on the host.
//! Some of it also with the kernel's datapath, in the test guest.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use anyhow::{Result, ensure};
use e2e::kill::killed_at_every_step;
use e2e::osvif::{ADDRESS, VIF, in_open_vswitch};
use e2e::ovs::{Dpdk, Host, datapath_type, of_os_vif};
use serde_json::{Value, json};

const TAP: &str = "tapdc065497-3c";
const CONFLICT: i32 = 4;

fn vif(profile: &Value) -> Value {
    in_open_vswitch("VIFOpenVSwitch", "br-int", &json!({"vif_name": TAP}), profile)
}

/// A host with a bridge that was there before us.
fn start(more: &str) -> Result<Host> {
    let host = Host::start_with(Dpdk::Off, more)?;
    host.ovs.vsctl(&format!("add-br br-int -- set Bridge br-int datapath_type={}", datapath_type()))?;
    Ok(host)
}

#[test]
fn rows_are_those_of_os_vif_with_either_datapath() -> Result<()> {
    let through_linux_bridge = in_open_vswitch(
        "VIFBridge",
        "br-int",
        &json!({"vif_name": TAP, "bridge_name": "qbrdc065497-3c"}),
        &json!({}),
    );
    for (case, more, vif) in [
        ("openvswitch_default", "", vif(&json!({}))),
        ("openvswitch_create_port", "", vif(&json!({"create_port": true}))),
        ("openvswitch_per_port_bridge", "per_port_bridge = true", vif(&json!({}))),
        ("bridge_hybrid", "", through_linux_bridge),
    ] {
        let mut host = start(more)?;
        let before = host.state()?;
        host.plug_vif(&vif)?;
        assert_eq!(host.ovs.comparable_rows()?, of_os_vif(case)?, "{case}");
        // Another configuration makes another plug of a new one only.
        let plugged = (host.state()?, host.generation()?);
        host.restart_with("isolate = true\nqos_type = \"none\"")?;
        host.plug_vif(&vif)?;
        assert_eq!((host.state()?, host.generation()?), plugged, "{case}");
        host.unplug_vif(&vif)?;
        assert_eq!(host.state()?, before, "{case}");
        host.unplug_vif(&vif)?;
    }
    Ok(())
}

/// Ours to make is a TAP only with its port.
#[test]
fn tap_and_port_are_made_in_every_combination_as_the_profile_says() -> Result<()> {
    for more in ["", "per_port_bridge = true"] {
        let host = start(more)?;
        let before = host.state()?;
        for n in 0..8 {
            let [create_tap, create_port, multiqueue] = [n & 1 != 0, n & 2 != 0, n & 4 != 0];
            let flags =
                json!({"create_tap": create_tap, "create_port": create_port, "multiqueue": multiqueue});
            let vif = vif(&flags);
            host.plug_vif(&vif)?;
            let own_bridge = !more.is_empty();
            let port = create_port || own_bridge;
            let bridge = if own_bridge { "pbdc065497-3c8" } else { "br-int" };
            assert_eq!(
                host.ovs.vsctl(&format!("list-ports {bridge}"))?.contains(TAP),
                port,
                "{more}: {flags}"
            );
            let link = host.ovs.host().run(&format!("ip -details -oneline link show {TAP} 2>&1 || true"))?;
            if create_tap && port {
                ensure!(link.contains(ADDRESS) && link.contains("mtu 1450") && link.contains("UP"), "{link}");
                assert_eq!(link.contains("multi_queue"), multiqueue, "{flags}: {link}");
                let ipv6 = host.ovs.host().run(&format!("cat /proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"))?;
                assert_eq!(ipv6.trim(), "1", "the host takes no part in the guest's address detection");
                host.daemon.wait_for_forwarding(&[VIF])?;
            } else {
                ensure!(link.contains("does not exist"), "{flags}: {link}");
            }
            host.unplug_vif(&vif)?;
            assert_eq!(host.state()?, before, "{more}: {flags}");
        }
    }
    Ok(())
}

#[test]
fn a_new_port_is_isolated_where_the_configuration_says_so() -> Result<()> {
    let mut host = start("isolate = true")?;
    let vif = vif(&json!({"create_port": true, "create_tap": true}));
    let vlans = |port: &str| host.ovs.vsctl(&format!("get Port {port} tag vlan_mode trunks"));
    host.plug_vif(&vif)?;
    assert_eq!(vlans(TAP)?, "4095\ntrunk\n[4095]");
    // A trunk's own bridge is its agent's, and what is no logical port has no agent.
    let trunk = in_open_vswitch(
        "VIFOpenVSwitch",
        "tbr-1",
        &json!({"vif_name": "tapt", "id": "t"}),
        &json!({"create_port": true, "create_tap": true, "interface_id": "t"}),
    );
    host.plug_vif(&trunk)?;
    assert_eq!(vlans("tapt")?, "[]\n[]\n[]");
    assert_eq!(host.ovs.vsctl("get Interface tapt external_ids:bridge_name")?, "tbr-1");
    host.plug("plain", "br-int", &[])?;
    assert_eq!(vlans("vhd-plain")?, "[]\n[]\n[]");
    // A trunk's bridge goes with its port, whatever else is in there.
    host.ovs.vsctl("add-port tbr-1 tpt -- set Interface tpt type=internal")?;
    host.unplug_vif(&trunk)?;
    assert_eq!(host.ovs.vsctl("list-br")?, "br-int");

    host.unplug_vif(&vif)?;
    host.restart_with("isolate = true\nper_port_bridge = true")?;
    host.plug_vif(&vif)?;
    let vlans = |port: &str| host.ovs.vsctl(&format!("get Port {port} tag vlan_mode trunks"));
    assert_eq!(vlans(TAP)?, "[]\n[]\n[]", "no agent would ever take it out");
    assert_eq!(vlans(&format!("ibp{VIF}"))?, "4095\ntrunk\n[4095]");
    Ok(())
}

#[test]
fn a_row_of_table_qos_goes_with_its_port_and_takes_the_place_of_older_ones_with_either_datapath() -> Result<()>
{
    let host = start("qos_type = \"linux-htb\"")?;
    let before = host.state()?;
    let rows = || host.ovs.vsctl("--no-wait --bare --columns=type list QoS");
    let vif = vif(&json!({"create_port": true, "create_tap": true}));
    // As os-vif's plug-in leaves them.
    let id = "58b25a10-7b82-5385-9020-a2e650c6b0da";
    for kind in ["linux-noop", "linux-htb"] {
        host.ovs.vsctl(&format!("create QoS type={kind} external_ids:id={id} external_ids:_type={kind}"))?;
    }
    host.plug_vif(&vif)?;
    assert_eq!(rows()?, "linux-htb");
    let discipline = || host.ovs.host().run(&format!("tc qdisc show dev {TAP}"));
    ensure!(discipline()?.contains("qdisc htb"), "{}", discipline()?);
    host.ovs.vsctl(&format!("del-port {TAP}"))?;
    host.daemon.wait_for_forwarding(&[VIF])?;
    assert_eq!(rows()?, "linux-htb");
    ensure!(discipline()?.contains("qdisc htb"), "{}", discipline()?);
    host.unplug_vif(&vif)?;
    assert_eq!(host.state()?, before);
    Ok(())
}

#[test]
fn a_daemon_killed_at_every_step_leaves_a_port_in_its_own_bridge_whole_or_not_at_all() -> Result<()> {
    let Host { mut daemon, ovs } = start("qos_type = \"linux-htb\"\nisolate = true")?;
    let to = json!({"kind": "ovs", "bridge": "br-int", "iface_id": "lsp1", "per_port_bridge": true,
                    "guest": {"make_tap": true, "make_port": true}});
    killed_at_every_step(&mut daemon, &json!({"to": to}), || ovs.state())
}

#[test]
fn a_daemon_killed_at_every_step_leaves_a_port_in_a_trunks_bridge_whole_or_not_at_all() -> Result<()> {
    let Host { mut daemon, ovs } = start("")?;
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    let to = json!({"kind": "ovs", "bridge": "tbr-1", "iface_id": "lsp1", "tap": "tapt"});
    killed_at_every_step(&mut daemon, &json!({"socket": socket, "to": to}), || ovs.state())
}

#[test]
fn many_ports_forward_again_after_the_switch_was_killed_with_either_datapath() -> Result<()> {
    const PLUGS: usize = 32;
    let mut host = start("")?;
    let names: Vec<_> = (0..PLUGS).map(|n| format!("vm{n}")).collect();
    for name in &names {
        let to = json!({"kind": "ovs", "bridge": "br-int", "guest": {"make_tap": true, "make_port": true}});
        ensure!(host.plug_document(name, &json!({"to": to}))?.status.success(), "{name}");
    }
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    host.daemon.wait_for_forwarding(&names)?;
    let plugged = host.state()?;
    host.ovs.kill_switch()?;
    for name in [names[0], names[PLUGS - 1]] {
        host.wait_for(name, "linked", "ovs-vswitchd, which forwards for bridge br-int, does not run")?;
    }
    host.ovs.start_switch()?;
    host.daemon.wait_for_forwarding(&names)?;
    assert_eq!(host.state()?, plugged);
    Ok(())
}

#[test]
fn a_logical_port_is_one_port() -> Result<()> {
    let host = start("")?;
    host.ovs.host().run("ip tuntap add left mode tap; ip tuntap add foreign mode tap")?;
    // A port of a plug that nobody knows of any more.
    host.ovs.vsctl(
        "add-port br-int left -- set Port left external_ids:vhostd-plug=gone -- \
         set Interface left external_ids:iface-id=lsp1",
    )?;
    host.plug("vm1", "br-int", &["--iface-id", "lsp1"])?;
    assert_eq!(host.ovs.vsctl("list-ports br-int")?, "vhd-vm1");
    let error = host.refused("vm2", "br-int", &["--iface-id", "lsp1"], CONFLICT)?;
    ensure!(error.contains("logical port lsp1 belongs to plug vm1 already"), "{error}");
    // Somebody else's stays.
    host.ovs.vsctl("add-port br-int foreign -- set Interface foreign external_ids:iface-id=lsp2")?;
    let error = host.refused("vm2", "br-int", &["--iface-id", "lsp2"], CONFLICT)?;
    ensure!(error.contains("logical port lsp2 is port foreign already"), "{error}");
    assert_eq!(host.ovs.vsctl("list-ports br-int")?, "foreign\nvhd-vm1");
    Ok(())
}
