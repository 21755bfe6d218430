//! DPDK's testpmd as a front end (virtio-user) or back end (vhost), without huge pages.
//!
//! `--no-huge` makes DPDK take its memory from a memfd, which virtio-user can share with a back end. Forwarding lcores poll:
//! each takes a core for itself.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::deadline::wait_for_some;
use crate::process::{Process, Signal};

/// Start-up takes half a second where nothing else runs.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
const PROMPT: &str = "testpmd> ";

/// A virtio-user device: a front end.
#[derive(Clone, Debug)]
pub struct VirtioUser {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// It listens, and survives the back end's end.
    pub server: bool,
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors of a ring.
    pub queue_size: u16,
    /// Offer VIRTIO_NET_F_MRG_RXBUF.
    pub mrg_rxbuf: bool,
    /// Offer VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Offer VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// The port's address.
    pub mac: Option<String>,
}

impl VirtioUser {
    /// Connects; one pair of split rings of 256, mergeable, not in order.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            server: false,
            queues: 1,
            queue_size: 256,
            mrg_rxbuf: true,
            in_order: false,
            packed: false,
            mac: None,
        }
    }

    /// The device as testpmd's argument of `--vdev`; each device of a process has another `index`.
    pub fn vdev(&self, index: usize) -> String {
        let mac = self.mac.as_ref().map(|mac| format!(",mac={mac}")).unwrap_or_default();
        format!(
            "net_virtio_user{index},path={},server={},queues={},queue_size={},mrg_rxbuf={},in_order={},packed_vq={}{mac}",
            self.socket.display(),
            u8::from(self.server),
            self.queues,
            self.queue_size,
            u8::from(self.mrg_rxbuf),
            u8::from(self.in_order),
            u8::from(self.packed),
        )
    }
}

/// What testpmd counted at one of its ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Frames received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames lost because nobody fetched them.
    pub rx_missed: u64,
    /// Frames received with errors.
    pub rx_errors: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that could not be sent.
    pub tx_errors: u64,
}

/// A running testpmd at its prompt. Dropping it kills it.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
}

impl Testpmd {
    /// Starts it with these devices; `lcores` is the main one and the forwarding ones, as `0,1`; `arguments` are testpmd's own, as
    /// `--forward-mode=txonly`. It waits at its prompt, and forwards after `start`.
    pub fn start(name: &str, lcores: &str, vdevs: &[String], arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new("stdbuf");
        // --no-shconf: no files in /run/dpdk, through which processes would find each other.
        command
            .args(["--output=L", "dpdk-testpmd", "--no-pci", "--no-huge", "-m", "512", "--no-telemetry"])
            .args(["--no-shconf", "-l", lcores, "--log-level=pmd.net.virtio.init:debug"]);
        for vdev in vdevs {
            command.args(["--vdev", vdev]);
        }
        command.args(["--", "--interactive", "--total-num-mbufs=16384"]).args(arguments);
        let mut testpmd = Self { process: Process::spawn(name, &command)? };
        testpmd
            .wait_for_prompt(0, START_TIMEOUT)
            .context("dpdk-testpmd (installed by tests/setup.sh dpdk)")?;
        Ok(testpmd)
    }

    /// Runs a command at the prompt and gives what it printed.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let before = self.process.log()?.len();
        writeln!(self.process.stdin(), "{command}").context("testpmd is gone")?;
        self.wait_for_prompt(before, COMMAND_TIMEOUT).with_context(|| command.to_owned())
    }

    /// Counters of every port, in order.
    pub fn stats(&mut self) -> Result<Vec<PortStats>> {
        Ok(parse_stats(&self.command("show port stats all")?))
    }

    /// Features that its virtio-user ports negotiated, in order.
    pub fn features(&self) -> Result<Vec<u64>> {
        parse_features(&self.process.log()?)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends a signal: STOP and CONT make a peer that hangs.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Everything it has printed so far.
    pub fn log(&self) -> Result<String> {
        self.process.log()
    }

    /// Waits for the next prompt in the log after `before` bytes and gives what is between.
    fn wait_for_prompt(&mut self, before: usize, timeout: Duration) -> Result<String> {
        wait_for_some("testpmd's prompt", timeout, || {
            self.process.check_running()?;
            let log = self.process.log()?;
            // Messages of other threads may follow the prompt.
            Ok(log
                .get(before..)
                .and_then(|printed| printed.split_once(PROMPT))
                .map(|(text, _)| text.to_owned()))
        })
    }
}

/// Reads the features out of the log of virtio's start.
fn parse_features(log: &str) -> Result<Vec<u64>> {
    let after = log.lines().filter_map(|line| line.split_once("features after negotiate = "));
    after.map(|(_, bits)| Ok(u64::from_str_radix(bits.trim(), 16)?)).collect()
}

/// Reads `show port stats all`: a heading per port, then words `NAME: number`.
fn parse_stats(text: &str) -> Vec<PortStats> {
    let mut ports: Vec<PortStats> = Vec::new();
    let mut words = text.split_ascii_whitespace().peekable();
    while let Some(word) = words.next() {
        if word == "statistics" {
            ports.push(PortStats::default());
        }
        let Some(port) = ports.last_mut() else { continue };
        let counter = match word {
            "RX-packets:" => &mut port.rx_packets,
            "RX-bytes:" => &mut port.rx_bytes,
            "RX-missed:" => &mut port.rx_missed,
            "RX-errors:" => &mut port.rx_errors,
            "TX-packets:" => &mut port.tx_packets,
            "TX-bytes:" => &mut port.tx_bytes,
            "TX-errors:" => &mut port.tx_errors,
            _ => continue,
        };
        if let Some(number) = words.peek().and_then(|word| word.parse().ok()) {
            *counter = number;
        }
    }
    ports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_port_by_port() {
        let text = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 12         RX-missed: 3          RX-bytes:  768
  RX-errors: 1
  RX-nombuf:  0
  TX-packets: 34         TX-errors: 2          TX-bytes:  2176

  Throughput (since last show)
  Rx-pps:            5          Rx-bps:         2560
  ############################################################################

  ######################## NIC statistics for port 1  ########################
  RX-packets: 7          RX-missed: 0          RX-bytes:  420
";
        let zero = PortStats {
            rx_packets: 12,
            rx_bytes: 768,
            rx_missed: 3,
            rx_errors: 1,
            tx_packets: 34,
            tx_bytes: 2176,
            tx_errors: 2,
        };
        let one = PortStats { rx_packets: 7, rx_bytes: 420, ..PortStats::default() };
        assert_eq!(parse_stats(text), [zero, one]);
        assert_eq!(parse_stats("Bad arguments"), []);
    }

    #[test]
    fn features_are_read_port_by_port() {
        let log = "virtio_ethdev_negotiate_features(): host_features before negotiate = 9100199a3
virtio_ethdev_negotiate_features(): features after negotiate = 910018020
testpmd> virtio_ethdev_negotiate_features(): features after negotiate = 10
";
        assert_eq!(parse_features(log).unwrap(), [0x9_1001_8020, 0x10]);
    }

    #[test]
    fn a_device_is_described_in_full() {
        let device = VirtioUser { server: true, packed: true, ..VirtioUser::new("/run/a.sock".into()) };
        assert_eq!(
            device.vdev(3),
            "net_virtio_user3,path=/run/a.sock,server=1,queues=1,queue_size=256,mrg_rxbuf=1,in_order=0,packed_vq=1"
        );
    }
}
