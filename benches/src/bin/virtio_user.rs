//! An independent front end: DPDK's virtio-user, two ports of a `dpdk-testpmd` on one core, against vhostd and against
//! DPDK's own vhost library on the other.
//!
//! Frames go round: the front end sends a few thousand, the back end passes them from one port to the other, the front
//! end sends what it receives on again. Figures are testpmd's own (`show port stats`), both ports added up. A virtio-user
//! is not light: it fills and frees a buffer for each frame, which costs it as much as or more than the frame costs the
//! back end. So these figures show that a real driver gets at least what DPDK would give it; how fast a back end is, `peers`
//! shows.
//!
//! `cargo run --release -p benches --bin virtio_user -- --help`
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use benches::backend::{Backend, Kind, Shape, bound, cpu_time, serve_if_asked, testpmd};
use benches::figures::Spread;
use benches::machine::Machine;
use benches::watch::{BUSY, TRIES};
use benches::{BACKEND_CPU, FRONTEND_CPU};
use clap::Parser;

const WARM_UP: Duration = Duration::from_millis(500);

/// DPDK's virtio-user as front end, against vhostd and against DPDK's vhost library
#[derive(Parser)]
struct Args {
    /// Lengths of frames, bytes
    #[arg(long, value_delimiter = ',', default_values_t = [64, 512, 1500])]
    length: Vec<usize>,
    /// Rounds of each case
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds that each back end is measured in a round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

/// A front end whose frames go round; ended when dropped.
struct VirtioUser {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl VirtioUser {
    fn start(backend: &Backend, len: usize, packed: bool, huge_pages: bool) -> Result<Self> {
        let sockets = backend.sockets();
        let vdev = |n: usize| {
            let (path, packed) = (sockets[n].display(), u8::from(packed));
            format!(
                "--vdev=net_virtio_user{n},path={path},mac={},queues=1,queue_size=256,packed_vq={packed}",
                mac(n)
            )
        };
        // Into a pipe it would write when it has many lines.
        let mut child = bound("stdbuf")
            .args(["-oL", "dpdk-testpmd"])
            // The back end maps it all, and takes few regions.
            .args(testpmd::memory(huge_pages))
            .arg("--single-file-segments")
            .arg(format!("--lcores=0@{BACKEND_CPU},1@{FRONTEND_CPU}"))
            .arg("--main-lcore=0")
            .args([vdev(0), vdev(1)])
            .args(["--", "-i", "--forward-mode=io", "--total-num-mbufs=8192"])
            .args([0, 1].map(|n| format!("--eth-peer={n},{}", mac(1 - n))))
            .arg(format!("--txpkts={len}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting dpdk-testpmd")?;
        let stdout = child.stdout.take().context("its output")?;
        let mut front = Self { child, lines: BufReader::new(stdout).lines() };
        front.say("start tx_first 32")?;
        front.rate()?;
        Ok(front)
    }

    fn say(&mut self, command: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its input")?;
        Ok(writeln!(stdin, "{command}")?)
    }

    /// Millions of frames received a second by both ports since the last call.
    fn rate(&mut self) -> Result<f64> {
        self.say("show port stats all")?;
        let mut sum = 0.0;
        for _ in 0..2 {
            let found = self.lines.by_ref().find_map(|line| {
                let line = line.ok()?;
                line.trim().strip_prefix("Rx-pps:")?.split_whitespace().next()?.parse::<f64>().ok()
            });
            sum += found.context("dpdk-testpmd ended instead of showing its ports")?;
        }
        Ok(sum / 1e6)
    }

    /// The same over a time in which nobody took processor time from front end or back end, or [`TRIES`] times somebody did.
    fn undisturbed_rate(&mut self, backend: &mut Backend, time: Duration) -> Result<f64> {
        let mut tries = 0;
        loop {
            self.rate()?;
            let (start, front, back) = (Instant::now(), cpu_time(self.child.id()), backend.cpu_time());
            std::thread::sleep(time);
            let rate = self.rate()?;
            let least = start.elapsed().mul_f64(BUSY);
            backend.check()?;
            tries += 1;
            let busy = cpu_time(self.child.id()) - front >= least && backend.cpu_time() - back >= least;
            if busy || tries == TRIES {
                return Ok(rate);
            }
        }
    }
}

impl Drop for VirtioUser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mac(port: usize) -> String {
    format!("02:00:00:00:00:{:02x}", port + 1)
}

fn main() -> Result<()> {
    if let Some(served) = serve_if_asked() {
        return served;
    }
    let args = Args::parse();
    let machine = Machine::here();
    println!("{machine}");
    println!("virtio-user as front end; millions of frames a second, median and half the spread");
    println!("{:>8}{:>8}{:>14}{:>14}{:>14}", "bytes", "rings", "vhostd", "DPDK io", "vhostd/DPDK");
    for packed in [false, true] {
        for len in &args.length {
            let shape =
                Shape { ports: 2, taps: 0, first_tap: 0, frame_max: *len, huge_pages: machine.huge_pages };
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..args.rounds {
                ours.push(rate(Kind::Vhostd, &shape, packed, args.seconds)?);
                theirs.push(rate(Kind::Dpdk, &shape, packed, args.seconds)?);
            }
            let spreads = [Spread::of(&ours), Spread::of(&theirs), Spread::of_ratios(&ours, &theirs)];
            let cells: String = spreads.into_iter().flatten().map(|spread| format!("{spread:>14}")).collect();
            println!("{len:>8}{:>8}{cells}", if packed { "packed" } else { "split" });
        }
    }
    Ok(())
}

fn rate(kind: Kind, shape: &Shape, packed: bool, seconds: f64) -> Result<f64> {
    let mut backend = Backend::start(kind, shape)?;
    let mut front = VirtioUser::start(&backend, shape.frame_max, packed, shape.huge_pages)?;
    std::thread::sleep(WARM_UP);
    let rate = front.undisturbed_rate(&mut backend, Duration::from_secs_f64(seconds));
    rate.with_context(|| format!("{} B through {}", shape.frame_max, kind.name()))
}
