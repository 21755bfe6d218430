//! Back ends of our own: the running program, started again.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use dataplane::{Config, Dataplane, Link, Poll, PortSpec};
use vhost_user::{Endpoint, Limits, Sessions};

use super::{Kind, Shape, bound, socket};
use crate::BACKEND_CPU;
use crate::limit::LimitPort;

const SERVE: &str = "--serve-as-back-end";
/// Addresses that a port may teach the switch: more than any traffic here has.
const FDB_PORT_MAX: u32 = 1 << 17;

/// To be called first by every `main` that starts back ends: whether the program was started as one, and how that ended.
pub fn serve_if_asked() -> Option<Result<()>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [serve, kind, ports, dir] = &args[..] else { return None };
    (serve == SERVE).then(|| {
        let ports = ports.parse().context("number of ports")?;
        match Kind::from_str(kind, false) {
            Ok(Kind::Vhostd) => vhostd(dir.as_ref(), ports, Poll::Busy),
            Ok(Kind::VhostdAdaptive) => vhostd(dir.as_ref(), ports, Poll::Adaptive),
            Ok(Kind::Limit) => limit(dir.as_ref()),
            _ => bail!("{kind} is no back end of ours"),
        }
    })
}

pub(super) fn command(kind: Kind, dir: &Path, shape: &Shape) -> Result<Command> {
    let mut command = bound(std::env::current_exe()?);
    let name = kind.to_possible_value().context("every kind has a name")?;
    command.args([SERVE, name.get_name()]).arg(shape.ports.to_string()).arg(dir);
    Ok(command)
}

fn vhostd(dir: &Path, ports: usize, poll: Poll) -> Result<()> {
    let config = Config {
        cpus: vec![BACKEND_CPU],
        poll,
        ageing: Duration::from_secs(300),
        fdb_port_max: FDB_PORT_MAX,
        on_event: Box::new(|_| {}),
    };
    let plane = Dataplane::start(config)?;
    for port in 0..ports {
        let endpoint = Endpoint::listen(socket(dir, port));
        let link = Link::VhostUser { endpoint, mac: None, queue_pairs: 1 };
        plane.add_port(PortSpec { name: format!("p{port}"), network: "bench".into(), mtu: 9216, link })?;
    }
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

fn limit(dir: &Path) -> Result<()> {
    let sessions = Sessions::start(Limits::default(), Box::new(|_, _| {}))?;
    let ports = [LimitPort::default(), LimitPort::default()];
    for (n, port) in ports.iter().enumerate() {
        sessions.add(Endpoint::listen(socket(dir, n)), Box::new(port.clone()))?;
    }
    crate::pin(BACKEND_CPU);
    loop {
        ports[0].forward(&ports[1]);
        ports[1].forward(&ports[0]);
    }
}
