//! Guests on macvtaps: what they send leaves through an interface of the host, without a bridge.
//!
//! ```text
//! vm1 ── vhostd ── macvtap on eth1 ══ a cable ══ eth2 under a macvtap ── vhostd ── vm2
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::{self, GUESTS, PLAIN};
use e2e::peer::{Peer, PeerConfig};

const SOON: Duration = Duration::from_secs(30);
const PLUGS: [(&str, &str); 2] = [("vm1", "eth1"), ("vm2", "eth2")];

/// Two plugs, each on its end of the cable. Macvtaps' devices are named by interface numbers in one directory for all
/// namespaces of the machine, so that tests that run side by side need numbers of their own: those behind `others`.
fn start(others: u32) -> Result<Daemon> {
    let daemon = Daemon::start()?;
    daemon.host().run(&format!(
        "for n in $(seq {others}); do ip link add f$n type bridge; done; ip link add eth1 type veth peer name eth2"
    ))?;
    for ((name, device), address) in PLUGS.into_iter().zip(GUESTS) {
        let (socket, to) = (daemon.socket(name).display().to_string(), format!("macvtap:{device}"));
        let mac = address.map(|byte| format!("{byte:02x}")).join(":");
        daemon.run(&["plug", name, "--listen", &socket, "--to", &to, "--mac", &mac])?;
    }
    Ok(daemon)
}

fn guest(daemon: &Daemon, name: &str) -> Result<Peer> {
    // A daemon that has come back answers before it has all its sockets again.
    let path = daemon.socket(name);
    let mut guest =
        wait_for_some("the port's socket", SOON, || Ok(Peer::connect(&path, PeerConfig::default()).ok()))?;
    guest.offer_all();
    daemon.wait_for_forwarding(&[name])?;
    Ok(guest)
}

/// What the two send to each other arrives.
fn exchange(daemon: &Daemon) -> Result<()> {
    exchange::exchange(&mut guest(daemon, "vm1")?, &mut guest(daemon, "vm2")?)
}

#[test]
fn frames_leave_through_the_device_also_after_a_kill() -> Result<()> {
    let mut daemon = start(20)?;
    exchange(&daemon)?;
    let links = daemon.host().run("ip -oneline link show type macvtap | cut -d: -f1,2")?;
    assert_eq!(links.lines().count(), 2);
    daemon.kill_and_restart()?;
    exchange(&daemon)?;
    assert_eq!(daemon.host().run("ip -oneline link show type macvtap | cut -d: -f1,2")?, links, "the same");
    for (name, _) in PLUGS {
        daemon.run(&["unplug", name])?;
    }
    assert_eq!(daemon.host().run("ip -oneline link show type macvtap")?, "");
    Ok(())
}

#[test]
fn a_device_that_goes_is_said_and_its_neighbour_stays() -> Result<()> {
    let daemon = start(40)?;
    exchange(&daemon)?;
    daemon.host().run("ip link add eth3 type veth peer name eth4")?;
    let (socket, to) = (daemon.socket("vm3").display().to_string(), "macvtap:eth3");
    daemon.run(&["plug", "vm3", "--listen", &socket, "--to", to])?;
    daemon.host().run("ip link del eth3")?;
    let mut third = guest(&daemon, "vm3")?;
    ensure!(third.send_now(0, &PLAIN, &[2; 60]), "buffers come back");
    wait_for_some("the frame to be counted as dropped", SOON, || {
        let drops = daemon.run(&["drops"])?;
        Ok(drops.contains("vm3").then_some(()))
    })?;
    exchange(&daemon)?;
    daemon.run(&["unplug", "vm3"])?;
    Ok(())
}
