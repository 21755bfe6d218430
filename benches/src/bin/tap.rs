//! Between a guest and the host: frames through a TAP, and TCP between two TAPs.
//!
//! Frames: a light front end and a load on one core, the back end on the other. *To the host*, the front end sends and the
//! kernel counts what the TAP received. *To the guest*, frames that are written to another TAP are redirected by tc, so that
//! they cost their sender little, and the front end counts. A bare loop that writes, or reads, one frame a system call and
//! does nothing else with it is the limit of that way. All of them live side by side and take turns, each stopped while it is
//! another's: machines drift, so rounds are short, and many.
//!
//! TCP (`--tcp`): iperf3 in two network namespaces, each with a TAP of the back end; for comparison, a veth between them.
//!
//! Everything happens in network namespaces that end with the program; it needs root, tc and, for TCP, iperf3.
//!
//! `cargo run --release -p benches --bin tap -- --help`
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::backend::{Backend, Kind, Shape, bound, serve_if_asked, tap};
use benches::figures::Spread;
use benches::machine::Machine;
use benches::traffic::frame;
use benches::watch::{TRIES, Watch};
use benches::{BACKEND_CPU, FRONTEND_CPU, pin};
use clap::{Parser, ValueEnum};
use dataplane::light::{LightConfig, LightGuest};
use sys::tap::{TapQueue, VNET_HEADER_LEN};

const INSIDE: &str = "BENCH_TAP_NAMESPACE";
/// Buffers of the bare loop: as a ring of a light front end has them.
const BUFFERS: usize = 256;
const STRIDE: usize = 2304;
/// Frames that the load sends before it looks at the front end.
const LOAD_BURST: usize = 32;
const WARM_UP: Duration = Duration::from_millis(300);
/// The same for one that has had its core before.
const SETTLE: Duration = Duration::from_millis(10);
/// How long a back end may take until the first frame is through, or a program until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// Frames and TCP between a guest and the host, side by side with peers
#[derive(Parser)]
struct Args {
    /// TCP between two TAPs instead of frames
    #[arg(long)]
    tcp: bool,
    /// Only these back ends, beside the limit
    #[arg(long, value_delimiter = ',')]
    backend: Vec<Kind>,
    /// Only frames that go there
    #[arg(long)]
    to: Option<Direction>,
    /// Bytes of a frame
    #[arg(long, value_delimiter = ',', default_value = "64,1500",
        value_parser = clap::value_parser!(u16).range(60..=1514))]
    length: Vec<u16>,
    /// Rounds of each case: 30 of frames, 3 of TCP
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Seconds of each measurement: 0.05 of frames, 1 of TCP
    #[arg(long)]
    seconds: Option<f64>,
}

/// Who moves frames: a back end, or the limit.
type Way = Option<Kind>;

fn main() -> Result<ExitCode> {
    if let Some(served) = serve_if_asked() {
        return served.map(|()| ExitCode::SUCCESS);
    }
    let args = Args::parse();
    if std::env::var_os(INSIDE).is_none() {
        let mut again = bound("unshare");
        again.args(["--net", "--"]).arg(std::env::current_exe()?).args(std::env::args().skip(1));
        let status = again.env(INSIDE, "1").status().context("unshare")?;
        return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    run(&["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"])?;
    println!("{}", Machine::here());
    if args.tcp { all_tcp(&args) } else { all_frames(&args) }.map(|()| ExitCode::SUCCESS)
}

/// The limit, and those back ends that are there and asked for.
fn ways(kinds: &[Kind], args: &Args) -> Vec<Way> {
    let mut ways = vec![None];
    for kind in kinds.iter().copied().filter(|kind| args.backend.is_empty() || args.backend.contains(kind)) {
        match kind.missing() {
            None => ways.push(Some(kind)),
            Some(_) if kind == Kind::Before && args.backend.is_empty() => {}
            Some(way_out) => println!("{} is not installed and left out: {way_out}", kind.name()),
        }
    }
    ways
}

/// Medians of the rounds of all ways, and ratios to the first of them.
fn print_row(name: &str, figures: &BTreeMap<Way, Vec<f64>>, ways: &[Way]) {
    let of = |way: &Way| figures.get(way).and_then(|values| Spread::of(values));
    let ratio = |way: &Way| Some(Spread::of_ratios(figures.get(way)?, figures.get(&ways[0])?)?.median);
    let cell = |way: &Way| match (of(way), ratio(way)) {
        (Some(spread), Some(ratio)) => format!("{spread:>13} ({ratio:.2})"),
        _ => format!("{:>20}", "-"),
    };
    println!("{name:<16}{}", ways.iter().map(cell).collect::<String>());
}

fn print_head(title: &str, limit: &str, ways: &[Way]) {
    println!("\n{title}, median and half the spread (ratio to {limit})");
    let name = |way: &Way| format!("{:>20}", way.map_or(limit.to_owned(), |kind| kind.name().to_owned()));
    println!("{:<16}{}", "", ways.iter().map(name).collect::<String>());
}

// Frames.

/// Where frames go.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// From the guest to the host
    Host,
    /// From the host to the guest
    Guest,
}

fn all_frames(args: &Args) -> Result<()> {
    let ways = ways(&[Kind::Vhostd, Kind::Before, Kind::Dpdk, Kind::Ovs, Kind::CloudHypervisor], args);
    let (rounds, seconds) = (args.rounds.unwrap_or(30), args.seconds.unwrap_or(0.05));
    print_head("millions of frames a second", "bare loop", &ways);
    pin(FRONTEND_CPU);
    for (direction, name) in [(Direction::Host, "to host"), (Direction::Guest, "to guest")] {
        for len in args.length.iter().filter(|_| args.to.is_none_or(|to| to == direction)) {
            let about =
                |way: Way| format!("{name}, {len} B: {}", way.map_or("bare loop", |kind| kind.name()));
            let mut contenders = Vec::new();
            // Cloud Hypervisor waits for a kick of the RX ring, which our front end never gives.
            let measured = |way: &&Way| direction == Direction::Host || **way != Some(Kind::CloudHypervisor);
            for (n, way) in ways.iter().filter(measured).enumerate() {
                let contender = Contender::start(*way, n, direction, usize::from(*len));
                contenders.push(contender.with_context(|| about(*way))?);
            }
            for _ in 0..rounds {
                for contender in &mut contenders {
                    let turn = contender.turn(Duration::from_secs_f64(seconds));
                    turn.with_context(|| about(contender.way))?;
                }
            }
            let note = if contenders.iter().any(|contender| contender.disturbed) { " *" } else { "" };
            let figures = contenders.iter().map(|c| (c.way, c.rates.clone())).collect();
            print_row(&format!("{name}, {len} B{note}"), &figures, &ways);
        }
    }
    println!("* disturbed by other programs");
    Ok(())
}

/// One way, with a TAP of its own; stopped when it is another's turn.
struct Contender {
    way: Way,
    mover: Mover,
    traffic: Traffic,
    /// Millions of frames a second, round by round.
    rates: Vec<f64>,
    /// Other programs took part in a round.
    disturbed: bool,
}

/// What moves frames.
enum Mover {
    Bare(Bare),
    Backend(Backend),
}

impl Contender {
    fn start(way: Way, number: usize, direction: Direction, len: usize) -> Result<Self> {
        let (mover, guest) = match way {
            None => (Mover::Bare(Bare::start(number, direction, len)?), None),
            Some(kind) => {
                let huge_pages = Machine::here().huge_pages;
                let shape = Shape { ports: 1, taps: 1, first_tap: number, frame_max: len, huge_pages };
                let backend = Backend::start(kind, &shape)?;
                let guest = LightGuest::connect(&backend.sockets()[0], &LightConfig::default())?;
                (Mover::Backend(backend), Some(guest))
            }
        };
        let traffic = Traffic::start(number, direction, len, guest)?;
        let mut contender = Self { way, mover, traffic, rates: Vec::new(), disturbed: false };
        let start = Instant::now();
        while contender.arrived()? == 0 {
            ensure!(start.elapsed() < READY_TIMEOUT, "no frame arrives");
            contender.traffic.run_for(Duration::from_millis(1));
        }
        contender.traffic.run_for(WARM_UP);
        contender.pause()?;
        Ok(contender)
    }

    /// Frames that arrived so far: at the front end, at the bare loop, or at the kernel.
    fn arrived(&self) -> Result<u64> {
        match (&self.traffic.load, &self.mover) {
            (None, _) => Ok(kernel_received(&self.traffic.tap)?.0),
            (Some(_), Mover::Bare(bare)) => Ok(bare.read.load(Ordering::Relaxed)),
            (Some(_), Mover::Backend(_)) => Ok(self.traffic.received),
        }
    }

    fn turn(&mut self, time: Duration) -> Result<()> {
        match &self.mover {
            Mover::Bare(bare) => bare.resume(),
            Mover::Backend(backend) => backend.resume()?,
        }
        self.traffic.run_for(SETTLE);
        let mut tries = 0;
        loop {
            let watch = match &self.mover {
                Mover::Backend(backend) => Some(Watch::start(backend)),
                Mover::Bare(_) => None,
            };
            let (start, before) = (Instant::now(), self.arrived()?);
            self.traffic.run_for(time);
            let rate = (self.arrived()? - before) as f64 / start.elapsed().as_secs_f64();
            let disturbed = match (watch, &mut self.mover) {
                (Some(watch), Mover::Backend(backend)) => watch.disturbed(backend)?,
                _ => false,
            };
            tries += 1;
            if !disturbed || tries == TRIES {
                self.rates.push(rate / 1e6);
                self.disturbed |= disturbed;
                return self.pause();
            }
        }
    }

    fn pause(&mut self) -> Result<()> {
        match &mut self.mover {
            Mover::Bare(bare) => bare.pause(),
            Mover::Backend(backend) => backend.pause()?,
        }
        Ok(())
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // OVS makes its TAP persistent. Others' goes with them.
        if self.way == Some(Kind::Ovs) {
            let _ = run(&["ip", "link", "delete", &self.traffic.tap]);
        }
    }
}

/// A loop that reads or writes the TAP and does nothing else.
struct Bare {
    state: Arc<AtomicU8>,
    read: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// States of it. `PAUSING` until it has seen that.
const RUNNING: u8 = 0;
const PAUSING: u8 = 1;
const PAUSED: u8 = 2;
const STOPPED: u8 = 3;

impl Bare {
    fn start(number: usize, direction: Direction, len: usize) -> Result<Self> {
        let queue = TapQueue::create(&tap(number), false)?;
        let (state, read) = (Arc::new(AtomicU8::new(RUNNING)), Arc::new(AtomicU64::new(0)));
        let (seen, count) = (state.clone(), read.clone());
        let thread = std::thread::spawn(move || {
            pin(BACKEND_CPU);
            // As many buffers as a ring has, as far apart.
            let (sent, mut room) = (with_header(len), vec![0; 1 << 16]);
            let mut buffers = vec![0; BUFFERS * STRIDE];
            buffers.chunks_mut(STRIDE).for_each(|buffer| buffer[..sent.len()].copy_from_slice(&sent));
            let mut buffers = buffers.chunks(STRIDE).cycle();
            loop {
                match seen.load(Ordering::Relaxed) {
                    RUNNING => {}
                    STOPPED => return,
                    _ => {
                        let _ = seen.compare_exchange(PAUSING, PAUSED, Ordering::Relaxed, Ordering::Relaxed);
                        std::thread::park();
                        continue;
                    }
                }
                match direction {
                    // Not up yet: the kernel says so.
                    Direction::Host => {
                        let buffer = buffers.next().expect("it never ends");
                        let _ = rustix::io::write(queue.as_fd(), &buffer[..sent.len()]);
                    }
                    Direction::Guest => {
                        if rustix::io::read(queue.as_fd(), &mut room).is_ok() {
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            }
        });
        Ok(Self { state, read, thread: Some(thread) })
    }

    fn pause(&self) {
        self.state.store(PAUSING, Ordering::Relaxed);
        while self.state.load(Ordering::Relaxed) == PAUSING {
            std::thread::yield_now();
        }
    }

    fn resume(&self) {
        self.set(RUNNING);
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::Relaxed);
        self.thread.iter().for_each(|thread| thread.thread().unpark());
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.set(STOPPED);
        // It ends with the TAP closed: the next one may have its name.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A frame to the guest, or from it, with a header that asks for nothing.
fn with_header(len: usize) -> Vec<u8> {
    [vec![0; VNET_HEADER_LEN], frame(1, 0, len)].concat()
}

/// What this thread does: sends, or lets the front end send.
struct Traffic {
    /// The back end's.
    tap: String,
    /// Frames written here come out of the TAP.
    load: Option<TapQueue>,
    sent: Vec<u8>,
    guest: Option<LightGuest>,
    received: u64,
}

impl Traffic {
    fn start(number: usize, direction: Direction, len: usize, mut guest: Option<LightGuest>) -> Result<Self> {
        run(&["ip", "link", "set", &tap(number), "up"])?;
        let to_host = direction == Direction::Host;
        if let Some(guest) = &mut guest {
            let sent = frame(0, 1, len);
            guest.load(if to_host { std::slice::from_ref(&sent) } else { &[] });
        }
        let load = if to_host { None } else { Some(redirected(number)?) };
        Ok(Self { tap: tap(number), load, sent: with_header(len), guest, received: 0 })
    }

    #[inline]
    fn step(&mut self) {
        if let Some(load) = &self.load {
            for _ in 0..LOAD_BURST {
                // What the TAP has no room for is dropped behind the redirection: this one takes everything.
                let _ = rustix::io::write(load.as_fd(), &self.sent);
            }
        }
        if let Some(guest) = &mut self.guest {
            self.received += guest.recycle().1;
        }
    }

    fn run_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..16 {
                self.step();
            }
        }
    }
}

/// A TAP: what is written to it comes out of the back end's.
fn redirected(number: usize) -> Result<TapQueue> {
    let (name, to) = (format!("load{number}"), tap(number));
    let load = TapQueue::create(&name, false)?;
    run(&["ip", "link", "set", &name, "up"])?;
    for line in [
        format!("qdisc replace dev {to} root noqueue"),
        format!("qdisc add dev {name} clsact"),
        format!(
            "filter add dev {name} ingress protocol all u32 match u32 0 0 action mirred egress redirect dev {to}"
        ),
    ] {
        run(&["tc"].into_iter().chain(line.split(' ')).collect::<Vec<_>>())?;
    }
    Ok(load)
}

/// Frames and bytes that the kernel received from an interface (proc(5), /proc/net/dev).
fn kernel_received(name: &str) -> Result<(u64, u64)> {
    received_in(&std::fs::read_to_string("/proc/self/net/dev")?, name)
}

fn received_in(table: &str, name: &str) -> Result<(u64, u64)> {
    let line = table.lines().filter_map(|line| line.trim().split_once(':')).find(|(have, _)| *have == name);
    let (_, line) = line.with_context(|| format!("no interface {name}"))?;
    let mut numbers = line.split_whitespace().map_while(|word| word.parse().ok());
    let bytes = numbers.next().context("bytes")?;
    Ok((numbers.next().context("frames")?, bytes))
}

/// Runs a program that has nothing to say.
fn run(words: &[&str]) -> Result<()> {
    let output = Command::new(words[0]).args(&words[1..]).output().with_context(|| words.join(" "))?;
    ensure!(output.status.success(), "{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

// TCP.

fn all_tcp(args: &Args) -> Result<()> {
    let ways = ways(&[Kind::VhostdAdaptive, Kind::Cable, Kind::Dpdk, Kind::Ovs, Kind::OvsTso], args);
    print_head("TCP, Gbit/s", "veth", &ways);
    let (mut rates, mut lengths) = (BTreeMap::<Way, Vec<f64>>::new(), BTreeMap::<Way, Vec<f64>>::new());
    for way in (0..args.rounds.unwrap_or(3)).flat_map(|_| &ways) {
        let measured = tcp(*way, args.seconds.unwrap_or(1.0));
        let (rate, length) = measured.with_context(|| way.map_or("veth", Kind::name).to_owned())?;
        rates.entry(*way).or_default().push(rate);
        lengths.entry(*way).or_default().push(length);
    }
    print_row("", &rates, &ways);
    print_row("bytes a frame", &lengths, &ways);
    Ok(())
}

/// A network namespace, held by a process.
struct Namespace(Child);

impl Namespace {
    fn new() -> Result<Self> {
        let ours = std::fs::read_link("/proc/self/ns/net")?;
        let holder = Self(bound("unshare").args(["--net", "--", "sleep", "infinity"]).spawn()?);
        let theirs = format!("/proc/{}/ns/net", holder.0.id());
        wait_until("a network namespace", || std::fs::read_link(&theirs).is_ok_and(|there| there != ours))?;
        Ok(holder)
    }

    /// `words` within it.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = bound("nsenter");
        command.args(["--target", &self.0.id().to_string(), "--net", "--"]).args(words);
        command
    }

    /// Takes an interface and gives it an address.
    fn take(&self, interface: &str, address: &str) -> Result<()> {
        run(&["ip", "link", "set", interface, "netns", &self.0.id().to_string()])?;
        for line in
            [format!("ip address add {address}/24 dev {interface}"), format!("ip link set {interface} up")]
        {
            let status = self.command(&line.split(' ').collect::<Vec<_>>()).status()?;
            ensure!(status.success(), "{line}");
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gbit/s of one stream, and bytes of a frame on average as it left the sender's TAP.
fn tcp(way: Way, seconds: f64) -> Result<(f64, f64)> {
    let namespaces = [Namespace::new()?, Namespace::new()?];
    let huge_pages = Machine::here().huge_pages;
    let backend = match way {
        Some(Kind::Cable) => Some(Backend::start(
            Kind::Cable,
            &Shape { ports: 1, taps: 2, first_tap: 0, frame_max: 1500, huge_pages },
        )?),
        Some(kind) => Some(Backend::start(
            kind,
            &Shape { ports: 0, taps: 2, first_tap: 0, frame_max: 1500, huge_pages },
        )?),
        None => {
            let veth = format!("ip link add {} type veth peer name {}", tap(0), tap(1));
            run(&veth.split(' ').collect::<Vec<_>>())?;
            None
        }
    };
    if way == Some(Kind::Dpdk) {
        // It finds TAPs by name until it forwards, which is soon after it set the last one up.
        wait_until("testpmd", || is_up(&tap(1)))?;
        std::thread::sleep(Duration::from_millis(500));
    }
    namespaces[0].take(&tap(0), "192.0.2.1")?;
    namespaces[1].take(&tap(1), "192.0.2.2")?;
    let mut server = namespaces[1].command(&["iperf3", "--server"]);
    let mut server = Namespace(server.stdout(Stdio::null()).spawn()?);
    wait_until("a connection", || {
        let probe = ["iperf3", "--client", "192.0.2.2", "--bytes", "1", "--connect-timeout", "1000"];
        succeeds(namespaces[0].command(&probe))
    })?;
    let received = || -> Result<(u64, u64)> {
        let table = namespaces[1].command(&["cat", "/proc/self/net/dev"]).output()?;
        received_in(&String::from_utf8_lossy(&table.stdout), &tap(1))
    };
    let before = received()?;
    let time = seconds.ceil().to_string();
    let client = ["iperf3", "--client", "192.0.2.2", "--time", &time, "--json"];
    let output = namespaces[0].command(&client).output().context("iperf3")?;
    let after = received()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let rate = rate.with_context(|| format!("iperf3 says {}", report["error"]))?;
    ensure!(server.0.try_wait()?.is_none(), "the server ended");
    drop((server, backend));
    Ok((rate / 1e9, (after.1 - before.1) as f64 / (after.0 - before.0) as f64))
}

fn is_up(interface: &str) -> bool {
    let output = Command::new("ip").args(["-oneline", "link", "show", "dev", interface, "up"]).output();
    output.is_ok_and(|output| !output.stdout.is_empty())
}

fn succeeds(mut command: Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn wait_until(what: &str, mut there: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !there() {
        if start.elapsed() > READY_TIMEOUT {
            bail!("{what} did not come in {READY_TIMEOUT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_bytes_of_the_interface_asked_for() {
        let table = "Inter-|   Receive\n face |bytes    packets errs\n  tap1: 1 2 3\n   tap:   640      10    0    0\n";
        assert_eq!(received_in(table, "tap").unwrap(), (10, 640));
        assert_eq!(received_in(table, "tap1").unwrap(), (2, 1));
        assert!(received_in(table, "ap").is_err());
    }
}
