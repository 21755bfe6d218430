//! The same traffic through vhostd and through DPDK's vhost library, side by side.
//!
//! Two light front ends on one core, the back end on another; frames of both directions added up. Rounds alternate, since
//! machines drift; medians and the ratio round by round are what counts. vhostd is a learning switch, DPDK's testpmd
//! passes frames on without a look.
//!
//! `cargo run --release -p benches --bin peers [-- --rounds N --seconds S --no-merge --json]`; with `--no-merge` the front
//! ends do not negotiate mergeable buffers.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result};
use benches::backend::{Backend, serve, serve_limit};
use benches::pair::Pair;
use benches::{FRONTEND_CPU, pin};
use dataplane::light::LightConfig;
use serde::Serialize;

const LENGTHS: [usize; 3] = [64, 512, 1500];
const WARM_UP: Duration = Duration::from_millis(200);

#[derive(Serialize)]
struct Row {
    frame_bytes: usize,
    vhostd_mpps: Spread,
    dpdk_mpps: Spread,
    ratio: Spread,
}

/// Smallest, median, largest.
#[derive(Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { min: values[0], median: values[values.len() / 2], max: values[values.len() - 1] }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:6.2} ({:5.2}..{:5.2})", self.median, self.min, self.max)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1));
    if let Some(dir) = value("--vhostd") {
        return serve(dir.as_ref());
    }
    if let Some(dir) = value("--limit") {
        return serve_limit(dir.as_ref());
    }
    let number = |name: &str, default: f64| value(name).map_or(Ok(default), |v| v.parse());
    let rounds = number("--rounds", 5.0).context("--rounds takes a number")?.max(1.0);
    let time = Duration::from_secs_f64(number("--seconds", 1.0).context("--seconds takes a number")?);
    let mut config = LightConfig::default();
    if args.iter().any(|a| a == "--no-merge") {
        config.features &= !(1 << vring::features::MRG_RXBUF);
    }
    let json = args.iter().any(|a| a == "--json");
    pin(FRONTEND_CPU);
    let mut rows = Vec::new();
    for frame_bytes in LENGTHS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..rounds as usize {
            eprintln!("{frame_bytes} B, round {} of {rounds}", round + 1);
            ours.push(rate(&Backend::vhostd()?, &config, frame_bytes, time)?);
            theirs.push(rate(&Backend::testpmd()?, &config, frame_bytes, time)?);
        }
        let ratio = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        let row = Row {
            frame_bytes,
            vhostd_mpps: Spread::of(ours),
            dpdk_mpps: Spread::of(theirs),
            ratio: Spread::of(ratio),
        };
        rows.push(row);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!("{:>8}  {:>22}  {:>22}  {:>22}", "bytes", "vhostd Mframes/s", "DPDK Mframes/s", "ratio");
    for row in rows {
        let (ours, theirs) = (row.vhostd_mpps.to_string(), row.dpdk_mpps.to_string());
        println!("{:>8}  {ours:>22}  {theirs:>22}  {:>22}", row.frame_bytes, row.ratio.to_string());
    }
    Ok(())
}

/// Millions of frames a second through a back end.
fn rate(backend: &Backend, config: &LightConfig, frame_bytes: usize, time: Duration) -> Result<f64> {
    let [a, b] = backend.sockets();
    let mut pair = Pair::connect([&a, &b], config, frame_bytes)?;
    pair.rate(WARM_UP)?;
    Ok(pair.rate(time)? / 1e6)
}
