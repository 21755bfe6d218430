//! Guests on macvtaps: what they send leaves through an interface of the host, without a bridge.
//!
//! ```text
//! vm1 ── vhostd ── macvtap on eth1 ══ a cable ══ eth2 under a macvtap ── vhostd ── vm2
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::oracle::{Flow, Oracle};
use e2e::peer::{Peer, PeerConfig};
use vring::HEADER_LEN;

const SOON: Duration = Duration::from_secs(30);
/// For a frame that was not lost.
const AGAIN: Duration = Duration::from_millis(200);
const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
const GUESTS: [(&str, &str, [u8; 6]); 2] =
    [("vm1", "eth1", [2, 0, 0, 0, 0, 0xa]), ("vm2", "eth2", [2, 0, 0, 0, 0, 0xb])];

/// Two plugs, each on its end of the cable. Macvtaps' devices are named by interface numbers in one directory for all
/// namespaces of the machine, so that these are out of the way.
fn start() -> Result<Daemon> {
    let daemon = Daemon::start()?;
    daemon.host().run(
        "for n in $(seq 30); do ip link add f$n type bridge; done; \
         ip link add eth1 type veth peer name eth2",
    )?;
    for (name, device, address) in GUESTS {
        let (socket, to) = (daemon.socket(name).display().to_string(), format!("macvtap:{device}"));
        let mac = address.map(|byte| format!("{byte:02x}")).join(":");
        daemon.run(&["plug", name, "--listen", &socket, "--to", &to, "--mac", &mac])?;
    }
    Ok(daemon)
}

fn guest(daemon: &Daemon, name: &str) -> Result<Peer> {
    let mut guest = Peer::connect(daemon.socket(name), PeerConfig::default())?;
    guest.offer_all();
    daemon.wait_for_forwarding(&[name])?;
    Ok(guest)
}

/// A cable that was just plugged in carries nothing yet: sent again until it comes.
fn pass(from: &mut Peer, to: &mut Peer, frame: &[u8]) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        ensure!(from.send_now(0, &PLAIN, frame), "buffers come back");
        let again = Instant::now() + AGAIN;
        while Instant::now() < again {
            if to.receive(0).is_some_and(|(_, got)| got == frame) {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
    bail!("a frame of {} bytes has not come", frame.len())
}

/// Each guest gets what the other sends, whole.
fn exchange(daemon: &Daemon) -> Result<()> {
    let (mut a, mut b) = (guest(daemon, "vm1")?, guest(daemon, "vm2")?);
    let oracle = Oracle::new(std::process::id());
    let [(.., src), (.., dst)] = GUESTS;
    let (there, back) = (Flow { id: 0, src, dst }, Flow { id: 1, src: dst, dst: src });
    for (sequence, len) in (0..).zip([60, 64, 590, 1514, 60]) {
        pass(&mut a, &mut b, &oracle.frame(&there, sequence, len))?;
        pass(&mut b, &mut a, &oracle.frame(&back, sequence, len))?;
    }
    Ok(())
}

#[test]
fn frames_leave_through_the_device_also_after_a_kill() -> Result<()> {
    let mut daemon = start()?;
    exchange(&daemon)?;
    let links = daemon.host().run("ip -oneline link show type macvtap | cut -d: -f1,2")?;
    assert_eq!(links.lines().count(), 2);
    daemon.kill_and_restart()?;
    exchange(&daemon)?;
    assert_eq!(daemon.host().run("ip -oneline link show type macvtap | cut -d: -f1,2")?, links, "the same");
    for (name, ..) in GUESTS {
        daemon.run(&["unplug", name])?;
    }
    assert_eq!(daemon.host().run("ip -oneline link show type macvtap")?, "");
    Ok(())
}

#[test]
fn a_device_that_goes_is_said_and_its_neighbour_stays() -> Result<()> {
    let daemon = start()?;
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
