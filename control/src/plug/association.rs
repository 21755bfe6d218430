//! Guests that a switch outside is told of, by 802.1Qbg or 802.1Qbh.
//!
//! By 802.1Qbg the switch may let go of one at any time (`hostnet::SwitchWatch`). Then it is associated anew, as whatever else
//! somebody undoes of a plug is done again: told as an event, and not raced.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use hostnet::{Association, AssociationError, HostNet, LetGo, Listener, Profile, SwitchWatch};
use tokio::sync::watch;
use tokio::time::sleep;

use super::links::Flaw;
use crate::names::{Name, Uuid};
use crate::spec::PortProfile;

/// This host, for a switch that wants to know (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";
/// Pause before a socket that fails is read again.
const RETRY: Duration = Duration::from_secs(1);

/// The guests, by their plugs.
pub(super) struct Associations {
    listener: Listener,
    /// Where lldpad tells what the switch does; none if that cannot be opened.
    told_at: OnceLock<Option<u32>>,
    opened: Mutex<Option<SwitchWatch>>,
    guests: Mutex<HashMap<Name, Guest>>,
    /// Counts guests that were let go of.
    changes: watch::Sender<u64>,
}

struct Guest {
    association: Association,
    is_let_go: bool,
}

impl Associations {
    pub(super) fn new(pid_file: PathBuf, pci: hostnet::Pci) -> Self {
        Self {
            listener: Listener { pid_file, pci, ..Listener::default() },
            told_at: OnceLock::new(),
            opened: Mutex::default(),
            guests: Mutex::default(),
            changes: watch::Sender::default(),
        }
    }

    /// Tells when a switch lets go of a guest. Only the first time: whoever is given it has to run [`follow`](Self::follow).
    pub(super) fn begin(&self) -> Option<watch::Receiver<u64>> {
        let mut opened = self.opened.lock().expect("no holder of this lock panics");
        if self.told_at.get().is_some() {
            return None;
        }
        *opened = SwitchWatch::open()
            .inspect_err(|error| tracing::warn!("cannot hear what switches let go of: {error}"))
            .ok();
        self.told_at.set(opened.as_ref().map(SwitchWatch::port)).ok()?;
        opened.is_some().then(|| self.changes.subscribe())
    }

    /// Hears what switches let go of, for ever.
    pub(super) async fn follow(&self) {
        let opened = self.opened.lock().expect("no holder of this lock panics").take();
        let Some(mut switches) = opened else { return };
        loop {
            match switches.next(&self.listener.pid_file).await {
                Ok(told) => self.let_go(&told),
                Err(error) => {
                    tracing::warn!("cannot hear what switches let go of: {error}");
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Notes it of guests that are associated, and of nobody else.
    fn let_go(&self, told: &LetGo) {
        for guest in self.guests().values_mut() {
            let Profile::Qbg { instance, .. } = guest.association.profile else { continue };
            if instance == told.instance && told.addresses.contains(&guest.association.address) {
                guest.is_let_go = true;
                self.changes.send_modify(|count| *count = count.wrapping_add(1));
            }
        }
    }

    /// Has the switch know of a plug's guest.
    pub(super) async fn associate(
        &self,
        host: &HostNet,
        id: &Name,
        association: Association,
    ) -> Result<(), AssociationError> {
        // From here on: the switch may let go of it before we hear that it has it.
        self.guests().insert(id.clone(), Guest { association: association.clone(), is_let_go: false });
        let done = host.associate(&self.listener(), &association).await;
        if done.is_err() {
            self.guests().remove(id);
        }
        done
    }

    /// The same for one that the switch has let go of.
    pub(super) async fn mend(&self, host: &HostNet, id: &Name) -> Result<(), AssociationError> {
        let let_go = self.guests().get_mut(id).filter(|guest| guest.is_let_go).map(|guest| {
            guest.is_let_go = false;
            guest.association.clone()
        });
        let Some(association) = let_go else { return Ok(()) };
        let done = host.associate(&self.listener(), &association).await;
        if let (Err(_), Some(guest)) = (&done, self.guests().get_mut(id)) {
            guest.is_let_go = true;
        }
        done
    }

    /// Has it forget the guest.
    pub(super) async fn disassociate(
        &self,
        host: &HostNet,
        id: &Name,
        association: &Association,
    ) -> Result<(), AssociationError> {
        self.guests().remove(id);
        host.disassociate(&self.listener(), association).await
    }

    /// What a switch has undone of a plug.
    pub(super) fn flaw(&self, id: &Name) -> Option<Flaw> {
        let guests = self.guests();
        let guest = guests.get(id).filter(|guest| guest.is_let_go)?;
        let message = format!("the switch at {} has let go of the guest", guest.association.device);
        Some(Flaw { message, ours: true, is_gone: false })
    }

    fn listener(&self) -> Listener {
        let told_at = self.told_at.get().copied().flatten().unwrap_or_default();
        Listener { told_at, ..self.listener.clone() }
    }

    fn guests(&self) -> MutexGuard<'_, HashMap<Name, Guest>> {
        self.guests.lock().expect("no holder of this lock panics")
    }
}

/// What a switch is told of a guest.
pub(super) async fn profile_of(asked: &PortProfile) -> Profile {
    match asked {
        PortProfile::Qbg { manager_id, type_id, type_id_version, instance_id } => Profile::Qbg {
            manager: *manager_id,
            type_id: *type_id,
            type_version: *type_id_version,
            instance: instance_id.0,
        },
        PortProfile::Qbh { profile_id, instance_id } => {
            Profile::Qbh { profile: profile_id.to_string(), guest: instance_id.0, host: machine_id().await }
        }
    }
}

async fn machine_id() -> Option<[u8; 16]> {
    let text = tokio::fs::read_to_string(MACHINE_ID).await.ok()?;
    text.trim().parse().ok().map(|Uuid(bytes)| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_is_associated_can_be_let_go_of() {
        let associations = Associations::new("/nowhere".into(), hostnet::Pci::default());
        let id = |name: &str| name.parse::<Name>().unwrap();
        let profile = Profile::Qbg { manager: 1, type_id: 2, type_version: 3, instance: [7; 16] };
        let qbh = Profile::Qbh { profile: "web".into(), guest: [7; 16], host: None };
        for (name, profile) in [("vm1", profile), ("vm2", qbh)] {
            let association = Association { device: "eth1".into(), function: None, address: [2; 6], profile };
            associations.guests().insert(id(name), Guest { association, is_let_go: false });
        }
        let changes = associations.changes.subscribe();
        for (instance, addresses) in [([8; 16], vec![[2; 6]]), ([7; 16], vec![]), ([7; 16], vec![[3; 6]])] {
            associations.let_go(&LetGo { instance, addresses });
        }
        assert!(!changes.has_changed().unwrap() && associations.flaw(&id("vm1")).is_none());
        associations.let_go(&LetGo { instance: [7; 16], addresses: vec![[3; 6], [2; 6]] });
        assert!(changes.has_changed().unwrap());
        let flaw = associations.flaw(&id("vm1")).unwrap();
        assert_eq!(flaw.message, "the switch at eth1 has let go of the guest");
        assert!(associations.flaw(&id("vm2")).is_none() && associations.guests().len() == 2);
    }
}
