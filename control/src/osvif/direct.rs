//! `VIFDirect`: a macvtap on an interface of the host.

use hostnet::Pci;
use vif::ProfileKind;
use vif::profile::{Ieee8021QbgProfile, Ieee8021QbhProfile};
use vif::vif::{DirectMode, DirectVif};

use super::{missing, parsed, required, unsupported};
use crate::names::{IfName, PciAddress};
use crate::problem::{Kind, Problem};
use crate::spec::{Macvtap, MacvtapMode, PortProfile};

/// The macvtap on the VLAN that is named, or on the device of that PCI address.
pub(super) fn macvtap(asked: &vif::Plug, card: &DirectVif) -> Result<Macvtap, Problem> {
    let profile = match asked.vif.port_profile.value().map(|profile| (&profile.kind, profile.class)) {
        None | Some((ProfileKind::Base, _)) => None,
        Some((ProfileKind::Ieee8021Qbg(profile), _)) => Some(qbg(profile)?),
        Some((ProfileKind::Ieee8021Qbh(profile), _)) => Some(qbh(asked, profile)?),
        Some((_, class)) => return Err(unsupported(&format!("a VIFDirect with port profile {class}"))),
    };
    let device = match (card.vlan_name.value(), card.dev_address.value()) {
        (Some(vlan), _) if !vlan.is_empty() => parsed("vif.vlan_name", vlan)?,
        (_, Some(address)) => interface_of(&Pci::default(), parsed("vif.dev_address", address)?)?,
        _ => return Err(missing("vif.dev_address")),
    };
    let mode = match required("vif.mode", &card.mode)? {
        DirectMode::Vepa => MacvtapMode::Vepa,
        DirectMode::Passthrough => MacvtapMode::Passthrough,
        DirectMode::Bridge => MacvtapMode::Bridge,
    };
    let tap = card.vif_name.value().map(|name| parsed("vif.vif_name", name)).transpose()?;
    Ok(Macvtap { mode, tap, profile, ..Macvtap::new(device) })
}

fn qbg(profile: &Ieee8021QbgProfile) -> Result<PortProfile, Problem> {
    Ok(PortProfile::Qbg {
        manager_id: number("vif.port_profile.manager_id", &profile.manager_id)?,
        type_id: number("vif.port_profile.type_id", &profile.type_id)?,
        type_id_version: number("vif.port_profile.type_id_version", &profile.type_id_version)?,
        instance_id: {
            let field = "vif.port_profile.instance_id";
            parsed(field, required(field, &profile.instance_id)?)?
        },
    })
}

pub(super) fn qbh(asked: &vif::Plug, profile: &Ieee8021QbhProfile) -> Result<PortProfile, Problem> {
    let field = "vif.port_profile.profile_id";
    let profile_id = parsed(field, required(field, &profile.profile_id)?)?;
    let field = "instance_info.uuid";
    let instance = asked.instance_info.as_ref().ok_or_else(|| missing(field))?;
    Ok(PortProfile::Qbh { profile_id, instance_id: parsed(field, required(field, &instance.uuid)?)? })
}

fn number<T: TryFrom<i64>>(field: &str, value: &vif::Field<i64>) -> Result<T, Problem> {
    let value = *required(field, value)?;
    T::try_from(value).map_err(|_| Problem::invalid(format!("{field} is {value}")).field(field))
}

/// The network interface of a PCI device.
fn interface_of(pci: &Pci, address: PciAddress) -> Result<IfName, Problem> {
    let field = "vif.dev_address";
    let problem = |cause: String| Problem::new(Kind::Precondition, format!("{field}: {cause}")).field(field);
    let device = pci.device(address.0).map_err(|error| problem(error.to_string()))?;
    parsed(field, &device.interface().map_err(|error| problem(error.to_string()))?)
}
