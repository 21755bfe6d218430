//! A plug's macvtap, and what the switch outside is told of the guest on it.

use dataplane::Link;
use hostnet::{Association, HostNet, Listener, MacvtapSpec, Profile};

use super::error::StepError;
use crate::names::{Name, Uuid};
use crate::spec::{Macvtap, PlugSpec, PortProfile};

/// This host, for a switch that wants to know (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";

/// Makes the macvtap, or finds it made. Nothing to forward for if it is the guest's.
pub(super) async fn ensure(
    host: &HostNet,
    listener: &Listener,
    id: &Name,
    spec: &PlugSpec,
    macvtap: &Macvtap,
) -> Result<Option<Link>, StepError> {
    let wanted = macvtap_spec(id, spec, macvtap);
    let link = if macvtap.guest {
        host.ensure_idle_macvtap(&wanted).await?;
        None
    } else {
        Some(Link::Tap { queues: host.ensure_macvtap(&wanted).await?.queues, offloads: true })
    };
    if let Some(guest) = association(host, id, macvtap).await? {
        host.associate(listener, &guest).await?;
    }
    Ok(link)
}

/// Puts a macvtap right that somebody has open.
pub(super) async fn mend(
    host: &HostNet,
    id: &Name,
    spec: &PlugSpec,
    macvtap: &Macvtap,
) -> Result<(), StepError> {
    host.ensure_idle_macvtap(&macvtap_spec(id, spec, macvtap)).await?;
    Ok(())
}

/// Removes the macvtap if it is ours, once the switch has forgotten the guest.
pub(super) async fn remove(
    host: &HostNet,
    listener: &Listener,
    id: &Name,
    macvtap: &Macvtap,
) -> Result<(), StepError> {
    if let Some(guest) = association(host, id, macvtap).await? {
        host.disassociate(listener, &guest).await?;
    }
    host.remove_macvtap(macvtap.tap(id).as_str(), id.as_str()).await?;
    Ok(())
}

/// Frames to other addresses than its own do not reach a macvtap, so it has the guest's.
fn macvtap_spec(id: &Name, spec: &PlugSpec, macvtap: &Macvtap) -> MacvtapSpec {
    MacvtapSpec {
        name: macvtap.tap(id).to_string(),
        owner: id.to_string(),
        device: macvtap.device.to_string(),
        mode: macvtap.mode.into(),
        queues: spec.tap_queues(),
        mtu: Some(spec.mtu_bytes().into()),
        address: spec.mac.map(|mac| mac.0),
    }
}

/// What the switch is to know of the guest, whose address is the macvtap's. Nothing without a macvtap, which it would be behind.
async fn association(host: &HostNet, id: &Name, macvtap: &Macvtap) -> Result<Option<Association>, StepError> {
    let Some(profile) = &macvtap.profile else { return Ok(None) };
    let Some(link) = host.link(macvtap.tap(id).as_str()).await? else { return Ok(None) };
    let Ok(address) = link.address.try_into() else { return Ok(None) };
    let profile = match profile {
        PortProfile::Qbg { manager_id, type_id, type_id_version, instance_id } => Profile::Qbg {
            manager: *manager_id,
            type_id: *type_id,
            type_version: *type_id_version,
            instance: instance_id.0,
        },
        PortProfile::Qbh { profile_id, instance_id } => {
            Profile::Qbh { profile: profile_id.to_string(), guest: instance_id.0, host: machine_id().await }
        }
    };
    Ok(Some(Association { device: macvtap.device.to_string(), address, profile }))
}

async fn machine_id() -> Option<[u8; 16]> {
    let text = tokio::fs::read_to_string(MACHINE_ID).await.ok()?;
    text.trim().parse().ok().map(|Uuid(bytes)| bytes)
}
