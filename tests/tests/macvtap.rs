//! Guests on macvtaps: what they send leaves through an interface of the host, without a bridge.
//!
//! ```text
//! vm1 ── vhostd ── macvtap on eth1 ══ a cable ══ eth2 under a macvtap ── vhostd ── vm2
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::env;
use std::fs;
use std::io::{BufRead, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::{self, GUESTS, PLAIN};
use e2e::kill::killed_at_every_step;
use e2e::netns::Netns;
use e2e::peer::{Peer, PeerConfig};
use e2e::process::Process;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, sendto, socket,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const PLUGS: [(&str, &str); 2] = [("vm1", "eth1"), ("vm2", "eth2")];

/// A cable. Macvtaps' devices are named by interface numbers in one directory for all namespaces of the machine, so that tests
/// that run side by side need numbers of their own: those behind `others`.
fn cable(host: &Netns, others: u32) -> Result<()> {
    host.run(&format!(
        "for n in $(seq {others}); do echo link add f$n type bridge; done | ip -batch -
         ip link add eth1 type veth peer name eth2; ip link set eth1 up; ip link set eth2 up"
    ))?;
    Ok(())
}

/// Two plugs, each on its end of the cable.
fn start(others: u32) -> Result<Daemon> {
    let daemon = Daemon::start()?;
    cable(daemon.host(), others)?;
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
    let mut third = guest(&daemon, "vm3")?;
    let mut events = daemon.events()?;
    daemon.host().run("ip link del eth3")?;
    events.wait_for("failed", "there is no interface eth3")?;
    ensure!(third.send_now(0, &PLAIN, &[2; 60]), "buffers come back");
    wait_for_some("the frame to be counted as dropped", SOON, || {
        let drops = daemon.run(&["drops"])?;
        Ok(drops.contains("vm3").then_some(()))
    })?;
    exchange(&daemon)?;
    daemon.run(&["unplug", "vm3"])?;
    Ok(())
}

#[test]
fn a_device_with_a_smaller_mtu_is_named_until_it_has_the_plugs() -> Result<()> {
    let daemon = start(80)?;
    let guests = [guest(&daemon, "vm1")?, guest(&daemon, "vm2")?];
    let mut events = daemon.events()?;
    daemon.host().run("ip link set eth1 mtu 1400")?;
    events
        .wait_for("failed", "macvtap vhd-vm1 cannot have an MTU of 1500: eth1 has 1400, raise that first")?;
    let conditions = daemon.json(&["show", "vm1"])?["status"]["conditions"].to_string();
    ensure!(conditions.contains("vhd-vm1 has MTU 1400, the plug 1500"), "{conditions}");
    daemon.host().run("ip link set eth1 mtu 1500")?;
    events.wait_for("repaired", "vhd-vm1 has MTU 1400, the plug 1500")?;
    daemon.wait_for_forwarding(&["vm1", "vm2"])?;
    drop(guests);
    exchange(&daemon)
}

#[test]
fn a_daemon_killed_at_every_step_leaves_a_macvtap_whole_or_not_at_all() -> Result<()> {
    let mut daemon = Daemon::start()?;
    let host = daemon.netns();
    cable(&host, 200)?;
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    let to = json!({"kind": "macvtap", "device": "eth1", "mode": "passthrough"});
    let spec = json!({"socket": socket, "to": to, "mac": "52:54:00:00:00:01"});
    killed_at_every_step(&mut daemon, &spec, || {
        Ok(format!("{}\n{}", host.state()?, host.run("cat /sys/class/net/eth1/address")?))
    })
}

/// Set in the process that plays lldpad: a directory for its pid file, and for what it is asked.
const LLDPAD: &str = "E2E_LLDPAD";
/// A number that no process has.
const LLDPAD_PORT: u32 = 1 << 23;
const UUID: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";
/// Values of IFLA_PORT_REQUEST (linux/if_link.h).
const ASSOCIATE: u8 = 2;
const DISASSOCIATE: u8 = 3;

/// Not a test but the process beside one.
#[test]
fn lldpad() -> Result<()> {
    let Some(dir) = env::var_os(LLDPAD).map(PathBuf::from) else { return Ok(()) };
    let own = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), SockProtocol::NetlinkRoute)?;
    bind(own.as_raw_fd(), &NetlinkAddr::new(LLDPAD_PORT, 0))?;
    let mut requests = fs::File::create(dir.join("requests"))?;
    let last = Arc::new(Mutex::new(Vec::new()));
    let (ends, told) = (own.as_raw_fd(), last.clone());
    thread::spawn(move || {
        for _line in std::io::stdin().lock().lines() {
            let_go(ends, told.lock().unwrap().clone()).unwrap();
        }
    });
    fs::write(dir.join("lldpad.pid"), format!("{LLDPAD_PORT}\n"))?;
    let mut buffer = [0; 4096];
    loop {
        let (len, from) = recvfrom::<NetlinkAddr>(own.as_raw_fd(), &mut buffer)?;
        let message = &buffer[..len];
        // RTM_SETLINK; the request is its last attribute.
        let answer = if message[4] == 19 {
            requests.write_all(&message[len - 4..len - 3])?;
            *last.lock().unwrap() = message.to_vec();
            netlink(2, &[&[0; 4], &message[..16]].concat())
        } else {
            netlink(3, &[&message[16..32], &attribute(24, &attribute(1, &response()))[..]].concat())
        };
        sendto(own.as_raw_fd(), &answer, &from.context("a sender")?, MsgFlags::empty())?;
    }
}

/// Tells whoever made a request that the switch has taken it back: at the port that stands in the message's header.
fn let_go(own: RawFd, mut message: Vec<u8>) -> Result<()> {
    let request = message.len() - 4;
    message[request] = DISASSOCIATE;
    let told_at = u32::from_ne_bytes(message[12..16].try_into()?);
    sendto(own, &message, &NetlinkAddr::new(told_at, 0), MsgFlags::empty())?;
    Ok(())
}

/// IFLA_PORT_INSTANCE_UUID, and IFLA_PORT_RESPONSE: success.
fn response() -> Vec<u8> {
    let uuid: Vec<u8> = (1..=16).collect();
    [attribute(4, &uuid), attribute(7, &[0; 2])].concat()
}

fn netlink(kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + payload.len()).unwrap();
    [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], payload].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap();
    let pad = vec![0; value.len().next_multiple_of(4) - value.len()];
    [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value, &pad].concat()
}

fn start_lldpad(netns: &Netns, dir: &Path) -> Result<Process> {
    let mut command = netns.command(env::current_exe()?);
    command.args(["--exact", "lldpad", "--nocapture"]).env(LLDPAD, dir);
    let process = Process::spawn("lldpad", &command)?;
    wait_for_some("lldpad", SOON, || Ok(dir.join("lldpad.pid").exists().then_some(())))?;
    Ok(process)
}

/// A macvtap whose guest the switch outside is told of.
fn announced(protocol: &str) -> Value {
    let mut profile = json!({"protocol": protocol, "instance_id": UUID});
    let more = match protocol {
        "802.1Qbg" => json!({"manager_id": 1, "type_id": 2, "type_id_version": 3}),
        _ => json!({"profile_id": "web"}),
    };
    profile.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"to": {"kind": "macvtap", "device": "eth1", "mode": "vepa", "guest": true, "profile": profile}})
}

#[test]
fn a_daemon_killed_at_every_step_leaves_no_guest_that_the_switch_outside_knows_of() -> Result<()> {
    let (netns, dir) = (Arc::new(Netns::new()?), tempfile::tempdir()?);
    let configuration = format!("[devices]\nlldpad = {:?}\n", dir.path().join("lldpad.pid"));
    let mut daemon = Daemon::start_on(netns.clone(), &configuration)?;
    cable(&netns, 400)?;
    let _lldpad = start_lldpad(&netns, dir.path())?;
    killed_at_every_step(&mut daemon, &announced("802.1Qbg"), || {
        let is_known = fs::read(dir.path().join("requests"))?.last() == Some(&ASSOCIATE);
        Ok(format!("{}\n{is_known}", netns.state()?))
    })
}

#[test]
fn a_switch_outside_is_told_of_the_guest_and_forgets_it() -> Result<()> {
    let (netns, dir) = (Arc::new(Netns::new()?), tempfile::tempdir()?);
    let configuration = format!("[devices]\nlldpad = {:?}\n", dir.path().join("lldpad.pid"));
    let mut daemon = Daemon::start_on(netns.clone(), &configuration)?;
    cable(&netns, 60)?;
    let plug = |daemon: &Daemon, protocol: &str| {
        let path = daemon.socket("document.json");
        fs::write(&path, json!({"id": "vm1", "spec": announced(protocol)}).to_string())?;
        daemon.command(&["plug", "-f", path.to_str().context("a path")?])
    };
    let macvtaps = || netns.run("ip -oneline link show type macvtap");
    for (protocol, text) in [("802.1Qbg", "start lldpad"), ("802.1Qbh", "takes hardware")] {
        let refused = plug(&daemon, protocol)?;
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success() && errors.contains(text), "{errors}");
        assert_eq!(macvtaps()?, "", "nothing is left");
    }

    let mut lldpad = start_lldpad(&netns, dir.path())?;
    let made = plug(&daemon, "802.1Qbg")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    daemon.wait_for_forwarding(&["vm1"])?;
    daemon.kill_and_restart()?;
    daemon.wait_for_forwarding(&["vm1"])?;
    let mut events = daemon.events()?;
    lldpad.stdin().write_all(b"let go\n")?;
    events.wait_for("repaired", "the switch at eth1 has let go of the guest")?;
    daemon.wait_for_forwarding(&["vm1"])?;
    daemon.run(&["unplug", "vm1"])?;
    assert_eq!(macvtaps()?, "");
    // Once more after the restart: whoever lldpad is by then may not know of it.
    let requests = [ASSOCIATE, ASSOCIATE, ASSOCIATE, DISASSOCIATE];
    assert_eq!(fs::read(dir.path().join("requests"))?, requests);
    Ok(())
}
