//! A plug's place in a Linux bridge: in one that plugs share, or in one of its own from which a veth pair leads on into Open
//! vSwitch.
//!
//! A shared bridge, its uplink and the uplink's VLAN stay as long as a plug is recorded that names them, whether its guest is
//! there or not. What is ours of them is known by the kernel's marks alone.

use hostnet::{HostNet, VethSpec};

use super::error::StepError;
use super::table::Others;
use crate::names::Name;
use crate::spec::{Bridge, Ovs, PlugSpec, To};

/// The bridges that plugs share.
#[derive(Default)]
pub(super) struct LinuxBridges {
    /// Held from making a bridge until the TAP is in it: nobody removes an empty bridge meanwhile.
    changing: tokio::sync::Mutex<()>,
}

impl LinuxBridges {
    /// Makes the bridge, or finds it made, with its uplink, and the plug's TAP a port of it.
    pub(super) async fn join(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        bridge: &Bridge,
    ) -> Result<(), StepError> {
        let name = bridge.bridge.as_str();
        let _nobody_removes_it = self.changing.lock().await;
        host.ensure_bridge(name).await?;
        if let Some(uplink) = &bridge.uplink {
            let (device, port) = (uplink.device.as_str(), uplink.port());
            if let Some(vlan) = uplink.vlan {
                host.ensure_vlan(port.as_str(), device, vlan, Some(spec.mtu_bytes().into())).await?;
            }
            host.ensure_uplink(port.as_str(), name).await?;
        }
        if !bridge.guest {
            host.enslave(bridge.tap(id).as_str(), name).await?;
        }
        Ok(())
    }

    /// Gives back the uplink and removes the bridge, each if it is of our making and no other plug needs it.
    pub(super) async fn leave(
        &self,
        host: &HostNet,
        bridge: &Bridge,
        others: &Others<'_>,
    ) -> Result<(), StepError> {
        let name = bridge.bridge.as_str();
        let _nobody_joins_it = self.changing.lock().await;
        let is_same = |other: &PlugSpec, need: fn(&Bridge) -> bool| matches!(&other.to, Some(To::Bridge(other)) if other.bridge == bridge.bridge && need(other));
        if let Some(uplink) = &bridge.uplink
            && !others.any(|other| is_same(other, |other| other.uplink.is_some()))
        {
            host.release_uplink(name).await?;
            if uplink.vlan.is_some() {
                host.remove_vlan(uplink.port().as_str()).await?;
            }
        }
        if !others.any(|other| is_same(other, |_| true)) {
            host.remove_bridge(name).await?;
        }
        Ok(())
    }
}

/// Makes the bridge of a hybrid plug and the veth pair that leads on from it, and the plug's TAP, if it is ours, a port.
pub(super) async fn join_hybrid(
    host: &HostNet,
    id: &Name,
    spec: &PlugSpec,
    ovs: &Ovs,
) -> Result<(), StepError> {
    let (Some(bridge), Some(ends)) = (&ovs.hybrid, ovs.veth(id)) else { return Ok(()) };
    host.ensure_own_bridge(bridge.as_str(), id.as_str()).await?;
    host.ensure_veth(&VethSpec {
        ends: ends.clone().map(String::from),
        owner: id.to_string(),
        mtu: Some(spec.mtu_bytes().into()),
    })
    .await?;
    host.enslave(ends[0].as_str(), bridge.as_str()).await?;
    if ovs.makes_tap() {
        host.enslave(ovs.tap(id).as_str(), bridge.as_str()).await?;
    }
    Ok(())
}

/// Removes both. Whatever else is in the bridge is let go.
pub(super) async fn leave_hybrid(host: &HostNet, id: &Name, ovs: &Ovs) -> Result<(), StepError> {
    let (Some(bridge), Some(ends)) = (&ovs.hybrid, ovs.veth(id)) else { return Ok(()) };
    host.remove_veth(&ends.map(String::from), id.as_str()).await?;
    host.remove_own_bridge(bridge.as_str(), id.as_str()).await?;
    Ok(())
}
