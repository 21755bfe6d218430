//! Running commands in the guest: the host's end of what tests/guest/init speaks over its virtio-serial port.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code of the shell: 128 + number when a signal ended it.
    pub status: i32,
    /// Standard output and standard error, as they came.
    pub stdout: String,
}

/// The connection to the guest's init.
#[derive(Debug)]
pub(super) struct Agent {
    writer: Mutex<UnixStream>,
    jobs: Mutex<Jobs>,
    /// How often the guest has come up.
    boots: AtomicU32,
    next: AtomicU64,
}

/// Where the reply of each running command goes. Dropping a sender tells its job that no reply will come.
type Jobs = HashMap<u64, Sender<Output>>;

impl Agent {
    /// Talks to the guest over `stream`, until that ends.
    pub(super) fn start(stream: UnixStream) -> Result<Arc<Self>> {
        let reader = BufReader::new(stream.try_clone()?);
        let agent = Arc::new(Self {
            writer: Mutex::new(stream),
            jobs: Mutex::default(),
            boots: AtomicU32::new(0),
            next: AtomicU64::new(0),
        });
        let receiver = agent.clone();
        thread::Builder::new().name("agent".into()).spawn(move || {
            // An error is the end of QEMU; whoever waits for a reply hears of it by his sender's drop.
            let _ = receiver.receive(reader);
            locked(&receiver.jobs).clear();
        })?;
        Ok(agent)
    }

    /// How often the guest has come up so far.
    pub(super) fn boots(&self) -> u32 {
        self.boots.load(Ordering::Acquire)
    }

    /// Starts a shell command in the guest.
    pub(super) fn spawn(self: &Arc<Self>, command: &str) -> Result<Job> {
        ensure!(!command.trim().is_empty(), "an empty command");
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = channel();
        locked(&self.jobs).insert(id, sender);
        let line = format!("{id} {}\n", command.replace('\n', "\x1e"));
        locked(&self.writer).write_all(line.as_bytes()).context("the guest's agent is gone")?;
        Ok(Job { id, command: command.into(), reply, agent: self.clone() })
    }

    /// Ends the reading thread.
    pub(super) fn close(&self) {
        // It fails when QEMU has closed the connection first.
        let _ = locked(&self.writer).shutdown(Shutdown::Both);
    }

    fn receive(&self, mut reader: BufReader<UnixStream>) -> Result<()> {
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            if line == "ready\n" {
                // Commands of an earlier boot will not be answered.
                locked(&self.jobs).clear();
                self.boots.fetch_add(1, Ordering::Release);
            } else {
                let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                let [id, status, size] = fields[..] else { bail!("not a reply: {line:?}") };
                let mut bytes = vec![0; size.parse()?];
                reader.read_exact(&mut bytes)?;
                let stdout = String::from_utf8_lossy(&bytes).into_owned();
                if let Some(sender) = locked(&self.jobs).remove(&id.parse()?) {
                    // Nobody may be waiting any more.
                    let _ = sender.send(Output { status: status.parse()?, stdout });
                }
            }
            line.clear();
        }
        Ok(())
    }
}

/// A command that runs in the guest. Dropping it leaves the command alone.
#[derive(Debug)]
pub struct Job {
    id: u64,
    command: String,
    reply: Receiver<Output>,
    agent: Arc<Agent>,
}

impl Job {
    /// Waits for its end. After a time-out it can be waited for again.
    pub fn wait(&self, timeout: Duration) -> Result<Output> {
        match self.reply.recv_timeout(timeout) {
            Ok(output) => Ok(output),
            Err(RecvTimeoutError::Timeout) => {
                bail!("waited {timeout:?} for the end of a command in the guest: {}", self.command)
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the guest went away during: {}", self.command),
        }
    }

    /// What it has printed so far. Only while it runs.
    pub fn output(&self, timeout: Duration) -> Result<String> {
        Ok(self.agent.spawn(&format!("cat /run/{}.out", self.id))?.wait(timeout)?.stdout)
    }

    /// Sends a signal, as `TERM`, to its process group. `INT` reaches only programs with a handler for it, as ping and iperf3.
    pub fn signal(&self, signal: &str, timeout: Duration) -> Result<()> {
        let kill = format!("kill -{signal} -$(cat /run/{}.pid)", self.id);
        let output = self.agent.spawn(&kill)?.wait(timeout)?;
        ensure!(output.status == 0, "signal {signal} to: {}: {}", self.command, output.stdout);
        Ok(())
    }
}

/// The data is whole after every statement, so a panic elsewhere does not spoil it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
