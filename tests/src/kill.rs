//! A daemon that is killed in the middle of what it does.

use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::deadline::wait_for_some;

const ROUNDS: u32 = 12;
const PLUG: &str = "/v1/plugs/vm1";
/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);

/// Kills a daemon: whoever waits for an answer of it waits no more.
pub fn kill(daemon: &Daemon) -> Result<()> {
    let pid = Pid::from_raw(daemon.pid().cast_signed()).context("a process")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Plugs and unplugs `vm1` in turn and kills the daemon a little later each time. When it is back, the host is as it was
/// without the plug if there is none, and as it was with it otherwise, as far as `state` tells; at the end as at the beginning.
pub fn killed_in_the_middle(
    daemon: &mut Daemon,
    spec: &Value,
    state: impl Fn() -> Result<String>,
) -> Result<()> {
    let before = state()?;
    let body = json!({"spec": spec}).to_string();
    let answer = daemon.http("PUT", PLUG, &body)?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    let plugged = state()?;
    for round in 0..ROUNDS {
        let (method, body) = if round % 2 == 0 { ("DELETE", "") } else { ("PUT", body.as_str()) };
        let (sender, done) = mpsc::channel();
        std::thread::scope(|scope| {
            let daemon = &*daemon;
            scope.spawn(move || {
                // It fails when the daemon dies first.
                let _ = daemon.http(method, PLUG, body);
                let _ = sender.send(());
            });
            let _ = done.recv_timeout(Duration::from_millis((1 + round / 2).into()));
            kill(daemon)
        })?;
        daemon.kill_and_restart()?;
        let is_there = || daemon.run(&["ls", "-o", "name"]).map(|names| !names.is_empty());
        wait_for_some("the plug to be there whole, or not at all", SOON, || {
            let (there, state) = (is_there()?, state()?);
            Ok((state == if there { plugged.as_str() } else { before.as_str() }).then_some(()))
        })
        .with_context(|| {
            format!("{}\nbefore:\n{before}\nplugged:\n{plugged}", state().unwrap_or_default())
        })?;
        // Each round begins where an unkilled one would have ended.
        daemon.http(method, PLUG, body)?;
    }
    daemon.run(&["unplug", "vm1"])?;
    anyhow::ensure!(state()? == before, "{}\nbefore:\n{before}", state()?);
    Ok(())
}
