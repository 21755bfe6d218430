//! Plugs into Linux bridges, and through one into Open vSwitch: real bridges, a real switch, the daemon. What is compared
//! before and after is all there is of the host: links, addresses, routes, and rows of the switch's database.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod kernel;

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::exchange;
use e2e::inproc::count;
use e2e::kill::killed_at_every_step;
use e2e::osvif::envelope;
use e2e::ovs::{Host, said};
use e2e::peer::{Peer, PeerConfig};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const MAC: &str = "52:54:00:00:00:01";
/// Exit code of the command line.
const CONFLICT: i32 = 4;
const INSTANCE: &str = "d7a730ca-3c28-49c3-8f26-4662b909fe8a";

/// What os-vif hands to a plug-in.
fn asked(class: &str, id: &str, mut more: Value, network: &Value, profile: Option<Value>) -> Value {
    let version = if class == "VIFVHostUser" { "1.1" } else { "1.0" };
    let mut data = json!({"id": id, "address": MAC, "network": envelope("Network", "1.1", network)});
    data.as_object_mut().unwrap().extend(profile.map(|profile| ("port_profile".to_owned(), profile)));
    data.as_object_mut().unwrap().append(more.as_object_mut().unwrap());
    let instance = envelope("InstanceInfo", "1.0", &json!({"uuid": INSTANCE}));
    json!({"vif": envelope(class, version, &data), "instance_info": instance})
}

/// A VIFBridge for vif_name `tapID` in this bridge.
fn bridge_vif(id: &str, bridge: &str, network: &Value, profile: Option<Value>) -> Value {
    let more = json!({"vif_name": format!("tap{id}"), "bridge_name": bridge});
    asked("VIFBridge", id, more, network, profile)
}

fn by_socket(daemon: &Daemon, id: &str, mut asked: Value) -> Value {
    asked["socket"] = json!({"role": "listen", "path": daemon.socket(id)});
    asked
}

/// Asks for something, and gives the answer's body if it is this status.
fn post(daemon: &Daemon, path: &str, body: &Value, status: u16) -> Result<Value> {
    let answer = daemon.http("POST", path, &body.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer")?;
    ensure!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    Ok(serde_json::from_str(body)?)
}

fn plug(daemon: &Daemon, asked: &Value) -> Result<Value> {
    post(daemon, "/v1/os-vif/plug", asked, 201)
}

fn unplug(daemon: &Daemon, asked: &Value) -> Result<Value> {
    post(daemon, "/v1/os-vif/unplug", asked, 200)
}

fn guest(daemon: &Daemon, plug: &str) -> Result<Peer> {
    let path = daemon.socket(plug);
    let mut guest =
        wait_for_some("the port's socket", SOON, || Ok(Peer::connect(&path, PeerConfig::default()).ok()))?;
    guest.offer_all();
    daemon.wait_for_forwarding(&[plug])?;
    Ok(guest)
}

/// The network that the hybrid plugs are in.
fn integration() -> Value {
    json!({"bridge": "br-int", "mtu": 1500})
}

fn hybrid_vif(daemon: &Daemon, id: &str) -> Value {
    let profile = json!({"interface_id": format!("lsp-{id}"), "hybrid_plug": true,
                         "bridge_name": format!("qbr{id}")});
    let profile = envelope("VIFPortProfileFPOpenVSwitch", "1.4", &profile);
    let more = json!({"vif_name": format!("tap{id}"), "mode": "client", "path": daemon.socket(id)});
    asked("VIFVHostUser", id, more, &integration(), Some(profile))
}

#[test]
fn a_hybrid_guest_reaches_open_vswitch_through_its_linux_bridge() -> Result<()> {
    let Host { mut daemon, ovs } = Host::start()?;
    let before = ovs.state()?;
    let [one, two] = ["one", "two"].map(|id| hybrid_vif(&daemon, id));
    plug(&daemon, &one)?;
    plug(&daemon, &two)?;
    let (mut a, mut b) = (guest(&daemon, "one")?, guest(&daemon, "two")?);
    exchange(&mut a, &mut b)?;

    assert_eq!(ovs.vsctl("list-ports br-int")?, "qvoone\nqvotwo");
    let ids = "get Interface qvoone external_ids:iface-id external_ids:iface-status external_ids:attached-mac \
               external_ids:vm-uuid mtu";
    assert_eq!(ovs.vsctl(ids)?, format!("lsp-one\nactive\n\"{MAC}\"\n\"{INSTANCE}\"\n1500"));
    let plugged = ovs.state()?;
    for line in [
        "\"qbrone\" null 1500 \"bridge\" \"vhostd:one\"",
        "\"qvbone\" \"qbrone\" 1500 \"veth\" \"vhostd:one\"",
        "\"qvoone\" null 1500 \"veth\" \"vhostd:one\"",
        "\"tapone\" \"qbrone\" 1500 \"tun\" \"vhostd:one\"",
    ] {
        ensure!(plugged.contains(line), "no {line} in\n{plugged}");
    }
    let bridge = ovs.host().run("ip -details link show qbrone")?;
    ensure!(bridge.contains(" ageing_time 0 ") && bridge.contains(" mcast_snooping 0 "), "{bridge}");

    let generation = || ovs.vsctl("--no-wait get Open_vSwitch . next_cfg");
    let generation_before = generation()?;
    post(&daemon, "/v1/os-vif/plug", &one, 200)?;
    daemon.kill_and_restart()?;
    drop((a, b));
    let (mut a, mut b) = (guest(&daemon, "one")?, guest(&daemon, "two")?);
    assert_eq!((ovs.state()?, generation()?), (plugged, generation_before), "nothing is touched");
    exchange(&mut a, &mut b)?;

    unplug(&daemon, &one)?;
    unplug(&daemon, &two)?;
    unplug(&daemon, &two)?;
    assert_eq!(ovs.state()?, before);
    Ok(())
}

#[test]
fn the_bridge_of_a_vmms_tap_is_made_with_its_way_into_open_vswitch() -> Result<()> {
    let Host { daemon, ovs } = Host::start()?;
    let before = ovs.state()?;
    let profile = envelope("VIFPortProfileOpenVSwitch", "1.4", &json!({"interface_id": "lsp1"}));
    let card = bridge_vif("vm1", "qbrvm1", &integration(), Some(profile));
    let plugged = post(&daemon, "/v1/os-vif/plug?wait=forwarding", &card, 201)?;
    assert_eq!(plugged["status"]["phase"], "forwarding");
    let host = ovs.host();
    assert_eq!(host.run("ls /sys/class/net/qbrvm1/brif")?, "qvbvm1\n", "libvirt adds the TAP");
    assert_eq!(ovs.vsctl("get Interface qvovm1 external_ids:iface-id ofport")?, "lsp1\n1");
    // The bridge goes although the VMM's TAP is in it still.
    host.run("ip tuntap add tapvm1 mode tap; ip link set tapvm1 master qbrvm1 up")?;
    unplug(&daemon, &card)?;
    host.run("ip link del tapvm1")?;
    assert_eq!(ovs.state()?, before);

    // The same served by a socket: the TAP is ours.
    plug(&daemon, &by_socket(&daemon, "vm1", card.clone()))?;
    plug(&daemon, &hybrid_vif(&daemon, "vm2"))?;
    exchange(&mut guest(&daemon, "vm1")?, &mut guest(&daemon, "vm2")?)?;
    unplug(&daemon, &card)?;
    unplug(&daemon, &hybrid_vif(&daemon, "vm2"))?;
    assert_eq!(ovs.state()?, before);
    Ok(())
}

#[test]
fn a_vif_in_a_file_is_served_by_the_socket_that_the_command_line_names() -> Result<()> {
    let daemon = Daemon::start()?;
    let before = daemon.host().state()?;
    let sockets = ["listens", "dials"].map(|id| daemon.socket(id).display().to_string());
    let files = sockets.each_ref().map(|socket| format!("{socket}.json"));
    for (id, file) in ["listens", "dials"].iter().zip(&files) {
        fs::write(file, bridge_vif(id, "brq1", &json!({}), None).to_string())?;
    }
    let listener = UnixListener::bind(&sockets[1])?;
    let plug = |n: usize, role: &str| daemon.command(&["plug", "-f", &files[n], role, &sockets[n]]);
    for (n, role) in [(0, "--listen"), (1, "--connect"), (0, "--listen")] {
        let plugged = plug(n, role)?;
        ensure!(plugged.status.success(), "{role}: {}", String::from_utf8_lossy(&plugged.stderr));
    }
    let mut dials = Peer::accept(&listener, PeerConfig::default())?;
    dials.offer_all();
    daemon.wait_for_forwarding(&["dials"])?;
    exchange(&mut guest(&daemon, "listens")?, &mut dials)?;
    let error = said(&plug(0, "--connect")?, CONFLICT)?;
    ensure!(error.contains("plug listens exists and differs in socket.role"), "{error}");
    for file in &files {
        daemon.run(&["unplug", "-f", file])?;
    }
    assert_eq!(daemon.host().state()?, before);
    Ok(())
}

/// A host whose eth1 has its addresses and is its way out.
fn host_with_eth1() -> Result<Daemon> {
    let daemon = Daemon::start()?;
    daemon.host().run(
        "ip link add eth1 type veth peer name out1; ip link set eth1 up; ip link set out1 up
         ip addr add 192.0.2.5/24 brd + dev eth1; ip addr add 2001:db8::5/64 dev eth1 nodad
         ip route add default via 192.0.2.1 dev eth1; ip -6 route add default via 2001:db8::1 dev eth1",
    )?;
    Ok(daemon)
}

fn provided() -> Value {
    json!({"bridge": "brq1", "bridge_interface": "eth1", "should_provide_bridge": true})
}

#[test]
fn plugs_share_a_bridge_whose_uplink_gets_everything_back_from_the_last() -> Result<()> {
    let mut daemon = host_with_eth1()?;
    let before = daemon.host().state()?;
    let card = bridge_vif("card", "brq1", &provided(), None);
    let [one, two] = ["one", "two"].map(|id| bridge_vif(id, "brq1", &provided(), None));
    // Without an interface of its own it only needs the bridge.
    let bare = bridge_vif("bare", "brq1", &json!({}), None);
    plug(&daemon, &card)?;
    plug(&daemon, &bare)?;
    for (id, vif) in [("one", &one), ("two", &two)] {
        plug(&daemon, &by_socket(&daemon, id, vif.clone()))?;
    }
    let plugged = daemon.host().state()?;
    for line in [
        "brq1    inet 192.0.2.5/24",
        "brq1    inet6 2001:db8::5/64",
        "default via 192.0.2.1 dev brq1",
        "\"eth1\" \"brq1\"",
        "default via 2001:db8::1 dev brq1",
        "vhostd uplink eth1",
    ] {
        ensure!(plugged.contains(line), "no {line} in\n{plugged}");
    }
    exchange(&mut guest(&daemon, "one")?, &mut guest(&daemon, "two")?)?;
    daemon.kill_and_restart()?;
    exchange(&mut guest(&daemon, "one")?, &mut guest(&daemon, "two")?)?;
    assert_eq!(daemon.host().state()?, plugged);

    unplug(&daemon, &one)?;
    unplug(&daemon, &two)?;
    let kept = daemon.host().state()?;
    ensure!(kept.contains("default via 192.0.2.1 dev brq1"), "card is plugged still:\n{kept}");
    unplug(&daemon, &card)?;
    let kept = daemon.host().state()?;
    ensure!(kept.contains("\"brq1\" null") && kept.contains("default via 192.0.2.1 dev eth1"), "{kept}");
    unplug(&daemon, &bare)?;
    assert_eq!(daemon.host().state()?, before);
    Ok(())
}

#[test]
fn a_vlan_of_the_uplink_is_made_or_said_to_be_impossible() -> Result<()> {
    let daemon = host_with_eth1()?;
    let before = daemon.host().state()?;
    let mut network = provided();
    network["should_provide_vlan"] = json!(true);
    network["vlan"] = json!(7);
    let vif = bridge_vif("vm1", "brq1", &network, None);
    let answer = daemon.http("POST", "/v1/os-vif/plug", &vif.to_string())?;
    if answer.contains("201 Created") {
        let plugged = daemon.host().state()?;
        ensure!(plugged.contains("\"vlan7\" \"brq1\" 1500 \"vlan\" \"vhostd\""), "{plugged}");
        ensure!(plugged.contains("default via 192.0.2.1 dev eth1"), "eth1 stays the host's: {plugged}");
        unplug(&daemon, &vif)?;
    } else {
        ensure!(
            answer.contains("424 ") && answer.contains("cannot make VLAN vlan7: this kernel lacks"),
            "{answer}"
        );
    }
    assert_eq!(daemon.host().state()?, before);
    Ok(())
}

#[test]
fn what_is_somebody_elses_is_refused_and_nothing_is_left() -> Result<()> {
    let Host { daemon, ovs } = Host::start()?;
    let host = ovs.host();
    host.run(
        "ip link add name adm up type bridge ageing_time 500; ip tuntap add tapa mode tap
         ip link add qvob type veth peer name elsewhere; ip tuntap add qbrc mode tap
         ip link add eth1 type veth peer name out1",
    )?;
    let before = ovs.state()?;
    let refused = |vif: &Value, status: u16, words: &str| -> Result<()> {
        let problem = post(&daemon, "/v1/os-vif/plug", vif, status)?;
        let detail = problem["detail"].as_str().context("a detail")?;
        ensure!(detail.contains(words), "{detail}");
        assert_eq!(ovs.state()?, before, "{words}");
        Ok(())
    };
    refused(&hybrid_vif(&daemon, "a"), 409, "tapa exists and was not made by vhostd")?;
    refused(&hybrid_vif(&daemon, "b"), 409, "qvob exists and was not made by vhostd")?;
    refused(&hybrid_vif(&daemon, "c"), 409, "qbrc exists and is a TAP, not a bridge")?;
    let long = bridge_vif("d", "sixteen-bytes-xx", &json!({}), None);
    refused(&long, 400, "\"sixteen-bytes-xx\" is not an interface name: 1 to 15")?;
    let foreign = bridge_vif("e", "adm", &provided(), None);
    refused(&foreign, 409, "eth1 cannot become the uplink of adm, which was not made by vhostd")?;
    let mut nowhere = provided();
    nowhere["bridge_interface"] = json!("eth9");
    refused(&bridge_vif("f", "brq1", &nowhere, None), 424, "there is no interface eth9")?;
    let other = bridge_vif("g", "qbrc", &json!({}), None);
    refused(&by_socket(&daemon, "g", other), 409, "qbrc exists and is a TAP, not a bridge")?;

    // An administrator's bridge is used as it is, and stays so.
    let bare = by_socket(&daemon, "h", bridge_vif("h", "adm", &json!({}), None));
    plug(&daemon, &bare)?;
    unplug(&daemon, &bare)?;
    assert_eq!(ovs.state()?, before);
    ensure!(host.run("ip -details link show adm")?.contains(" ageing_time 500 "), "it is untouched");
    Ok(())
}

#[test]
fn one_id_is_one_spec() -> Result<()> {
    let Host { daemon, ovs: _ovs } = Host::start()?;
    let vif = hybrid_vif(&daemon, "vm1");
    plug(&daemon, &vif)?;
    for (at, value, field) in [
        ("/port_profile/versioned_object.data/bridge_name", json!("qbrx"), "spec.to.hybrid"),
        ("/network/versioned_object.data/mtu", json!(1400), "spec.mtu"),
        ("/vif_name", json!("tapx"), "spec.to.tap"),
    ] {
        let mut other = vif.clone();
        *other.pointer_mut(&format!("/vif/versioned_object.data{at}")).unwrap() = value;
        let problem = post(&daemon, "/v1/os-vif/plug", &other, 409)?;
        assert_eq!(problem["field"], field);
    }
    let card = bridge_vif("card", "brq1", &json!({}), None);
    plug(&daemon, &card)?;
    let problem = post(&daemon, "/v1/os-vif/plug", &by_socket(&daemon, "card", card.clone()), 409)?;
    let detail = problem["detail"].as_str().unwrap();
    ensure!(detail.contains("socket") && detail.contains("to.guest"), "{detail}");
    // Nobody else's plug takes its names.
    let mut other = hybrid_vif(&daemon, "vm1");
    let data = &mut other["vif"]["versioned_object.data"];
    data["id"] = json!("vm2");
    data["vif_name"] = json!("tapvm2");
    data["path"] = json!(daemon.socket("vm2"));
    let problem = post(&daemon, "/v1/os-vif/plug", &other, 409)?;
    ensure!(problem["detail"].as_str().unwrap().contains("belongs to plug vm1"), "{problem}");
    Ok(())
}

/// Waits until the plug's conditions contain this text.
fn wait_for_condition(daemon: &Daemon, plug: &str, text: &str) -> Result<()> {
    let look = || daemon.json(&["show", plug]);
    wait_for_some(&format!("{plug}: {text}"), SOON, || {
        Ok(look()?["status"]["conditions"].to_string().contains(text).then_some(()))
    })
    .with_context(|| look().unwrap_or_default().to_string())
}

/// Does something to the host, and waits until that is told to be put right, and is.
fn is_put_right(daemon: &Daemon, action: &str, told: &str, state: impl Fn() -> Result<String>) -> Result<()> {
    let (plugged, mut events) = (state()?, daemon.events()?);
    daemon.host().run(action)?;
    events.wait_for("repaired", told).with_context(|| format!("after {action}"))?;
    wait_for_some("the host to be as before", SOON, || Ok((state()? == plugged).then_some(())))
        .with_context(|| format!("{}\nwanted:\n{plugged}", state().unwrap_or_default()))
}

/// Each is done to one plug, one after the other: the daemon takes no more than three at once from anybody.
#[test]
fn what_somebody_else_does_to_links_is_put_right_and_told() -> Result<()> {
    let Host { daemon, ovs } = Host::start()?;
    let before = ovs.state()?;
    let hybrid = |id: &str| plug(&daemon, &hybrid_vif(&daemon, id));
    let bridged = |id: &str| {
        plug(&daemon, &by_socket(&daemon, id, bridge_vif(id, "brq1", &json!({"mtu": 1500}), None)))
    };
    for id in ["h1", "h2"] {
        hybrid(id)?;
    }
    for id in ["b1", "b2"] {
        bridged(id)?;
    }
    let [mut h1, mut h2] = ["h1", "h2"].map(|id| guest(&daemon, id).unwrap());
    let [mut b1, mut b2] = ["b1", "b2"].map(|id| guest(&daemon, id).unwrap());
    for (action, told) in [
        ("ip link set taph1 nomaster", "taph1 is not in bridge qbrh1"),
        ("ip link set qvbh1 mtu 1400", "qvbh1 has MTU 1400, the plug 1500"),
        ("ip link del qbrh1", "interface qbrh1 is gone"),
        ("ip link del qvoh2", "interface qvbh2 is gone; interface qvoh2 is gone"),
        ("ip link set qbrh2 down", "qbrh2 is down"),
        // One that we have open, and one that Open vSwitch has. Where the second goes while the first is put right, only one of
        // them is told of: whichever is left for the attempt that succeeds.
        ("ip link del taph2; ip link del qvoh2", "put right what somebody else had done"),
    ] {
        is_put_right(&daemon, action, told, || ovs.state())?;
        exchange(&mut h1, &mut h2)?;
    }
    for (action, told) in [
        ("ip link set tapb1 down", "tapb1 is down"),
        ("ip link del brq1", "interface brq1 is gone"),
        ("ip link del tapb1", "interface tapb1 is gone"),
    ] {
        is_put_right(&daemon, action, told, || ovs.state())?;
        exchange(&mut b1, &mut b2)?;
    }
    for id in ["h1", "h2", "b1", "b2"] {
        daemon.run(&["unplug", id])?;
    }
    assert_eq!(ovs.state()?, before);
    Ok(())
}

#[test]
fn a_tap_deleted_under_open_vswitch_is_made_anew_and_taken_up() -> Result<()> {
    let Host { daemon, ovs } = Host::start()?;
    for name in ["a", "b"] {
        let socket = daemon.socket(name).display().to_string();
        daemon.run(&["plug", name, "--listen", &socket, "--to", "ovs:br0"])?;
    }
    let (mut a, mut b) = (guest(&daemon, "a")?, guest(&daemon, "b")?);
    is_put_right(&daemon, "ip link del vhd-a", "interface vhd-a is gone", || ovs.state())?;
    exchange(&mut a, &mut b)
}

#[test]
fn who_keeps_undoing_it_is_not_raced_and_is_told_of() -> Result<()> {
    let daemon = Daemon::start()?;
    plug(&daemon, &by_socket(&daemon, "vm1", bridge_vif("vm1", "brq1", &json!({}), None)))?;
    let (start, mut events) = (Instant::now(), daemon.events()?);
    let undoing = "while ip link set tapvm1 nomaster; do sleep 0.01; done";
    let mut another = daemon.host().command("sh").args(["-c", undoing]).spawn()?;
    let text = "tapvm1 is not in bridge brq1: somebody else keeps undoing";
    let told = events
        .wait_for("failed", text)
        .and_then(|()| events.wait_for("failed", text))
        .and_then(|()| wait_for_condition(&daemon, "vm1", text));
    another.kill()?;
    another.wait()?;
    told?;
    // Three at once, and then with pauses that double from 100 ms on.
    let repairs = events.count("repaired");
    ensure!((4..=10).contains(&repairs), "{repairs} repairs in {:?}", start.elapsed());
    wait_for_some("the last repair", SOON, || {
        Ok(daemon.host().state()?.contains("\"tapvm1\" \"brq1\"").then_some(()))
    })
}

#[test]
fn another_mtu_than_the_plugs_is_a_condition_where_it_is_not_ours() -> Result<()> {
    let daemon = host_with_eth1()?;
    let network = |mtu: u16| {
        let mut network = provided();
        network["mtu"] = json!(mtu);
        network
    };
    let card = bridge_vif("vm1", "brq1", &network(9000), None);
    plug(&daemon, &card)?;
    wait_for_condition(&daemon, "vm1", "eth1 has MTU 1500, the plug 9000")?;
    daemon.host().run("ip link set out1 mtu 9000; ip link set eth1 mtu 9000; ip link set brq1 mtu 9000")?;
    daemon.wait_for_forwarding(&["vm1"])?;
    daemon.host().run("ip link set brq1 mtu 1400")?;
    wait_for_condition(&daemon, "vm1", "brq1 has MTU 1400, the plug 9000")?;
    daemon.host().run("ip link set brq1 mtu 9000; ip tuntap add tapvm1 mode tap")?;
    wait_for_condition(&daemon, "vm1", "tapvm1 has MTU 1500, the plug 9000")?;
    daemon.host().run("ip link set tapvm1 mtu 9000")?;
    daemon.wait_for_forwarding(&["vm1"])?;
    // A TAP that is ours is put right.
    plug(&daemon, &by_socket(&daemon, "vm2", bridge_vif("vm2", "brq1", &network(9000), None)))?;
    let _guest = guest(&daemon, "vm2")?;
    is_put_right(&daemon, "ip link set tapvm2 mtu 1400", "tapvm2 has MTU 1400, the plug 9000", || {
        daemon.host().state()
    })
}

/// Four clients plug and unplug one id, so many times each, as it comes.
fn race(daemon: &Daemon, spec: &Value, requests: u64, state: impl Fn() -> Result<String>) -> Result<()> {
    const CLIENTS: u64 = 4;
    let before = state()?;
    let body = json!({"spec": spec}).to_string();
    std::thread::scope(|scope| {
        let client = |number: u64| {
            let body = &body;
            move || {
                (0..requests).try_for_each(|request| {
                    // Pairs of clients are at odds at any time.
                    let plugs = (request + number).is_multiple_of(2);
                    let (method, body) = if plugs { ("PUT", body.as_str()) } else { ("DELETE", "") };
                    let answer = daemon.http(method, "/v1/plugs/vm1", body)?;
                    ensure!(answer.starts_with("HTTP/1.1 20"), "{method}: {answer}");
                    Ok(())
                })
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(client(number))).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap())
    })?;
    daemon.run(&["unplug", "vm1"])?;
    assert_eq!(state()?, before);
    Ok(())
}

#[test]
fn plugs_and_unplugs_of_one_id_that_race_leave_nothing_in_a_bridge() -> Result<()> {
    let daemon = host_with_eth1()?;
    let spec = spec_of(&daemon, &by_socket(&daemon, "vm1", bridge_vif("vm1", "brq1", &provided(), None)))?;
    race(&daemon, &spec, 250, || daemon.host().state())
}

#[test]
fn plugs_and_unplugs_of_one_id_that_race_leave_nothing_in_open_vswitch() -> Result<()> {
    let Host { daemon, ovs } = Host::start()?;
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    let spec = json!({"socket": socket, "to": {"kind": "ovs", "bridge": "br0"}});
    // Each waits for ovs-vswitchd.
    race(&daemon, &spec, count(50, 250), || ovs.state())
}

/// The spec that a VIF becomes.
fn spec_of(daemon: &Daemon, asked: &Value) -> Result<Value> {
    let mut plan = post(daemon, "/v1/os-vif/plug?dry_run=true", asked, 201)?;
    Ok(plan["spec"].take())
}

#[test]
fn a_daemon_killed_at_every_step_of_a_hybrid_plug_leaves_neither_gaps_nor_leftovers() -> Result<()> {
    let Host { mut daemon, ovs } = Host::start()?;
    let spec = spec_of(&daemon, &hybrid_vif(&daemon, "vm1"))?;
    killed_at_every_step(&mut daemon, &spec, || ovs.state())
}

#[test]
fn a_daemon_killed_at_every_step_of_a_bridge_plug_leaves_the_uplink_with_its_addresses() -> Result<()> {
    let mut daemon = host_with_eth1()?;
    let host = daemon.netns();
    let vif = by_socket(&daemon, "vm1", bridge_vif("vm1", "brq1", &provided(), None));
    let spec = spec_of(&daemon, &vif)?;
    killed_at_every_step(&mut daemon, &spec, || host.state())
}
