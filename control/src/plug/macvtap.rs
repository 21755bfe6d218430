//! A plug's macvtap.

use dataplane::Link;
use hostnet::{HostNet, MacvtapSpec};

use super::steps::StepError;
use crate::names::Name;
use crate::spec::{Macvtap, PlugSpec};

/// Makes the macvtap, or finds it made. Nothing to forward for if it is the guest's.
pub(super) async fn ensure(
    host: &HostNet,
    id: &Name,
    spec: &PlugSpec,
    macvtap: &Macvtap,
) -> Result<Option<Link>, StepError> {
    let wanted = macvtap_spec(id, spec, macvtap);
    if macvtap.guest {
        host.ensure_idle_macvtap(&wanted).await?;
        return Ok(None);
    }
    Ok(Some(Link::Tap { queues: host.ensure_macvtap(&wanted).await?.queues, offloads: true }))
}

/// Removes the macvtap if it is ours.
pub(super) async fn remove(host: &HostNet, id: &Name, macvtap: &Macvtap) -> Result<(), StepError> {
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
