//! The daemon as people run it: `vhostd serve` in a network namespace that plays the host, and its command line.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sys::fail_point::DIE_AT;
use tempfile::TempDir;

use crate::deadline::wait_for_some;
use crate::netns::Netns;
use crate::process::Process;

/// For the daemon to answer, and for a plug to forward.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Silence after which a stream of events is taken to be over.
const HTTP_PAUSE: Duration = Duration::from_secs(2);
/// The daemon's configuration in its directory.
const CONFIGURATION: &str = "vhostd.toml";

/// A running daemon with a state directory, an API socket and a host of its own. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    vhostd: PathBuf,
    host: Arc<Netns>,
    /// Holds the configuration, the state, the API's socket, and the sockets of plugs.
    dir: TempDir,
}

impl Daemon {
    /// Starts it on a host of its own and waits until it answers.
    pub fn start() -> Result<Self> {
        Self::start_on(Arc::new(Netns::new()?), "")
    }

    /// Starts it on a host with a configuration (TOML) and waits until it answers.
    pub fn start_on(host: Arc<Netns>, configuration: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vhostd").tempdir()?;
        fs::write(dir.path().join(CONFIGURATION), configuration)?;
        let vhostd = vhostd_path()?;
        let process = serve(&vhostd, &host, dir.path(), None)?;
        let mut daemon = Self { process, vhostd, host, dir };
        daemon.wait_until_up()?;
        Ok(daemon)
    }

    /// The file with its configuration, which it reads when it starts.
    pub fn configuration(&self) -> PathBuf {
        self.dir.path().join(CONFIGURATION)
    }

    /// Kills it with SIGKILL, starts it again on the same state, and waits until it answers. Gives the time from the kill
    /// to the answer.
    pub fn kill_and_restart(&mut self) -> Result<Duration> {
        self.kill_and_restart_after(|| Ok(()))
    }

    /// The same, and does something while it is dead.
    pub fn kill_and_restart_after(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        self.process.kill()?;
        meanwhile()?;
        self.process = serve(&self.vhostd, &self.host, self.dir.path(), None)?;
        self.wait_until_up()?;
        Ok(start.elapsed())
    }

    /// Kills it and starts it again to die before the `n`th change that it makes (`sys::fail_point`). False if it dies before it
    /// has tried to bring its plugs back.
    pub fn restart_to_die(&mut self, n: u32) -> Result<bool> {
        self.process.kill()?;
        self.process = serve(&self.vhostd, &self.host, self.dir.path(), Some(n))?;
        wait_for_some("vhostd to be ready or to die", READY_TIMEOUT, || match self.ended()? {
            Some(_) => Ok(Some(false)),
            None => {
                let answer = self.http("GET", "/readyz", "").unwrap_or_default();
                Ok(answer.starts_with("HTTP/1.1 200").then_some(true))
            }
        })
    }

    /// The namespace it runs in.
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// The same, to be kept beside the daemon.
    pub fn netns(&self) -> Arc<Netns> {
        self.host.clone()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.ended()
    }

    /// Sends a request to the API and gives the whole answer, head and body. A stream of events is cut after a moment.
    pub fn http(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.dir.path().join("api.sock"))?;
        let pause = if path.starts_with("/v1/events") { HTTP_PAUSE } else { READY_TIMEOUT };
        stream.set_read_timeout(Some(pause))?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: vhostd\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut answer = Vec::new();
        let written = stream.write_all(request.as_bytes());
        let read = stream.read_to_end(&mut answer);
        // A request that is refused half-way ends with an answer and a broken connection.
        if answer.is_empty() {
            written?;
            read?;
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Its plugs, as the API shows them.
    pub fn plugs(&self) -> Result<Vec<Value>> {
        let answer = self.http("GET", "/v1/plugs", "")?;
        let (_, body) = answer.split_once("\r\n\r\n").context("an answer")?;
        Ok(serde_json::from_str(body)?)
    }

    /// Its events from now on.
    pub fn events(&self) -> Result<EventStream> {
        let mut stream = UnixStream::connect(self.dir.path().join("api.sock"))?;
        stream.set_read_timeout(Some(READY_TIMEOUT))?;
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: vhostd\r\n\r\n")?;
        let mut lines = BufReader::new(stream).lines();
        // The answer's head comes when the daemon has begun.
        let status = lines.next().context("an answer")??;
        ensure!(status.contains(" 200 "), "{status}");
        Ok(EventStream { lines, seen: Vec::new() })
    }

    /// What there is in the directory of plugs' sockets, sorted.
    pub fn files(&self) -> Result<Vec<String>> {
        let names = fs::read_dir(self.dir.path())?.map(|entry| Ok(entry?.file_name().display().to_string()));
        let mut names: Vec<_> = names.collect::<Result<_>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// A path for the socket of a plug.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    /// Runs the command line.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        Ok(command(&self.vhostd, &self.host, self.dir.path()).args(arguments).output()?)
    }

    /// Runs a command that has to succeed and gives what it prints.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments)?;
        ensure!(
            output.status.success(),
            "vhostd {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same with its result as JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[&["-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("vhostd {}: {text}", arguments.join(" ")))
    }

    /// Waits until each of these plugs forwards.
    pub fn wait_for_forwarding(&self, plugs: &[&str]) -> Result<()> {
        plugs.iter().try_for_each(|plug| {
            wait_for_some(&format!("{plug} to forward"), READY_TIMEOUT, || {
                Ok((self.json(&["show", plug])?["status"]["phase"] == "forwarding").then_some(()))
            })
            .with_context(|| self.run(&["show", plug]).unwrap_or_default())
        })
    }

    /// Statistics of a plug's only port.
    pub fn stats(&self, plug: &str) -> Result<Value> {
        let mut ports = self.json(&["stats", plug])?;
        Ok(ports.get_mut(0).context("a plug without a port")?.take())
    }

    /// Frames with a segmentation request, of all ports and both directions.
    pub fn gso_frames(&self) -> Result<u64> {
        let stats = self.json(&["stats"])?;
        let ports = stats.as_array().context("stats is not an array of ports")?;
        Ok(ports.iter().filter_map(|port| port["gso_frames"].as_u64()).sum())
    }

    /// Everything it has logged since it was last started.
    pub fn log(&self) -> Result<String> {
        self.process.log()
    }

    fn wait_until_up(&mut self) -> Result<()> {
        wait_for_some("vhostd to answer", READY_TIMEOUT, || {
            self.process.check_running()?;
            Ok(self.plugs().ok().map(drop))
        })
    }
}

/// Events as they happen.
#[derive(Debug)]
pub struct EventStream {
    lines: Lines<BufReader<UnixStream>>,
    seen: Vec<String>,
}

impl EventStream {
    /// Waits for an event of this kind whose text contains this.
    pub fn wait_for(&mut self, kind: &str, text: &str) -> Result<()> {
        let (kind, deadline) = (format!("\"kind\":\"{kind}\""), Instant::now() + READY_TIMEOUT);
        loop {
            let line = self.lines.next().context("the daemon's events ended")?;
            let none = || format!("no {kind} with {text:?} in\n{}", self.seen.join("\n"));
            let line = line.with_context(none)?;
            // Comments say that there is nothing to tell: the socket's time-out alone would never come.
            ensure!(Instant::now() < deadline, none());
            if line.starts_with("data: ") {
                let is_it = line.contains(&kind) && line.contains(text);
                self.seen.push(line);
                if is_it {
                    return Ok(());
                }
            }
        }
    }

    /// Events of this kind among those that have been waited for or came before them.
    pub fn count(&self, kind: &str) -> usize {
        self.seen.iter().filter(|line| line.contains(&format!("\"kind\":\"{kind}\""))).count()
    }
}

/// The program, which cargo puts beside the other programs, one directory above the tests.
pub fn vhostd_path() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("vhostd")).find(|path| path.is_file());
    found.with_context(|| format!("no vhostd near {}: cargo build --workspace --bins", own.display()))
}

fn serve(vhostd: &Path, host: &Netns, dir: &Path, die_at: Option<u32>) -> Result<Process> {
    let mut command = command(vhostd, host, dir);
    command.envs(die_at.map(|n| (DIE_AT, n.to_string())));
    command
        .arg("serve")
        .arg("--config")
        .arg(dir.join(CONFIGURATION))
        .arg("--state-dir")
        .arg(dir.join("state"));
    Process::spawn("vhostd", &command)
}

/// The program in the host's namespace, with the API's socket.
fn command(vhostd: &Path, host: &Netns, dir: &Path) -> Command {
    let mut command = host.command(vhostd);
    command.arg("--api").arg(dir.join("api.sock"));
    command
}
