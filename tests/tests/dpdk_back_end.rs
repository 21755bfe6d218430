//! DPDK's vhost library as the back end that we attach to, in both roles. testpmd forwards between two of its ports, we between
//! the two ports that are front ends to them, in one network:
//!
//! ```text
//!   ┌─→ port 0 ══ front-end port 0 ──→ vhostd ──→ front-end port 1 ══ port 1 ─┐      and the same the other way
//!   └──────────────────────────────── testpmd ←──────────────────────────────┘
//! ```
//!
//! As many frames as testpmd sends to begin with go round and round, for ever; none may be lost. With two queue pairs, testpmd
//! makes frames of many flows instead.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::testpmd::Testpmd;
use serde_json::Value;

/// Frames to be received by each port.
const FRAMES: u64 = 20_000;
const TIMEOUT: Duration = Duration::from_secs(60);
const PLUGS: [&str; 2] = ["p0", "p1"];

// One test, because forwarding lcores poll: only one testpmd at a time.
#[test]
fn frames_go_round_in_both_roles_and_after_either_side_came_back_and_use_every_queue() {
    for (role, client) in [("--frontend-connect", 0), ("--frontend-listen", 1)] {
        go_round(role, client).unwrap();
    }
    flows_use_every_queue().unwrap();
}

/// Both queue pairs carry frames in both directions.
fn flows_use_every_queue() -> Result<()> {
    let daemon = Daemon::start()?;
    let mut vdevs = Vec::new();
    for (n, plug) in PLUGS.iter().enumerate() {
        let path = daemon.socket(plug).display().to_string();
        daemon.run(&["plug", plug, "--frontend-connect", &path, "--queues", "2"])?;
        vdevs.push(format!("net_vhost{n},iface={path},queues=2"));
    }
    let arguments = ["--nb-cores=1", "--disable-link-check", "--rxq=2", "--txq=2", "--forward-mode=flowgen"];
    let mut testpmd = Testpmd::start("testpmd", "0,1", &vdevs, &arguments)?;
    daemon.wait_for_forwarding(&PLUGS).with_context(|| testpmd.log().unwrap_or_default())?;
    testpmd.command("start")?;
    for plug in PLUGS {
        wait_for_some("frames in every ring", TIMEOUT, || {
            let rings = daemon.stats(plug)?["rings"].take();
            let rings = rings.as_array().context("a port without rings")?;
            let busy = |ring: &Value| ring["rx_frames"].as_u64().max(ring["tx_frames"].as_u64()) > Some(1000);
            Ok((rings.len() == 4 && rings.iter().all(busy)).then_some(()))
        })
        .with_context(|| daemon.run(&["-o", "json", "stats", plug]).unwrap_or_default())?;
    }
    testpmd.command("stop")?;
    Ok(())
}

fn go_round(role: &str, client: u8) -> Result<()> {
    let mut daemon = Daemon::start()?;
    let mut vdevs = Vec::new();
    for (n, plug) in PLUGS.iter().enumerate() {
        let path = daemon.socket(plug).display().to_string();
        daemon.run(&["plug", plug, role, &path])?;
        vdevs.push(format!("net_vhost{n},iface={path},queues=1,client={client}"));
    }
    for round in 0..2 {
        let mut testpmd =
            Testpmd::start("testpmd", "0,1", &vdevs, &["--nb-cores=1", "--disable-link-check"])?;
        daemon.wait_for_forwarding(&PLUGS).with_context(|| testpmd.log().unwrap_or_default())?;
        frames_go_round(&mut testpmd)?;
        if round == 0 {
            daemon.kill_and_restart()?;
            daemon.wait_for_forwarding(&PLUGS)?;
            frames_go_round(&mut testpmd)?;
        }
        for plug in PLUGS {
            let stats = daemon.stats(plug)?;
            ensure!(
                stats["kind"] == "front_end" && stats["drops"].as_object().is_some_and(|d| d.is_empty()),
                "{stats}"
            );
        }
        // It is killed, and DPDK does not replace a socket that was left behind.
        drop(testpmd);
        if client == 0 {
            PLUGS.iter().try_for_each(|plug| std::fs::remove_file(daemon.socket(plug)))?;
        }
    }
    Ok(())
}

fn frames_go_round(testpmd: &mut Testpmd) -> Result<()> {
    let before = testpmd.stats()?;
    testpmd.command("start tx_first")?;
    wait_for_some("frames to go round", TIMEOUT, || {
        let now = testpmd.stats()?;
        let enough =
            now.iter().zip(&before).all(|(now, before)| now.rx_packets - before.rx_packets >= FRAMES);
        Ok(enough.then_some(()))
    })?;
    testpmd.command("stop")?;
    Ok(())
}
