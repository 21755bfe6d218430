//! Tells OVN where a guest is, as soon as it is there.
//!
//! A guest that arrives by live migration is to be found at once. Linux announces itself then, by ARP, and only for a guest that
//! cannot does QEMU have us send RARP (SEND_RARP). OVN waits for more: a logical port with `activation-strategy=rarp` stays
//! silent on its new host until a RARP comes from there (ovn-nb(5)). With a TAP as the guest's card QEMU sends one, whoever the
//! guest is. So do we, whenever a plug with a logical port comes to forward: the guest's rings run then, and OVN's
//! flows are in place to hear it.

use std::collections::BTreeSet;

use tokio::sync::watch;

use super::{LOOK_EVERY, Plugs};
use crate::names::Name;
use crate::spec::PlugSpec;
use crate::status::{Phase, Plug, Whose};

impl Plugs {
    /// Follows plugs with a logical port, for ever. `changes` tells when Open vSwitch was seen to have changed.
    pub(super) async fn announce_arrivals(&self, mut changes: watch::Receiver<u64>) {
        let mut events = self.events.subscribe();
        let mut there = BTreeSet::new();
        loop {
            let logical = self.table.settled_plugs(|_, spec| has_logical_port(spec));
            let plugs: Vec<_> = logical.iter().filter_map(|id| self.show(id).ok()).collect();
            let now: BTreeSet<Name> =
                plugs.iter().filter(|plug| forwards(plug)).map(|p| p.id.clone()).collect();
            for id in now.difference(&there) {
                self.announce(id);
            }
            there = now;
            // A worker that takes up a port is no event.
            if !plugs.iter().any(waits_for_us) {
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    changed = events.changed() => if changed.is_err() { return },
                }
            }
            // Several changes come at once.
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn announce(&self, id: &Name) {
        let Some((_, Some(ports), _)) = self.table.look(id) else { return };
        if ports.into_iter().any(|port| self.steps.announce(port)) {
            tracing::info!(plug = %id, "the guest's address is announced");
        }
    }
}

fn has_logical_port(spec: &PlugSpec) -> bool {
    spec.ovs().is_some_and(|ovs| ovs.iface_id.is_some()) && spec.mac.is_some()
}

fn forwards(plug: &Plug) -> bool {
    plug.status.phase == Phase::Forwarding
}

fn waits_for_us(plug: &Plug) -> bool {
    let ours = |phase, whose| phase == Phase::Forwarding && whose == Whose::Vhostd;
    plug.status.conditions.iter().any(|c| ours(c.phase, c.whose))
}
