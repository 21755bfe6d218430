//! `VIFVHostUser`: a guest behind a vhost-user socket, and what its port profile joins it with.

use vif::vif::{VhostUserMode, VhostUserVif};
use vif::{PortProfile, ProfileKind};

use super::device::{self, Representor};
use super::{missing, open_vswitch, parsed, required, unsupported};
use crate::problem::Problem;
use crate::spec::{Bridge, Device, Ovs, PlugSpec, Role, Socket, Tap, To};

pub(super) fn fill_in(spec: &mut PlugSpec, asked: &vif::Plug, card: &VhostUserVif) -> Result<(), Problem> {
    if spec.socket.is_some() {
        let problem = Problem::invalid("a VIFVHostUser names its socket itself, in vif.path");
        return Err(problem.field("socket").hint("leave out the socket beside the VIF"));
    }
    spec.socket = Some(socket_of(card)?);
    match asked.vif.port_profile.value() {
        Some(profile) if !matches!(profile.kind, ProfileKind::Base) => {
            spec.to = Some(host_side(asked, card, profile)?);
        }
        _ => {
            let id = asked.vif.network.value().and_then(|network| network.id.value());
            spec.network = id.map(|id| parsed("vif.network.id", id)).transpose()?;
        }
    }
    Ok(())
}

/// The virtual function through which the guest reaches its representor.
fn behind_socket(asked: &vif::Plug, profile: &PortProfile) -> Result<Device, Problem> {
    let Representor { port, address } = device::representor(asked, profile)?;
    let address = address.ok_or_else(|| missing("vif.port_profile.representor_address"))?;
    Ok(Device { port: Some(Box::new(port)), ..Device::new(address) })
}

fn socket_of(vif: &VhostUserVif) -> Result<Socket, Problem> {
    let role = match required("vif.mode", &vif.mode)? {
        VhostUserMode::Client => Role::Listen,
        VhostUserMode::Server => Role::Connect,
    };
    Ok(Socket { role, path: parsed("vif.path", required("vif.path", &vif.path)?)? })
}

fn host_side(asked: &vif::Plug, vif: &VhostUserVif, profile: &PortProfile) -> Result<To, Problem> {
    // VIFVHostUser 1.0 has no vif_name.
    let tap = || parsed("vif.vif_name", required("vif.vif_name", &vif.vif_name)?);
    match &profile.kind {
        _ if device::is_offloaded(profile) => Ok(To::Device(behind_socket(asked, profile)?)),
        ProfileKind::FpTap(tap_profile) => {
            let field = "vif.port_profile.mac_address";
            let mac = tap_profile.mac_address.value().map(|mac| parsed(field, mac)).transpose()?;
            Ok(To::Tap(Tap { mac, ..Tap::new(tap()?) }))
        }
        ProfileKind::FpBridge(bridge) => {
            let field = "vif.port_profile.bridge_name";
            let bridge = parsed(field, required(field, &bridge.bridge_name)?)?;
            Ok(To::Bridge(Bridge { tap: Some(tap()?), ..Bridge::new(bridge) }))
        }
        ProfileKind::FpOpenVSwitch(ovs, more) => {
            let field = "vif.port_profile.bridge_name";
            let is_hybrid = more.hybrid_plug.value() == Some(&true);
            let bridge = is_hybrid.then(|| parsed(field, required(field, &more.bridge_name)?)).transpose()?;
            Ok(To::Ovs(Ovs { tap: Some(tap()?), hybrid: bridge, ..open_vswitch::port(asked, ovs)? }))
        }
        // os-vif's own plug-in does not look at vif_name. nova's is the same that it makes up.
        ProfileKind::OpenVSwitch(ovs) => {
            let made_up =
                || asked.vif.id.value().map(|id| format!("vhu{}", id.chars().take(11).collect::<String>()));
            let tap = vif.vif_name.value().cloned().or_else(made_up);
            let tap = tap.map(|name| parsed("vif.vif_name", &name)).transpose()?;
            Ok(To::Ovs(Ovs { tap, ..open_vswitch::port(asked, ovs)? }))
        }
        _ => Err(unsupported(&format!("a VIF with port profile {}", profile.class))),
    }
}
