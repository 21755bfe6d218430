//! DPDK's vhost library as `dpdk-testpmd` drives it.

use std::path::Path;
use std::process::{Command, Stdio};

use super::{Shape, bound, socket};
use crate::{BACKEND_CPU, FRONTEND_CPU};

/// Bytes of a DPDK buffer before its data, and what the data of frames of usual length gets.
const HEADROOM: usize = 128;
const DATA: usize = 2048;

pub(super) fn command(dir: &Path, shape: &Shape) -> Command {
    let vhost = |n: usize| format!("--vdev=net_vhost{n},iface={},queues=1", socket(dir, n).display());
    let tap = |(n, name): (usize, String)| format!("--vdev=net_tap{n},iface={name}");
    // A long frame gets one long buffer: testpmd is spared chains of them.
    let mbuf = HEADROOM + shape.frame_max.next_multiple_of(64).max(DATA);
    let mut command = bound("dpdk-testpmd");
    command
        .args(memory(shape.huge_pages))
        .arg(format!("--lcores=1@{FRONTEND_CPU},0@{BACKEND_CPU}"))
        .arg("--main-lcore=1")
        .args((0..shape.ports).map(vhost).chain(shape.tap_names().enumerate().map(tap)))
        .args(["--", "-i", "--auto-start", "--forward-mode=io", "--burst=32", "--total-num-mbufs=8192"])
        .arg(format!("--mbuf-size={mbuf}"))
        .stderr(Stdio::null());
    command
}

/// What every DPDK program here gets: no devices, no files, and 256 MiB.
pub fn memory(huge_pages: bool) -> [&'static str; 7] {
    let pages = if huge_pages { "--in-memory" } else { "--no-huge" };
    [pages, "--no-pci", "--no-shconf", "--no-telemetry", "--log-level=error", "-m", "256"]
}
