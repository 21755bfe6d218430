//! A plug's TAP, alone or in a bridge.

use dataplane::Link;
use hostnet::{HostNet, TapSpec};

use super::error::StepError;
use crate::names::Name;
use crate::spec::{PlugSpec, Tap, To};

/// Makes the TAP, or finds it made. Nothing to forward for if it is the guest's.
pub(super) async fn ensure(
    host: &HostNet,
    id: &Name,
    spec: &PlugSpec,
    to: &To,
) -> Result<Option<Link>, StepError> {
    let tap = tap_spec(id, spec, to);
    let Some(guest) = spec.kernel_guest() else {
        // What forwards in Open vSwitch is known, and told, when the port is in there.
        let offloads = !matches!(to, To::Ovs(_));
        return Ok(Some(Link::Tap { queues: host.ensure_tap(&tap).await?.queues, offloads }));
    };
    if guest.make_tap {
        host.ensure_idle_tap(&tap).await?;
    }
    Ok(None)
}

/// Puts the TAP's MTU and its being up right, or makes one again that is the guest's. Open vSwitch sees to the MTU of its own
/// ports.
pub(super) async fn mend(host: &HostNet, id: &Name, spec: &PlugSpec, to: &To) -> Result<(), StepError> {
    match spec.kernel_guest() {
        None => {
            let is_switchs = spec.ovs().is_some_and(|ovs| ovs.hybrid.is_none());
            let mtu = (!is_switchs).then(|| spec.mtu_bytes().into());
            host.set_right(to.tap(id).as_str(), mtu).await?;
        }
        Some(_) => drop(ensure(host, id, spec, to).await?),
    }
    Ok(())
}

/// Removes the TAP if it is ours.
pub(super) async fn remove(host: &HostNet, id: &Name, to: &To) -> Result<(), StepError> {
    host.remove_tap(to.tap(id).as_str(), id.as_str()).await?;
    Ok(())
}

fn tap_spec(id: &Name, spec: &PlugSpec, to: &To) -> TapSpec {
    TapSpec {
        name: to.tap(id).to_string(),
        owner: id.to_string(),
        queues: spec.tap_queues(),
        mtu: Some(spec.mtu_bytes().into()),
        address: match to {
            To::Tap(Tap { mac: Some(mac), .. }) => Some(mac.0),
            // The guest's card itself.
            _ if spec.kernel_guest().is_some() => spec.mac.map(|mac| mac.0),
            _ => None,
        },
        persistent: true,
        // Only a TAP asked for by its own name may be an administrator's.
        adopt: matches!(to, To::Tap(_)),
    }
}
