//! A daemon of its own for each test: the real binary, in a directory and a network namespace that go with the test.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const VHOSTD: &str = env!("CARGO_BIN_EXE_vhostd");
/// For anything that must happen; far beyond what it takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A place for one daemon.
pub struct Place {
    dir: tempfile::TempDir,
}

/// A running daemon; it dies with this value.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Default for Place {
    fn default() -> Self {
        Self { dir: tempfile::Builder::new().prefix("vhostd.").tempdir_in("/tmp").unwrap() }
    }
}

impl Place {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn api(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// Starts a daemon and returns when every stored plug has been tried.
    pub fn serve(&self) -> Daemon {
        self.serve_with(&[])
    }

    pub fn serve_with(&self, args: &[&str]) -> Daemon {
        let daemon = self.spawn(args);
        self.until_ready();
        daemon
    }

    /// Starts a daemon in a network namespace of its own.
    pub fn spawn(&self, args: &[&str]) -> Daemon {
        self.spawn_by(&["unshare", "--net"], "--map-root-user", &[], args)
    }

    /// Starts a daemon in the network namespace of a process, and returns when every stored plug has been tried.
    pub fn serve_in(&self, pid: u32) -> Daemon {
        self.serve_in_by(pid, &[])
    }

    /// The same, for a daemon that may not change the namespace's network.
    pub fn serve_in_powerless(&self, pid: u32) -> Daemon {
        self.serve_in_by(pid, &["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
    }

    fn serve_in_by(&self, pid: u32, inside: &[&str]) -> Daemon {
        let enter = ["nsenter", "--net", "--target", &pid.to_string()];
        let daemon = self.spawn_by(&enter, "--user", inside, &[]);
        self.until_ready();
        daemon
    }

    /// Starts a daemon as systemd does: it notifies the socket `notify`, and has a watchdog to feed.
    pub fn spawn_as_service(&self, watchdog: Duration) -> Daemon {
        let notify = format!("NOTIFY_SOCKET={}", self.path("notify").display());
        let watchdog = format!("WATCHDOG_USEC={}", watchdog.as_micros());
        self.spawn_by(&["env", &notify, &watchdog, "unshare", "--net"], "--map-root-user", &[], &[])
    }

    /// Starts a daemon that survives a write beyond its file size limit, and returns when it is ready.
    pub fn serve_limited(&self) -> Daemon {
        let daemon =
            self.spawn_by(&["env", "--ignore-signal=XFSZ", "unshare", "--net"], "--map-root-user", &[], &[]);
        self.until_ready();
        daemon
    }

    fn spawn_by(&self, wrapper: &[&str], for_ordinary_users: &str, inside: &[&str], args: &[&str]) -> Daemon {
        let log = self.path("log");
        let output = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(wrapper);
        if !rustix::process::geteuid().is_root() {
            command.arg(for_ordinary_users);
        }
        command.args(inside).arg(VHOSTD).arg("--api").arg(self.api()).arg("serve");
        if !args.contains(&"--state-dir") {
            command.arg("--state-dir").arg(self.path("state"));
        }
        command.args(args).env_remove("VHOSTD_API").env_remove("NOTIFY_SOCKET");
        let child =
            command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        Daemon { child, log }
    }

    fn until_ready(&self) {
        self.until("the daemon is ready", || {
            self.try_http("GET", "/readyz", "").is_some_and(|a| a.status == 200)
        });
    }

    /// Runs the command line as a user without any rights.
    pub fn vhostd_as_nobody(&self, args: &[&str]) -> Answer {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", VHOSTD, "--api"]);
        Answer::new(&command.arg(self.api()).args(args).output().unwrap(), self.dir.path())
    }

    /// Runs the command line against this place's daemon.
    pub fn vhostd(&self, args: &[&str]) -> Answer {
        self.vhostd_with_input(args, "")
    }

    pub fn vhostd_with_input(&self, args: &[&str], input: &str) -> Answer {
        let mut command = Command::new(VHOSTD);
        command.arg("--api").arg(self.api()).args(args).env_remove("VHOSTD_API").env("COLUMNS", "100");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // It may end without reading everything.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        Answer::new(&child.wait_with_output().unwrap(), self.dir.path())
    }

    /// Starts a command that goes on; its output is piped.
    pub fn spawn_vhostd(&self, args: &[&str]) -> Child {
        let mut command = Command::new(VHOSTD);
        command.arg("--api").arg(self.api()).args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    /// One HTTP request on a connection of its own.
    pub fn http(&self, method: &str, path: &str, body: &str) -> Http {
        self.try_http(method, path, body).unwrap_or_else(|| panic!("{method} {path} was not answered"))
    }

    pub fn try_http(&self, method: &str, path: &str, body: &str) -> Option<Http> {
        let mut stream = UnixStream::connect(self.api()).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        // A daemon that refuses at once may close before everything is written.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        Http::parse(&answer)
    }

    /// Waits for something that must come true.
    pub fn until(&self, what: &str, mut come_true: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !come_true() {
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
                panic!("waited in vain until {what}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The phase that `ls` shows for a plug.
    pub fn phase(&self, id: &str) -> String {
        let plug = self.http("GET", &format!("/v1/plugs/{id}"), "").json();
        plug["status"]["phase"].as_str().unwrap_or("absent").to_owned()
    }
}

impl Daemon {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for its end, and gives its exit code.
    pub fn wait(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "the daemon does not end\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sets the size beyond which its files cannot be written.
    pub fn limit_file_size(&self, bytes: &str) {
        let limit = format!("--fsize={bytes}:");
        let status =
            Command::new("prlimit").args(["--pid", &self.pid().to_string(), &limit]).status().unwrap();
        assert!(status.success());
    }

    pub fn terminate(&mut self) -> i32 {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.wait()
    }

    /// A program that will run in the daemon's network namespace.
    pub fn command_inside(&self, program: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--net"]);
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--").args(program);
        command
    }

    /// Runs a program in the daemon's network namespace.
    pub fn inside(&self, program: &[&str]) -> String {
        let output = self.command_inside(program).output().unwrap();
        assert!(output.status.success(), "{program:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A link as `ip -j -d link show` describes it; null if there is none.
    pub fn link(&self, name: &str) -> Value {
        let links: Vec<Value> =
            serde_json::from_str(&self.inside(&["ip", "-j", "-d", "link", "show"])).unwrap();
        links.into_iter().find(|link| link["ifname"] == name).unwrap_or(Value::Null)
    }

    /// The number of descriptors it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon\n{}", self.log());
        }
    }
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Answer {
    fn new(output: &Output, dir: &Path) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(dir.to_str().unwrap(), "DIR");
        Self {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// What the API answered.
#[derive(Debug)]
pub struct Http {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Http {
    fn parse(answer: &[u8]) -> Option<Self> {
        let answer = String::from_utf8_lossy(answer);
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let head = head.to_ascii_lowercase();
        let body =
            if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_owned() };
        Some(Self { status, head, body })
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

fn unchunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
    }
    body
}
