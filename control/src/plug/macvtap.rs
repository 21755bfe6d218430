//! A plug's macvtap, and what the switch outside is told of the guest on it.

use dataplane::Link;
use hostnet::{Association, HostNet, MacvtapSpec};

use super::association::{Associations, profile_of};
use super::error::StepError;
use crate::names::Name;
use crate::spec::{Macvtap, PlugSpec};

/// Makes the macvtap, or finds it made. Nothing to forward for if it is the guest's.
pub(super) async fn ensure(
    host: &HostNet,
    associations: &Associations,
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
        associations.associate(host, id, guest).await?;
    }
    Ok(link)
}

/// Puts a macvtap right that somebody has open, and what the switch knows of the guest on it.
pub(super) async fn mend(
    host: &HostNet,
    associations: &Associations,
    id: &Name,
    spec: &PlugSpec,
    macvtap: &Macvtap,
) -> Result<(), StepError> {
    host.ensure_idle_macvtap(&macvtap_spec(id, spec, macvtap)).await?;
    Ok(associations.mend(host, id).await?)
}

/// Removes the macvtap if it is ours, once the switch has forgotten the guest.
pub(super) async fn remove(
    host: &HostNet,
    associations: &Associations,
    id: &Name,
    macvtap: &Macvtap,
) -> Result<(), StepError> {
    if let Some(guest) = association(host, id, macvtap).await? {
        associations.disassociate(host, id, &guest).await?;
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
    let (device, profile) = (macvtap.device.to_string(), profile_of(profile).await);
    Ok(Some(Association { device, function: None, address, profile }))
}
