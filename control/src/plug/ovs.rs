//! A plug's part in Open vSwitch: its port ensured, and what becomes of it followed.
//!
//! Whether a port forwards is not ours to say: ovs-vswitchd opens the device, OVN puts flows in place. So all of it is read
//! from the database as it changes ([`ovsdb::View`]), and a plug forwards when nothing there is missing. What the database
//! cannot tell, that ovs-vswitchd has died, is told by the end of a connection to its control socket, which is beside the
//! database's.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use hostnet::{HostNet, Kind, LinkState};
use ovsdb::{Address, Client, Device, Monitor, PortSpec, Switch, View};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::StepError;
use crate::config::OvsConfig;
use crate::names::Name;
use crate::spec::{DatapathType, Ovs, PlugSpec};
use crate::status::{Condition, Phase, Whose};

/// First and longest pause before the database is followed again.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(2);
/// How often ovs-vswitchd is looked for while it is not there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// There if the kernel forwards for Open vSwitch.
const KERNEL_MODULE: &str = "/sys/module/openvswitch";

/// Open vSwitch on this host.
pub(super) struct OpenVSwitch {
    switch: Switch,
    /// What bridges are made as.
    datapath_type: Option<DatapathType>,
    seen: Mutex<Seen>,
    /// Counts what was seen.
    changes: watch::Sender<u64>,
    followed: OnceLock<()>,
}

/// What is known of it.
struct Seen {
    /// The database's content, or why it is not known.
    view: Result<View, String>,
    /// ovs-vswitchd has ended.
    switch_is_down: bool,
}

impl OpenVSwitch {
    pub(super) fn new(config: OvsConfig) -> Self {
        let unknown = "its database has not been read yet".to_owned();
        Self {
            switch: Switch::new(Client::new(config.database)),
            datapath_type: config.datapath_type,
            seen: Mutex::new(Seen { view: Err(unknown), switch_is_down: false }),
            changes: watch::Sender::default(),
            followed: OnceLock::new(),
        }
    }

    /// Fails if its database does not answer, or the bridge's name stands for something else.
    pub(super) async fn check(&self, host: &HostNet, ovs: &Ovs) -> Result<(), StepError> {
        let bridge = ovs.bridge.as_str();
        if self.switch.has_bridge(bridge).await? { Ok(()) } else { refuse_other_link(host, bridge).await }
    }

    /// Whether the bridge is there.
    pub(super) async fn has_bridge(&self, ovs: &Ovs) -> Result<bool, StepError> {
        Ok(self.switch.has_bridge(ovs.bridge.as_str()).await?)
    }

    /// Makes what the plug asks for, and waits until ovs-vswitchd has it. False if it was there, just so.
    pub(super) async fn ensure(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        ovs: &Ovs,
    ) -> Result<bool, StepError> {
        self.check(host, ovs).await?;
        let bridge = PortSpec {
            bridge: ovs.bridge.to_string(),
            datapath_type: ovs.datapath_type.map(Into::into),
            datapath_default: self.datapath_type.map_or_else(datapath_of_kernel, Into::into),
            ..PortSpec::default()
        };
        if !ovs.makes_port() {
            return Ok(self.switch.ensure_bridge(&bridge).await?);
        }
        let tap = ovs.tap(id);
        let device = if ovs.makes_tap() {
            let missing = || hostnet::Error::Missing { name: tap.to_string() };
            Device::Host(host.link(tap.as_str()).await?.ok_or_else(missing)?.ifindex)
        } else {
            Device::ToCome
        };
        let port = PortSpec {
            name: tap.to_string(),
            owner: id.to_string(),
            external_ids: external_ids(spec, ovs),
            mtu: Some(spec.mtu_bytes()),
            isolated: ovs.isolated && !ovs.is_trunk(),
            device,
            ..bridge
        };
        Ok(self.switch.ensure_port(&port).await?)
    }

    /// Whether the kernel takes frames from the bridge's TAPs, and does what is left to it. ovs-vswitchd, when it forwards
    /// itself, reads packets without what else belongs to them.
    pub(super) async fn is_forwarded_by_kernel(&self, ovs: &Ovs) -> Result<bool, StepError> {
        let kind = self.switch.datapath_type(ovs.bridge.as_str()).await?;
        Ok(kind.as_deref() == Some(ovsdb::DatapathType::System.name()))
    }

    /// Removes the plug's port.
    pub(super) async fn remove_port(&self, id: &Name, ovs: &Ovs) -> Result<(), StepError> {
        if ovs.makes_port() {
            self.switch.remove_port(ovs.bridge.as_str(), ovs.tap(id).as_str(), id.as_str()).await?;
        }
        Ok(())
    }

    /// Removes the bridge if nobody needs it any more.
    pub(super) async fn remove_bridge(&self, ovs: &Ovs) -> Result<(), StepError> {
        self.switch.remove_bridge(ovs.bridge.as_str(), ovs.is_trunk()).await?;
        Ok(())
    }

    /// Whether somebody else has taken away what the plug needs.
    pub(super) fn is_amiss(&self, id: &Name, ovs: &Ovs) -> bool {
        self.seen().view.as_ref().is_ok_and(|view| lacks(view, id, ovs))
    }

    /// What is missing for the plug's port to forward.
    pub(super) fn missing(&self, id: &Name, spec: &PlugSpec, ovs: &Ovs) -> Vec<Condition> {
        let seen = self.seen();
        let (tap, bridge) = (ovs.tap(id), &ovs.bridge);
        let mut messages = Vec::new();
        match &seen.view {
            Err(cause) => messages.push(format!("how Open vSwitch is cannot be told: {cause}")),
            Ok(view) if lacks(view, id, ovs) => {
                messages.push(format!("{tap} is not in Open vSwitch bridge {bridge}"));
            }
            Ok(view) if ovs.makes_port() => messages.extend(missing_in(view, spec, ovs, tap.as_str())),
            Ok(_) => {}
        }
        if seen.switch_is_down {
            messages.push(format!("ovs-vswitchd, which forwards for bridge {bridge}, does not run"));
        }
        let condition = |message| Condition { phase: Phase::Forwarding, whose: Whose::Host, message };
        messages.into_iter().map(condition).collect()
    }

    /// Tells when something was seen to have changed.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// True once: whoever is told so has to run [`follow`](Self::follow). A host without Open vSwitch is never asked for its
    /// database.
    pub(super) fn must_be_followed(&self) -> bool {
        self.followed.set(()).is_ok()
    }

    /// Follows the database, whatever becomes of it, for ever.
    pub(super) async fn follow(&self) {
        tokio::join!(self.follow_database(), self.look_for_switch());
    }

    async fn follow_database(&self) {
        let mut pause = RETRY_FIRST;
        loop {
            match Monitor::open(self.switch.address()).await {
                Ok((mut monitor, view)) => {
                    pause = RETRY_FIRST;
                    self.see(|seen| seen.view = Ok(view));
                    let error = loop {
                        match monitor.next().await {
                            Ok(tables) => self.see(|seen| {
                                if let Ok(view) = &mut seen.view {
                                    view.apply(&tables);
                                }
                            }),
                            Err(error) => break error,
                        }
                    };
                    tracing::warn!("{error}");
                    self.see(|seen| seen.view = Err(error.to_string()));
                }
                Err(error) => self.see(|seen| seen.view = Err(error.to_string())),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }

    /// A switch that answers once is missed when it does not any more; of one that was never seen nothing is said.
    async fn look_for_switch(&self) {
        let Address::Unix(database) = self.switch.address() else { return };
        let Some(dir) = Path::new(database).parent() else { return };
        loop {
            match control_socket(dir).await {
                ControlSocket::Connected(mut stream) => {
                    self.see_switch(false);
                    // It says nothing unasked: this ends when it does.
                    let _ = stream.read(&mut [0]).await;
                    self.see_switch(true);
                }
                ControlSocket::Dead => self.see_switch(true),
                ControlSocket::Absent => {}
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn see_switch(&self, is_down: bool) {
        if self.seen().switch_is_down != is_down {
            self.see(|seen| seen.switch_is_down = is_down);
        }
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no holder of this lock panics")
    }
}

/// What there is of ovs-vswitchd's control socket, `ovs-vswitchd.PID.ctl` (ovs-vswitchd(8), `--unixctl`).
enum ControlSocket {
    Connected(UnixStream),
    /// Left behind by one that was killed.
    Dead,
    Absent,
}

async fn control_socket(dir: &Path) -> ControlSocket {
    let Ok(mut entries) = tokio::fs::read_dir(dir).await else { return ControlSocket::Absent };
    let mut found = ControlSocket::Absent;
    while let Ok(Some(entry)) = entries.next_entry().await {
        let name = entry.file_name();
        let is_control = |name: &str| name.starts_with("ovs-vswitchd") && name.ends_with(".ctl");
        if !name.to_str().is_some_and(is_control) {
            continue;
        }
        match UnixStream::connect(entry.path()).await {
            Ok(stream) => return ControlSocket::Connected(stream),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => found = ControlSocket::Dead,
            Err(_) => {}
        }
    }
    found
}

/// A link of the bridge's name that is no bridge of Open vSwitch would make ovs-vswitchd fail in a way that only its log tells.
/// One that ovs-vswitchd has left behind is a TAP, which it takes up again.
async fn refuse_other_link(host: &HostNet, bridge: &str) -> Result<(), StepError> {
    match host.link(bridge).await? {
        None | Some(LinkState { kind: Kind::Tap(_), .. }) => Ok(()),
        Some(LinkState { name, kind, .. }) => {
            Err(hostnet::Error::WrongKind { name, kind, wanted: "an Open vSwitch bridge" }.into())
        }
    }
}

/// ovs-vswitchd itself lists a datapath in the kernel whether or not the kernel has one, and has its module loaded when it
/// starts.
fn datapath_of_kernel() -> ovsdb::DatapathType {
    if Path::new(KERNEL_MODULE).exists() { DatapathType::System.into() } else { DatapathType::Netdev.into() }
}

/// What Neutron and OVN know the port by, in the keys of Open vSwitch's integration guide.
fn external_ids(spec: &PlugSpec, ovs: &Ovs) -> BTreeMap<String, String> {
    let trunk = ovs.is_trunk().then(|| ovs.bridge.to_string());
    let pairs = [
        ("iface-id", ovs.iface_id.as_ref().map(ToString::to_string)),
        ("iface-status", ovs.iface_id.as_ref().map(|_| "active".into())),
        ("attached-mac", spec.mac.as_ref().map(ToString::to_string)),
        ("vm-uuid", ovs.vm_uuid.as_ref().map(ToString::to_string)),
        ("bridge_name", trunk),
    ];
    pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

/// Whether the bridge, or the port in it, is not there.
fn lacks(view: &View, id: &Name, ovs: &Ovs) -> bool {
    if ovs.makes_port() {
        view.bridge_of(ovs.tap(id).as_str()) != Some(ovs.bridge.as_str())
    } else {
        !view.has_bridge(ovs.bridge.as_str())
    }
}

/// What is missing for a port that is there.
fn missing_in(view: &View, spec: &PlugSpec, ovs: &Ovs, tap: &str) -> Vec<String> {
    let Some(interface) = view.interface(tap) else {
        return vec![format!("{tap} has no interface in Open vSwitch")];
    };
    if let Some(error) = &interface.error {
        return vec![format!("ovs-vswitchd cannot use {tap}: {error}")];
    }
    if interface.ofport.is_none_or(|number| number < 1) {
        return vec![format!("ovs-vswitchd has not taken up {tap} yet")];
    }
    let mut messages = Vec::new();
    let mtu = spec.mtu_bytes();
    if let Some(found) = interface.mtu.filter(|found| *found != i64::from(mtu)) {
        messages.push(format!("{tap} has MTU {found} in Open vSwitch, the plug {mtu}"));
    }
    if let Some(id) = ovs.iface_id.as_ref()
        && view.ovn_bridge() == Some(ovs.bridge.as_str())
        && !interface.ovn_installed
    {
        messages.push(format!("OVN has no flows for logical port {id} on this host yet (ovn-installed)"));
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::KernelGuest;
    use serde_json::json;

    fn view(interface: &serde_json::Value) -> View {
        let mut view = View::default();
        view.apply(&json!({
            "Open_vSwitch": {"r": {"new": {"external_ids": ["map", [["ovn-remote", "unix:/x"]]]}}},
            "Bridge": {"b": {"new": {"name": "br-int", "ports": ["uuid", "p"]}}},
            "Port": {"p": {"new": {"name": "vhd-vm1"}}},
            "Interface": {"i": {"new": interface}},
        }));
        view
    }

    fn missing(to: &serde_json::Value, interface: &serde_json::Value) -> Vec<String> {
        let spec: PlugSpec = serde_json::from_value(json!({"to": to})).unwrap();
        let spec = spec.completed(&"vm1".parse().unwrap()).unwrap();
        missing_in(&view(interface), &spec, spec.ovs().unwrap(), "vhd-vm1")
    }

    #[test]
    fn each_missing_step_is_named() {
        let plain = json!({"kind": "ovs", "bridge": "br-int"});
        let logical = json!({"kind": "ovs", "bridge": "br-int", "iface_id": "lsp1"});
        let installed = json!(["map", [["ovn-installed", "true"]]]);
        let open = json!({"name": "vhd-vm1", "ofport": 3, "mtu": 1500});
        let bound = json!({"name": "vhd-vm1", "ofport": 3, "mtu": 1500, "external_ids": installed});
        for (to, interface, expected) in [
            (&plain, open.clone(), None),
            (&logical, bound, None),
            (&logical, open, Some("lsp1")),
            (&plain, json!({"name": "other"}), Some("no interface")),
            (&plain, json!({"name": "vhd-vm1", "ofport": ["set", []]}), Some("not taken up")),
            (
                &plain,
                json!({"name": "vhd-vm1", "ofport": -1, "error": "No such device"}),
                Some("No such device"),
            ),
            (&plain, json!({"name": "vhd-vm1", "ofport": 3, "mtu": 1400}), Some("1400")),
        ] {
            let messages = missing(to, &interface);
            assert_eq!(messages.len(), usize::from(expected.is_some()), "{messages:?}");
            assert!(messages.iter().all(|message| message.contains(expected.unwrap())), "{messages:?}");
        }
    }

    #[test]
    fn a_port_in_another_bridge_is_not_in_ours() {
        let id: Name = "vm1".parse().unwrap();
        let of = |bridge: &str| Ovs::new(bridge.parse().unwrap());
        let view = view(&json!({"name": "vhd-vm1"}));
        assert!(!lacks(&view, &id, &of("br-int")) && lacks(&view, &id, &of("br1")));
        let bridge_alone = KernelGuest { make_tap: false, make_port: false };
        assert!(!lacks(&view, &"vm2".parse().unwrap(), &Ovs { guest: Some(bridge_alone), ..of("br-int") }));
        assert!(lacks(&view, &id, &Ovs { guest: Some(bridge_alone), ..of("br1") }));
    }
}
