//! DPDK's virtio-user as front end, in both roles. Two of its ports are in one network, testpmd forwards between them:
//!
//! ```text
//!   ┌─→ port 0, TX ──→ vhostd ──→ port 1, RX ─┐        and the same from port 1 to port 0
//!   └──────────────── testpmd ←───────────────┘
//! ```
//!
//! testpmd sends one burst on each queue, and from then on these frames go round and round: a fixed number, smaller than
//! any ring, so there is always room for each of them and none may be lost. When testpmd stops, all of them have to be
//! there, in its RX rings.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::testpmd::{Testpmd, VirtioUser};
use serde_json::Value;
use vring::features::{IN_ORDER, MQ, MRG_RXBUF, RING_PACKED, VERSION_1};

/// Frames that testpmd sends on each queue of each port to begin with.
const BURST: u64 = 32;
/// Frames to be received by each port before it stops.
const FRAMES: u64 = 20_000;
const TIMEOUT: Duration = Duration::from_secs(60);

/// What a port counts about itself.
#[derive(Debug)]
struct Counts {
    rx: u64,
    tx: u64,
}

// One test, because forwarding lcores poll: only one testpmd at a time.
#[test]
fn frames_go_round_without_loss_in_every_shape_and_both_roles() {
    let plain = VirtioUser::new("".into());
    let packed = VirtioUser { packed: true, ..plain.clone() };
    let shapes = [
        ("mergeable", plain.clone()),
        ("not mergeable", VirtioUser { mrg_rxbuf: false, ..plain.clone() }),
        ("in order", VirtioUser { in_order: true, ..plain.clone() }),
        ("in order, not mergeable", VirtioUser { in_order: true, mrg_rxbuf: false, ..plain.clone() }),
        ("two queue pairs", VirtioUser { queues: 2, ..plain.clone() }),
        ("packed", packed.clone()),
        ("packed, not mergeable", VirtioUser { mrg_rxbuf: false, ..packed.clone() }),
        ("packed, in order", VirtioUser { in_order: true, ..packed.clone() }),
        ("packed, two queue pairs", VirtioUser { queues: 2, ..packed.clone() }),
    ];
    for (role, server) in [("--listen", false), ("--connect", true)] {
        for (name, shape) in &shapes {
            let frames = go_round(role, &VirtioUser { server, ..shape.clone() })
                .with_context(|| format!("plug {role}, {name}"))
                .unwrap();
            println!("plug {role}, {name}: {frames} frames");
        }
    }
}

/// Lets frames go round and gives how many vhostd has forwarded.
fn go_round(role: &str, shape: &VirtioUser) -> Result<u64> {
    let daemon = Daemon::start()?;
    // testpmd's first frames from port N are for 02:00:00:00:00:0N: that is the other port.
    let vdevs = [("p0", "02:00:00:00:00:01"), ("p1", "02:00:00:00:00:00")].map(|(plug, mac)| {
        let (socket, mac) = (daemon.socket(plug), Some(mac.into()));
        VirtioUser { socket, mac, ..shape.clone() }
    });
    for (plug, device) in ["p0", "p1"].iter().zip(&vdevs) {
        daemon.run(&["plug", plug, role, device.socket.to_str().context("path")?])?;
    }
    let vdevs: Vec<_> = vdevs.iter().enumerate().map(|(index, device)| device.vdev(index)).collect();
    let queues = shape.queues;
    let (rxq, txq) = (format!("--rxq={queues}"), format!("--txq={queues}"));
    let mut testpmd =
        Testpmd::start("testpmd", "0,1", &vdevs, &["--nb-cores=1", "--txonly-multi-flow", &rxq, &txq])?;
    daemon.wait_for_forwarding(&["p0", "p1"])?;
    ensure_negotiated(&testpmd, shape)?;

    testpmd.command("start tx_first")?;
    wait_for_some("frames to go round", TIMEOUT, || {
        Ok(testpmd.stats()?.iter().all(|port| port.rx_packets >= FRAMES).then_some(()))
    })?;
    testpmd.command("stop")?;

    let theirs = testpmd.stats()?;
    // What is in the TX rings is still on its way.
    let ours = wait_for_some("vhostd to take what was sent", TIMEOUT, || {
        let ours = [daemon.stats("p0")?, daemon.stats("p1")?];
        let taken = ours.iter().zip(&theirs).all(|(ours, theirs)| ours["rx_frames"] == theirs.tx_packets);
        Ok(taken.then_some(ours))
    })
    .with_context(|| format!("testpmd {theirs:?}, vhostd {:?}", daemon.stats("p0")))?;
    let counts = [counts(&ours[0])?, counts(&ours[1])?];
    let context = || format!("testpmd {theirs:?}, vhostd {ours:?}");

    ensure!(counts[0].rx == counts[1].tx && counts[1].rx == counts[0].tx, "not all forwarded: {}", context());
    let waiting = |port: usize| counts[port].tx - theirs[port].rx_packets;
    ensure!(
        waiting(0) + waiting(1) == 2 * BURST * u64::from(queues),
        "there are not as many frames as in the beginning: {}",
        context()
    );
    for (ours, theirs) in ours.iter().zip(&theirs) {
        ensure!(theirs.tx_errors + theirs.rx_errors + theirs.rx_missed == 0, "{}", context());
        ensure!(ours["drops"].as_object().is_some_and(serde_json::Map::is_empty), "{}", context());
        for ring in ours["rings"].as_array().context("no rings")? {
            let frames = ring["rx_frames"].as_u64().max(ring["tx_frames"].as_u64());
            ensure!(frames > Some(0), "a ring was not used: {}", context());
        }
    }
    Ok(counts[0].rx + counts[1].rx)
}

/// The shape is what both ends agreed on, not only what was asked for.
fn ensure_negotiated(testpmd: &Testpmd, shape: &VirtioUser) -> Result<()> {
    let ports = testpmd.features()?;
    ensure!(ports.len() == 2, "{ports:x?}");
    for features in ports {
        let wanted = [
            (IN_ORDER, shape.in_order),
            (MRG_RXBUF, shape.mrg_rxbuf),
            (MQ, shape.queues > 1),
            (RING_PACKED, shape.packed),
            (VERSION_1, true),
        ];
        for (bit, wanted) in wanted {
            ensure!((features & 1 << bit != 0) == wanted, "feature {bit} of {features:#x}: wanted {wanted}");
        }
    }
    // On packed rings it has one path for both.
    let in_order = shape.in_order && !shape.packed;
    ensure!(testpmd.log()?.contains("using inorder Rx path") == in_order, "the path of its frames");
    Ok(())
}

fn counts(stats: &Value) -> Result<Counts> {
    let count = |name: &str| stats[name].as_u64().with_context(|| format!("{name}: {stats}"));
    Ok(Counts { rx: count("rx_frames")?, tx: count("tx_frames")? })
}
