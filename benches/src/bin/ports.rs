//! Many ports of which most are idle: what they take of the rate of the two that are not, what they cost in memory, and,
//! when nobody sends, in processor time.
//!
//! The two send to each other all the while, on a back end with all ports plugged; the front ends of the others connect
//! and leave again in every round, so that both rates of a round are those of the same rings at nearly the same time.
//!
//! `cargo run --release -p benches --bin ports -- --help`
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use benches::backend::{Backend, Kind, Shape, serve_if_asked};
use benches::figures::Spread;
use benches::machine::Machine;
use benches::traffic::{Guests, Traffic};
use benches::{FRONTEND_CPU, pin};
use clap::Parser;
use dataplane::light::{LightConfig, LightGuest};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const WARM_UP: Duration = Duration::from_millis(200);
/// Longer than an adaptive worker polls in vain, and than what connecting leaves to be done.
const SETTLE: Duration = Duration::from_millis(200);
/// Descriptors of an idle front end's rings.
const IDLE_RING: u16 = 64;

/// What idle ports cost the busy ones, in rate, memory and processor time
#[derive(Parser)]
struct Args {
    /// Ports in all, of which two are busy
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(3..))]
    ports: u16,
    /// Ports in all when nobody sends
    #[arg(long, default_value_t = 256)]
    idle_ports: u16,
    /// Bytes of a frame
    #[arg(long, default_value_t = 64)]
    frame: usize,
    /// Rounds of each way of polling
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
}

fn main() -> Result<()> {
    raise_limit()?;
    if let Some(served) = serve_if_asked() {
        return served;
    }
    let args = Args::parse();
    println!("{}", Machine::here());
    pin(FRONTEND_CPU);
    for kind in [Kind::VhostdAdaptive, Kind::Vhostd] {
        beside_idle(kind, &args)?;
    }
    all_idle(&args)
}

/// A back end needs eight descriptors a port; it inherits the limit.
fn raise_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).context("open files")
}

fn start(kind: Kind, ports: u16, frame_max: usize) -> Result<Backend> {
    Backend::start(kind, &Shape { ports: ports.into(), taps: 0, first_tap: 0, frame_max, huge_pages: false })
}

/// The rate of two busy front ends alone and beside the others.
fn beside_idle(kind: Kind, args: &Args) -> Result<()> {
    let mut backend = start(kind, args.ports, args.frame)?;
    let sockets = backend.sockets();
    let (busy, others) = sockets.split_at(2);
    let mut pair = Guests::connect(busy, &LightConfig::default(), &Traffic::of(args.frame))?;
    pair.warm_up(WARM_UP)?;
    let time = Duration::from_secs_f64(args.seconds);
    let (mut alone, mut beside, mut memory) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..args.rounds {
        alone.push(pair.undisturbed_rate(&mut backend, time)?.0 / 1e6);
        let before = memory_kib()?;
        let idle = connect(others)?;
        pair.warm_up(SETTLE)?;
        beside.push(pair.undisturbed_rate(&mut backend, time)?.0 / 1e6);
        memory = (memory_kib()? - before) / others.len() as f64;
        drop(idle);
        pair.warm_up(SETTLE)?;
    }
    let spread = |values: &[f64]| Spread::of(values).context("no rounds");
    println!(
        "{}, {} B: {} M/s alone, {} M/s beside {} idle ports, ratio {}; {memory:.0} KiB a connected port",
        kind.name(),
        args.frame,
        spread(&alone)?,
        spread(&beside)?,
        others.len(),
        Spread::of_ratios(&beside, &alone).context("no rounds")?,
    );
    Ok(())
}

/// The processor time of a back end whose front ends are all connected and send nothing.
fn all_idle(args: &Args) -> Result<()> {
    let backend = start(Kind::VhostdAdaptive, args.idle_ports, args.frame)?;
    let idle = connect(&backend.sockets())?;
    std::thread::sleep(SETTLE);
    let (began, before) = (Instant::now(), backend.cpu_time());
    std::thread::sleep(Duration::from_secs_f64(args.seconds * f64::from(args.rounds)));
    let share = (backend.cpu_time() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    println!(
        "{}: {:.2} % of a core with {} idle ports",
        Kind::VhostdAdaptive.name(),
        share * 100.0,
        idle.len()
    );
    Ok(())
}

/// Front ends that offer all their buffers and then do nothing.
fn connect(sockets: &[PathBuf]) -> Result<Vec<LightGuest>> {
    let config = LightConfig { ring_size: IDLE_RING, ..LightConfig::default() };
    let connect = |socket: &PathBuf| {
        let mut guest = LightGuest::connect(socket, &config)?;
        guest.offer_all();
        Ok(guest)
    };
    sockets.iter().map(connect).collect()
}

/// Memory of the back end, which is this program's only child, with the pages of guests that it has touched.
fn memory_kib() -> Result<f64> {
    let children = std::fs::read_to_string("/proc/thread-self/children")?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", children.trim()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().next().context("VmRSS")?.parse()?)
}
