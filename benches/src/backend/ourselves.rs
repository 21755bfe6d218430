//! Back ends of our own: the running program, started again.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use dataplane::{Config, Dataplane, Link, Poll, PortSpec};
use sys::tap::TapQueue;
use vhost_user::{Endpoint, Limits, Sessions};

use super::{BEFORE, Kind, Shape, bound, socket, tap};
use crate::limit::LimitPort;
use crate::{BACKEND_CPU, FRONTEND_CPU};

const SERVE: &str = "--serve-as-back-end";
/// Addresses that a port may teach the switch: more than any traffic here has.
const FDB_PORT_MAX: u32 = 1 << 17;

/// To be called first by every `main` that starts back ends: whether the program was started as one, and how that ended.
pub fn serve_if_asked() -> Option<Result<()>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [serve, kind, ports, taps, first_tap, dir] = &args[..] else { return None };
    (serve == SERVE).then(|| {
        let ports = ports.parse().context("number of ports")?;
        let taps: usize = taps.parse().context("number of TAPs")?;
        let first_tap = first_tap.parse().context("number of the first TAP")?;
        let taps = first_tap..first_tap + taps;
        match Kind::from_str(kind, false) {
            Ok(Kind::Vhostd | Kind::Before) => vhostd(dir.as_ref(), ports, taps, Poll::Busy),
            Ok(Kind::VhostdAdaptive) => vhostd(dir.as_ref(), ports, taps, Poll::Adaptive),
            Ok(Kind::Cable) => cable_end(dir.as_ref(), taps.end),
            Ok(Kind::Limit) => limit(dir.as_ref()),
            _ => bail!("{kind} is no back end of ours"),
        }
    })
}

pub(super) fn command(kind: Kind, dir: &Path, shape: &Shape) -> Result<Command> {
    let program = match kind {
        Kind::Before => PathBuf::from(std::env::var_os(BEFORE).context("no program of before")?),
        _ => std::env::current_exe()?,
    };
    let mut command = bound(program);
    let name = kind.to_possible_value().context("every kind has a name")?;
    let numbers = [shape.ports, shape.taps, shape.first_tap].map(|n| n.to_string());
    command.args([SERVE, name.get_name()]).args(numbers).arg(dir);
    Ok(command)
}

/// Both ends of the cable: the number of its TAP tells which.
pub(super) fn cable(dir: &Path) -> Result<[Command; 2]> {
    let end = |first_tap| {
        command(Kind::Cable, dir, &Shape { ports: 1, taps: 0, first_tap, frame_max: 0, huge_pages: false })
    };
    Ok([end(0)?, end(1)?])
}

fn vhostd(dir: &Path, ports: usize, taps: Range<usize>, poll: Poll) -> Result<()> {
    let sockets = (0..ports).map(|n| Ok(served(socket(dir, n))));
    let taps = taps.map(|n| opened(&tap(n)));
    serve(BACKEND_CPU, poll, sockets.chain(taps))
}

/// End 0 listens, end 1 is its front end.
fn cable_end(dir: &Path, end: usize) -> Result<()> {
    let path = socket(dir, 0);
    let (cpu, cable) = match end {
        0 => (BACKEND_CPU, served(path)),
        _ => (FRONTEND_CPU, Link::FrontEnd { endpoint: Endpoint::connect(path), queue_pairs: 1 }),
    };
    serve(cpu, Poll::Adaptive, [Ok(cable), opened(&tap(end))].into_iter())
}

fn served(socket: PathBuf) -> Link {
    Link::VhostUser { endpoint: Endpoint::listen(socket), mac: None, queue_pairs: 1, policy: None }
}

fn opened(tap: &str) -> Result<Link> {
    Ok(Link::Tap { queues: vec![TapQueue::create(tap, false)?], offloads: true })
}

/// Joins ports to a network, and forwards between them until whoever started the program is gone.
fn serve(cpu: usize, poll: Poll, links: impl Iterator<Item = Result<Link>>) -> Result<()> {
    let config = Config {
        cpus: vec![cpu],
        poll,
        ageing: Duration::from_secs(300),
        fdb_port_max: FDB_PORT_MAX,
        on_event: Box::new(|_| {}),
    };
    let plane = Dataplane::start(config)?;
    for (port, link) in links.enumerate() {
        let (name, network) = (format!("p{port}"), "bench".into());
        plane.add_port(PortSpec { name, network, mtu: 9216, link: link? })?;
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
