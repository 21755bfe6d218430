//! `VIFOpenVSwitch`: a guest's TAP in Open vSwitch; and the port that other VIFs have there.

use vif::profile::OpenVSwitchProfile;
use vif::vif::OpenVSwitchVif;
use vif::{Field, ProfileKind};

use super::{missing, parsed, required, unsupported};
use crate::problem::Problem;
use crate::spec::{DatapathType, KernelGuest, Ovs, PlugSpec, To};

/// Queues of a multi-queue TAP whose VMM says how many it wants when it opens them: more than one makes it such a TAP.
const CARD_QUEUES: u16 = 2;

pub(super) fn fill_in(spec: &mut PlugSpec, asked: &vif::Plug, card: &OpenVSwitchVif) -> Result<(), Problem> {
    let Some(ProfileKind::OpenVSwitch(profile)) = asked.vif.port_profile.value().map(|p| &p.kind) else {
        return Err(unsupported("a VIFOpenVSwitch without VIFPortProfileOpenVSwitch"));
    };
    let is_set = |field: &Field<bool>| field.value().copied().unwrap_or_default();
    let guest =
        KernelGuest { make_tap: is_set(&profile.create_tap), make_port: is_set(&profile.create_port) };
    let tap = Some(parsed("vif.vif_name", required("vif.vif_name", &card.vif_name)?)?);
    let guest = spec.socket.is_none().then_some(guest);
    spec.queues = (guest.is_some() && is_set(&profile.multiqueue)).then_some(CARD_QUEUES);
    spec.to = Some(To::Ovs(Ovs { tap, guest, ..port(asked, profile)? }));
    Ok(())
}

/// The port in Open vSwitch, but for its TAP. Its bridge is the network's, as for os-vif's own plug-in.
pub(super) fn port(asked: &vif::Plug, profile: &OpenVSwitchProfile) -> Result<Ovs, Problem> {
    let field = "vif.network.bridge";
    let network = asked.vif.network.value().ok_or_else(|| missing("vif.network"))?;
    let bridge = parsed(field, required(field, &network.bridge)?)?;
    required("vif.address", &asked.vif.address)?;
    let field = "vif.port_profile.datapath_type";
    let datapath_type = match profile.datapath_type.value().map(String::as_str) {
        None | Some("") => None,
        Some("system") => Some(DatapathType::System),
        Some("netdev") => Some(DatapathType::Netdev),
        Some(other) => {
            let problem = Problem::invalid(format!("{field} is {other:?}, it must be system or netdev"));
            return Err(problem.field(field));
        }
    };
    let given = |field: &str, text: Option<&String>| {
        text.filter(|text| !text.is_empty()).map(|text| parsed(field, text)).transpose()
    };
    let uuid = asked.instance_info.as_ref().and_then(|instance| instance.uuid.value());
    Ok(Ovs {
        datapath_type,
        iface_id: given("vif.port_profile.interface_id", profile.interface_id.value())?,
        vm_uuid: given("instance_info.uuid", uuid)?,
        ..Ovs::new(bridge)
    })
}
