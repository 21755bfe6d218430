//! A daemon that is killed in the middle of what it does.
//!
//! It dies at its fail points (`sys::fail_point`), of which one is before each change that it makes to the world: at the first,
//! at the second, and so on until it lives through a request, which has been interrupted everywhere by then.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::deadline::wait_for_some;

const PLUG: &str = "/v1/plugs/vm1";
/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);
/// More changes than any request makes.
const CHANGES_MAX: u32 = 300;

/// Kills a daemon: whoever waits for an answer of it waits no more.
pub fn kill(daemon: &Daemon) -> Result<()> {
    let pid = Pid::from_raw(daemon.pid().cast_signed()).context("a process")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// A daemon, what it is asked for, and how the host is with it and without.
struct Scene<'a> {
    daemon: &'a mut Daemon,
    body: String,
    state: &'a dyn Fn() -> Result<String>,
    before: String,
    plugged: String,
}

/// Plugs and unplugs `vm1`, and has the daemon die before each change that it makes for either, and once more before as many
/// changes of its next life. When it is back, the host is as it was without the plug if there is none, and as it was with it
/// otherwise, as far as `state` and the sockets tell; at the end as at the beginning.
pub fn killed_at_every_step(
    daemon: &mut Daemon,
    spec: &Value,
    state: impl Fn() -> Result<String>,
) -> Result<()> {
    killed_at_steps(daemon, spec, 1, state)
}

/// The same before one change in so many.
pub fn killed_at_steps(
    daemon: &mut Daemon,
    spec: &Value,
    stride: u32,
    state: impl Fn() -> Result<String>,
) -> Result<()> {
    let body = json!({"spec": spec}).to_string();
    let (before, plugged) = (String::new(), String::new());
    let mut scene = Scene { daemon, body, state: &state, before, plugged };
    scene.before = scene.now()?;
    scene.lives_through("PUT")?;
    scene.plugged = scene.now()?;
    scene.lives_through("DELETE")?;
    ensure!(scene.now()? == scene.before, "{}\nbefore:\n{}", scene.now()?, scene.before);
    if !cfg!(debug_assertions) {
        return scene.has_no_fail_points();
    }
    let start = scene.changes_of_a_start()?;
    let mut requests = ["PUT", "DELETE"].map(|method| Rounds { method, next: start + 1, lived: false });
    // Each round begins where the last one ended.
    let mut is_there = false;
    while requests.iter().any(|rounds| !rounds.lived) {
        let Rounds { method, next, lived } = &mut requests[usize::from(is_there)];
        if *lived {
            scene.lives_through(method)?;
            is_there = !is_there;
            continue;
        }
        ensure!(*next <= CHANGES_MAX, "a {method} takes more than {CHANGES_MAX} changes");
        *lived = scene.dies_at(*next, method)?;
        let round = || format!("after a {method}, killed before change {next}");
        is_there = scene.comes_back(*next).with_context(round)?;
        *next += stride;
    }
    if is_there {
        scene.lives_through("DELETE")?;
    }
    ensure!(scene.now()? == scene.before, "{}\nbefore:\n{}", scene.now()?, scene.before);
    let [put, delete] = requests.map(|rounds| rounds.next - start - 1 - stride);
    eprintln!(
        "killed before each change of a start ({start}), and each {stride} of a plug ({put}), a restoration and an unplug ({delete})"
    );
    Ok(())
}

/// How far it has come with one kind of request.
struct Rounds {
    method: &'static str,
    /// The change before which it dies next, counted from its start.
    next: u32,
    /// It has lived through a request, told to die before one change more than that takes.
    lived: bool,
}

impl Scene<'_> {
    fn now(&self) -> Result<String> {
        Ok(format!("{}\n{}", (self.state)()?, self.daemon.files()?.join("\n")))
    }

    /// Starts it to die before its first change, its second, and so on until it lives to answer; gives how many it makes until then.
    fn changes_of_a_start(&mut self) -> Result<u32> {
        for n in 1..CHANGES_MAX {
            if self.daemon.restart_to_die(n)? {
                return Ok(n - 1);
            }
        }
        bail!("a start takes more than {CHANGES_MAX} changes")
    }

    /// Asks for the plug, or for its end. `None` if the daemon died over it.
    fn ask(&mut self, method: &str) -> Result<Option<()>> {
        let body = if method == "PUT" { self.body.as_str() } else { "" };
        let answer = self.daemon.http(method, PLUG, body);
        if let Ok(answer) = &answer
            && !answer.is_empty()
        {
            ensure!(answer.starts_with("HTTP/1.1 20"), "{method}: {answer}");
            return Ok(Some(()));
        }
        let ended = wait_for_some("the end of vhostd", SOON, || self.daemon.ended());
        let ended = ended.with_context(|| format!("{method}: {answer:?}"))?;
        ensure!(ended.signal() == Some(Signal::KILL.as_raw()), "{ended}");
        Ok(None)
    }

    /// The daemon starts and is asked, and nobody tells it to die.
    fn lives_through(&mut self, method: &str) -> Result<()> {
        self.daemon.kill_and_restart()?;
        self.ask(method)?.context("nobody killed it")
    }

    /// The daemon starts and is asked, and dies at the `n`th change since its start. True if it lives.
    fn dies_at(&mut self, n: u32, method: &str) -> Result<bool> {
        Ok(self.daemon.restart_to_die(n)? && self.ask(method)?.is_some())
    }

    /// Starts it again to die at the `n`th change of what it has left to do, and again, now to live. True if the plug is there.
    fn comes_back(&mut self, n: u32) -> Result<bool> {
        let settled = if self.daemon.restart_to_die(n)? { self.settled()? } else { None };
        let settled = match settled {
            Some(is_there) => Some(is_there),
            None => {
                self.daemon.kill_and_restart()?;
                self.settled()?
            }
        };
        settled.context("nobody killed it")
    }

    /// Waits until the plug is there whole, or not at all, and gives which. `None` if the daemon dies first.
    fn settled(&mut self) -> Result<Option<bool>> {
        let settled = wait_for_some("the plug to be there whole, or not at all", SOON, || {
            let Ok(plugs) = self.daemon.plugs() else { return Ok(self.daemon.ended()?.map(|_| None)) };
            let now = self.now()?;
            Ok(match plugs.first() {
                None => (now == self.before).then_some(Some(false)),
                Some(plug) if plug["status"]["phase"] == "pending" => None,
                Some(_) => (now == self.plugged).then_some(Some(true)),
            })
        });
        settled.with_context(|| {
            let (now, plugs) = (self.now().unwrap_or_default(), self.daemon.plugs().unwrap_or_default());
            format!("{plugs:?}\n{now}\nbefore:\n{}\nplugged:\n{}", self.before, self.plugged)
        })
    }

    /// A daemon as it ships does not look at what tells others when to die.
    fn has_no_fail_points(&mut self) -> Result<()> {
        ensure!(self.dies_at(1, "PUT")? && self.dies_at(1, "DELETE")?, "a release build has fail points");
        eprintln!(
            "SKIPPED: a build without debug assertions has no fail points; the tests of the dev profile kill it at each"
        );
        Ok(())
    }
}
