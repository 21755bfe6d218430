//! A daemon that dies before each change that it makes: plugs into a network of its own, and into a TAP. Those into bridges, Open
//! vSwitch, macvtaps and devices are with the others of their kind.

use anyhow::Result;
use e2e::daemon::Daemon;
use e2e::kill::killed_at_every_step;
use serde_json::json;

#[test]
fn a_guests_socket_is_there_or_not_at_all() -> Result<()> {
    let mut daemon = Daemon::start()?;
    let host = daemon.netns();
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    killed_at_every_step(&mut daemon, &json!({"socket": socket, "network": "net1"}), || host.state())
}

#[test]
fn a_guests_socket_and_its_tap_are_there_or_not_at_all() -> Result<()> {
    let mut daemon = Daemon::start()?;
    let host = daemon.netns();
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    let to = json!({"kind": "tap", "tap": "tap1", "mac": "52:54:00:00:00:01"});
    let spec = json!({"socket": socket, "to": to, "queues": 2, "mtu": 1400});
    killed_at_every_step(&mut daemon, &spec, || host.state())
}
