//! A guest of which a switch is told by 802.1Qbg, with a real lldpad; the test plays the switch.
//!
//! ```text
//! vhostd ── netlink ── lldpad ── eth1 ══ a cable ══ eth2 ── switch
//! ```
//!
//! lldpad can be a switch, too, but not one that answers an association.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::env;
use std::fs;
use std::io::{BufRead, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::netns::Netns;
use e2e::process::Process;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, socket,
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
const UUID: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";

/// EVB with everything that VDP needs, for the agent that speaks with the nearest customer bridge.
const CONFIGURATION: &str = "nearest_customer_bridge: { eth1: { adminStatus = 3; vdp: { enableTx = true; };
    tlvid001b3f00: { enableTx = true; fmode = \"reflectiverelay\"; capabilities = \"rte,ecp,vdp\"; }; }; };\n";

/// Requests of VDP; the last is our own, to remember that the switch has let go.
const ASSOCIATE: u8 = 2;
const DISASSOCIATE: u8 = 3;
const LET_GO: u8 = 0xff;

#[test]
fn a_switch_is_told_of_the_guest_and_again_when_it_lets_go_of_it() -> Result<()> {
    let (netns, dir) = (Arc::new(Netns::new()?), tempfile::tempdir()?);
    netns.run(
        "for n in $(seq 100); do ip link add f$n type bridge; done; ip link add eth1 type veth peer name eth2; \
         ip link set eth1 up; ip link set eth2 up",
    )?;
    let mut switch = start_switch(&netns, dir.path())?;
    let _lldpad = start_lldpad(&netns, dir.path())?;
    let pid_file = format!("[devices]\nlldpad = {:?}\n", dir.path().join("lldpad.pid"));
    let daemon = Daemon::start_on(netns.clone(), &pid_file)?;
    let mut events = daemon.events()?;

    answer_with(&mut switch, dir.path(), "3")?;
    let refused = plug(&daemon)?;
    ensure!(refused.contains("does not know that VSI type"), "{refused}");
    ensure!(netns.run("ip -oneline link show type macvtap")?.is_empty(), "nothing is left");
    answer_with(&mut switch, dir.path(), "0")?;
    fs::write(dir.path().join("requests"), "")?;

    ensure!(plug(&daemon)?.is_empty());
    daemon.wait_for_forwarding(&["vm1"])?;
    switch.stdin().write_all(b"let go\n")?;
    events.wait_for("repaired", "the switch at eth1 has let go of the guest")?;
    daemon.wait_for_forwarding(&["vm1"])?;
    daemon.run(&["unplug", "vm1"])?;
    wait_for_some("the switch to be told of the end", SOON, || {
        let mut requests = fs::read(dir.path().join("requests"))?;
        // lldpad says again what is not answered at once.
        requests.dedup();
        Ok((requests == [ASSOCIATE, LET_GO, ASSOCIATE, DISASSOCIATE]).then_some(()))
    })
}

/// What was wrong with it. lldpad takes no request before it has found that the switch speaks VDP.
fn plug(daemon: &Daemon) -> Result<String> {
    let profile = json!({"protocol": "802.1Qbg", "instance_id": UUID, "manager_id": 1, "type_id": 2,
                         "type_id_version": 3});
    let to = json!({"kind": "macvtap", "device": "eth1", "mode": "vepa", "guest": true, "profile": profile});
    let path = daemon.socket("document.json");
    fs::write(&path, json!({"id": "vm1", "spec": {"to": to}}).to_string())?;
    wait_for_some("lldpad and the switch to find each other", SOON, || {
        let output = daemon.command(&["plug", "-f", path.to_str().context("a path")?])?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((!errors.contains("refuses to associate")).then_some(errors))
    })
}

/// Its state, in shared memory, and its pid file are one for the machine.
fn start_lldpad(netns: &Netns, dir: &Path) -> Result<Process> {
    fs::write(dir.join("lldpad.conf"), CONFIGURATION)?;
    let mut command = netns.command("unshare");
    command.args(["--mount", "sh", "-e", "-c"]);
    command.arg("mount -t tmpfs shm /dev/shm; exec lldpad -p -f \"$1/lldpad.conf\"").arg("sh").arg(dir);
    let mut process = Process::spawn("lldpad", &command)?;
    fs::write(dir.join("lldpad.pid"), process.pid().to_string())?;
    wait_for_some("lldpad (installed by tests/setup.sh lldpad)", SOON, || {
        process.check_running()?;
        let ports = netns.run("cat /proc/net/netlink")?;
        Ok(ports
            .lines()
            .any(|line| line.split_whitespace().nth(2) == Some(&process.pid().to_string()))
            .then_some(()))
    })?;
    Ok(process)
}

/// Set in the process that plays the switch: a directory for what it is asked.
const SWITCH: &str = "E2E_SWITCH";

fn start_switch(netns: &Netns, dir: &Path) -> Result<Process> {
    let mut command = netns.command(env::current_exe()?);
    command.args(["--exact", "switch", "--nocapture"]).env(SWITCH, dir);
    let process = Process::spawn("switch", &command)?;
    wait_for_some("the switch", SOON, || Ok(dir.join("requests").exists().then_some(())))?;
    Ok(process)
}

/// Has the switch answer requests so from now on.
fn answer_with(switch: &mut Process, dir: &Path, response: &str) -> Result<()> {
    switch.stdin().write_all(format!("{response}\n").as_bytes())?;
    let known = || fs::read_to_string(dir.join("answer")).unwrap_or_default();
    wait_for_some("the switch to know", SOON, || Ok((known() == response).then_some(())))
}

/// Not a test but the process beside one.
#[test]
fn switch() -> Result<()> {
    let Some(dir) = env::var_os(SWITCH).map(PathBuf::from) else { return Ok(()) };
    let wire = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), SockProtocol::EthAll)?;
    let own = fs::read_to_string("/sys/class/net/eth2/ifindex")?.trim().parse::<usize>()?;
    let switch = Arc::new(Mutex::new(Switch { wire, dir, answer: 0, sequence: 0, last: None }));
    let told = switch.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            told.lock().unwrap().be_told(&line.unwrap()).unwrap();
        }
    });
    switch.lock().unwrap().note(&[])?;
    let wire = switch.lock().unwrap().wire.try_clone()?;
    let mut buffer = [0; 2048];
    loop {
        let (len, from) = recvfrom::<LinkAddr>(wire.as_raw_fd(), &mut buffer)?;
        let from = from.context("a sender")?;
        // All interfaces' frames come here, and those that leave.
        if from.ifindex() == own && buffer[6..12] != MAC {
            switch.lock().unwrap().receive(&buffer[..len], from)?;
        }
    }
}

/// As draft 0.2 of IEEE 802.1Qbg has EVB, ECP and VDP: that is what lldpad speaks for port profiles.
struct Switch {
    wire: OwnedFd,
    dir: PathBuf,
    /// Response to requests of VDP.
    answer: u8,
    sequence: u16,
    /// TLV of the last request, and where it came from.
    last: Option<(Vec<u8>, LinkAddr)>,
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
const NEAREST_CUSTOMER_BRIDGE: [u8; 6] = [1, 0x80, 0xc2, 0, 0, 0];
const NEAREST_BRIDGE: [u8; 6] = [1, 0x80, 0xc2, 0, 0, 0xe];
const LLDP: [u8; 2] = [0x88, 0xcc];
const ECP: [u8; 2] = [0x88, 0xb7];
/// OUI and subtype of ECP; the operation and a sequence number follow.
const ECP_HEADER: [u8; 6] = [0, 0x1b, 0x3f, 0, 0, 0];
const REQUEST: u8 = 0;
const ACKNOWLEDGEMENT: u8 = 1;
/// In a TLV of VDP, behind its header.
const MODE: usize = 2 + 4;
const RESPONSE: usize = MODE + 1;

impl Switch {
    fn be_told(&mut self, line: &str) -> Result<()> {
        if let Ok(answer) = line.parse() {
            self.answer = answer;
            return Ok(fs::write(self.dir.join("answer"), line)?);
        }
        let (mut tlv, to) = self.last.clone().context("nobody to let go of")?;
        tlv[MODE] = DISASSOCIATE;
        self.note(&[LET_GO])?;
        self.sequence += 1;
        let sequence = self.sequence.to_be_bytes();
        self.send(&to, NEAREST_BRIDGE, ECP, &[&ECP_HEADER[..], &[REQUEST], &sequence, &tlv])
    }

    fn receive(&mut self, frame: &[u8], from: LinkAddr) -> Result<()> {
        match frame.get(12..14).and_then(|kind| kind.try_into().ok()) {
            Some(LLDP) => self.advertise(&from),
            Some(ECP) if frame.get(20) == Some(&REQUEST) => self.answer(&frame[21..], from),
            _ => Ok(()),
        }
    }

    /// Says that it has VDP, with reflective relay.
    fn advertise(&self, to: &LinkAddr) -> Result<()> {
        let id = |kind: u8, sub: u8| [&[kind << 1, 7, sub][..], &MAC].concat();
        let evb = [0, 0x1b, 0x3f, 0, 0x40, 7, 0x40, 7, 0, 100, 0, 0, 15];
        let parts = [&id(1, 4)[..], &id(2, 3), &[3 << 1, 2, 0, 120], &[127 << 1, 13], &evb];
        self.send(to, NEAREST_CUSTOMER_BRIDGE, LLDP, &parts)
    }

    /// Acknowledges a request: a sequence number and TLVs, of which an empty one is the last. Answers the first, if there is one.
    fn answer(&mut self, request: &[u8], from: LinkAddr) -> Result<()> {
        let (sequence, tlvs) = request.split_at(2);
        self.send(&from, NEAREST_BRIDGE, ECP, &[&ECP_HEADER[..], &[ACKNOWLEDGEMENT], sequence])?;
        let len = 2 + usize::from(tlvs[0] & 1) * 256 + usize::from(tlvs[1]);
        if len == 2 {
            return Ok(());
        }
        let mut tlv = tlvs[..len].to_vec();
        self.note(&[tlv[MODE]])?;
        tlv[RESPONSE] = self.answer;
        self.last = Some((tlv.clone(), from));
        self.send(&from, NEAREST_BRIDGE, ECP, &[&ECP_HEADER[..], &[REQUEST], sequence, &tlv])
    }

    fn send(&self, to: &LinkAddr, group: [u8; 6], kind: [u8; 2], parts: &[&[u8]]) -> Result<()> {
        let mut frame = [&group[..], &MAC, &kind, &parts.concat(), &[0; 2]].concat();
        frame.resize(frame.len().max(60), 0);
        sendto(self.wire.as_raw_fd(), &frame, to, MsgFlags::empty())?;
        Ok(())
    }

    fn note(&self, requests: &[u8]) -> Result<()> {
        let path = self.dir.join("requests");
        Ok(fs::OpenOptions::new().create(true).append(true).open(path)?.write_all(requests)?)
    }
}
