//! A host with Open vSwitch and the daemon, and what is plugged into the one through the other.

use std::fs;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Dpdk, Ovs, datapath_type};
use crate::daemon::Daemon;
use crate::deadline::wait_for_some;
use crate::netns::Netns;
use crate::peer::{Peer, PeerConfig};

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);

/// A host with Open vSwitch and the daemon.
#[derive(Debug)]
pub struct Host {
    /// The daemon, whose bridges are made as [`datapath_type`] says.
    pub daemon: Daemon,
    /// The switch. Outlives the daemon.
    pub ovs: Ovs,
}

impl Host {
    /// Starts both.
    pub fn start() -> Result<Self> {
        Self::start_with(Dpdk::Off, "")
    }

    /// The same, with more lines in the daemon's section `[ovs]`.
    pub fn start_with(dpdk: Dpdk, more: &str) -> Result<Self> {
        let netns = Arc::new(Netns::new()?);
        let ovs = Ovs::start(&netns, dpdk)?;
        let daemon = Daemon::start_on(netns, &configuration(&ovs, more))?;
        Ok(Self { daemon, ovs })
    }

    /// Kills the daemon and starts it again with other lines in its section `[ovs]`.
    pub fn restart_with(&mut self, more: &str) -> Result<()> {
        let text = configuration(&self.ovs, more);
        let file = self.daemon.configuration();
        self.daemon.kill_and_restart_after(|| Ok(fs::write(file, text)?)).map(drop)
    }

    /// See [`Ovs::state`].
    pub fn state(&self) -> Result<String> {
        self.ovs.state()
    }

    /// A plug joined with a port of a bridge.
    pub fn plug(&self, name: &str, bridge: &str, more: &[&str]) -> Result<String> {
        let (socket, to) = (self.socket(name), format!("ovs:{bridge}"));
        self.daemon.run(&[&["plug", name, "--listen", &socket, "--to", &to], more].concat())
    }

    /// The same, which has to fail with this exit code. Gives what it says.
    pub fn refused(&self, name: &str, bridge: &str, more: &[&str], code: i32) -> Result<String> {
        let (socket, to) = (self.socket(name), format!("ovs:{bridge}"));
        let arguments = [&["plug", name, "--listen", &socket, "--to", &to], more].concat();
        said(&self.daemon.command(&arguments)?, code)
    }

    /// The same from a native document.
    pub fn plug_document(&self, id: &str, spec: &Value) -> Result<Output> {
        let path = self.daemon.socket(&format!("{id}.json"));
        fs::write(&path, json!({"id": id, "spec": spec}).to_string())?;
        self.daemon.command(&["plug", "-f", path.to_str().context("a path")?])
    }

    /// Plugs as os-vif does.
    pub fn plug_vif(&self, request: &Value) -> Result<()> {
        let answer = self.daemon.http("POST", "/v1/os-vif/plug", &request.to_string())?;
        ensure!(answer.contains("\"phase\":"), "{answer}");
        Ok(())
    }

    /// Unplugs as os-vif does.
    pub fn unplug_vif(&self, request: &Value) -> Result<()> {
        let answer = self.daemon.http("POST", "/v1/os-vif/unplug", &request.to_string())?;
        ensure!(answer.contains("\"existed\":"), "{answer}");
        Ok(())
    }

    /// Where the plug's socket is.
    pub fn socket(&self, name: &str) -> String {
        self.daemon.socket(name).display().to_string()
    }

    /// Waits until the plug is in this phase, and its conditions contain this text.
    pub fn wait_for(&self, plug: &str, phase: &str, text: &str) -> Result<()> {
        let look = || self.daemon.json(&["show", plug]);
        wait_for_some(&format!("{plug} to be {phase}: {text}"), SOON, || {
            let status = look()?["status"].take();
            let conditions = status["conditions"].to_string();
            Ok((status["phase"] == phase && conditions.contains(text)).then_some(()))
        })
        .with_context(|| look().unwrap_or_default().to_string())
    }

    /// Waits until links and rows are these.
    pub fn wait_for_state(&self, state: &str) -> Result<()> {
        wait_for_some("the host to be as before", SOON, || Ok((self.state()? == state).then_some(())))
            .with_context(|| format!("{}\nwanted:\n{state}", self.state().unwrap_or_default()))
    }

    /// The plug's guest, once frames flow.
    pub fn guest(&self, plug: &str) -> Result<Peer> {
        self.wait_for(plug, "attached", "waiting for a front end")?;
        let mut guest = Peer::connect(self.daemon.socket(plug), PeerConfig::default())?;
        guest.offer_all();
        self.daemon.wait_for_forwarding(&[plug])?;
        Ok(guest)
    }

    /// Times that Open vSwitch was told of a change.
    pub fn generation(&self) -> Result<String> {
        self.ovs.vsctl("--no-wait get Open_vSwitch . next_cfg")
    }

    /// How many events of this kind there were since the daemon's start.
    pub fn events(&self, kind: &str) -> Result<usize> {
        let info = self.daemon.json(&["api", "GET", "/v1/info"])?;
        let answer = self.daemon.http("GET", &format!("/v1/events?since={}-0", info["epoch"]), "")?;
        Ok(answer.matches(&format!("\"kind\":\"{kind}\"")).count())
    }
}

/// What a command that failed so said.
pub fn said(output: &Output, code: i32) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{:?}, not {code}: {errors}", output.status);
    Ok(errors)
}

fn configuration(ovs: &Ovs, more: &str) -> String {
    format!(
        "[ovs]\ndatabase = \"unix:{}\"\ndatapath_type = \"{}\"\nsocket_dir = {:?}\n{more}\n",
        ovs.socket().display(),
        datapath_type(),
        ovs.shared()
    )
}
