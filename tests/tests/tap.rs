//! A TAP that rests: it is watched only while nobody polls it, and no frame falls between.
#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane::{Link, PortSpec};
use e2e::inproc::{Plane, PortPlan};
use e2e::netns::inside;
use e2e::peer::{MERGEABLE, PeerConfig};
use sys::tap::TapQueue;

const ROUNDS: u64 = 60;
const SETUP: &str = "ip link set tap0 up
    ip addr add 10.0.0.1/24 dev tap0
    ip neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev tap0";

#[test]
fn frames_wake_a_tap_that_rests() -> Result<()> {
    if !inside("frames_wake_a_tap_that_rests")? {
        return Ok(());
    }
    let plane = Plane::start()?;
    let link = Link::Tap { queues: vec![TapQueue::create("tap0", false)?], offloads: true };
    plane.dataplane().add_port(PortSpec { name: "tap0".into(), network: "net".into(), mtu: 1500, link })?;
    ensure!(Command::new("sh").args(["-e", "-c", SETUP]).status()?.success());
    plane.add(PortPlan::new("guest", "net"))?;
    let mut guest = plane.guest("guest", PeerConfig { features: MERGEABLE, ..PeerConfig::default() })?;
    let socket = UdpSocket::bind("10.0.0.1:0")?;
    for round in 0..ROUNDS {
        // From well below to well above the time after which it rests, so that frames come at every moment of it.
        std::thread::sleep(Duration::from_micros(round * 5));
        let payload = [&b"round "[..], &round.to_be_bytes()].concat();
        socket.send_to(&payload, "10.0.0.2:9")?;
        // The kernel has something to say for itself now and then.
        while !guest.expect(0)?.1.ends_with(&payload) {}
    }
    drop((guest, socket));
    plane.finish()
}
