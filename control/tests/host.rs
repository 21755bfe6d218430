//! The host's side, on real TAPs and bridges in a network namespace.

mod support;

use serde_json::{Value, json};
use support::Place;

fn uplink(place: &Place, id: &str, to: &Value) -> support::Http {
    place.http("PUT", &format!("/v1/plugs/{id}"), &json!({"spec": {"to": to}}).to_string())
}

#[test]
fn an_uplink_is_a_tap_in_a_bridge() {
    let place = Place::default();
    let daemon = place.serve();
    let plugged =
        place.vhostd(&["plug", "up", "--to", "bridge:br0", "--mtu", "1400", "--wait", "forwarding"]).ok();
    assert_eq!(plugged.out, "up forwarding\n");
    let tap = daemon.link("vhd-up");
    assert_eq!((&tap["master"], &tap["mtu"]), (&json!("br0"), &json!(1400)));
    assert_eq!(
        place.vhostd(&["ls"]).ok().out.lines().nth(1).unwrap().split_whitespace().last(),
        Some("(vhd-up)")
    );

    let second = uplink(&place, "up2", &json!({"kind": "bridge", "bridge": "br0"}));
    assert_eq!((second.status, second.json()["field"].as_str()), (409, Some("spec.network")));
    assert_eq!(place.vhostd(&["unplug", "up"]).ok().out, "up unplugged\n");
    assert_eq!((daemon.link("vhd-up"), daemon.link("br0")), (Value::Null, Value::Null));
}

#[test]
fn a_tap_keeps_its_number_through_a_kill() {
    let place = Place::default();
    let daemon = place.serve();
    // A namespace goes with its last process: hold it while the daemon is away.
    let mut holder =
        daemon.command_inside(&["setpriv", "--pdeathsig", "KILL", "sleep", "600"]).spawn().unwrap();
    place.vhostd(&["plug", "up", "--to", "bridge:br0"]).ok();
    let before = daemon.link("vhd-up");
    daemon.kill();
    let after = place.serve_in(holder.id());
    assert_eq!(place.phase("up"), "forwarding");
    let link = after.link("vhd-up");
    assert_eq!((&link["ifindex"], &link["master"]), (&before["ifindex"], &json!("br0")));
    place.vhostd(&["unplug", "up"]).ok();
    assert_eq!((after.link("vhd-up"), after.link("br0")), (Value::Null, Value::Null));
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn an_unplug_that_fails_is_finished_by_the_next_start() {
    let place = Place::default();
    let daemon = place.serve();
    let mut holder =
        daemon.command_inside(&["setpriv", "--pdeathsig", "KILL", "sleep", "600"]).spawn().unwrap();
    place.vhostd(&["plug", "up", "--to", "bridge:br0"]).ok();
    daemon.kill();
    // This one can attach to the TAP, which is persistent, but not remove it.
    let daemon = place.serve_in_powerless(holder.id());
    assert_eq!(place.phase("up"), "forwarding");
    for _ in 0..2 {
        let refused = place.vhostd(&["unplug", "up"]);
        assert_eq!(refused.code, 7, "{refused:?}");
        assert!(refused.err.contains("tried again until it succeeds"), "{refused:?}");
    }
    let shown = place.vhostd(&["show", "up"]).ok().out;
    assert!(shown.contains("being unplugged, will be tried again: cannot remove vhd-up"), "{shown}");
    let plug = place.vhostd(&["plug", "up", "--to", "bridge:br1"]);
    assert_eq!(plug.code, 7, "the old one is in the way: {plug:?}");
    daemon.kill();
    let daemon = place.serve_in(holder.id());
    assert_eq!(place.http("GET", "/v1/plugs", "").json(), json!([]));
    assert_eq!((daemon.link("vhd-up"), daemon.link("br0")), (Value::Null, Value::Null));
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn socket_and_tap_are_joined_in_a_network_of_their_own() {
    let place = Place::default();
    let daemon = place.serve();
    let socket = place.path("vm1.sock").display().to_string();
    place.vhostd(&["plug", "vm1", "--listen", &socket, "--to", "tap:tap1", "--queues", "2"]).ok();
    let stats = place.vhostd(&["stats", "vm1", "-o", "json"]).ok().json();
    let ports: Vec<_> =
        stats.as_array().unwrap().iter().map(|s| (&s["port"], &s["network"], &s["kind"])).collect();
    let network = json!("plug:vm1");
    let (tap, vm) = ((json!("vm1:tap"), json!("tap")), (json!("vm1"), json!("vhost_user")));
    assert_eq!(ports, [(&tap.0, &network, &tap.1), (&vm.0, &network, &vm.1)]);
    assert_eq!(daemon.link("tap1")["linkinfo"]["info_data"]["multi_queue"], json!(true));
    place.vhostd(&["unplug", "vm1"]).ok();
    assert_eq!(daemon.link("tap1"), Value::Null);
    assert!(!place.path("vm1.sock").exists());
}

#[test]
fn an_administrators_interfaces_are_used_and_stay() {
    let place = Place::default();
    let daemon = place.serve();
    daemon.inside(&["ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"]);
    daemon.inside(&["ip", "link", "add", "br0", "type", "bridge"]);
    place.vhostd(&["plug", "a", "--to", "tap:tap0"]).ok();
    place.vhostd(&["plug", "b", "--to", "bridge:br0", "--network", "b"]).ok();
    place.vhostd(&["unplug", "a"]).ok();
    place.vhostd(&["unplug", "b"]).ok();
    assert_ne!(daemon.link("tap0"), Value::Null);
    assert_ne!(daemon.link("br0"), Value::Null);
    assert_eq!(daemon.link("vhd-b"), Value::Null);
}

#[test]
fn a_failed_step_undoes_the_ones_before_it() {
    let place = Place::default();
    let daemon = place.serve();
    daemon.inside(&["ip", "tuntap", "add", "foreign", "mode", "tap"]);
    // The bridge is none: the TAP is made first and must go again.
    let answer = uplink(&place, "up", &json!({"kind": "bridge", "bridge": "foreign"}));
    assert_eq!(answer.status, 409, "{answer:?}");
    assert_eq!(daemon.link("vhd-up"), Value::Null);
    assert_eq!(place.http("GET", "/v1/plugs/up", "").status, 404);

    // The socket is the last step: TAP and bridge must go again.
    let nowhere = place.path("no/dir/x.sock");
    let spec = json!({"spec": {"socket": {"role": "listen", "path": nowhere}, "to": {"kind": "bridge", "bridge": "br9"}}});
    let answer = place.http("PUT", "/v1/plugs/vm", &spec.to_string());
    assert_eq!(answer.status, 424, "{answer:?}");
    assert_eq!((daemon.link("vhd-vm"), daemon.link("br9")), (Value::Null, Value::Null));
    assert_eq!(place.http("GET", "/v1/plugs", "").json(), json!([]));
    assert_eq!(place.http("GET", "/v1/stats", "").json(), json!([]));
    // Nothing is in the way of the same name.
    assert_eq!(uplink(&place, "up", &json!({"kind": "tap", "tap": "foreign2"})).status, 201);
}

#[test]
fn a_name_that_another_plugs_tap_has_is_refused() {
    let place = Place::default();
    let _daemon = place.serve();
    assert_eq!(uplink(&place, "a", &json!({"kind": "tap", "tap": "vhd-b"})).status, 201);
    let spec = json!({"spec": {"network": "n", "to": {"kind": "bridge", "bridge": "br0"}}}).to_string();
    let answer = place.http("PUT", "/v1/plugs/b", &spec);
    assert_eq!((answer.status, answer.json()["field"].as_str()), (409, Some("spec.to.tap")));
}

#[test]
fn os_vif_profiles_make_taps() {
    let place = Place::default();
    let daemon = place.serve();
    let object = |class: &str, data: Value| {
        let version = if class == "VIFVHostUser" { "1.1" } else { "1.0" };
        json!({"versioned_object.name": class, "versioned_object.namespace": "os_vif",
            "versioned_object.version": version, "versioned_object.data": data})
    };
    let vif = |id: &str, profile: Value| {
        let path = place.path(&format!("{id}.sock"));
        object(
            "VIFVHostUser",
            json!({"id": id, "vif_name": format!("tap{id}"), "mode": "client", "path": path, "port_profile": profile,
            "network": object("Network", json!({"id": "n"}))}),
        )
    };
    let bridge = vif("one", object("VIFPortProfileFPBridge", json!({"bridge_name": "brq1"})));
    place.vhostd_with_input(&["plug", "-f", "-"], &json!({ "vif": bridge }).to_string()).ok();
    assert_eq!(daemon.link("tapone")["master"], "brq1");
    let tap = vif("two", object("VIFPortProfileFPTap", json!({})));
    place.vhostd_with_input(&["plug", "-f", "-"], &tap.to_string()).ok();
    assert_eq!(daemon.link("taptwo")["linkinfo"]["info_kind"], "tun");
    for vif in [bridge, tap] {
        place.vhostd_with_input(&["unplug", "-f", "-", "--must-exist"], &vif.to_string()).ok();
    }
    for name in ["tapone", "taptwo", "brq1"] {
        assert_eq!(daemon.link(name), Value::Null, "{name}");
    }
}

#[test]
fn a_macvtap_is_joined_with_a_guest_or_is_its_card() {
    let place = Place::default();
    let daemon = place.serve();
    // Macvtaps' devices are named by interface numbers in one directory for all namespaces.
    daemon.inside(&["ip", "link", "add", "eth1", "index", "3001", "type", "veth", "peer", "name", "out1"]);
    let socket = place.path("vm1.sock").display().to_string();
    let mac = "52:54:00:00:00:11";
    place.vhostd(&["plug", "vm1", "--listen", &socket, "--to", "macvtap:eth1", "--mac", mac]).ok();
    let link = daemon.link("vhd-vm1");
    assert_eq!((&link["link"], &link["address"]), (&json!("eth1"), &json!(mac)));
    assert_eq!(link["linkinfo"]["info_data"]["mode"], json!("bridge"));
    let ports = place.vhostd(&["stats", "vm1", "-o", "json"]).ok().json();
    assert_eq!(ports.as_array().unwrap().len(), 2);

    let card = json!({"kind": "macvtap", "device": "eth1", "tap": "mvt2", "guest": true});
    let asked = json!({"spec": {"to": card, "mac": "52:54:00:00:00:12"}}).to_string();
    let made = place.http("PUT", "/v1/plugs/vm2?wait=forwarding", &asked);
    assert_eq!((made.status, &made.json()["status"]["phase"]), (201, &json!("forwarding")));
    assert_eq!(daemon.link("mvt2")["address"], json!("52:54:00:00:00:12"));
    assert_eq!(place.http("PUT", "/v1/plugs/vm2", &asked).status, 200);

    let taken = json!({"spec": {"to": {"kind": "macvtap", "device": "eth1", "mode": "passthrough"}}});
    let taken = place.http("PUT", "/v1/plugs/vm3", &taken.to_string());
    assert_eq!(taken.status, 409, "{}", taken.json());
    assert!(taken.json()["detail"].as_str().unwrap().contains("passthrough"));
    let uplink = place.vhostd(&["plug", "vm4", "--to", "macvtap:eth1"]);
    assert!(uplink.code == 2 && uplink.err.contains("macvtap:eth1:passthrough"), "{uplink:?}");
    let missing = place.vhostd(&["plug", "vm4", "--to", "macvtap:eth9:passthrough"]);
    assert!(missing.code == 7 && missing.err.contains("there is no interface eth9"), "{missing:?}");
    for id in ["vm1", "vm2", "vm3", "vm4"] {
        place.vhostd(&["unplug", id]).ok();
    }
    assert_eq!((daemon.link("vhd-vm1"), daemon.link("mvt2")), (Value::Null, Value::Null));
    assert_ne!(daemon.link("eth1"), Value::Null);
}

#[test]
fn a_dry_run_says_the_steps_and_what_is_there() {
    let place = Place::default();
    let daemon = place.serve();
    daemon.inside(&["ip", "link", "add", "br0", "type", "bridge"]);
    let socket = place.path("vm1.sock").display().to_string();
    let dry = |to: &str| place.vhostd(&["plug", "vm1", "--listen", &socket, "--to", to, "--dry-run"]);
    let expected = "vm1 pending: dry run: not plugged
  1. record plug vm1, so that a restart brings it back
  2. make vhd-vm1, a TAP: MTU 1500, queues 1
  3. use br0, a Linux bridge that is there
  4. put vhd-vm1 into br0
  5. forward between vhd-vm1 and a network of its own
  6. make socket DIR/vm1.sock, on which the guest's front end joins a network of its own
";
    assert_eq!(dry("bridge:br0").ok().out, expected);
    assert!(dry("macvtap:br0").ok().out.contains("2. make vhd-vm1, a macvtap: on br0, mode bridge\n"));
    let refused = dry("tap:br0");
    assert!(
        refused.code == 4 && refused.err.contains("br0 exists and is a bridge, not a TAP"),
        "{refused:?}"
    );
    assert_eq!(daemon.link("vhd-vm1"), Value::Null);
    assert_eq!(place.http("GET", "/v1/plugs", "").json(), json!([]));
}
