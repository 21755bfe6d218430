//! What the daemon costs before a frame moves: time until its API answers, time to plug 256 ports, memory with none and
//! with 256, the time a restart takes to have them all back, and memory of a front-end port that is connected and idle.
//!
//! `cargo build --release -p vhostd -p benches && target/release/footprint`
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const PORTS: usize = 256;
/// Front-end ports, attached to as many ports of another daemon.
const FRONT_ENDS: usize = 64;
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A daemon on a state directory; killed when dropped.
struct Daemon {
    child: Child,
    api: PathBuf,
}

impl Daemon {
    /// Starts it and waits for its API; returns the time that took.
    fn start(dir: &Path) -> Result<(Self, Duration)> {
        let binary = std::env::current_exe()?.with_file_name("vhostd");
        let api = dir.join("api.sock");
        let begun = Instant::now();
        let child = Command::new(&binary)
            .arg("--api")
            .arg(&api)
            .args(["serve", "--state-dir"])
            .arg(dir.join("state"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}: build it first", binary.display()))?;
        let daemon = Self { child, api };
        while daemon.request("GET", "/healthz", "").is_err() {
            ensure!(begun.elapsed() < START_TIMEOUT, "no answer from the daemon");
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok((daemon, begun.elapsed()))
    }

    /// One request on a connection of its own.
    fn request(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.api)?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: vhostd\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.starts_with("HTTP/1.1 2") {
            bail!("{method} {path}: {answer}");
        }
        Ok(answer)
    }

    fn rss_mib(&self) -> Result<f64> {
        self.memory_mib("VmRSS:")
    }

    /// A line of its status (proc(5), /proc/pid/status), MiB.
    fn memory_mib(&self, name: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
        let kib: f64 = line.split_whitespace().next().with_context(|| name.to_owned())?.parse()?;
        Ok(kib / 1024.0)
    }

    /// All of it, and how much of that are not pages of files: those of the program are as many as the page cache likes.
    fn memory(&self) -> Result<String> {
        let own = self.memory_mib("RssAnon:")? + self.memory_mib("RssShmem:")?;
        Ok(format!("{:7.1} MiB, {own:.1} of its own", self.rss_mib()?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (daemon, up) = Daemon::start(dir.path())?;
    println!("API answers after             {:7.1} ms", up.as_secs_f64() * 1e3);
    println!("memory, no ports              {}", daemon.memory()?);
    let begun = Instant::now();
    for n in 0..PORTS {
        let socket = dir.path().join(format!("{n}.sock"));
        let body = format!(r#"{{"spec":{{"socket":{{"path":{socket:?},"role":"listen"}}}}}}"#);
        daemon.request("PUT", &format!("/v1/plugs/port{n}"), &body)?;
    }
    println!("{PORTS} ports plugged in           {:7.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    println!("memory, {PORTS} ports             {}", daemon.memory()?);
    drop(daemon);
    let (daemon, up) = Daemon::start(dir.path())?;
    println!("after kill -9: API answers    {:7.1} ms", up.as_secs_f64() * 1e3);
    let begun = Instant::now();
    while daemon.request("GET", "/readyz", "").is_err() {
        ensure!(begun.elapsed() < START_TIMEOUT, "the daemon does not get ready");
        std::thread::sleep(Duration::from_micros(200));
    }
    println!("and has all plugs back after  {:7.1} ms", (up + begun.elapsed()).as_secs_f64() * 1e3);
    println!("memory, a front-end port idle {:7.1} KiB", front_end_kib()?);
    Ok(())
}

/// What each of many front-end ports adds to a daemon, connected and idle.
fn front_end_kib() -> Result<f64> {
    let dirs = (tempfile::tempdir()?, tempfile::tempdir()?);
    let ((back, _), (front, _)) = (Daemon::start(dirs.0.path())?, Daemon::start(dirs.1.path())?);
    let before = front.rss_mib()?;
    for n in 0..FRONT_ENDS {
        let socket = dirs.0.path().join(format!("{n}.sock"));
        for (daemon, role) in [(&back, "listen"), (&front, "frontend_connect")] {
            let body = format!(r#"{{"spec":{{"socket":{{"path":{socket:?},"role":"{role}"}}}}}}"#);
            daemon.request("PUT", &format!("/v1/plugs/port{n}"), &body)?;
        }
    }
    let begun = Instant::now();
    while front.request("GET", "/v1/plugs", "")?.matches(r#""phase":"forwarding""#).count() < FRONT_ENDS {
        ensure!(begun.elapsed() < START_TIMEOUT, "front-end ports find no back end");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((front.rss_mib()? - before) * 1024.0 / FRONT_ENDS as f64)
}
