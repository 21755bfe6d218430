//! Call fds in the hands of a peer that wants to stop whoever signals them.
//!
//! A write to an eventfd that is full and blocks waits for ever, and the peer shares the flags and the counter. The
//! workers that serve its rings serve the canaries' too.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::hand::{BUFFERS, Hand, HandConfig, writable};
use e2e::inproc::{count, until};
use e2e::stage::{Stage, plain, to_hostile};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// The most an eventfd holds by writing.
const FULL: u64 = u64::MAX - 1;

/// Another descriptor of the same eventfd, as the back end has one.
fn shared(fd: &EventFd) -> Result<OwnedFd> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(own, fd.as_raw_fd(), PidfdGetfdFlags::empty())?)
}

/// A call fd in the hands of the peer.
struct Call(OwnedFd);

impl Drop for Call {
    fn drop(&mut self) {
        // Lets go whoever waits for it: a test that fails does not hang.
        let _ = fcntl_setfl(&self.0, OFlags::NONBLOCK);
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// Gives ring `index` a call fd that is full, and makes it blocking again when the back end has it.
fn give_full_call(hand: &mut Hand, index: u16) -> Result<Call> {
    let call = EventFd::new(EFD_CLOEXEC)?;
    call.write(FULL)?;
    hand.front().vhost().set_vring_call(index.into(), &call)?;
    let fd = shared(&call)?;
    fcntl_setfl(&fd, OFlags::empty())?;
    hand.rings[usize::from(index)].bells.call = call;
    Ok(Call(fd))
}

/// A thread that empties and fills eventfds and makes them blocking, some 10,000 times a second.
struct Jammer {
    stop: Arc<AtomicBool>,
    jams: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Jammer {
    fn start(calls: Vec<Call>) -> Self {
        let (stop, jams) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, jammed) = (stop.clone(), jams.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for Call(call) in &calls {
                    // Its own reads and writes must not wait.
                    let _ = fcntl_setfl(call, OFlags::NONBLOCK);
                    let _ = rustix::io::read(call, &mut [0; 8]);
                    let _ = rustix::io::write(call, &FULL.to_ne_bytes());
                    let _ = fcntl_setfl(call, OFlags::empty());
                }
                jammed.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        Self { stop, jams, thread: Some(thread) }
    }
}

impl Drop for Jammer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It waits for nobody.
            let _ = thread.join();
        }
    }
}

/// Frames in both directions, each of which asks for a call: how long the middle one took.
fn exchange(stage: &mut Stage, hand: &mut Hand, rounds: u64) -> Result<Duration> {
    let before = calls(stage)?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let began = Instant::now();
        hand.rx().ring.set_descriptor(0, writable(BUFFERS + 4096, 2048));
        hand.rx().post(0);
        stage.neighbour_sends(&plain(), &to_hostile(200))?;
        stage.book.tx += 1;
        hand.rx().expect_used()?;
        stage.good(hand)?;
        times.push(began.elapsed());
    }
    // A call follows its frame.
    until("calls on both rings", || {
        calls(stage).is_ok_and(|now| now.iter().zip(&before).all(|(now, before)| now - before >= rounds))
    })?;
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

/// Calls of the hostile guest's rings.
fn calls(stage: &Stage) -> Result<Vec<u64>> {
    let rings = stage.plane().port(stage.port)?.rings;
    ensure!(rings.len() == 2, "{rings:?}");
    Ok(rings.iter().map(|ring| ring.calls).collect())
}

#[test]
fn p23_call_fds_that_are_full_and_block_delay_nobody() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    let shared = stage.plane().dataplane().workers().into_iter().find(|worker| {
        let serves = |port: &str| worker.vrings.iter().any(|vring| vring.starts_with(port));
        serves("hostile/") && serves("canary-")
    });
    ensure!(shared.is_some(), "no worker serves the hostile guest and a canary");
    hand.rx().ring.want_call();
    hand.tx().ring.want_call();
    let rounds = count(300, 20_000);
    let before = exchange(&mut stage, &mut hand, rounds)?;

    let full = [give_full_call(&mut hand, 0)?, give_full_call(&mut hand, 1)?];
    let while_full = exchange(&mut stage, &mut hand, rounds).context("full call fds")?;
    for Call(call) in &full {
        // As full as only the kernel can make it: calls were made, and nobody waited for room.
        let mut bytes = [0; 8];
        rustix::io::read(call, &mut bytes)?;
        ensure!(u64::from_ne_bytes(bytes) >= FULL);
    }

    let jammer = Jammer::start(Vec::from(full));
    let while_jammed = exchange(&mut stage, &mut hand, rounds).context("jammed call fds")?;
    until("jams", || jammer.jams.load(Ordering::Relaxed) > rounds)?;
    drop(jammer);

    println!("a round: {before:?}, with full call fds {while_full:?}, with jammed ones {while_jammed:?}");
    // The machine may be busy; a call that waits for the peer takes for ever.
    let late = 5 * before + Duration::from_millis(5);
    ensure!(while_full < late && while_jammed < late, "{before:?} {while_full:?} {while_jammed:?}");
    // A call fd of the usual kind is called as ever, after the one call that comes with it.
    let call = EventFd::new(EFD_CLOEXEC)?;
    hand.front().vhost().set_vring_call(1, &call)?;
    call.read()?;
    stage.good(&mut hand)?;
    until("a call", || call.read().is_ok())?;
    drop(call);
    stage.end(hand)
}
