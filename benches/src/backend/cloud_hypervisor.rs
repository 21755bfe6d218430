//! Cloud Hypervisor's back end for one guest and one TAP: `vhost_user_net` of its source tree, which no Debian package has.

use std::path::Path;
use std::process::{Command, Stdio};

use super::{Shape, bound, socket, tap};
use crate::BACKEND_CPU;

/// Built with `cargo build --release -p vhost_user_net` there, and put into a directory of PATH.
pub(super) const PROGRAM: &str = "vhost_user_net";

pub(super) fn command(dir: &Path, shape: &Shape) -> Command {
    let socket = socket(dir, 0);
    let mut command = bound("taskset");
    command
        .args(["--cpu-list", &BACKEND_CPU.to_string(), PROGRAM, "--net-backend"])
        .arg(format!(
            "ip=192.168.249.1,mask=255.255.255.0,socket={},num_queues=2,queue_size=256,tap={}",
            socket.display(),
            tap(shape.first_tap)
        ))
        .stderr(Stdio::null());
    command
}
