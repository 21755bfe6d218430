//! What a plug would do, for people: the steps of [`super::steps`] in their order, and what is there of it already.

use hostnet::{HostNet, Kind};

use super::error::StepError;
use super::ovs::OpenVSwitch;
use crate::names::{IfName, Name};
use crate::spec::{Bridge, Macvtap, Ovs, PlugSpec, Role, Socket, To, Uplink};

/// The steps, one sentence each. Fails where the first of them would because of what is there.
pub(super) async fn plan(
    host: &HostNet,
    ovs: &OpenVSwitch,
    id: &Name,
    spec: &PlugSpec,
) -> Result<Vec<String>, StepError> {
    let mut steps = vec![format!("record plug {id}, so that a restart brings it back")];
    match &spec.to {
        None => {}
        Some(to @ To::Tap(_)) => steps.push(tap(host, id, spec, to).await?),
        Some(to @ To::Bridge(Bridge { bridge, uplink, guest, .. })) => {
            if !guest {
                steps.push(tap(host, id, spec, to).await?);
            }
            steps.push(linux_bridge(host, bridge).await?);
            if let Some(uplink) = uplink {
                steps.extend(vlan(host, uplink).await?);
                let port = uplink.port();
                steps.push(format!("put {port} into {bridge}, and move its addresses and routes there"));
            }
            if !guest {
                steps.push(format!("put {} into {bridge}", to.tap(id)));
            }
        }
        Some(to @ To::Ovs(ovs)) => {
            if ovs.makes_tap() && ovs.vhost_user().is_none() {
                steps.push(tap(host, id, spec, to).await?);
            }
            if let (Some(bridge), Some([near, far])) = (&ovs.hybrid, ovs.veth(id)) {
                steps.push(linux_bridge(host, bridge).await?);
                let pair = link(host, "a veth pair", near.as_str(), |kind| *kind == Kind::Veth).await?;
                let ports =
                    if ovs.makes_tap() { format!("{near} and {}", to.tap(id)) } else { near.to_string() };
                steps.extend([format!("{pair}: to {far}"), format!("put {ports} into {bridge}")]);
            }
        }
        Some(To::Device(device)) => steps.extend(super::device::plan(id, spec, device)),
        Some(to @ To::Macvtap(Macvtap { device, mode, profile, .. })) => {
            let name = to.tap(id);
            let made =
                link(host, "a macvtap", name.as_str(), |kind| matches!(kind, Kind::Macvtap(_))).await?;
            steps.push(format!("{made}: on {device}, mode {}", mode.name()));
            if let Some(profile) = profile {
                let protocol = profile.protocol();
                steps.push(format!("tell the switch at {device} by {protocol}, and wait for its answer"));
            }
        }
    }
    steps.extend(ports(id, spec));
    if let Some(to) = spec.ovs() {
        steps.extend(in_ovs(ovs, id, to).await?);
    }
    Ok(steps)
}

async fn linux_bridge(host: &HostNet, bridge: &IfName) -> Result<String, StepError> {
    link(host, "a Linux bridge", bridge.as_str(), |kind| matches!(kind, Kind::Bridge)).await
}

/// The uplink's VLAN, if it is one.
async fn vlan(host: &HostNet, uplink: &Uplink) -> Result<Option<String>, StepError> {
    let (Some(number), port) = (uplink.vlan, uplink.port()) else { return Ok(None) };
    let made = link(host, "a VLAN", port.as_str(), |kind| matches!(kind, Kind::Vlan(_))).await?;
    Ok(Some(format!("{made}: number {number} of {}", uplink.device)))
}

/// The TAP, and what it will be.
async fn tap(host: &HostNet, id: &Name, spec: &PlugSpec, to: &To) -> Result<String, StepError> {
    let name = to.tap(id);
    let made = link(host, "a TAP", name.as_str(), |kind| matches!(kind, Kind::Tap(_))).await?;
    Ok(format!("{made}: MTU {}, queues {}", spec.mtu_bytes(), spec.tap_queues()))
}

async fn link(
    host: &HostNet,
    what: &'static str,
    name: &str,
    is_one: fn(&Kind) -> bool,
) -> Result<String, StepError> {
    match host.link(name).await? {
        None => Ok(format!("make {name}, {what}")),
        Some(link) if is_one(&link.kind) => Ok(format!("use {name}, {what} that is there")),
        Some(link) => {
            Err(hostnet::Error::WrongKind { name: link.name, kind: link.kind, wanted: what }.into())
        }
    }
}

/// What the dataplane does.
fn ports(id: &Name, spec: &PlugSpec) -> Vec<String> {
    let network = match &spec.network {
        Some(network) => format!("network {network}"),
        None => "a network of its own".to_owned(),
    };
    let mut steps = Vec::new();
    let socket = spec.ovs().and_then(Ovs::vhost_user);
    if let Some(Socket { path, .. }) = socket {
        steps.push(format!("make socket {path}, on which Open vSwitch joins {network}"));
    } else if let Some(to) = spec.to.as_ref().filter(|_| spec.kernel_guest().is_none()) {
        steps.push(format!("forward between {} and {network}", to.tap(id)));
    }
    if let Some(Socket { role, path }) = &spec.socket {
        steps.push(match role {
            Role::Listen => format!("make socket {path}, on which the guest's front end joins {network}"),
            Role::Connect => {
                format!("dial {path} until the guest's front end answers, which joins {network}")
            }
            Role::FrontendListen => {
                format!("make socket {path}, on which another switch's back end joins {network}")
            }
            Role::FrontendConnect => {
                format!("dial {path} until another switch's back end answers, which joins {network}")
            }
        });
    }
    steps
}

/// What Open vSwitch is asked for, last.
async fn in_ovs(ovs: &OpenVSwitch, id: &Name, to: &Ovs) -> Result<Vec<String>, StepError> {
    let bridge = &to.bridge;
    let verb = if ovs.has_bridge(to).await? { "use" } else { "make" };
    let mut steps = vec![format!("{verb} Open vSwitch bridge {bridge}")];
    steps.extend(to.own_bridge(id).map(|own| format!("make Open vSwitch bridge {own} for this port alone")));
    let ports = to.ports(id);
    for (n, port) in ports.iter().enumerate() {
        let is_logical = n + 1 == ports.len();
        let logical = to.iface_id.as_ref().filter(|_| is_logical).map(|id| format!(" as logical port {id}"));
        steps.push(format!(
            "add {} to {}{}, and wait until ovs-vswitchd has it",
            port.name,
            port.bridge,
            logical.unwrap_or_default()
        ));
    }
    Ok(steps)
}
