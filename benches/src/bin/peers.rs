//! The same traffic through vhostd and through its peers, side by side.
//!
//! Light front ends on one core, the back end on another; frames of all directions added up. The back ends of a case live side
//! by side, and take turns on that core, each stopped while it is another's: machines drift, so rounds are short, and many;
//! medians and the ratios round by round are what counts. vhostd and OVS NORMAL are learning switches, OVS flows has a rule
//! each way, DPDK's testpmd passes frames on without a look, and the bare loop is what one copy a frame costs.
//!
//! `cargo run --release -p benches --bin peers -- --help`
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use benches::backend::{Backend, Kind, Shape, serve_if_asked};
use benches::figures::Spread;
use benches::machine::Machine;
use benches::plot::BarChart;
use benches::traffic::{Guests, Traffic};
use benches::{FRONTEND_CPU, pin};
use clap::{Parser, ValueEnum};
use dataplane::light::LightConfig;
use serde::Serialize;
use vring::features;

const LENGTHS: [usize; 7] = [64, 128, 256, 512, 1024, 1500, 9000];
const KINDS: [Kind; 6] = [Kind::Vhostd, Kind::Before, Kind::Dpdk, Kind::Limit, Kind::Ovs, Kind::OvsFlows];
const RATIOS: [&str; 3] = ["vhostd/DPDK", "vhostd/limit", "vhostd/before"];
const WARM_UP: Duration = Duration::from_millis(200);
/// The same for one that has had its core before.
const SETTLE: Duration = Duration::from_millis(10);
/// For a case in which switches that learn slowly have many addresses to learn.
const WARM_UP_LEARNING: Duration = Duration::from_secs(2);

/// The same traffic through vhostd and its peers, side by side; two to three minutes
#[derive(Parser)]
struct Args {
    /// Every case; some eight minutes
    #[arg(long)]
    all: bool,
    /// Only these parts of the matrix
    #[arg(long, value_delimiter = ',')]
    part: Vec<Part>,
    /// Only these back ends
    #[arg(long, value_delimiter = ',')]
    backend: Vec<Kind>,
    /// Rounds of each case
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds that each back end is measured in a round
    #[arg(long, default_value_t = 0.05)]
    seconds: f64,
    /// Write the figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw them into this directory
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// A part of the matrix: what varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Part {
    /// Lengths of frames, between two ports
    Lengths,
    /// The same for guests without mergeable buffers
    NotMergeable,
    /// The same with packed rings
    Packed,
    /// Ports of a network, each sending to all others
    Ports,
    /// Addresses seen, all of them talking all the time
    Stations,
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Self::Lengths => "frame length, bytes",
            Self::NotMergeable => "frame length, bytes, no mergeable buffers",
            Self::Packed => "frame length, bytes, packed rings",
            Self::Ports => "ports of a network, 64 B",
            Self::Stations => "addresses seen, 64 B",
        }
    }
}

/// One row: everybody gets this.
struct Case {
    part: Part,
    name: String,
    ports: usize,
    traffic: Traffic,
    kinds: Vec<Kind>,
}

impl Case {
    /// Whether a back end takes part. A build of before does what this one does.
    fn has(&self, kind: Kind) -> bool {
        self.kinds.contains(if kind == Kind::Before { &Kind::Vhostd } else { &kind })
    }

    fn warm_up(&self) -> Duration {
        if self.part == Part::Stations { WARM_UP_LEARNING } else { WARM_UP }
    }

    fn matrix(all: bool) -> Vec<Self> {
        use Kind::{Dpdk, Limit, Ovs, Vhostd};
        let mut cases = Vec::new();
        let mut add = |part, name: String, ports, traffic, kinds: &[Kind]| {
            cases.push(Self { part, name, ports, traffic, kinds: kinds.into() });
        };
        let without_ovs = [Vhostd, Dpdk, Limit];
        for part in [Part::Lengths, Part::NotMergeable, Part::Packed] {
            for len in LENGTHS {
                if !all && (![64, 512, 1500].contains(&len) || part == Part::NotMergeable) {
                    continue;
                }
                let with_ovs = part == Part::Lengths && (all || len != 512);
                let kinds = if with_ovs { &KINDS[..] } else { &without_ovs };
                add(part, len.to_string(), 2, Traffic::of(len), kinds);
            }
            if all || part == Part::Lengths {
                add(part, "IMIX".into(), 2, Traffic::imix(), &without_ovs);
            }
        }
        let ports: &[usize] = if all { &[2, 8, 32] } else { &[8] };
        for ports in ports {
            add(Part::Ports, ports.to_string(), *ports, Traffic::of(64), &[Vhostd, Ovs]);
        }
        let stations: &[u32] = if all { &[10, 1_000, 100_000] } else { &[1_000] };
        for stations in stations {
            let kinds = if all { &KINDS[..] } else { &[Vhostd, Dpdk, Ovs] };
            let traffic = Traffic::of(64).with_stations(*stations);
            add(Part::Stations, stations.to_string(), 2, traffic, kinds);
        }
        cases
    }
}

/// What a case gave.
#[derive(Serialize)]
struct Row {
    part: Part,
    case: String,
    ports: usize,
    /// Rounds in which other programs took processor time, of any back end.
    disturbed: u32,
    /// By back end.
    mframes_per_second: BTreeMap<&'static str, Spread>,
    vhostd_to_dpdk: Option<Spread>,
    vhostd_to_limit: Option<Spread>,
    vhostd_to_before: Option<Spread>,
}

#[derive(Serialize)]
struct Report<'a> {
    machine: &'a Machine,
    rounds: u16,
    seconds: f64,
    rows: &'a [Row],
}

fn main() -> Result<()> {
    if let Some(served) = serve_if_asked() {
        return served;
    }
    let args = Args::parse();
    let machine = Machine::here();
    println!("{machine}");
    let kinds: Vec<Kind> = KINDS.into_iter().filter(|kind| wanted(*kind, &args.backend)).collect();
    let mut cases = Case::matrix(args.all);
    cases.retain(|case| args.part.is_empty() || args.part.contains(&case.part));
    cases.retain(|case| kinds.iter().any(|kind| case.has(*kind)));
    pin(FRONTEND_CPU);
    let mut rows: Vec<Row> = Vec::new();
    let count = cases.len();
    for (n, case) in cases.iter().enumerate() {
        if rows.last().is_none_or(|row| row.part != case.part) {
            print_head(case.part, &kinds);
        }
        if std::io::stderr().is_terminal() {
            eprint!("case {} of {count}\r", n + 1);
        }
        let row = measure(case, &kinds, &args, machine.huge_pages)?;
        print_row(&row, &kinds);
        rows.push(row);
    }
    if let Some(file) = &args.json {
        let report = Report { machine: &machine, rounds: args.rounds, seconds: args.seconds, rows: &rows };
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("writing {}", file.display()))?;
    }
    args.svg.as_ref().map_or(Ok(()), |dir| draw(dir, &rows, &kinds))
}

/// Whether a back end is asked for, and there.
fn wanted(kind: Kind, asked: &[Kind]) -> bool {
    if !asked.is_empty() && !asked.contains(&kind) {
        return false;
    }
    if let Some(way_out) = kind.missing() {
        if kind == Kind::Before && asked.is_empty() {
            return false;
        }
        println!("{} is not installed and left out: {way_out}", kind.name());
        return false;
    }
    true
}

/// What the front ends of a case take, if offered.
fn config(part: Part) -> LightConfig {
    let mut config = LightConfig::default();
    if part == Part::NotMergeable {
        config.features &= !(1 << features::MRG_RXBUF);
    }
    if part == Part::Packed {
        config.features |= 1 << features::RING_PACKED;
    }
    config
}

/// All rounds of one case.
fn measure(case: &Case, kinds: &[Kind], args: &Args, huge_pages: bool) -> Result<Row> {
    let time = Duration::from_secs_f64(args.seconds);
    let about = |kind: Kind| format!("{}, {}: {}", case.part.title(), case.name, kind.name());
    let mut contenders = Vec::new();
    for kind in kinds.iter().copied().filter(|kind| case.has(*kind)) {
        contenders.push(Contender::start(kind, case, huge_pages).with_context(|| about(kind))?);
    }
    for _ in 0..args.rounds {
        for contender in &mut contenders {
            contender.turn(time).with_context(|| about(contender.kind))?;
        }
    }
    let rates = |kind: Kind| contenders.iter().find(|c| c.kind == kind).map(|c| &c.rates[..]);
    let ratio = |to: Kind| Spread::of_ratios(rates(Kind::Vhostd)?, rates(to)?);
    Ok(Row {
        part: case.part,
        case: case.name.clone(),
        ports: case.ports,
        disturbed: contenders.iter().map(|c| c.disturbed).sum(),
        vhostd_to_dpdk: ratio(Kind::Dpdk),
        vhostd_to_limit: ratio(Kind::Limit),
        vhostd_to_before: ratio(Kind::Before),
        mframes_per_second: contenders
            .iter()
            .filter_map(|c| Some((c.kind.name(), Spread::of(&c.rates)?)))
            .collect(),
    })
}

/// A back end of a case, with front ends of its own; stopped when it is another's turn.
struct Contender {
    kind: Kind,
    backend: Backend,
    guests: Guests,
    /// Millions of frames a second, round by round.
    rates: Vec<f64>,
    /// Rounds in which other programs took processor time.
    disturbed: u32,
}

impl Contender {
    fn start(kind: Kind, case: &Case, huge_pages: bool) -> Result<Self> {
        let shape =
            Shape { ports: case.ports, taps: 0, first_tap: 0, frame_max: case.traffic.longest(), huge_pages };
        let mut backend = Backend::start(kind, &shape)?;
        let mut guests = Guests::connect(&backend.sockets(), &config(case.part), &case.traffic)?;
        guests.warm_up(case.warm_up())?;
        backend.pause()?;
        Ok(Self { kind, backend, guests, rates: Vec::new(), disturbed: 0 })
    }

    fn turn(&mut self, time: Duration) -> Result<()> {
        self.backend.resume()?;
        self.guests.warm_up(SETTLE)?;
        let (rate, disturbed) = self.guests.undisturbed_rate(&mut self.backend, time)?;
        self.rates.push(rate / 1e6);
        self.disturbed += u32::from(disturbed);
        self.backend.pause()
    }
}

fn print_head(part: Part, kinds: &[Kind]) {
    println!("\n{}; millions of frames a second, median and half the spread", part.title());
    let columns = kinds.iter().map(|kind| kind.name()).chain(RATIOS);
    println!("{:>8}{}", "", columns.map(|name| format!("{name:>14}")).collect::<String>());
}

fn print_row(row: &Row, kinds: &[Kind]) {
    let figures = kinds.iter().map(|kind| row.mframes_per_second.get(kind.name()).copied());
    let columns = figures.chain([row.vhostd_to_dpdk, row.vhostd_to_limit, row.vhostd_to_before]);
    let cell = |spread: Option<Spread>| spread.map_or_else(|| format!("{:>14}", "-"), |s| format!("{s:>14}"));
    let disturbed = if row.disturbed == 0 { "" } else { "  disturbed by other programs" };
    println!("{:>8}{}{disturbed}", row.case, columns.map(cell).collect::<String>());
}

/// A chart for each part.
fn draw(dir: &Path, rows: &[Row], kinds: &[Kind]) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for part in Part::value_variants() {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.part == *part).collect();
        if rows.is_empty() {
            continue;
        }
        let values = |row: &Row| {
            let median = |kind: &Kind| row.mframes_per_second.get(kind.name()).map(|spread| spread.median);
            kinds.iter().map(median).collect()
        };
        let chart = BarChart {
            title: part.title().into(),
            unit: "millions of frames a second".into(),
            series: kinds.iter().map(|kind| kind.name().into()).collect(),
            groups: rows.iter().map(|row| (row.case.clone(), values(row))).collect(),
        };
        let name = part.to_possible_value().context("every part has a name")?;
        let file = dir.join(format!("{}.svg", name.get_name()));
        std::fs::write(&file, chart.to_svg()).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}
