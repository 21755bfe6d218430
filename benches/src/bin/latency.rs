//! How long a frame is on its way, through vhostd and through DPDK.
//!
//! A guest sends one frame of 64 bytes to another, stamped with the time; when it has come, the next. The other two of four
//! ports carry the load: two light front ends that send to each other, held back to a part of the rate that they reach
//! alone. So these are the times that a guest sees beside busy neighbours. All front ends are driven by one thread, whose
//! own turn (send, look at four rings) is part of every figure, and the same for everybody.
//!
//! `cargo run --release -p benches --bin latency -- --help`
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::backend::{Backend, Kind, Shape, serve_if_asked};
use benches::figures::Spread;
use benches::machine::Machine;
use benches::traffic::{Guests, Traffic, frame};
use benches::watch::{TRIES, Watch};
use benches::{FRONTEND_CPU, pin};
use clap::Parser;
use dataplane::light::{LightConfig, LightGuest};
use serde::Serialize;
use vring::HEADER_LEN;

const KINDS: [Kind; 3] = [Kind::Vhostd, Kind::VhostdAdaptive, Kind::Dpdk];
const FRAME: usize = 64;
/// Where the stamp is in the frame.
const STAMP: usize = 14;
/// Descriptors of the load's rings: it comes in bursts of up to so many.
const LOAD_RING: u16 = 64;
const WARM_UP: Duration = Duration::from_millis(200);
/// After which a frame counts as lost: a measurement ends there.
const LOST: Duration = Duration::from_secs(2);
/// Before anything came, frames are sent again: DPDK drops them until its ports are up.
const FIRST_TRIES: u32 = 100;
const FIRST_LOST: Duration = Duration::from_millis(20);
/// Longer than an adaptive worker polls in vain.
const PAUSE: Duration = Duration::from_micros(200);

/// How long a frame is on its way through vhostd (busy and adaptive polling) and through DPDK
#[derive(Parser)]
struct Args {
    /// Rounds of each case
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds that each back end is measured in a round
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Write the figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What else goes on.
#[derive(Clone, Copy)]
enum Load {
    /// Nothing: one frame after the other.
    Alone,
    /// Nothing, and a pause before each frame.
    Paused,
    /// Percent of what the load's front ends can do.
    Percent(u8),
}

const LOADS: [Load; 5] = [Load::Alone, Load::Paused, Load::Percent(10), Load::Percent(50), Load::Percent(90)];

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Alone => f.pad("alone"),
            Self::Paused => f.pad("200 µs apart"),
            Self::Percent(percent) => f.pad(&format!("{percent} % load")),
        }
    }
}

/// Microseconds that so many of all frames did not exceed: medians of the rounds.
#[derive(Clone, Copy, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
    p999: f64,
}

#[derive(Serialize)]
struct Row {
    load: String,
    back_end: &'static str,
    load_mframes_per_second: f64,
    microseconds: Quantiles,
}

fn main() -> Result<()> {
    if let Some(served) = serve_if_asked() {
        return served;
    }
    let args = Args::parse();
    let machine = Machine::here();
    println!("{machine}");
    println!(
        "frames of {FRAME} B, microseconds from guest to guest: p50 / p99 / p99.9; load in millions of frames a second"
    );
    let heads = KINDS.map(|kind| format!("{:>26}{:>7}", kind.name(), "load"));
    println!("{:<12}{}", "", heads.concat());
    pin(FRONTEND_CPU);
    let mut rows = Vec::new();
    for load in LOADS {
        let mut rounds = KINDS.map(|_| Vec::new());
        for _ in 0..args.rounds {
            for (kind, rounds) in KINDS.into_iter().zip(&mut rounds) {
                let round = measure(kind, load, &args, machine.huge_pages);
                rounds.push(round.with_context(|| format!("{}, {load}", kind.name()))?);
            }
        }
        print!("{load:<12}");
        for (kind, rounds) in KINDS.into_iter().zip(rounds) {
            let row = Row::of(load, kind, &rounds).context("no rounds")?;
            let Quantiles { p50, p99, p999 } = row.microseconds;
            let cell = format!("{p50:.2} / {p99:.2} / {p999:.2}");
            print!("{cell:>26}{:>7.1}", row.load_mframes_per_second);
            rows.push(row);
        }
        println!();
    }
    args.json.as_ref().map_or(Ok(()), |file| {
        let report = serde_json::json!({ "machine": machine, "rows": rows });
        std::fs::write(file, format!("{report:#}\n")).with_context(|| format!("writing {}", file.display()))
    })
}

impl Row {
    fn of(load: Load, kind: Kind, rounds: &[(Quantiles, f64)]) -> Option<Self> {
        let median = |figure: &dyn Fn(&(Quantiles, f64)) -> f64| {
            Some(Spread::of(&rounds.iter().map(figure).collect::<Vec<_>>())?.median)
        };
        let microseconds = Quantiles {
            p50: median(&|round| round.0.p50)?,
            p99: median(&|round| round.0.p99)?,
            p999: median(&|round| round.0.p999)?,
        };
        let load_mframes_per_second = median(&|round| round.1)?;
        Some(Self { load: load.to_string(), back_end: kind.name(), load_mframes_per_second, microseconds })
    }
}

/// One round: the times, and the load in millions of frames a second.
fn measure(kind: Kind, load: Load, args: &Args, huge_pages: bool) -> Result<(Quantiles, f64)> {
    let time = Duration::from_secs_f64(args.seconds);
    let mut backend =
        Backend::start(kind, &Shape { ports: 4, taps: 0, first_tap: 0, frame_max: FRAME, huge_pages })?;
    let sockets = backend.sockets();
    let mut probe = Probe::connect(&sockets[..2])?;
    let mut neighbours = None;
    if let Load::Percent(percent) = load {
        let config = LightConfig { ring_size: LOAD_RING, ..LightConfig::default() };
        let mut guests = Guests::connect(&sockets[2..], &config, &Traffic::of(FRAME))?;
        guests.warm_up(WARM_UP)?;
        let (rate, _) = guests.undisturbed_rate(&mut backend, WARM_UP)?;
        neighbours = Some(Neighbours { guests, rate: rate * f64::from(percent) / 100.0, delivered: 0 });
    }
    let pause = if matches!(load, Load::Paused) { PAUSE } else { Duration::ZERO };
    probe.first(&mut neighbours)?;
    probe.run(WARM_UP, pause, &mut neighbours)?;
    for _ in 1..TRIES {
        let watch = Watch::start(&backend);
        let round = probe.run(time, pause, &mut neighbours)?;
        if !watch.disturbed(&mut backend)? {
            return Ok(round);
        }
    }
    probe.run(time, pause, &mut neighbours)
}

/// The load.
struct Neighbours {
    guests: Guests,
    /// Frames a second, both directions.
    rate: f64,
    delivered: u64,
}

impl Neighbours {
    /// Lets them go on if they are not ahead of their rate.
    #[inline]
    fn step(&mut self, elapsed: Duration) {
        if (self.delivered as f64) < elapsed.as_secs_f64() * self.rate {
            self.delivered += self.guests.step();
        }
    }
}

/// Two guests, one of which sends to the other.
struct Probe {
    guests: [LightGuest; 2],
    frame: Vec<u8>,
    received: Vec<u8>,
    start: Instant,
}

impl Probe {
    fn connect(sockets: &[PathBuf]) -> Result<Self> {
        let connect = |socket: &PathBuf| -> Result<_> {
            let mut guest = LightGuest::connect(socket, &LightConfig::default())?;
            guest.offer_all();
            Ok(guest)
        };
        let mut guests = [connect(&sockets[0])?, connect(&sockets[1])?];
        // So that a switch knows where the other one is.
        ensure!(guests[1].send(0, &[0; HEADER_LEN], &frame(5, 4, FRAME)), "no buffer in a fresh ring");
        let (frame, start) = (frame(4, 5, FRAME), Instant::now());
        Ok(Self { guests, frame, received: Vec::new(), start })
    }

    /// Waits until frames come through.
    fn first(&mut self, load: &mut Option<Neighbours>) -> Result<()> {
        for _ in 0..FIRST_TRIES {
            if self.trip(Instant::now(), load, FIRST_LOST)?.is_some() {
                return Ok(());
            }
        }
        bail!("the back end delivers nothing")
    }

    /// Sends frames for so long, each when the one before has come; returns how long they took, and the load's rate.
    fn run(
        &mut self,
        time: Duration,
        pause: Duration,
        load: &mut Option<Neighbours>,
    ) -> Result<(Quantiles, f64)> {
        let mut times = Vec::new();
        let begun = Instant::now();
        if let Some(load) = load {
            load.delivered = 0;
        }
        while begun.elapsed() < time {
            times.push(self.trip(begun, load, LOST)?.context("a frame was lost")?);
            let end = Instant::now() + pause;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        }
        let rate =
            load.as_ref().map_or(0.0, |load| load.delivered as f64 / begun.elapsed().as_secs_f64() / 1e6);
        times.sort_unstable();
        let at = |part: f64| times[(times.len() as f64 * part) as usize].as_secs_f64() * 1e6;
        Ok((Quantiles { p50: at(0.5), p99: at(0.99), p999: at(0.999) }, rate))
    }

    /// One frame; `None` if it does not come within `lost`.
    fn trip(
        &mut self,
        begun: Instant,
        load: &mut Option<Neighbours>,
        lost: Duration,
    ) -> Result<Option<Duration>> {
        let sent = self.start.elapsed();
        self.frame[STAMP..STAMP + 8].copy_from_slice(&u64::try_from(sent.as_nanos())?.to_be_bytes());
        ensure!(self.guests[0].send(0, &[0; HEADER_LEN], &self.frame), "no buffer for one frame");
        loop {
            if let Some(load) = load {
                load.step(begun.elapsed());
            }
            let come = self.guests[1].receive(0, &mut self.received);
            let took = self.start.elapsed() - sent;
            // Others' frames come here until a switch knows where they belong.
            if come && self.received[HEADER_LEN..] == self.frame {
                return Ok(Some(took));
            }
            if took > lost {
                return Ok(None);
            }
        }
    }
}
