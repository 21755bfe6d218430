//! Front-end ports attached to Open vSwitch with DPDK, which takes them for guests (`dpdkvhostuserclient`):
//!
//! ```text
//! guest A ── left ── a ═══ va ── OVS ── vb ═══ b ── right ── guest B
//! ```
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::netns::Netns;
use e2e::oracle::{Flow, Oracle};
use e2e::ovs::{Dpdk, Ovs};
use e2e::peer::{MERGEABLE, Peer, PeerConfig};
use vring::{HEADER_LEN, features};
use wire::Mac;
use wire::craft::{Craft, Tcp, leave_segments};

const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
/// Payload of a TCP segment.
const SEGMENT: u16 = 1448;
/// Frames of 64 KiB in a burst: as many as a ring of 1024 buffers of 2 KiB has room for.
const BURST: u32 = 31;
const TIMEOUT: Duration = Duration::from_secs(30);
const PLUGS: [&str; 4] = ["a", "b", "guest-a", "guest-b"];

/// Two guests that take whatever can be left to them.
struct Guests {
    a: Peer,
    b: Peer,
    /// Of the next frame.
    sequence: u64,
}

impl Guests {
    fn connect(daemon: &Daemon) -> Result<Self> {
        let offloads = 1 << features::CSUM
            | 1 << features::GUEST_CSUM
            | 1 << features::HOST_TSO4
            | 1 << features::GUEST_TSO4;
        let features = MERGEABLE | offloads;
        let config = PeerConfig { features, ring_size: 1024, tx_len: 66_000, ..PeerConfig::default() };
        let connect = |plug: &str| -> Result<Peer> {
            // A daemon that has come back answers before it has all its sockets again.
            let path = daemon.socket(plug);
            let mut peer =
                wait_for_some("the port's socket", TIMEOUT, || Ok(Peer::connect(&path, config).ok()))?;
            peer.offer_all();
            Ok(peer)
        };
        Ok(Self { a: connect("guest-a")?, b: connect("guest-b")?, sequence: 0 })
    }

    /// The two ends of a way.
    fn way(&mut self, flow: &Flow) -> (&mut Peer, &mut Peer) {
        if flow.src == A { (&mut self.a, &mut self.b) } else { (&mut self.b, &mut self.a) }
    }

    fn frame(&mut self, flow: &Flow) -> Vec<u8> {
        self.sequence += 1;
        let len = 60 + usize::try_from(self.sequence * 97 % 1400).unwrap();
        Oracle::new(0).frame(flow, self.sequence, len)
    }

    /// Sends until frames arrive, and takes all of them away. A frame's flow keeps its order.
    fn reach(&mut self, flow: &Flow) -> Result<()> {
        let mut last = Vec::new();
        wait_for_some("a frame through Open vSwitch", TIMEOUT, || {
            last = self.frame(flow);
            let (from, to) = self.way(flow);
            ensure!(from.send_now(0, &PLAIN, &last), "buffers come back");
            Ok(to.receive(0).map(drop))
        })?;
        last = self.frame(flow);
        let (from, to) = self.way(flow);
        ensure!(from.send_now(0, &PLAIN, &last), "buffers come back");
        while to.expect(0)?.1 != last {}
        Ok(())
    }

    /// From then on none may be lost.
    fn talk(&mut self) -> Result<()> {
        let flows = [Flow { id: 0, src: A, dst: B }, Flow { id: 1, src: B, dst: A }];
        flows.iter().try_for_each(|flow| self.reach(flow))?;
        for flow in flows.iter().cycle().take(400) {
            let frame = self.frame(flow);
            let (from, to) = self.way(flow);
            ensure!(from.send_now(0, &PLAIN, &frame), "buffers come back");
            ensure!(to.expect(0)?.1 == frame, "{flow:?}");
        }
        // Of many flows, which the two queue pairs share.
        for port in 0..64 {
            let frame = craft(A, B).udp(port, 7, &[0; 100]);
            ensure!(self.a.send_now(0, &PLAIN, &frame), "buffers come back");
            ensure!(self.b.expect(0)?.1 == frame, "flow {port}");
        }
        Ok(())
    }

    /// Sends so many frames of nearly 64 KiB that are yet to be segmented, at once, and gives lengths of the frames that come.
    fn segmentable(&mut self, count: u32) -> Result<Vec<usize>> {
        for n in 0..count {
            let tcp = Tcp { sequence: n << 16, ..Tcp::default() };
            let mut frame = craft(A, B).tcp(&tcp, &[0; 64_000]);
            let header = leave_segments(&mut frame, SEGMENT).context("a TCP frame")?;
            ensure!(self.a.send(0, &header.to_bytes(), &[&frame]), "buffers are free");
        }
        self.a.flush(0);
        let (mut payload, mut lengths) = (0, Vec::new());
        while payload < count as usize * 64_000 {
            let (_, frame) = self.b.expect(0).with_context(|| format!("{payload} bytes have come"))?;
            payload += frame.len() - 54;
            lengths.push(frame.len());
        }
        Ok(lengths)
    }
}

fn craft(from: [u8; 6], to: [u8; 6]) -> Craft {
    Craft::v4(Mac::new(from), Mac::new(to), [10, 0, 0, 1].into(), [10, 0, 0, 2].into())
}

/// Waits until the plugs that face Open vSwitch have lost it.
fn wait_for_loss(daemon: &Daemon) -> Result<()> {
    wait_for_some("the end of the sessions", TIMEOUT, || {
        let gone = |plug: &&str| Ok(daemon.json(&["show", plug])?["status"]["phase"] == "attached");
        let gone = PLUGS[..2].iter().map(gone).collect::<Result<Vec<bool>>>()?;
        Ok((gone == [true, true]).then_some(()))
    })
}

fn dropped(daemon: &Daemon) -> Result<String> {
    daemon.run(&["-o", "json", "drops"])
}

// One test, because DPDK's ports are polled: only one such switch at a time.
#[test]
fn open_vswitch_carries_frames_after_either_side_came_back_and_whole_ones_if_it_can() {
    across().unwrap();
}

fn across() -> Result<()> {
    let mut daemon = Daemon::start()?;
    let mut ovs = Ovs::start(&Arc::new(Netns::new()?), Dpdk::On)?;
    ovs.vsctl("add-br br0 -- set Bridge br0 datapath_type=netdev")?;
    for (plug, network) in [("a", "left"), ("b", "right")] {
        let (path, guest) = (daemon.socket(plug), format!("guest-{plug}"));
        let path = path.to_str().context("a path")?;
        daemon.run(&["plug", plug, "--frontend-listen", path, "--network", network, "--queues", "2"])?;
        let socket = daemon.socket(&guest);
        daemon.run(&[
            "plug",
            &guest,
            "--listen",
            socket.to_str().context("a path")?,
            "--network",
            network,
        ])?;
        ovs.vsctl(&format!(
            "add-port br0 v{plug} -- set Interface v{plug} type=dpdkvhostuserclient options:vhost-server-path={path}"
        ))?;
    }
    let mut guests = Guests::connect(&daemon)?;
    daemon.wait_for_forwarding(&PLUGS)?;
    guests.talk()?;
    ensure!(ovs.vsctl("get Interface va status:num_of_vrings")? == "\"4\"", "two queue pairs");
    // Told nothing else, this switch takes no frames that are yet to be segmented.
    let lengths = guests.segmentable(1)?;
    ensure!(lengths.len() > 40 && lengths.iter().all(|len| *len <= 1514), "{lengths:?}");

    // vhostd comes back.
    daemon.kill_and_restart()?;
    let mut guests = Guests::connect(&daemon)?;
    daemon.wait_for_forwarding(&PLUGS)?;
    guests.talk()?;

    // The switch comes back, and takes them now.
    ovs.kill_switch()?;
    wait_for_loss(&daemon)?;
    ovs.vsctl("--no-wait set Open_vSwitch . other_config:userspace-tso-enable=true")?;
    ovs.start_switch()?;
    let begun = Instant::now();
    daemon.wait_for_forwarding(&PLUGS)?;
    guests.talk()?;
    println!("frames {:?} after the switch was back", begun.elapsed());
    let before = dropped(&daemon)?;
    let lengths = guests.segmentable(BURST)?;
    ensure!(lengths == [64_054; BURST as usize], "{lengths:?}");
    ensure!(dropped(&daemon)? == before, "{before} before, {} after", dropped(&daemon)?);
    Ok(())
}
