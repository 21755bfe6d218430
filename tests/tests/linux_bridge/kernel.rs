//! What a machine's kernel may lack, and that of the test guest does not: bonds, and bridges that filter VLANs.
//!
//! ```text
//! vm1 ── vhostd ── tapvm1 ── brq1 ── (vlan7) ── bond0 ══ eth1, eth2 ══ outside ── (outside.7) ── far ── tapfar ── vhostd ── far
//! ```

use std::env;
use std::sync::Arc;

use e2e::netns::Netns;
use e2e::qemu::MARK;

use super::*;

/// Makes links of a kind that the kernel may not have. False if it has not.
fn made(host: &Netns, what: &str, script: &str) -> Result<bool> {
    let made = host.run(script);
    if made.is_ok() || env::var_os(MARK).is_some() {
        return made.map(|_| true);
    }
    eprintln!("SKIPPED: this kernel has no {what}; the test guest's has (make test)");
    Ok(false)
}

/// A host whose way out is a bond of two interfaces, the other ends of which are ports of a switch outside.
fn host_with_bond() -> Result<Option<Daemon>> {
    let host = Arc::new(Netns::new()?);
    if !made(&host, "bonds", "ip link add bond0 type bond mode active-backup miimon 100")? {
        return Ok(None);
    }
    host.run(
        "ip link add outside type bridge forward_delay 0; ip link set outside up
         for n in 1 2; do
             ip link add eth$n type veth peer name out$n; ip link set out$n master outside up; ip link set eth$n master bond0
         done
         ip link set bond0 up
         ip addr add 192.0.2.5/24 brd + dev bond0; ip addr add 2001:db8::5/64 dev bond0 nodad
         ip route add default via 192.0.2.1 dev bond0; ip -6 route add default via 2001:db8::1 dev bond0",
    )?;
    Ok(Some(Daemon::start_on(host, "")?))
}

/// A network whose bridge `brq1` has the bond, or another interface, as its uplink.
fn provided_by(interface: &str, more: &Value) -> Value {
    let mut network = provided();
    network["bridge_interface"] = json!(interface);
    network.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    network
}

/// A guest whose bridge `far` is outside, on `interface` there.
fn guest_outside(daemon: &Daemon, interface: &str) -> Result<Peer> {
    daemon.host().run(&format!(
        "ip link add far type bridge forward_delay 0; ip link set {interface} master far up; ip link set far up"
    ))?;
    plug(daemon, &by_socket(daemon, "far", bridge_vif("far", "far", &json!({}), None)))?;
    guest(daemon, "far")
}

#[test]
fn a_bond_is_an_uplink_like_any_other_and_keeps_its_ports() -> Result<()> {
    let Some(mut daemon) = host_with_bond()? else { return Ok(()) };
    daemon.host().run("ip link add end type veth peer name cable; ip link set cable master outside up")?;
    let mut far = guest_outside(&daemon, "end")?;
    let before = daemon.host().state()?;
    // What is the bond's is not a bridge's to take.
    let taken = bridge_vif("vm1", "brq1", &provided_by("eth1", &json!({})), None);
    let problem = post(&daemon, "/v1/os-vif/plug", &taken, 409)?;
    ensure!(
        problem["detail"].to_string().contains("it is a port of bond0, take it out there first"),
        "{problem}"
    );
    assert_eq!(daemon.host().state()?, before);

    let vif = by_socket(&daemon, "vm1", bridge_vif("vm1", "brq1", &provided_by("bond0", &json!({})), None));
    plug(&daemon, &vif)?;
    let plugged = daemon.host().state()?;
    for line in [
        "brq1    inet 192.0.2.5/24",
        "default via 2001:db8::1 dev brq1",
        "\"bond0\" \"brq1\" 1500 \"bond\"",
        "\"eth1\" \"bond0\"",
        "\"eth2\" \"bond0\"",
    ] {
        ensure!(plugged.contains(line), "no {line} in\n{plugged}");
    }
    let mut near = guest(&daemon, "vm1")?;
    exchange(&mut near, &mut far)?;
    // Frames go by its other port now. The switch outside learns so by what the guest sends.
    let active = daemon.host().run("cat /sys/class/net/bond0/bonding/active_slave")?;
    let other_end = format!("ip link set out{}", active.trim().trim_start_matches("eth"));
    daemon.host().run(&format!("{other_end} down"))?;
    exchange(&mut near, &mut far)?;
    daemon.kill_and_restart()?;
    exchange(&mut guest(&daemon, "vm1")?, &mut guest(&daemon, "far")?)?;
    daemon.host().run(&format!("{other_end} up"))?;
    assert_eq!(daemon.host().state()?, plugged);
    unplug(&daemon, &vif)?;
    assert_eq!(daemon.host().state()?, before);
    Ok(())
}

#[test]
fn a_vlan_of_a_bond_is_an_uplink_and_the_bond_stays_the_hosts() -> Result<()> {
    let Some(daemon) = host_with_bond()? else { return Ok(()) };
    daemon.host().run("ip link add link outside name outside.7 type vlan id 7")?;
    let mut far = guest_outside(&daemon, "outside.7")?;
    let before = daemon.host().state()?;
    let network = provided_by("bond0", &json!({"should_provide_vlan": true, "vlan": 7}));
    let vif = by_socket(&daemon, "vm1", bridge_vif("vm1", "brq1", &network, None));
    for _ in 0..2 {
        plug(&daemon, &vif)?;
        let plugged = daemon.host().state()?;
        for line in [
            "\"vlan7\" \"brq1\" 1500 \"vlan\" \"vhostd\"",
            "\"bond0\" null",
            "default via 192.0.2.1 dev bond0",
        ] {
            ensure!(plugged.contains(line), "no {line} in\n{plugged}");
        }
        exchange(&mut guest(&daemon, "vm1")?, &mut far)?;
        unplug(&daemon, &vif)?;
        assert_eq!(daemon.host().state()?, before);
    }
    Ok(())
}

/// VLANs of all ports, as an administrator sees them.
fn vlans(host: &Netns) -> Result<String> {
    host.run("bridge vlan show | grep -v tapvm")
}

/// An administrator's bridge that tells VLANs apart: a port gets that of the bridge for what has no tag, and which others it is in
/// is the administrator's to say.
#[test]
fn a_bridge_that_filters_vlans_gives_a_plug_its_default_one() -> Result<()> {
    let mut daemon = Daemon::start()?;
    let filtering = "ip link add adm type bridge vlan_filtering 1 vlan_default_pvid 5 forward_delay 0; ip link set adm up";
    if !made(daemon.host(), "bridges that filter VLANs", filtering)? {
        return Ok(());
    }
    daemon.host().run(
        "ip link add end type veth peer name cable; ip link set cable master adm up
         bridge vlan del dev cable vid 5; bridge vlan add dev cable vid 6 pvid untagged; bridge vlan add dev adm vid 7 self",
    )?;
    let (before, vlans_before) = (daemon.host().state()?, vlans(daemon.host())?);
    let [one, two] = ["vm1", "vm2"].map(|id| by_socket(&daemon, id, bridge_vif(id, "adm", &json!({}), None)));
    plug(&daemon, &one)?;
    plug(&daemon, &two)?;
    for _ in 0..2 {
        exchange(&mut guest(&daemon, "vm1")?, &mut guest(&daemon, "vm2")?)?;
        let ports = daemon.host().run("bridge vlan show | grep tapvm")?;
        assert_eq!(
            ports.split_whitespace().collect::<Vec<_>>().join(" "),
            "tapvm1 5 PVID Egress Untagged tapvm2 5 PVID Egress Untagged"
        );
        assert_eq!(vlans(daemon.host())?, vlans_before);
        daemon.kill_and_restart()?;
    }
    // What an administrator gives a port is its own: vm1 is in the VLAN of the cable now, vm2 is not.
    daemon.host().run("bridge vlan del dev tapvm1 vid 5; bridge vlan add dev tapvm1 vid 6 pvid untagged")?;
    daemon.kill_and_restart()?;
    let mut far = guest_outside(&daemon, "end")?;
    exchange(&mut guest(&daemon, "vm1")?, &mut far)?;
    unplug(&daemon, &one)?;
    unplug(&daemon, &two)?;
    daemon.run(&["unplug", "far"])?;
    daemon.host().run("ip link set end nomaster down; ip link del far")?;
    assert_eq!((daemon.host().state()?, vlans(daemon.host())?), (before, vlans_before));
    Ok(())
}
