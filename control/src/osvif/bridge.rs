//! `VIFBridge`: a guest's TAP in a Linux bridge, which Open vSwitch may be behind.

use vif::vif::BridgeVif;
use vif::{Network, ProfileKind};

use super::{missing, open_vswitch, parsed, required, unsupported};
use crate::names::IfName;
use crate::problem::Problem;
use crate::spec::{Bridge, KernelGuest, Ovs, To, Uplink};

/// The bridge, and what is behind it. The TAP is a `guest`'s card, which its VMM puts there, or ours.
pub(super) fn host_side(asked: &vif::Plug, card: &BridgeVif, guest: bool) -> Result<To, Problem> {
    let tap = card.vif_name.value().map(|name| parsed("vif.vif_name", name)).transpose()?;
    let network = asked.vif.network.value();
    match asked.vif.port_profile.value().map(|profile| (&profile.kind, profile.class)) {
        Some((ProfileKind::OpenVSwitch(profile), _)) => {
            let hybrid = Some(parsed("vif.bridge_name", required("vif.bridge_name", &card.bridge_name)?)?);
            let guest = guest.then_some(KernelGuest { make_tap: false, make_port: true });
            Ok(To::Ovs(Ovs { hybrid, tap, guest, ..open_vswitch::port(asked, profile)? }))
        }
        None | Some((ProfileKind::Base, _)) => {
            let bridge = match (card.bridge_name.value(), network.and_then(|network| network.bridge.value()))
            {
                (Some(name), _) if !name.is_empty() => parsed("vif.bridge_name", name)?,
                (_, Some(name)) => parsed("vif.network.bridge", name)?,
                _ => return Err(missing("vif.bridge_name")),
            };
            let uplink = network.map(uplink_of).transpose()?.flatten();
            Ok(To::Bridge(Bridge { tap, uplink, guest, ..Bridge::new(bridge) }))
        }
        Some((_, class)) => Err(unsupported(&format!("a VIFBridge with port profile {class}"))),
    }
}

/// What os-vif is to provide beside the bridge: nothing where a network has a host of its own for each of its gateways
/// (multi_host), or where whoever made the bridge has done it.
fn uplink_of(network: &Network) -> Result<Option<Uplink>, Problem> {
    let is_set = |field: &vif::Field<bool>| field.value().copied().unwrap_or_default();
    if is_set(&network.multi_host) || !is_set(&network.should_provide_bridge) {
        return Ok(None);
    }
    let field = "vif.network.bridge_interface";
    let device = |name: &String| -> Result<IfName, Problem> { parsed(field, name) };
    if !is_set(&network.should_provide_vlan) {
        let named = network.bridge_interface.value().filter(|name| !name.is_empty());
        let device = named.map(device).transpose()?;
        return Ok(device.map(|device| Uplink { device, vlan: None }));
    }
    let device = device(required(field, &network.bridge_interface)?)?;
    let field = "vif.network.vlan";
    let vlan = *required(field, &network.vlan)?;
    let in_range =
        vlan.try_into().map_err(|_| Problem::invalid(format!("{field} is {vlan}, no VLAN")).field(field));
    Ok(Some(Uplink { device, vlan: Some(in_range?) }))
}
