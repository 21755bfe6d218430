//! `vhostd demo`: two built-in front ends talk through a daemon. Needs neither QEMU nor root nor huge pages.
//!
//! The daemon is this binary, started with `serve` on a state directory of its own; the front ends connect to the sockets
//! of two plugs, as QEMU would. First they check a thousand frames byte by byte, then they send as fast as they can.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dataplane::light::{LightConfig, LightGuest};
use hyper::Method;
use serde::Serialize;
use serde_json::{Value, json};
use vhost_user::FrontEndError;

use crate::cli::Format;
use crate::client::{Client, ClientError};
use crate::table::{self, Row};

/// Frame lengths, and how long each is measured.
const LENGTHS: [usize; 3] = [64, 512, 1500];
const MEASURE: Duration = Duration::from_secs(3);
/// Frames checked byte by byte.
const CHECKED: u32 = 1000;
/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The two plugs.
const NAMES: [&str; 2] = ["a", "b"];
/// The stations behind them.
const STATIONS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// IEEE 802 local experimental EtherType 1.
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

/// Why the demo did not run.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The system refused something.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        cause: std::io::Error,
    },
    /// The daemon did.
    #[error("{0}")]
    Daemon(#[from] ClientError),
    /// A front end could not be set up.
    #[error("a front end: {0}")]
    FrontEnd(#[from] FrontEndError),
    /// A frame did not arrive, or not as it was sent.
    #[error("frame {number} of {CHECKED}: {what}")]
    Frame {
        /// Which.
        number: u32,
        /// What is wrong.
        what: &'static str,
    },
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Rate {
    frame_bytes: usize,
    mframes_per_s: f64,
    gbit_per_s: f64,
}

impl Row for Rate {
    const TITLES: &'static str = "[FRAME BYTES]  [MFRAMES/S]  [GBIT/S]";

    fn cells(&self) -> Vec<String> {
        vec![
            self.frame_bytes.to_string(),
            format!("{:.2}", self.mframes_per_s),
            format!("{:.2}", self.gbit_per_s),
        ]
    }

    fn name(&self) -> String {
        self.frame_bytes.to_string()
    }
}

/// The daemon, ended when this is dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Its state directory is removed with it, so nothing is lost by not asking politely.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the demo and returns its table.
pub async fn run(format: Format) -> Result<String, DemoError> {
    let dir = TempDir::new()?;
    let api = dir.0.join("api.sock");
    let client = Client::new(&api);
    eprintln!("starting a daemon in {}", dir.0.display());
    let _daemon = start(&api, &dir.0, &client).await?;
    for name in NAMES {
        let socket = dir.0.join(name);
        eprintln!("plugging {name}, a front end connects to {}", socket.display());
        let body = json!({"spec": {"socket": {"path": socket, "role": "listen"}}});
        let plug = format!("/v1/plugs/{name}");
        client.json::<Value>(Method::PUT, &plug, Some(&body), PATIENCE).await?;
    }
    eprintln!("checking {CHECKED} frames byte by byte");
    check(&mut connect(&dir.0)?)?;
    let mut rates = Vec::new();
    for frame_bytes in LENGTHS {
        eprintln!("measuring {frame_bytes}-byte frames for {} s", MEASURE.as_secs());
        rates.push(measure(&dir.0, frame_bytes)?);
    }
    Ok(table::list(&rates, format))
}

/// Starts a daemon and waits until it answers.
async fn start(api: &Path, dir: &Path, client: &Client) -> Result<Daemon, DemoError> {
    let system = |what| move |cause| DemoError::System { what, cause };
    let log = std::fs::File::create(dir.join("log")).map_err(system("the daemon's log"))?;
    let binary = std::env::current_exe().map_err(system("finding this program"))?;
    let child = Command::new(binary)
        .arg("--api")
        .arg(api)
        .args(["serve", "--state-dir"])
        .arg(dir.join("state"))
        .stdin(Stdio::null())
        .stderr(log)
        .spawn();
    let daemon = Daemon(child.map_err(system("starting the daemon"))?);
    let begun = Instant::now();
    loop {
        match client.bytes(Method::GET, "/readyz", bytes::Bytes::new(), PATIENCE).await {
            Ok(_) => return Ok(daemon),
            Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Frames there and back, each compared with what was sent.
fn check(pair: &mut [LightGuest; 2]) -> Result<(), DemoError> {
    for guest in pair.iter_mut() {
        guest.offer_all();
    }
    let mut bytes = Vec::new();
    for number in 0..CHECKED {
        let wrong = |what| DemoError::Frame { number, what };
        let (from, to) = ((number % 2) as usize, (number as usize + 1) % 2);
        let len = LENGTHS[number as usize % LENGTHS.len()];
        let frame = frame(from, to, len, number.to_be_bytes());
        if !pair[from].send(0, &[0; 12], &frame) {
            return Err(wrong("the daemon takes no frames"));
        }
        let begun = Instant::now();
        while !pair[to].receive(0, &mut bytes) {
            if begun.elapsed() > PATIENCE {
                return Err(wrong("it did not arrive"));
            }
            std::thread::yield_now();
        }
        if bytes.get(12..) != Some(&frame[..]) {
            return Err(wrong("it arrived changed"));
        }
    }
    Ok(())
}

/// Both directions at once, as fast as it goes.
fn measure(dir: &Path, frame_bytes: usize) -> Result<Rate, DemoError> {
    let mut guests = connect(dir)?;
    for (station, guest) in guests.iter_mut().enumerate() {
        guest.load(&[frame(station, 1 - station, frame_bytes, [0; 4])]);
    }
    let (begun, mut frames) = (Instant::now(), 0);
    while begun.elapsed() < MEASURE {
        for _ in 0..64 {
            frames += guests.iter_mut().map(|guest| guest.recycle().1).sum::<u64>();
        }
    }
    #[allow(clippy::cast_precision_loss)]
    let mframes_per_s = frames as f64 / begun.elapsed().as_secs_f64() / 1e6;
    #[allow(clippy::cast_precision_loss)]
    let gbit_per_s = mframes_per_s * frame_bytes as f64 * 8.0 / 1e3;
    Ok(Rate { frame_bytes, mframes_per_s, gbit_per_s })
}

/// A front end on each plug.
fn connect(dir: &Path) -> Result<[LightGuest; 2], DemoError> {
    let [a, b] = NAMES.map(|name| connect_one(&dir.join(name)));
    Ok([a?, b?])
}

/// A port takes one front end at a time: the one before may still be on its way out.
fn connect_one(socket: &Path) -> Result<LightGuest, DemoError> {
    let begun = Instant::now();
    loop {
        match LightGuest::connect(socket, &LightConfig::default()) {
            Err(_) if begun.elapsed() < PATIENCE => std::thread::yield_now(),
            connected => return Ok(connected?),
        }
    }
}

fn frame(from: usize, to: usize, len: usize, number: [u8; 4]) -> Vec<u8> {
    let mut frame = [&STATIONS[to][..], &STATIONS[from], &EXPERIMENTAL, &number].concat();
    let rest = len.saturating_sub(frame.len());
    frame.extend((0..=u8::MAX).cycle().take(rest));
    frame
}

/// A directory that goes with its owner.
struct TempDir(std::path::PathBuf);

impl TempDir {
    fn new() -> Result<Self, DemoError> {
        let path = std::env::temp_dir().join(format!("vhostd-demo-{}", std::process::id()));
        let made = std::fs::create_dir(&path);
        made.map_err(|cause| DemoError::System { what: "a directory for the demo", cause })?;
        Ok(Self(path))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
