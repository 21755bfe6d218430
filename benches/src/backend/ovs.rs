//! OVS-DPDK from Debian's packages: database, switch and ports in a directory of its own, its devices in a network
//! namespace of its own, unless they are wanted in ours.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{Backend, Kind, Shape, bound};
use crate::{BACKEND_CPU, FRONTEND_CPU};

/// The switch.
pub(super) const SWITCH: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// Starts it; it is there when its sockets are.
pub(super) fn start(backend: &mut Backend, shape: &Shape) -> Result<()> {
    let dir = backend.dir.path().to_path_buf();
    let [file, socket] = ["conf.db", "db.sock"].map(|name| dir.join(name));
    run(at(Command::new("ovsdb-tool"), &dir).arg("create").arg(&file).arg(SCHEMA))?;
    let mut database = at(bound("ovsdb-server"), &dir);
    database.arg(format!("--remote=punix:{}", socket.display())).arg("-voff").arg(&file);
    backend.spawn(database)?;
    backend.wait_for(std::slice::from_ref(&socket))?;
    let database = format!("unix:{}", socket.display());
    run(at(Command::new("ovs-vsctl"), &dir)
        .arg("--no-wait")
        .arg(format!("--db={database}"))
        .args(configuration(backend.kind, shape)))?;
    let mut switch = at(bound("unshare"), &dir);
    switch
        .args((shape.taps == 0).then_some("--net"))
        .args([SWITCH, "-voff", &database])
        .stderr(Stdio::null());
    backend.spawn(switch)
}

/// One rule each way between two ports.
pub(super) fn add_flows(backend: &mut Backend) -> Result<()> {
    let dir = backend.dir.path().to_path_buf();
    let socket = dir.join("br.mgmt");
    backend.wait_for(std::slice::from_ref(&socket))?;
    let bridge = format!("unix:{}", socket.display());
    for flow in ["table=0,in_port=1,actions=output:2", "table=0,in_port=2,actions=output:1"] {
        run(at(Command::new("ovs-ofctl"), &dir).args(["add-flow", &bridge, flow]))?;
    }
    Ok(())
}

fn configuration(kind: Kind, shape: &Shape) -> Vec<String> {
    // Without --legacy-mem the switch adds --in-memory, which DPDK refuses together with --no-huge.
    // Without a limit it takes all huge pages that there are, for buffers that it does not need.
    let memory = if shape.huge_pages { "--in-memory --socket-limit=256" } else { "--no-huge --legacy-mem" };
    let mut words: Vec<String> =
        ["init", "--", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true"].map(Into::into).into();
    words.extend([
        format!("other_config:pmd-cpu-mask={:#x}", 1 << BACKEND_CPU),
        format!("other_config:dpdk-lcore-mask={:#x}", 1 << FRONTEND_CPU),
        format!("other_config:dpdk-extra={memory} --no-pci -m 256"),
        format!("other_config:userspace-tso-enable={}", kind == Kind::OvsTso),
    ]);
    let bridge = "-- add-br br -- set Bridge br datapath_type=netdev other_config:mac-table-size=200000";
    words.extend(bridge.split(' ').map(Into::into));
    for n in 0..shape.ports {
        let port = format!(
            "-- add-port br p{n} -- set Interface p{n} type=dpdkvhostuser ofport_request={} mtu_request={}",
            n + 1,
            shape.frame_max.saturating_sub(18).max(1500)
        );
        words.extend(port.split(' ').map(Into::into));
    }
    // A port of type internal is a TAP.
    for tap in shape.tap_names() {
        let port = format!("-- add-port br {tap} -- set Interface {tap} type=internal");
        words.extend(port.split(' ').map(Into::into));
    }
    words
}

fn at(mut command: Command, dir: &Path) -> Command {
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(name, dir);
    }
    command
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?}: {}",
        command.get_program(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
