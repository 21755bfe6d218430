//! Instructions that a burst of 64 frames of 64 bytes takes, held against stored values.
//!
//! Times are noisy on shared machines, counts of instructions are not. The program starts itself under callgrind once for
//! each [`Step`], which counts while one function is on the stack. Values are in `benches/instructions.txt`; 5 % more than
//! stored is an error. Another compiler makes other code: store again with it (`--store`), and look at the difference.
//!
//! `cargo run --release -p benches --bin instructions [-- --store]`
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use benches::side::Side;
use benches::traffic::{Guests, Traffic, ip, mac};
use clap::{Parser, ValueEnum};
use dataplane::fdb::Fdb;
use dataplane::light::LightConfig;
use dataplane::{Config, Dataplane, Link, Policy, Poll, PortSpec};
use vring::{BURST_MAX, Frames, RxRing, TxBurst, TxRing, features};
use wire::Mac;

/// Frames that take part, and bytes of each.
const FRAMES: u64 = 1000 * BURST_MAX as u64;
const FRAME: u32 = 64;
/// More than stored by this is an error.
const TOLERANCE: f64 = 0.05;
const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.txt");
const HEAD: &str = "# Instructions for a burst of 64 frames of 64 bytes: benches/src/bin/instructions.rs checks and stores them.\n";

/// What is counted.
#[derive(Clone, Copy, ValueEnum)]
enum Step {
    /// A burst out of a split TX ring, and its end.
    DequeueSplit,
    /// The same with a packed ring.
    DequeuePacked,
    /// A burst into a split RX ring.
    EnqueueSplit,
    /// The same with a packed ring.
    EnqueuePacked,
    /// 64 sources learned, 64 destinations looked up.
    LookUp,
    /// A burst through the switch and into a split RX ring, in the worker.
    Forward,
    /// The same of datagrams from guests that may be nobody else.
    ForwardPolicy,
}

impl Step {
    /// The function that callgrind looks at.
    fn function(self) -> &'static str {
        match self {
            Self::DequeueSplit | Self::DequeuePacked => "instructions::dequeue",
            Self::EnqueueSplit | Self::EnqueuePacked => "instructions::enqueue",
            Self::LookUp => "instructions::look_up",
            Self::Forward | Self::ForwardPolicy => "dataplane::switch::forward",
        }
    }

    /// Does it, and returns how many frames that were.
    fn run(self) -> Result<u64> {
        match self {
            Self::DequeueSplit | Self::EnqueueSplit => copy_bursts(0),
            Self::DequeuePacked | Self::EnqueuePacked => copy_bursts(1 << features::RING_PACKED),
            Self::LookUp => look_up_bursts(),
            Self::Forward => forward_bursts(false),
            Self::ForwardPolicy => forward_bursts(true),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }
}

/// Instructions that a burst takes, held against stored values
#[derive(Parser)]
struct Args {
    /// Store the counts instead of holding them against what is stored
    #[arg(long)]
    store: bool,
    /// Do what is counted: what this program starts under callgrind
    #[arg(long, hide = true)]
    run: Option<Step>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(step) = args.run {
        println!("{}", step.run()?);
        return Ok(());
    }
    let mut counts = BTreeMap::new();
    for step in Step::value_variants() {
        counts.insert(step.name(), count(*step).with_context(|| step.name())?);
    }
    if args.store {
        let lines: String = counts.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
        return Ok(std::fs::write(STORED, HEAD.to_owned() + &lines)?);
    }
    let outcome = check(&counts, &std::fs::read_to_string(STORED).with_context(|| STORED)?);
    if !wide_registers() {
        println!(
            "not held against the stored counts: they are of a processor with AVX2, which this one has not"
        );
        return Ok(());
    }
    outcome
}

/// Whether this processor runs the code that the stored counts are of.
fn wide_registers() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Prints both, and fails if a count is too high.
fn check(counts: &BTreeMap<String, u64>, stored: &str) -> Result<()> {
    let stored: BTreeMap<&str, u64> = stored
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, count)| Some((name, count.parse().ok()?)))
        .collect();
    println!("{:<16}{:>10}{:>10}", "instructions", "now", "stored");
    let mut worse = Vec::new();
    for (name, count) in counts {
        let was = *stored.get(name.as_str()).with_context(|| format!("{name} is not stored: use --store"))?;
        let change = *count as f64 / was as f64 - 1.0;
        println!("{name:<16}{count:>10}{was:>10}{:>+8.1} %", change * 100.0);
        if change > TOLERANCE {
            worse.push(name.as_str());
        }
    }
    ensure!(
        worse.is_empty(),
        "more instructions than stored: {}; make it fewer, or --store",
        worse.join(", ")
    );
    Ok(())
}

/// Instructions of a burst, by callgrind.
fn count(step: Step) -> Result<u64> {
    let program = std::env::current_exe()?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={}", step.function()))
        .arg(&program)
        .args(["--run", &step.name()])
        .stdin(Stdio::null())
        .output()
        .context("starting valgrind (apt-get install valgrind)")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}");
    // "==123== Collected : 4711"
    let total = words.lines().find_map(|line| line.split("Collected : ").nth(1)?.trim().parse::<u64>().ok());
    let frames: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().context("number of frames")?;
    match total {
        None | Some(0) => bail!("callgrind met no function {}", step.function()),
        Some(total) => Ok(total * BURST_MAX as u64 / frames),
    }
}

#[inline(never)]
fn dequeue<'m>(tx: &'m mut TxRing, frames: &'m mut Frames) -> TxBurst<'m> {
    tx.dequeue(frames).expect("a burst")
}

#[inline(never)]
fn enqueue(rx: &mut RxRing, burst: &TxBurst<'_>) -> u32 {
    rx.enqueue(&burst.burst, u64::MAX).expect("delivery").frames
}

#[inline(never)]
fn look_up(fdb: &Fdb, from: &[Mac], to: &[Mac]) -> usize {
    for mac in from {
        fdb.learn(*mac, 1, 0, u32::MAX);
    }
    to.iter().filter(|mac| fdb.lookup(**mac).is_some()).count()
}

fn copy_bursts(features: u64) -> Result<u64> {
    let (mut a, mut b) = (Side::new(FRAME + 12, false, features), Side::new(2048, true, features));
    let (mut tx, mut rx) = (TxRing::start(a.setup(), &a.mapped())?, RxRing::start(b.setup(), &b.mapped())?);
    let mut frames = Frames::default();
    for _ in 0..FRAMES / BURST_MAX as u64 {
        let burst = dequeue(&mut tx, &mut frames);
        ensure!(enqueue(&mut rx, &burst) as usize == BURST_MAX, "a burst is 64 frames");
        burst.complete();
        a.ring.recycle();
        b.ring.recycle();
    }
    Ok(FRAMES)
}

fn look_up_bursts() -> Result<u64> {
    let fdb = Fdb::new();
    let station = |n: u64| Mac::from_u64(0x0200_0000_0000 | n);
    for n in 0..1000 {
        fdb.learn(station(n), 1, 0, u32::MAX);
    }
    for first in (0..FRAMES).step_by(BURST_MAX) {
        let stations: Vec<Mac> = (first..first + BURST_MAX as u64).map(|n| station(n % 1000)).collect();
        ensure!(look_up(&fdb, &stations, &stations) == BURST_MAX, "all are known");
    }
    Ok(FRAMES)
}

/// A worker between two light front ends; `held`: to their addresses.
fn forward_bursts(held: bool) -> Result<u64> {
    let dir = tempfile::tempdir()?;
    let config = Config {
        cpus: Vec::new(),
        poll: Poll::Busy,
        ageing: Duration::from_secs(300),
        fdb_port_max: 256,
        on_event: Box::new(|_| {}),
    };
    let plane = Dataplane::start(config)?;
    let mut sockets = Vec::new();
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        let policy = held.then(|| Policy::new(mac(n), [(ip(n).into(), 32)]));
        sockets.push(dir.path().join(name));
        let endpoint = vhost_user::Endpoint::listen(dir.path().join(name));
        let link = Link::VhostUser { endpoint, mac: None, queue_pairs: 1, policy };
        plane.add_port(PortSpec { name: name.into(), network: "bench".into(), mtu: 1500, link })?;
    }
    let traffic = Traffic::of(FRAME as usize);
    let traffic = if held { traffic.over_ipv4() } else { traffic };
    let mut guests = Guests::connect(&sockets, &LightConfig::default(), &traffic)?;
    guests.deliver(FRAMES);
    drop(guests);
    let worker = plane.workers().pop().context("a worker")?;
    ensure!(worker.frames_per_burst > 63.0, "{} frames a burst", worker.frames_per_burst);
    Ok(worker.frames)
}
