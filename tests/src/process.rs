//! Child processes that die with the test and whose output is shown when it fails.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::deadline::wait_for_some;

/// Lines of a log that a failed test shows.
const LOG_LINES_SHOWN: usize = 100;

/// A running program. Dropping it kills it (SIGKILL) and, when the test has failed, shows the end of its output.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: File,
}

impl Process {
    /// Starts `command` with stdout and stderr in a log, stdin from a pipe that [`stdin`](Self::stdin) writes to.
    ///
    /// The kernel kills it when the **thread** that called this ends (PR_SET_PDEATHSIG), so start it from the test's own
    /// thread.
    pub fn spawn(name: &str, command: &Command) -> Result<Self> {
        let log = tempfile::tempfile().context("a file for the log")?;
        let child = dying_with_parent(command)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.into(), child, log })
    }

    /// Its process id. It stays the same when the command is a chain of programs that execute each other.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pipe to its standard input.
    pub fn stdin(&mut self) -> &mut ChildStdin {
        self.child.stdin.as_mut().expect("spawned with a pipe that nobody takes")
    }

    /// All its output so far.
    pub fn log(&self) -> Result<String> {
        // pread(), because the child writes at the offset of the description that it shares with us.
        let length = usize::try_from(self.log.metadata()?.len())?;
        let mut bytes = vec![0; length];
        self.log.read_exact_at(&mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails, with the end of the output, if it runs no more.
    pub fn check_running(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}\n{}", self.name, self.log_end()),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for_some(&what, timeout, || self.ended())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).context("not a process id")?;
        kill_process(pid, signal).with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    fn log_end(&self) -> String {
        let log = self.log().unwrap_or_else(|error| format!("(no log: {error})"));
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let status = self.kill();
        if thread::panicking() {
            let how = match &status {
                Ok(status) if status.signal() == Some(Signal::KILL.as_raw()) => "killed".into(),
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            eprintln!("---- {} ({how}) ----\n{}\n----", self.name, self.log_end());
        }
    }
}

/// The same command, run so that the kernel kills it when the starting thread ends.
///
/// `std` has no safe way to call prctl() in the child, so setpriv (util-linux, essential in Debian) does it.
fn dying_with_parent(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(key, value),
            None => tied.env_remove(key),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        tied.current_dir(dir);
    }
    tied
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::deadline::wait_for;

    const SOON: Duration = Duration::from_secs(10);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn is_gone(pid: u32) -> bool {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn output_input_and_status_are_those_of_the_program() {
        let mut process =
            Process::spawn("reader", &sh("read line; echo got $line; echo oops >&2; exit 7")).unwrap();
        process.stdin().write_all(b"hello\n").unwrap();
        assert_eq!(process.wait(SOON).unwrap().code(), Some(7));
        assert_eq!(process.log().unwrap(), "got hello\noops\n");
        let error = process.check_running().unwrap_err().to_string();
        assert!(error.contains("exit status: 7") && error.contains("oops"), "{error}");
    }

    #[test]
    fn the_log_can_be_read_while_the_program_writes() {
        let mut process = Process::spawn("writer", &sh("echo one; read line; echo two; read line")).unwrap();
        wait_for("the first line", SOON, || process.log().unwrap() == "one\n").unwrap();
        process.stdin().write_all(b"\n").unwrap();
        wait_for("both lines", SOON, || process.log().unwrap() == "one\ntwo\n").unwrap();
    }

    #[test]
    fn dropped_means_gone() {
        let process = Process::spawn("sleeper", &sh("exec sleep 1000")).unwrap();
        let pid = process.pid();
        drop(process);
        assert!(is_gone(pid));
    }

    #[test]
    fn it_dies_with_the_thread_that_started_it() {
        let mut process = thread::spawn(|| {
            let process = Process::spawn("orphan", &sh("echo up; exec sleep 1000")).unwrap();
            wait_for("the program", SOON, || !process.log().unwrap().is_empty()).unwrap();
            process
        })
        .join()
        .unwrap();
        assert_eq!(process.wait(SOON).unwrap().signal(), Some(Signal::KILL.as_raw()));
    }

    #[test]
    fn signals_arrive() {
        let mut process = Process::spawn("sleeper", &Command::new("cat")).unwrap();
        process.signal(Signal::TERM).unwrap();
        assert_eq!(process.wait(SOON).unwrap().signal(), Some(Signal::TERM.as_raw()));
    }
}
