//! Frames through a plug: phases up to forwarding, counters, learned addresses, and what a wait waits for.

mod support;

use std::time::{Duration, Instant};

use dataplane::light::{LightConfig, LightGuest};
use serde_json::{Value, json};
use support::Place;
use vring::HEADER_LEN;

/// An Ethernet frame of 60 bytes.
fn frame(destination: u8, source: u8) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, destination, 0x52, 0x54, 0, 0, 0, source, 0x88, 0xb5];
    frame.resize(60, 0xa5);
    frame
}

fn send_until_received(from: &mut LightGuest, to: &mut LightGuest, frame: &[u8]) -> Vec<u8> {
    let (mut bytes, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
    assert!(from.send(0, &[0; HEADER_LEN], frame));
    while !to.receive(0, &mut bytes) {
        assert!(Instant::now() < deadline, "the frame did not arrive");
        std::thread::yield_now();
    }
    bytes.split_off(HEADER_LEN)
}

#[test]
fn two_guests_talk_and_it_is_counted() {
    let place = Place::default();
    let _daemon = place.serve();
    for name in ["a", "b"] {
        let socket = place.path(name).display().to_string();
        place.vhostd(&["plug", name, "--listen", &socket]).ok();
    }
    let [mut a, mut b] =
        ["a", "b"].map(|name| LightGuest::connect(place.path(name), &LightConfig::default()).unwrap());
    a.offer_all();
    b.offer_all();
    for name in ["a", "b"] {
        let socket = place.path(name).display().to_string();
        let waited = place.vhostd(&["plug", name, "--listen", &socket, "--wait", "forwarding"]).ok();
        assert_eq!(waited.out, format!("{name} forwarding\n"));
    }
    assert_eq!(send_until_received(&mut a, &mut b, &frame(2, 1)), frame(2, 1));
    assert_eq!(send_until_received(&mut b, &mut a, &frame(1, 2)), frame(1, 2));

    let stats = |name: &str| place.vhostd(&["stats", name, "-o", "json"]).ok().json()[0].clone();
    let counted =
        |s: &Value| [&s["rx_frames"], &s["rx_bytes"], &s["tx_frames"], &s["tx_bytes"]].map(|n| n.as_u64());
    place.until("the counters are up to date", || {
        counted(&stats("a")) == [Some(1), Some(60), Some(1), Some(60)]
    });
    assert_eq!(stats("a")["rings"].as_array().unwrap().len(), 2);
    let fdb = place.vhostd(&["fdb", "-o", "json"]).ok().json();
    let learned: Vec<_> = fdb.as_array().unwrap().iter().map(|row| (&row["mac"], &row["port"])).collect();
    let (mac_a, mac_b) = (json!("52:54:00:00:00:01"), json!("52:54:00:00:00:02"));
    assert_eq!(learned.len(), 2);
    assert!(
        learned.contains(&(&mac_a, &json!("a"))) && learned.contains(&(&mac_b, &json!("b"))),
        "{learned:?}"
    );

    drop(b);
    place.until("b's front end is gone", || place.phase("b") == "attached");
    assert!(a.send(0, &[0; HEADER_LEN], &frame(2, 1)));
    place.until("the drop is told", || {
        let drops = place.vhostd(&["drops", "-o", "json"]).ok().json();
        drops.as_array().unwrap().iter().any(|d| d["reason"] == "guest_rx_ring_disabled" && d["port"] == "b")
    });
}

#[test]
fn a_guest_with_addresses_is_nobody_else() {
    let place = Place::default();
    let _daemon = place.serve();
    let sockets = ["a", "b"].map(|name| place.path(name).display().to_string());
    let own = ["--mac", "52:54:00:00:00:01", "--address", "192.0.2.7,2001:db8::/64"];
    place.vhostd(&[&["plug", "a", "--listen", &sockets[0]][..], &own].concat()).ok();
    place.vhostd(&["plug", "b", "--listen", &sockets[1]]).ok();
    let [mut a, mut b] =
        ["a", "b"].map(|name| LightGuest::connect(place.path(name), &LightConfig::default()).unwrap());
    b.offer_all();
    place.until("both forward", || ["a", "b"].iter().all(|name| place.phase(name) == "forwarding"));
    let datagram = |source: u8, last: u8| {
        let mut frame = frame(2, source);
        frame[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0]);
        frame[26..30].copy_from_slice(&[192, 0, 2, last]);
        frame
    };
    for spoofed in [datagram(3, 7), datagram(1, 8)] {
        assert!(a.send(0, &[0; HEADER_LEN], &spoofed));
    }
    assert_eq!(
        send_until_received(&mut a, &mut b, &datagram(1, 7)),
        datagram(1, 7),
        "the others came before it"
    );
    place.until("the drops are told", || {
        let drops = place.vhostd(&["drops", "-o", "json"]).ok().json();
        let told = |reason: &str| {
            drops
                .as_array()
                .unwrap()
                .iter()
                .any(|d| d["reason"] == reason && d["port"] == "a" && d["who"] == "policy")
        };
        told("spoofed_mac") && told("spoofed_address")
    });
}

#[test]
fn a_wait_ends_when_the_front_end_comes() {
    let place = Place::default();
    let _daemon = place.serve();
    let socket = place.path("a.sock");
    let body = json!({"spec": {"socket": {"role": "listen", "path": socket}}}).to_string();
    place.http("PUT", "/v1/plugs/a", &body);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| place.http("PUT", "/v1/plugs/a?wait=forwarding&timeout=20s", &body));
        let _guest = LightGuest::connect(&socket, &LightConfig::default()).unwrap();
        let answer = waiter.join().unwrap();
        assert_eq!((answer.status, &answer.json()["status"]["phase"]), (200, &json!("forwarding")));
    });
    place.until("the guest is gone", || place.phase("a") == "attached");
    let events = place.http("GET", "/v1/plugs/a", "").json();
    assert_eq!(events["status"]["conditions"][0]["whose"], "front_end");
}

#[test]
fn a_front_end_that_listens_is_found() {
    let place = Place::default();
    let _daemon = place.serve();
    let socket = place.path("vm.sock");
    place.vhostd(&["plug", "vm", "--connect", socket.to_str().unwrap()]).ok();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let guest = LightGuest::accept(&listener, &LightConfig::default()).unwrap();
    place.until("it forwards", || place.phase("vm") == "forwarding");
    drop((guest, listener));
    place.until("it dials again", || place.vhostd(&["show", "vm"]).out.contains("dialling"));
}
