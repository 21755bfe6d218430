//! Metrics, read from the dataplane's own counters when somebody asks: nothing is counted twice.

use std::fmt::Error;
use std::sync::Arc;

use dataplane::{PortReport, WorkerReport};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::daemon::Daemon;
use crate::status::Phase;

/// All metrics as OpenMetrics text.
pub fn text(daemon: &Arc<Daemon>) -> String {
    let mut registry = Registry::with_prefix("vhostd");
    let snapshot = Snapshot {
        ports: daemon.dataplane.ports(),
        workers: daemon.dataplane.workers(),
        phases: daemon.plugs.list().iter().map(|plug| plug.status.phase).collect(),
    };
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    text::encode(&mut text, &registry).expect("writing to a string does not fail");
    text
}

/// Everything at one moment.
#[derive(Debug)]
struct Snapshot {
    ports: Vec<PortReport>,
    workers: Vec<WorkerReport>,
    phases: Vec<Phase>,
}

type PortCounter = (&'static str, &'static str, fn(&PortReport) -> u64);
type WorkerCounter = (&'static str, &'static str, fn(&WorkerReport) -> u64);

const PORT_COUNTERS: [PortCounter; 8] = [
    ("port_rx_frames", "Frames from the port", |p| p.counters.rx_frames),
    ("port_rx_bytes", "Bytes from the port", |p| p.counters.rx_bytes),
    ("port_tx_frames", "Frames to the port", |p| p.counters.tx_frames),
    ("port_tx_bytes", "Bytes to the port", |p| p.counters.tx_bytes),
    ("port_gso_frames", "Frames with a segmentation request", |p| p.counters.gso_frames),
    ("port_kicks", "Wake-ups by the other side", |p| p.rings.iter().map(|r| r.kicks).sum()),
    ("port_calls", "Notifications sent to the other side", |p| p.rings.iter().map(|r| r.calls).sum()),
    ("port_sessions", "Connections so far", |p| p.session.as_ref().map_or(0, |s| s.connections)),
];

const WORKER_COUNTERS: [WorkerCounter; 2] = [
    ("worker_turns", "Passes over the rings", |w| w.turns),
    ("worker_frames", "Frames taken from ports", |w| w.frames),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        for (name, help, read) in PORT_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for port in &self.ports {
                counter(&mut family, &port_labels(port), read(port))?;
            }
        }
        let mut drops =
            encoder.encode_descriptor("port_drops", "Frames given up", None, MetricType::Counter)?;
        for port in &self.ports {
            for (reason, frames) in &port.counters.drops {
                let why = [("reason", reason.name()), ("who", reason.who().name())];
                counter(&mut drops, &[&port_labels(port)[..], &why[..]].concat(), *frames)?;
            }
        }
        let mut linked =
            encoder.encode_descriptor("port_linked", "1 if rings run", None, MetricType::Gauge)?;
        for port in &self.ports {
            gauge(&mut linked, &port_labels(port), u8::from(port.linked).into())?;
        }
        for (name, help, read) in WORKER_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (index, worker) in self.workers.iter().enumerate() {
                counter(&mut family, &[("worker", index.to_string().as_str())], read(worker))?;
            }
        }
        let mut busy =
            encoder.encode_descriptor("worker_busy_ratio", "Turns with work", None, MetricType::Gauge)?;
        for (index, worker) in self.workers.iter().enumerate() {
            gauge(&mut busy, &[("worker", index.to_string().as_str())], worker.busy_ratio)?;
        }
        let mut plugs = encoder.encode_descriptor("plugs", "Plugs by phase", None, MetricType::Gauge)?;
        for phase in [Phase::Pending, Phase::Attached, Phase::Linked, Phase::Forwarding] {
            let count = self.phases.iter().filter(|p| **p == phase).count();
            gauge(&mut plugs, &[("phase", phase.name())], u32::try_from(count).unwrap_or(u32::MAX).into())?;
        }
        Ok(())
    }
}

fn port_labels(port: &PortReport) -> [(&'static str, &str); 2] {
    [("port", &port.name), ("network", &port.network)]
}

fn counter(family: &mut MetricEncoder, labels: &[(&str, &str)], value: u64) -> Result<(), Error> {
    ConstCounter::new(value).encode(family.encode_family(&labels)?)
}

fn gauge(family: &mut MetricEncoder, labels: &[(&str, &str)], value: f64) -> Result<(), Error> {
    ConstGauge::new(value).encode(family.encode_family(&labels)?)
}
