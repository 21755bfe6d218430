//! The canary pair: two well-behaved guests that talk all the while and must not notice a thing.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use dataplane::PortId;
use vring::HEADER_LEN;

use crate::inproc::{Ledger, Plane, PortPlan};
use crate::oracle::{Checker, Flow, Oracle};
use crate::peer::{Ear, Peer, PeerConfig};

/// Frames in each direction of a round.
const ROUND: u64 = 16;
/// Between two rounds, so that the pair listens rather than loads the machine.
const PAUSE: Duration = Duration::from_millis(1);
/// Runs of canaries: their frames are no other test's.
const RUN: u32 = 0x00ca_9a51;

/// Two guests and the thread that moves their frames. Each round is sent in both directions and must arrive whole, in
/// order and once, by notifications alone, before the next begins: so a single lost frame, call or kick is found.
pub struct Canary {
    ports: [PortId; 2],
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<Result<u64>>>,
}

impl Canary {
    /// Adds two ports to a network of their own and lets them talk.
    pub fn start(plane: &Plane) -> Result<Self> {
        Self::in_network(plane, "canaries")
    }

    /// Adds two ports to `network` and lets them talk.
    pub fn in_network(plane: &Plane, network: &str) -> Result<Self> {
        let names = [0, 1].map(|n| format!("canary-{network}-{n}"));
        let mut ports = Vec::new();
        let mut peers = Vec::new();
        for name in &names {
            ports.push(plane.add(PortPlan::new(name, network))?);
            peers.push(plane.guest(name, PeerConfig::default())?);
        }
        let (Ok(ports), Ok(peers)) = (<[_; 2]>::try_from(ports), <[Peer; 2]>::try_from(peers)) else {
            bail!("two of each were made");
        };
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopped = stop.clone();
        // Made here, so that a census taken from now on has it.
        let ear = Ear::of(&peers)?;
        let thread = std::thread::Builder::new().name("canary".into());
        let thread = thread.spawn(move || sing(peers, &ear, &stopped))?;
        Ok(Self { ports, stop, thread: Some(thread) })
    }

    /// Ends it. Fails if a frame was lost, wrong or late by [`crate::peer::PATIENCE`], or if the dataplane counted
    /// anything else than what was sent.
    pub fn finish(mut self, plane: &Plane) -> Result<()> {
        let rounds = self.stop().context("the canaries were disturbed")?;
        ensure!(rounds > 0, "the canaries did not sing");
        for port in self.ports {
            let counters = plane.counters(port)?;
            ensure!(counters.rx_frames == rounds * ROUND, "{} sent, {counters:?}", rounds * ROUND);
            plane.expect_alone(port)?;
            // In a shared network others may have flooded; what came from the pair never got lost.
            ensure!(Ledger::from(&counters).dropped() == 0, "{counters:?}");
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<u64> {
        let (stopped, changed) = &*self.stop;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
        let Some(thread) = self.thread.take() else { return Ok(0) };
        thread.join().map_err(|_| anyhow!("its thread panicked"))?
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        // A test that failed has said so already.
        let _ = self.stop();
    }
}

/// Plays rounds until stopped. Returns how many.
fn sing(mut peers: [Peer; 2], ear: &Ear, stop: &(Mutex<bool>, Condvar)) -> Result<u64> {
    let oracle = Oracle::new(RUN);
    let id = std::process::id();
    let macs = [[2, 0xca, 0, 0, 0, 1], [2, 0xca, 0, 0, 0, 2]];
    let flows =
        [0, 1].map(|n| Flow { id: id.wrapping_add(n), src: macs[n as usize], dst: macs[1 - n as usize] });
    let mut checkers = [Checker::new(flows[1]), Checker::new(flows[0])];
    let mut frame = Vec::new();
    let mut rounds = 0;
    loop {
        let (first, end) = (rounds * ROUND, (rounds + 1) * ROUND);
        for (peer, flow) in peers.iter_mut().zip(&flows) {
            for sequence in first..end {
                let len = 60 + usize::try_from(sequence * 37 % 1400).expect("less than 1400");
                let (head, pattern) = oracle.parts(flow, sequence, len);
                ensure!(peer.send(0, &[0; HEADER_LEN], &[&head, pattern]), "frames are never returned");
            }
            peer.flush(0);
        }
        let mut wrong = None;
        let [a, b] = &mut peers;
        ear.wait_until("the canaries' frames", &mut [a, b], |peers| {
            for (peer, checker) in peers.iter_mut().zip(&mut checkers) {
                while peer.take(0, &mut frame).is_some() {
                    // Frames that others flooded are not ours to judge.
                    let ours = frame.get(6..8) == Some(&macs[0][..2]);
                    if ours && let Err(fault) = checker.check(&oracle, &frame) {
                        wrong = Some(fault);
                    }
                }
                peer.give_back(0);
            }
            wrong.is_some() || checkers.iter().all(|checker| checker.seen() == end)
        })?;
        if let Some(fault) = wrong {
            return Err(fault.into());
        }
        rounds += 1;
        let stopped = stop.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (stopped, _) = stop
            .1
            .wait_timeout_while(stopped, PAUSE, |stopped| !*stopped)
            .unwrap_or_else(PoisonError::into_inner);
        if *stopped {
            return Ok(rounds);
        }
    }
}
