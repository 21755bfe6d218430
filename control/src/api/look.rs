//! What the dataplane does, for looking at: statistics, drops, workers, learned addresses, networks.
//!
//! rx of a port is what came from it, tx what went to it: the switch's view.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use dataplane::{Counters, PortReport, RingReport};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use super::extract::Params;
use crate::names::{Name, mac_text};
use crate::plug::PlugError;
use crate::problem::Problem;

/// Frames and bytes.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// Frames from the port.
    pub rx_frames: u64,
    /// Their bytes, without vnet header.
    pub rx_bytes: u64,
    /// Frames to the port.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Of both: frames that carried a segmentation request.
    pub gso_frames: u64,
    /// Frames given up, by reason.
    pub drops: BTreeMap<String, u64>,
}

/// What passed a port.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PortStats {
    /// The port; `PLUG:tap` is the host's side of a plug that has both.
    pub port: String,
    /// Its plug.
    pub plug: String,
    /// Its network; `plug:PLUG` for a plug that is a network of its own.
    pub network: String,
    /// What is behind it.
    pub kind: PortKind,
    /// MTU in force, bytes.
    pub mtu: u16,
    /// Rings run and are enabled, or the TAP is open.
    pub linked: bool,
    /// Every worker that serves it has it in its list.
    pub forwarding: bool,
    /// Sums over its rings.
    #[serde(flatten)]
    pub counts: Counts,
    /// Each ring or TAP queue that ever ran.
    pub rings: Vec<RingStats>,
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// A guest.
    VhostUser,
    /// Another switch, to which we are a guest.
    FrontEnd,
    /// The host.
    Tap,
}

/// What passed a ring or TAP queue.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RingStats {
    /// Vring index: even receives, odd transmits, in the view of the guest (ours, if we are one to another switch). For a
    /// TAP: queue number.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Runs and is not broken.
    pub started: bool,
    /// The front end enabled it.
    pub enabled: bool,
    /// Why it was stopped, if it broke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// The worker that polls it.
    pub worker: usize,
    /// Of this ring alone.
    #[serde(flatten)]
    pub counts: Counts,
    /// Wake-ups by the other side.
    pub kicks: u64,
    /// Notifications sent to the other side.
    pub calls: u64,
    /// Bursts that carried at least one frame.
    pub bursts: u64,
}

/// Frames given up at a port for one reason.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PortDrops {
    /// The port.
    pub port: String,
    /// Its plug.
    pub plug: String,
    /// Why.
    pub reason: String,
    /// Whose fault it was: `guest`, `host`, `policy`, `network`.
    pub who: String,
    /// How many.
    pub frames: u64,
    /// What to do about it.
    pub advice: String,
}

/// A worker since it started.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// Its number.
    pub index: usize,
    /// Pinned to this lcore.
    pub cpu: Option<usize>,
    /// NUMA node of that lcore.
    #[serde(default)]
    pub node: Option<u32>,
    /// Passes over its rings.
    pub turns: u64,
    /// Turns that found work, of all.
    pub busy_ratio: f64,
    /// Frames taken from ports.
    pub frames: u64,
    /// Mean, of bursts that had any.
    pub frames_per_burst: f64,
    /// Mean TSC cycles, in turns with work.
    pub cycles_per_frame: f64,
    /// What it polls, as `port/index`.
    pub vrings: Vec<String>,
}

/// A learned address.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct FdbRow {
    /// In this network.
    pub network: String,
    /// The address.
    pub mac: String,
    /// The port it was seen on.
    pub port: String,
    /// Seconds since the last frame from it.
    pub age_s: u32,
}

/// A network: what can reach one another.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its ports.
    pub ports: Vec<String>,
    /// The port through which it reaches the host.
    pub uplink: Option<String>,
}

/// Parameters of statistics.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct StatsParams {
    /// Only this plug's ports.
    plug: Option<Name>,
}

/// Frames and bytes by port and ring.
#[utoipa::path(get, path = "/v1/stats", tag = "look", params(StatsParams),
    responses((status = 200, description = "By port", body = Vec<PortStats>), Problem))]
pub(super) async fn stats(
    State(daemon): Shared,
    Params(params): Params<StatsParams>,
) -> Result<Json<Vec<PortStats>>, Problem> {
    let ports = daemon.dataplane.ports().into_iter().map(port_stats);
    let Some(plug) = params.plug else { return Ok(Json(ports.collect())) };
    daemon.plugs.show(&plug).map_err(|_| PlugError::NotFound(plug.clone()))?;
    Ok(Json(ports.filter(|port| port.plug == plug.as_str()).collect()))
}

/// Frames given up, by port and reason.
#[utoipa::path(get, path = "/v1/drops", tag = "look", responses((status = 200, description = "By port and reason", body = Vec<PortDrops>)))]
pub(super) async fn drops(State(daemon): Shared) -> Json<Vec<PortDrops>> {
    let of_port = |port: PortReport| {
        let plug = plug_of_port(&port.name).to_owned();
        port.counters.drops.into_iter().map(move |(reason, frames)| PortDrops {
            port: port.name.clone(),
            plug: plug.clone(),
            reason: reason.name().into(),
            who: reason.who().name().into(),
            frames,
            advice: reason.advice().into(),
        })
    };
    Json(daemon.dataplane.ports().into_iter().flat_map(of_port).collect())
}

/// Workers and what they poll.
#[utoipa::path(get, path = "/v1/workers", tag = "look", responses((status = 200, description = "All workers", body = Vec<Worker>)))]
pub(super) async fn workers(State(daemon): Shared) -> Json<Vec<Worker>> {
    let worker = |(index, report): (usize, dataplane::WorkerReport)| Worker {
        index,
        cpu: report.cpu,
        node: report.node,
        turns: report.turns,
        busy_ratio: report.busy_ratio,
        frames: report.frames,
        frames_per_burst: report.frames_per_burst,
        cycles_per_frame: report.cycles_per_frame,
        vrings: report.vrings,
    };
    Json(daemon.dataplane.workers().into_iter().enumerate().map(worker).collect())
}

/// Learned addresses.
#[utoipa::path(get, path = "/v1/fdb", tag = "look", responses((status = 200, description = "All networks", body = Vec<FdbRow>)))]
pub(super) async fn fdb(State(daemon): Shared) -> Json<Vec<FdbRow>> {
    let row = |entry: dataplane::FdbEntry| FdbRow {
        network: entry.network,
        mac: mac_text(entry.mac),
        port: entry.port_name,
        age_s: entry.age_s,
    };
    Json(daemon.dataplane.fdb().into_iter().map(row).collect())
}

/// Networks and their ports.
#[utoipa::path(get, path = "/v1/networks", tag = "look", responses((status = 200, description = "All networks", body = Vec<Network>)))]
pub(super) async fn networks(State(daemon): Shared) -> Json<Vec<Network>> {
    let mut networks = BTreeMap::<String, Network>::new();
    for report in daemon.dataplane.ports() {
        let new = || Network { name: report.network.clone(), ports: Vec::new(), uplink: None };
        let network = networks.entry(report.network.clone()).or_insert_with(new);
        if report.kind == dataplane::PortKind::Tap {
            network.uplink = Some(report.name.clone());
        }
        network.ports.push(report.name);
    }
    Json(networks.into_values().collect())
}

/// A port is named after its plug: `PLUG`, or `PLUG:tap`.
fn plug_of_port(port: &str) -> &str {
    port.split_once(':').map_or(port, |(plug, _)| plug)
}

fn port_stats(port: PortReport) -> PortStats {
    PortStats {
        plug: plug_of_port(&port.name).into(),
        port: port.name,
        network: port.network,
        kind: match port.kind {
            dataplane::PortKind::VhostUser => PortKind::VhostUser,
            dataplane::PortKind::FrontEnd => PortKind::FrontEnd,
            dataplane::PortKind::Tap => PortKind::Tap,
        },
        mtu: port.mtu,
        linked: port.linked,
        forwarding: port.forwarding,
        counts: port.counters.into(),
        rings: port.rings.into_iter().map(ring_stats).collect(),
    }
}

fn ring_stats(ring: RingReport) -> RingStats {
    RingStats {
        index: ring.index,
        size: ring.size,
        started: ring.started,
        enabled: ring.enabled,
        broken: ring.broken,
        worker: ring.worker,
        counts: ring.counters.into(),
        kicks: ring.kicks,
        calls: ring.calls,
        bursts: ring.bursts,
    }
}

impl From<Counters> for Counts {
    fn from(counters: Counters) -> Self {
        Self {
            rx_frames: counters.rx_frames,
            rx_bytes: counters.rx_bytes,
            tx_frames: counters.tx_frames,
            tx_bytes: counters.tx_bytes,
            gso_frames: counters.gso_frames,
            drops: counters.drops.into_iter().map(|(reason, n)| (reason.name().into(), n)).collect(),
        }
    }
}
