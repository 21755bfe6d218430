//! A daemon whose memory is limited (a memory control group), and guests whose memory nobody has touched.
//!
//! The kernel charges a page of shared memory to whoever touches it first. So a frame that is written into an RX buffer
//! which the guest has not touched is paid by the daemon. If the limit ends there, the kernel kills the daemon and says so
//! in the group's events; plugs are back after the restart.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::{wait_for, wait_for_some};
use e2e::hand::{BUFFERS, Hand, HandConfig, writable};
use e2e::peer::{Peer, PeerConfig};
use e2e::stage::{HOSTILE, NEIGHBOUR, frame, plain};

const SOON: Duration = Duration::from_secs(30);
const PAGE: usize = 4096;
const LIMIT: usize = 64 << 20;
/// RX buffers, each in a page of its own: twice the limit.
const RING: u16 = 32_768;
const MEMORY: usize = BUFFERS + RING as usize * PAGE;

/// A memory control group, of the first or second version.
struct Group(PathBuf);

impl Group {
    /// A group below the root of the hierarchy. `None` if there is none, or it is not ours to change.
    fn new(limit: usize) -> Option<Self> {
        let name = format!("vhostd-test-{}", std::process::id());
        ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].into_iter().find_map(|root| {
            let group = Self(Path::new(root).join(&name));
            fs::create_dir(&group.0).ok()?;
            let files = ["memory.limit_in_bytes", "memory.max"];
            let limited =
                files.into_iter().any(|file| fs::write(group.0.join(file), limit.to_string()).is_ok());
            // Swap would be room, too. Where there is none, there is nothing to limit.
            let _ = fs::write(group.0.join("memory.memsw.limit_in_bytes"), limit.to_string());
            let _ = fs::write(group.0.join("memory.swap.max"), "0");
            limited.then_some(group)
        })
    }

    fn add(&self, pid: u32) -> Result<()> {
        Ok(fs::write(self.0.join("cgroup.procs"), pid.to_string())?)
    }

    /// Bytes charged to it.
    fn usage(&self) -> Result<usize> {
        let files = ["memory.usage_in_bytes", "memory.current"].map(|file| self.0.join(file));
        let text = files.iter().find_map(|file| fs::read_to_string(file).ok()).context("no usage")?;
        Ok(text.trim().parse()?)
    }

    /// Processes that the kernel killed because of it.
    fn killed(&self) -> Result<u64> {
        let files = ["memory.oom_control", "memory.events"].map(|file| self.0.join(file));
        let text = files.iter().find_map(|file| fs::read_to_string(file).ok()).context("no events")?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no oom_kill")?.parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Possible when the last process in it is gone.
        let _ = wait_for("the group's end", SOON, || fs::remove_dir(&self.0).is_ok());
    }
}

/// A guest with RX buffers in pages that it has touched, or not, and a neighbour that sends a frame into each of them
/// while the daemon lives.
fn fill(daemon: &mut Daemon, touched: bool) -> Result<Hand> {
    for plug in ["guest", "neighbour"] {
        daemon.run(&["plug", plug, "--listen", daemon.socket(plug).to_str().context("path")?])?;
    }
    let config = HandConfig {
        size: RING,
        memory: MEMORY,
        regions: vec![(0, MEMORY)],
        // Small pages, that is: not taken from a pool which is nobody's.
        unsealed: true,
        ..HandConfig::default()
    };
    let mut hand = Hand::connect(daemon.socket("guest"), &config)?;
    let mut neighbour = Peer::connect(daemon.socket("neighbour"), PeerConfig::default())?;
    for index in 0..RING {
        let offset = BUFFERS + usize::from(index) * PAGE;
        hand.rx().ring.set_descriptor(index, writable(offset, 2048));
        if touched {
            hand.memory().write(offset, &[0]);
        }
    }
    hand.rx().post_all(&(0..RING).collect::<Vec<_>>());
    daemon.wait_for_forwarding(&["guest", "neighbour"])?;
    let frame = frame(HOSTILE, NEIGHBOUR, 46);
    for _ in 0..RING {
        wait_for("room to send, or the daemon's end", SOON, || {
            neighbour.send_now(0, &plain(), &frame) || daemon.ended().is_ok_and(|end| end.is_some())
        })?;
    }
    wait_for("the last frame, or the daemon's end", SOON, || {
        hand.rx().ring.used_idx() == RING || daemon.ended().is_ok_and(|end| end.is_some())
    })?;
    Ok(hand)
}

#[test]
fn m15_untouched_guest_memory_is_paid_by_who_writes_first() -> Result<()> {
    let Some(group) = Group::new(LIMIT) else {
        println!("not run: no memory control group can be made here");
        return Ok(());
    };
    // Memory that the guest touched, or its VMM for it (prealloc), is the guest's.
    let mut daemon = Daemon::start()?;
    group.add(daemon.pid())?;
    let hand = fill(&mut daemon, true)?;
    ensure!(hand.rings[0].ring.used_idx() == RING && daemon.ended()?.is_none());
    let paid = group.usage()?;
    ensure!(paid < LIMIT / 4, "{paid} bytes for memory that is not ours");
    drop((hand, daemon));
    ensure!(group.killed()? == 0);

    // What nobody touched is ours when a frame is written into it, until the limit.
    let mut daemon = Daemon::start()?;
    group.add(daemon.pid())?;
    let hand = fill(&mut daemon, false)?;
    let end = daemon.ended()?.context("the limit is not kept")?;
    ensure!(end.signal() == Some(libc::SIGKILL), "{end}");
    let written = usize::from(hand.rings[0].ring.used_idx());
    ensure!(group.killed()? == 1, "the kernel does not say so");
    ensure!((LIMIT / PAGE / 2..LIMIT / PAGE).contains(&written), "killed after {written} pages");
    // A restart, outside of the group: the plugs are there, and so can the guest be.
    drop(hand);
    daemon.kill_and_restart()?;
    wait_for_some("the guest's plug", SOON, || {
        Ok((daemon.json(&["show", "guest"])?["status"]["phase"] == "attached").then_some(()))
    })?;
    let _guest = Peer::connect(daemon.socket("guest"), PeerConfig::default())?;
    daemon.wait_for_forwarding(&["guest"])?;
    drop(daemon);
    Ok(())
}
