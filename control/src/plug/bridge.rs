//! A plug's place in a Linux bridge.

use hostnet::HostNet;

use super::steps::StepError;
use crate::names::Name;
use crate::spec::Bridge;

/// The bridges that plugs share.
#[derive(Default)]
pub(super) struct LinuxBridges {
    /// Held from making a bridge until the TAP is in it: nobody removes an empty bridge meanwhile.
    changing: tokio::sync::Mutex<()>,
}

impl LinuxBridges {
    /// Makes the bridge, or finds it made, and the plug's TAP a port of it.
    pub(super) async fn join(&self, host: &HostNet, id: &Name, bridge: &Bridge) -> Result<(), StepError> {
        let name = bridge.bridge.as_str();
        let _nobody_removes_it = self.changing.lock().await;
        host.ensure_bridge(name).await?;
        host.enslave(bridge.tap(id).as_str(), name).await?;
        Ok(())
    }

    /// Removes the bridge if it is ours and nobody needs it any more.
    pub(super) async fn remove(&self, host: &HostNet, bridge: &Bridge) -> Result<(), StepError> {
        let _nobody_joins_it = self.changing.lock().await;
        host.remove_bridge(bridge.bridge.as_str()).await?;
        Ok(())
    }
}
