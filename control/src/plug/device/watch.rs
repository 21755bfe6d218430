//! What others do to devices that guests have.
//!
//! Nobody tells that a driver has let go of a device, or what a physical function that is down holds about a virtual one. So it
//! is looked at, again and again: for each plug with a device a few links in sysfs, and a question to the kernel.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use hostnet::{FunctionState, HostNet};
use tokio::sync::watch;

use super::{Devices, function_wanted};
use crate::names::{Mac, Name};
use crate::plug::error::StepError;
use crate::plug::links::Flaw;
use crate::spec::{Device, PlugSpec};

/// How often devices are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The guests' devices as they were last seen.
#[derive(Default)]
pub(super) struct Lookout {
    seen: Mutex<HashMap<Name, Seen>>,
    /// Counts looks that found something amiss.
    changes: watch::Sender<u64>,
    begun: OnceLock<()>,
}

struct Seen {
    spec: PlugSpec,
    flaws: Vec<String>,
}

impl Lookout {
    fn seen(&self) -> MutexGuard<'_, HashMap<Name, Seen>> {
        self.seen.lock().expect("no holder of this lock panics")
    }
}

impl Devices {
    /// Tells when something was seen to be amiss. Only the first time: whoever is given it has to run
    /// [`follow`](Self::follow).
    pub(in crate::plug) fn begin(&self) -> Option<watch::Receiver<u64>> {
        self.lookout.begun.set(()).is_ok().then(|| self.lookout.changes.subscribe())
    }

    /// Follows the devices, for ever.
    pub(in crate::plug) async fn follow(&self, host: &HostNet) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let plugs: Vec<_> =
                self.lookout.seen().iter().map(|(id, seen)| (id.clone(), seen.spec.clone())).collect();
            let mut is_amiss = false;
            for (id, spec) in plugs {
                let flaws = self.flaws_now(host, &spec).await;
                is_amiss |= !flaws.is_empty();
                // It may have gone meanwhile.
                if let Some(seen) = self.lookout.seen().get_mut(&id) {
                    seen.flaws = flaws;
                }
            }
            if is_amiss {
                self.lookout.changes.send_modify(|count| *count = count.wrapping_add(1));
            }
        }
    }

    /// Looks at the plug's device as it is now, and from now on.
    pub(in crate::plug) async fn look(&self, host: &HostNet, id: &Name, spec: &PlugSpec) {
        if spec.device().is_some() {
            let flaws = self.flaws_now(host, spec).await;
            self.lookout.seen().insert(id.clone(), Seen { spec: spec.clone(), flaws });
        }
    }

    /// The plug is gone.
    pub(in crate::plug) fn forget(&self, id: &Name) {
        self.lookout.seen().remove(id);
    }

    /// What is not as it has to be.
    pub(in crate::plug) fn flaws(&self, id: &Name) -> Vec<Flaw> {
        let flaws = self.lookout.seen().get(id).map(|seen| seen.flaws.clone()).unwrap_or_default();
        flaws.into_iter().map(|message| Flaw { message, ours: true, is_gone: false }).collect()
    }

    async fn flaws_now(&self, host: &HostNet, spec: &PlugSpec) -> Vec<String> {
        let Some(device) = spec.device() else { return Vec::new() };
        match self.differences(host, spec.mac, device).await {
            Ok(flaws) => flaws,
            // A device that cannot be looked at is not as it has to be.
            Err(error) => vec![error.to_string()],
        }
    }

    async fn differences(
        &self,
        host: &HostNet,
        mac: Option<Mac>,
        device: &Device,
    ) -> Result<Vec<String>, StepError> {
        let (Some(address), Some(found)) = (device.address, &device.found) else {
            return Err(StepError::Unresolved);
        };
        let mut flaws = Vec::new();
        if let Some(wanted) = &device.driver {
            let now = self.pci(move |pci| pci.device(address.0)).await?.binding.driver;
            if now.as_deref() != Some(wanted.as_str()) {
                let now = now.as_deref().unwrap_or("none");
                flaws.push(format!("{address} is bound to driver {now}, not to {wanted}"));
            }
        }
        // Of one whose switch is told of the guest the driver holds what it likes.
        if let (Some(function), Some(mac), None) = (&found.function, mac, &device.profile) {
            let physical = function.physical;
            let interface = self.physical_interface(physical).await?;
            let now = host.virtual_function(&interface, function.number).await?;
            let wanted = function_wanted(mac, device);
            let (now, wanted) = (in_words(&now), in_words(&wanted));
            if now != wanted {
                flaws.push(format!("{physical} holds {address} with {now}, not with {wanted}"));
            }
        }
        Ok(flaws)
    }
}

/// Without spoof check and trust: of a driver that does not tell them they read as off.
fn in_words(FunctionState { address, vlan, priority, .. }: &FunctionState) -> String {
    format!("address {}, VLAN {vlan}, priority {priority}", Mac(*address))
}
