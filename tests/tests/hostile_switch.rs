//! The switch between guests: who gets which frame, who teaches what, and what a port may not do to its neighbours.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{
    BadSource, GuestRxRingDisabled, GuestTxRingDisabled, Hairpin, LinkLocal, MtuExceeded, NoDestination,
    SpoofedAddress, SpoofedMac,
};
use dataplane::{Policy, Poll, PortId};
use e2e::canary::Canary;
use e2e::inproc::{FDB_MAX, Ledger, Plane, PortPlan, SOON, count, until};
use e2e::oracle::split_mix;
use e2e::peer::{MERGEABLE, Peer, PeerConfig};
use e2e::stage::{MTU, frame, plain};
use wire::Mac;
use wire::arp::Arp;
use wire::craft::Craft;

const BROADCAST: [u8; 6] = [0xff; 6];

/// A network of guests that know nothing of each other yet.
struct Net {
    canary: Canary,
    plane: Plane,
    ids: Vec<PortId>,
    peers: Vec<Peer>,
    /// What each port must have counted.
    books: Vec<Ledger>,
}

/// Address of guest `n`.
fn mac(n: usize) -> [u8; 6] {
    [2, 0, 0, 0, 1, u8::try_from(n).unwrap()]
}

impl Net {
    fn new(guests: usize) -> Result<Self> {
        Self::with(guests, PeerConfig::default(), MTU)
    }

    fn with(guests: usize, config: PeerConfig, mtu: u16) -> Result<Self> {
        let plane = Plane::start()?;
        let canary = Canary::start(&plane)?;
        let mut net = Self { canary, plane, ids: Vec::new(), peers: Vec::new(), books: Vec::new() };
        for n in 0..guests {
            let name = format!("guest-{n}");
            net.join(PortPlan { mtu, ..PortPlan::new(&name, "switch") }, config)?;
        }
        Ok(net)
    }

    fn join(&mut self, plan: PortPlan<'_>, config: PeerConfig) -> Result<()> {
        self.ids.push(self.plane.add(plan)?);
        self.peers.push(self.plane.guest(plan.name, config)?);
        self.books.push(Ledger::default());
        Ok(())
    }

    /// Guest `from` sends `frame`, on queue 0.
    fn send(&mut self, from: usize, frame: &[u8]) -> Result<()> {
        let peer = &mut self.peers[from];
        until("room to send", || peer.send_now(0, &plain(), frame))?;
        until("the frame to be used", || peer.unused(0) == 0)?;
        self.books[from].rx += 1;
        Ok(())
    }

    /// Guest `from` sends `frame`; exactly the guests in `to` get it.
    fn reaches(&mut self, from: usize, frame: &[u8], to: &[usize]) -> Result<()> {
        self.send(from, frame)?;
        for (n, peer) in self.peers.iter_mut().enumerate() {
            if to.contains(&n) {
                let (_, got) = peer.expect(0).with_context(|| format!("from {from} to {n}"))?;
                ensure!(got == frame, "{n} got another frame");
                self.books[n].tx += 1;
            } else {
                // The sender has it back, so whoever was to get it has it.
                ensure!(peer.receive(0).is_none(), "{n} got a frame from {from} that is not for it");
            }
        }
        Ok(())
    }

    /// Guest `from` sends `frame`; nobody gets it, for `reason`.
    fn dropped(&mut self, from: usize, frame: &[u8], reason: dataplane::DropReason) -> Result<()> {
        self.reaches(from, frame, &[])?;
        self.books[from] = std::mem::take(&mut self.books[from]).drops(reason, 1);
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        self.ids.iter().zip(&self.books).try_for_each(|(id, book)| self.plane.expect_counters(*id, book))
    }

    fn finish(self) -> Result<()> {
        self.settle()?;
        drop(self.peers);
        self.canary.finish(&self.plane)?;
        self.plane.finish()
    }
}

#[test]
fn unknown_and_group_addresses_are_flooded_known_ones_are_not() -> Result<()> {
    let mut net = Net::new(4)?;
    net.reaches(0, &frame(mac(1), mac(0), 46), &[1, 2, 3]).context("unknown")?;
    net.reaches(1, &frame(mac(0), mac(1), 46), &[0]).context("learned from the first")?;
    net.reaches(0, &frame(mac(1), mac(0), 46), &[1]).context("learned from the answer")?;
    net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1, 2, 3]).context("broadcast")?;
    net.reaches(2, &frame([0x33, 0x33, 0, 0, 0, 1], mac(2), 46), &[0, 1, 3]).context("multicast")?;
    net.reaches(2, &frame(mac(9), mac(2), 46), &[0, 1, 3]).context("still unknown")?;
    net.finish()
}

#[test]
fn station_that_moves_is_found_where_it_is() -> Result<()> {
    let mut net = Net::new(3)?;
    net.reaches(0, &frame(BROADCAST, mac(9), 46), &[1, 2])?;
    net.reaches(2, &frame(mac(9), mac(2), 46), &[0])?;
    net.reaches(1, &frame(mac(2), mac(9), 46), &[2])?;
    net.reaches(2, &frame(mac(9), mac(2), 46), &[1])?;
    // A front end that leaves takes nothing with it until its port goes.
    net.plane.dataplane().remove_port(net.ids[1]);
    ensure!(net.plane.dataplane().fdb().iter().all(|entry| entry.mac != mac(9)), "forgotten with its port");
    net.ids.remove(1);
    net.peers.remove(1);
    net.books.remove(1);
    net.reaches(1, &frame(mac(9), mac(2), 46), &[0]).context("unknown again")?;
    net.finish()
}

#[test]
fn no_frame_is_reflected() -> Result<()> {
    let mut net = Net::new(2)?;
    net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1])?;
    net.dropped(0, &frame(mac(0), mac(0), 46), Hairpin)?;
    net.reaches(0, &frame(BROADCAST, mac(7), 46), &[1])?;
    net.dropped(0, &frame(mac(7), mac(0), 46), Hairpin).context("another station behind the same port")?;
    net.finish()
}

#[test]
fn frames_that_no_bridge_forwards_end_at_the_port() -> Result<()> {
    let mut net = Net::new(2)?;
    for last in 0..=0x0f {
        net.dropped(0, &frame([0x01, 0x80, 0xc2, 0, 0, last], mac(0), 46), LinkLocal)?;
    }
    net.reaches(0, &frame([0x01, 0x80, 0xc2, 0, 0, 0x10], mac(0), 46), &[1])?;
    net.finish()
}

/// As the first frame of a burst, behind a good one, and alone.
#[test]
fn sources_that_no_station_can_have_are_dropped() -> Result<()> {
    let mut net = Net::new(2)?;
    for src in [[0; 6], BROADCAST, [1, 0, 0, 0, 0, 5], [0x33, 0x33, 0, 0, 0, 1]] {
        net.dropped(0, &frame(BROADCAST, src, 46), BadSource)
            .with_context(|| format!("alone: {src:02x?}"))?;
        net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1])?;
        let peer = &mut net.peers[0];
        for src in [mac(0), src, src, mac(0)] {
            ensure!(peer.send(0, &plain(), &[&frame(BROADCAST, src, 46)]));
        }
        peer.flush(0);
        until("the burst", || peer.unused(0) == 0)?;
        net.books[0].rx += 4;
        net.books[0] = std::mem::take(&mut net.books[0]).drops(BadSource, 2);
        for _ in 0..2 {
            ensure!(net.peers[1].expect(0)?.1[6..12] == mac(0));
            net.books[1].tx += 1;
        }
        ensure!(net.peers[1].receive(0).is_none(), "{src:02x?}");
        net.settle().with_context(|| format!("{src:02x?}"))?;
    }
    let learned: Vec<_> = net.plane.dataplane().fdb().into_iter().filter(|e| e.network == "switch").collect();
    ensure!(learned.len() == 1 && learned[0].mac == mac(0), "{learned:?}");
    net.finish()
}

/// In one burst with its own frames, before and behind them: its neighbours see those alone, and learn nothing false.
#[test]
fn a_guest_with_a_policy_is_nobody_else() -> Result<()> {
    let policy = Policy::new(mac(0), [([10, 0, 0, 1].into(), 32)]);
    let mut net = Net::new(0)?;
    net.join(
        PortPlan { mtu: MTU, policy: Some(&policy), ..PortPlan::new("guest-0", "switch") },
        PeerConfig::default(),
    )?;
    net.join(PortPlan { mtu: MTU, ..PortPlan::new("guest-1", "switch") }, PeerConfig::default())?;
    let craft = |from: usize, last: u8| {
        Craft::v4(Mac::new(mac(from)), Mac::BROADCAST, [10, 0, 0, last].into(), [10, 0, 0, 9].into())
    };
    let own = craft(0, 1).udp(1, 2, b"own");
    let stolen = Arp::request(Mac::new(mac(0)), [10, 0, 0, 2], [10, 0, 0, 9]).frame(Mac::BROADCAST);
    let tagged = craft(0, 2).tag(0x8100, 5).udp(1, 2, b"");
    for (spoofed, reason) in [
        (craft(1, 1).udp(1, 2, b""), SpoofedMac),
        (craft(0, 2).udp(1, 2, b""), SpoofedAddress),
        (tagged, SpoofedAddress),
        (stolen.to_vec(), SpoofedAddress),
    ] {
        for sent in [&own, &spoofed, &spoofed, &own] {
            ensure!(net.peers[0].send(0, &plain(), &[sent]));
        }
        net.peers[0].flush(0);
        let peer = &mut net.peers[0];
        until("the burst", || peer.unused(0) == 0)?;
        net.books[0].rx += 4;
        net.books[0] = std::mem::take(&mut net.books[0]).drops(reason, 2);
        for _ in 0..2 {
            ensure!(net.peers[1].expect(0)?.1 == own, "{reason:?}");
            net.books[1].tx += 1;
        }
        ensure!(net.peers[1].receive(0).is_none(), "{reason:?}");
        net.settle().with_context(|| format!("{reason:?}"))?;
    }
    let learned: Vec<_> = net.plane.dataplane().fdb().into_iter().filter(|e| e.network == "switch").collect();
    ensure!(learned.len() == 1 && learned[0].mac == mac(0), "{learned:?}");
    net.reaches(1, &craft(7, 7).udp(1, 2, b"its neighbour has no policy"), &[0])?;
    net.finish()
}

#[test]
fn tagged_frames_pass_untouched() -> Result<()> {
    let mut net = Net::new(2)?;
    let craft = Craft::v4(Mac::new(mac(0)), Mac::new(mac(1)), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    for (protocol, control) in [(0x8100, 0), (0x8100, 1), (0x8100, 4095), (0x8100, 0xe005), (0x88a8, 7)] {
        net.reaches(0, &craft.clone().tag(protocol, control).udp(1, 2, &[5; 100]), &[1])?;
        net.reaches(0, &craft.clone().tag(protocol, control).tag(0x8100, 9).udp(1, 2, &[5; 100]), &[1])?;
    }
    net.finish()
}

#[test]
fn frames_beyond_the_mtu_are_dropped_at_their_sender() -> Result<()> {
    let mut net = Net::with(2, PeerConfig { tx_len: 3000, ..PeerConfig::default() }, 1500)?;
    for payload in [1500, 1504, 1508] {
        net.reaches(0, &frame(mac(1), mac(0), payload), &[1]).context("with room for two tags")?;
    }
    for payload in [1509, 2000, 2900] {
        net.dropped(0, &frame(mac(1), mac(0), payload), MtuExceeded)?;
    }
    net.finish()
}

#[test]
fn frames_beyond_the_mtu_of_a_receiver_are_dropped_there() -> Result<()> {
    let mut net =
        Net::with(2, PeerConfig { tx_len: 3000, features: MERGEABLE, ..PeerConfig::default() }, MTU)?;
    net.ids.push(net.plane.add(PortPlan::new("narrow", "switch"))?);
    net.peers.push(net.plane.guest("narrow", PeerConfig { features: MERGEABLE, ..PeerConfig::default() })?);
    net.books.push(Ledger::default());
    net.reaches(2, &frame(BROADCAST, mac(2), 46), &[0, 1])?;
    net.reaches(0, &frame(mac(2), mac(0), 1508), &[2])?;
    for dst in [mac(2), BROADCAST] {
        net.reaches(0, &frame(dst, mac(0), 2000), if dst == BROADCAST { &[1] } else { &[] })?;
        net.books[2] = std::mem::take(&mut net.books[2]).drops(MtuExceeded, 1);
    }
    net.finish()
}

#[test]
fn guest_alone_in_its_network_has_nobody_to_reach() -> Result<()> {
    let mut net = Net::new(1)?;
    net.dropped(0, &frame(BROADCAST, mac(0), 46), NoDestination)?;
    net.dropped(0, &frame(mac(5), mac(0), 46), NoDestination)?;
    net.finish()
}

/// W08: a port that shows too many addresses gets no more than its share, and its neighbours keep theirs.
#[test]
fn addresses_of_one_port_are_capped_and_others_keep_theirs() -> Result<()> {
    let mut net = Net::new(3)?;
    for n in [1, 2] {
        net.reaches(
            n,
            &frame(BROADCAST, mac(n), 46),
            &[0, 1, 2].into_iter().filter(|m| *m != n).collect::<Vec<_>>(),
        )?;
    }
    let mut state = 8;
    let claims = count(20_000, 1_000_000);
    for _ in 0..claims / 40 {
        for _ in 0..40 {
            let [a, b, c, d, e, ..] = split_mix(&mut state).to_le_bytes();
            // To a group address that ends here: nobody has to take all of that.
            let sent = frame([0x01, 0x80, 0xc2, 0, 0, 1], [0x06, a, b, c, d, e], 46);
            ensure!(net.peers[0].send(0, &plain(), &[&sent]));
        }
        net.peers[0].flush(0);
        let peer = &mut net.peers[0];
        until("the frames", || peer.unused(0) == 0)?;
    }
    net.books[0].rx += claims / 40 * 40;
    net.books[0] = std::mem::take(&mut net.books[0]).drops(LinkLocal, claims / 40 * 40);
    let learned = net.plane.dataplane().fdb();
    let at = |n: usize| learned.iter().filter(|entry| entry.port == net.ids[n]).count();
    ensure!(at(0) == FDB_MAX as usize && at(1) == 1 && at(2) == 1, "{} {} {}", at(0), at(1), at(2));
    net.reaches(1, &frame(mac(2), mac(1), 46), &[2]).context("neighbours are known as before")?;
    // Taking a neighbour's address is a move, and those are counted against the same cap.
    net.reaches(0, &frame(mac(1), mac(2), 46), &[1])?;
    net.reaches(1, &frame(mac(2), mac(1), 46), &[2]).context("the cap refuses the move")?;
    net.finish()
}

#[test]
fn flows_spread_over_receive_queues_and_keep_theirs() -> Result<()> {
    const QUEUES: u16 = 4;
    let mut net = Net::with(2, PeerConfig { queue_pairs: QUEUES, ..PeerConfig::default() }, 1500)?;
    let craft = Craft::v4(Mac::new(mac(0)), Mac::new(mac(1)), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let queue_of = |net: &mut Net, port: u16, length: usize| -> Result<usize> {
        let sent = craft.udp(port, 80, &vec![0; length]);
        net.send(0, &sent)?;
        let mut found = None;
        until("the frame", || {
            found = (0..usize::from(QUEUES))
                .find(|queue| net.peers[1].receive(*queue).is_some_and(|(_, got)| got == sent));
            found.is_some()
        })?;
        net.books[1].tx += 1;
        Ok(found.unwrap())
    };
    let first: Vec<usize> = (1000..1100).map(|port| queue_of(&mut net, port, 30)).collect::<Result<_>>()?;
    let used: BTreeSet<usize> = first.iter().copied().collect();
    ensure!(used.len() == usize::from(QUEUES), "a hundred flows use queues {used:?} only");
    for round in 0..3 {
        for (port, queue) in (1000..).zip(&first) {
            let again = queue_of(&mut net, port, 100 + round)?;
            ensure!(again == *queue, "flow {port} moved from queue {queue} to {again}");
        }
    }
    // A queue that is disabled gets nothing; its flows go to the others.
    net.peers[1].front().enable(2, false)?;
    for port in 1000..1100 {
        ensure!(queue_of(&mut net, port, 50)? != 1, "queue 1 is disabled");
    }
    net.peers[1].front().enable(2, true)?;
    for (port, queue) in (1000..).zip(&first) {
        ensure!(queue_of(&mut net, port, 60)? == *queue, "with all queues back a flow is back, too");
    }
    net.finish()
}

#[test]
fn disabled_rings_take_and_give_nothing() -> Result<()> {
    let mut net = Net::new(3)?;
    net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1, 2])?;
    net.peers[0].front().enable(0, false)?;
    net.reaches(1, &frame(mac(0), mac(1), 46), &[])?;
    net.books[0] = std::mem::take(&mut net.books[0]).drops(GuestRxRingDisabled, 1);
    net.reaches(1, &frame(BROADCAST, mac(1), 46), &[2]).context("others are served")?;
    net.books[0] = std::mem::take(&mut net.books[0]).drops(GuestRxRingDisabled, 1);
    net.reaches(0, &frame(mac(1), mac(0), 46), &[1]).context("it can still send")?;
    net.peers[0].front().enable(1, false)?;
    net.dropped(0, &frame(mac(1), mac(0), 46), GuestTxRingDisabled)?;
    for index in [0, 1] {
        net.peers[0].front().enable(index, true)?;
    }
    net.reaches(0, &frame(mac(1), mac(0), 46), &[1])?;
    net.reaches(1, &frame(mac(0), mac(1), 46), &[0])?;
    net.finish()
}

#[test]
fn send_rarp_is_heard_three_times_and_teaches() -> Result<()> {
    let mut net = Net::new(3)?;
    let moved = [0x52, 0x54, 0, 1, 2, 3];
    net.peers[0].front().send_rarp(moved)?;
    let announcement = wire::rarp::announcement(Mac::new(moved));
    for _ in 0..3 {
        for n in [1, 2] {
            ensure!(net.peers[n].expect(0)?.1 == announcement);
            net.books[n].tx += 1;
        }
    }
    net.reaches(1, &frame(moved, mac(1), 46), &[0]).context("it is where it was announced")?;
    ensure!(net.peers[0].front().send_rarp([1, 0, 0, 0, 0, 1]).is_err(), "a group address");
    ensure!(net.peers[0].front().send_rarp([0; 6]).is_err(), "no address");
    net.finish()
}

/// Frames in ones and twos with the worker asleep in between: a lost kick would leave one behind.
#[test]
fn frames_sent_to_a_sleeping_worker_arrive() -> Result<()> {
    let mut net = Net::new(2)?;
    net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1])?;
    for round in 0..count(500, 100_000) {
        // Every third round at once, so that arming and sending meet.
        if round % 3 != 0 {
            let turns =
                |net: &Net| net.plane.dataplane().workers().iter().map(|w| w.turns).collect::<Vec<_>>();
            let mut last = turns(&net);
            until("a quiet moment", || {
                let now = turns(&net);
                std::mem::replace(&mut last, now.clone()) == now
            })?;
        }
        net.reaches(0, &frame(mac(1), mac(0), 46), &[1])?;
    }
    let port = net.plane.port(net.ids[0])?;
    ensure!(port.rings.iter().any(|ring| ring.kicks > 0), "the guest was asked for kicks");
    net.finish()
}

/// Batches of every size up to a burst and beyond: each is heard of, whether it ends a burst or not.
#[test]
fn batches_of_any_size_are_called_for() -> Result<()> {
    let config = PeerConfig { ring_size: 256, ..PeerConfig::default() };
    for features in [config.features, config.features | 1 << vring::features::EVENT_IDX] {
        let mut net = Net::with(2, PeerConfig { features, ..config }, MTU)?;
        net.reaches(0, &frame(BROADCAST, mac(0), 46), &[1])?;
        net.reaches(1, &frame(mac(0), mac(1), 46), &[0])?;
        for batch in (1..=100).chain(1..=20) {
            let rx = &mut net.peers[1].pairs[0].rx;
            ensure!(rx.ring.want_call(), "nothing is left of the batch before");
            // Calls for what was received already are no news.
            let _ = rx.bells.call.read();
            for _ in 0..batch {
                ensure!(net.peers[0].send(0, &plain(), &[&frame(mac(1), mac(0), 46)]));
            }
            net.peers[0].flush(0);
            let call = &net.peers[1].pairs[0].rx.bells.call;
            until("a call", || call.read().is_ok()).with_context(|| format!("for a batch of {batch}"))?;
            let mut left = batch;
            until("the batch", || {
                while net.peers[1].receive(0).is_some() {
                    left -= 1;
                }
                left == 0
            })?;
            let sender = &mut net.peers[0];
            until("the batch to be used", || sender.unused(0) == 0)?;
            net.books[0].rx += batch;
            net.books[1].tx += batch;
        }
        net.finish()?;
    }
    Ok(())
}

/// CPU time of the workers and the session thread, clock ticks.
fn ticks() -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        let name = std::fs::read_to_string(task.join("comm"))?;
        if name.starts_with("worker-") || name.starts_with("session") {
            let stat = std::fs::read_to_string(task.join("stat"))?;
            // Behind the name in parentheses: state is the first, utime and stime the twelfth and thirteenth.
            let (_, fields) = stat.rsplit_once(") ").context("a name in parentheses")?;
            let fields: Vec<_> = fields.split_whitespace().collect();
            sum += fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        }
    }
    Ok(sum)
}

#[test]
fn sixty_four_idle_ports_use_no_cpu() -> Result<()> {
    let plane = Plane::with_poll(Poll::Adaptive)?;
    let mut peers = Vec::new();
    for n in 0..64 {
        let name = format!("guest-{n}");
        plane.add(PortPlan::new(&name, "idle"))?;
        let config = PeerConfig { ring_size: 16, features: MERGEABLE, ..PeerConfig::default() };
        peers.push(plane.guest(&name, config)?);
    }
    ensure!(peers[0].send_now(0, &plain(), &frame(BROADCAST, mac(0), 46)));
    for peer in &mut peers[1..] {
        peer.expect(0)?;
    }
    // The one thing here that needs time: a second of quiet, of which 1 % would be one tick. Twice that is allowed.
    let quiet = Duration::from_secs(1);
    let mut spent = u64::MAX;
    e2e::deadline::wait_for("a second of quiet", SOON, || {
        let before = ticks().unwrap();
        std::thread::sleep(quiet);
        spent = ticks().unwrap() - before;
        spent <= 2
    })
    .with_context(|| format!("{spent} clock ticks in {quiet:?}"))?;
    drop(peers);
    plane.finish()
}
