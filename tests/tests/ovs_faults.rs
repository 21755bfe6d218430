//! Open vSwitch that dies in the middle of a plug or unplug, and what somebody else takes away of one.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::deadline::wait_for_some;
use e2e::ovs::{Host, Ovs};
use serde_json::json;

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(30);

/// What dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Database,
    Switch,
    Both,
}

impl Victim {
    fn kill(self, ovs: &mut Ovs) -> Result<()> {
        if self != Self::Switch {
            ovs.kill_database()?;
        }
        if self != Self::Database {
            ovs.kill_switch()?;
        }
        Ok(())
    }

    fn start(self, ovs: &mut Ovs) -> Result<()> {
        if self != Self::Switch {
            ovs.start_database()?;
        }
        if self != Self::Database {
            ovs.start_switch()?;
        }
        Ok(())
    }
}

/// A guest's TAP in a bridge of its own.
fn body() -> String {
    let guest = json!({"make_tap": true, "make_port": true});
    let to =
        json!({"kind": "ovs", "bridge": "br0", "iface_id": "lsp1", "per_port_bridge": true, "guest": guest});
    json!({"spec": {"to": to}}).to_string()
}

/// Each request is answered in time, and when Open vSwitch is back, the plug is there whole, or not at all.
fn dies_in_the_middle(victim: Victim) -> Result<()> {
    let Host { daemon, mut ovs } = Host::start()?;
    let body = body();
    let ask = |method: &str| match method {
        "PUT" => daemon.command(&["api", method, "/v1/plugs/vm1", "--data", &body]),
        _ => daemon.command(&["api", method, "/v1/plugs/vm1"]),
    };
    let before = state(&ovs)?;
    ask("PUT")?;
    let plugged = state(&ovs)?;
    for (method, moment) in [("DELETE", 12), ("PUT", 16), ("DELETE", 20), ("PUT", 40)] {
        let (sender, answered) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| sender.send(ask(method)));
            let _ = answered.recv_timeout(Duration::from_millis(moment));
            victim.kill(&mut ovs)
        })?;
        // Whoever was asked has said something before the threads were joined.
        victim.start(&mut ovs)?;
        let is_there = || daemon.run(&["ls", "-o", "name"]).map(|names| !names.is_empty());
        wait_for_some("the plug to be there whole, or not at all", SOON, || {
            let (there, state) = (is_there()?, state(&ovs)?);
            Ok((state == if there { plugged.as_str() } else { before.as_str() }).then_some(()))
        })
        .with_context(|| format!("{method}: {}", state(&ovs).unwrap_or_default()))?;
        ask(method)?;
    }
    daemon.run(&["unplug", "vm1"])?;
    assert_eq!(state(&ovs)?, before);
    Ok(())
}

/// But for the bridges' own links: a switch that is killed leaves them, and does not look for those of bridges that have gone.
fn state(ovs: &Ovs) -> Result<String> {
    let state = ovs.state()?;
    let is_of = |line: &str, name: &str| {
        line.starts_with(&format!("\"{name}\" ")) || line.contains(&format!("/{name}/"))
    };
    let kept = |line: &&str| !["br0", "pb68f65f194ec5"].into_iter().any(|name| is_of(line, name));
    Ok(state.lines().filter(kept).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_database_that_dies_in_the_middle_leaves_a_plug_whole_or_nothing() -> Result<()> {
    dies_in_the_middle(Victim::Database)
}

#[test]
fn a_switch_that_dies_in_the_middle_leaves_a_plug_whole_or_nothing() -> Result<()> {
    dies_in_the_middle(Victim::Switch)
}

#[test]
fn both_that_die_in_the_middle_leave_a_plug_whole_or_nothing() -> Result<()> {
    dies_in_the_middle(Victim::Both)
}

#[test]
fn whatever_somebody_else_removes_of_a_port_in_its_own_bridge_is_put_back() -> Result<()> {
    let host = Host::start()?;
    assert!(
        host.plug_document("vm1", &serde_json::from_str::<serde_json::Value>(&body())?["spec"])?
            .status
            .success()
    );
    host.daemon.wait_for_forwarding(&["vm1"])?;
    let plugged = host.state()?;
    let own = host.ovs.vsctl("port-to-br pbpvm1")?;
    for removal in
        ["del-port ibpvm1", "del-port pbpvm1", "del-port vhd-vm1", &format!("del-br {own}"), "del-br br0"]
    {
        host.ovs.vsctl(removal)?;
        host.wait_for_state(&plugged).context(removal.to_owned())?;
        host.daemon.wait_for_forwarding(&["vm1"]).context(removal.to_owned())?;
    }
    Ok(())
}
