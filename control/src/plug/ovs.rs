//! A plug's part in Open vSwitch: its ports ensured, and what becomes of them followed.
//!
//! ```text
//! guest ── vhostd ── TAP ── bridge                    as it comes, and where the bridge forwards in the kernel
//! guest ── vhostd ══ socket ══ bridge                 vhost-user: we are a guest to ovs-vswitchd, which polls with DPDK
//! guest ── vhostd ── TAP ── qbr… ── qvb…/qvo… ── bridge     hybrid, through a Linux bridge
//! guest ── TAP ── pb… ── pbp…/ibp… ── bridge          with a bridge of the port's own
//! ```
//!
//! Whether a port forwards is not ours to say: ovs-vswitchd opens the device, OVN puts flows in place. So all of it is read
//! from the database as it changes ([`ovsdb::View`]), and a plug forwards when nothing there is missing. What the database
//! cannot tell, that ovs-vswitchd or ovn-controller has died, is told by the end of a connection to its control socket, which is
//! beside the database's.

mod watch;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hostnet::{HostNet, Kind, LinkState};
use ovsdb::{Client, Device, PortSpec, Switch, View};
use sys::fail_point;
use tokio::sync::watch::Receiver;

use self::watch::Lookout;
use super::error::StepError;
use crate::config::OvsConfig;
use crate::names::Name;
use crate::spec::{Attach, DatapathType, Ovs, PlugSpec, Socket, SwitchPort};
use crate::status::{Condition, Phase, Whose};

/// There if the kernel forwards for Open vSwitch.
const KERNEL_MODULE: &str = "/sys/module/openvswitch";

/// Permissions of the directory for sockets between us and ovs-vswitchd, which may be another user: each socket has its own.
const DIRECTORY_MODE: u32 = 0o755;

/// Open vSwitch on this host.
pub(super) struct OpenVSwitch {
    switch: Switch,
    config: OvsConfig,
    lookout: Lookout,
}

impl OpenVSwitch {
    pub(super) fn new(config: OvsConfig) -> Self {
        let database = config.database.clone();
        Self { switch: Switch::new(Client::new(database.clone())), config, lookout: Lookout::new(database) }
    }

    /// Decides what a new plug leaves to us, by the configuration and by what the switch can do. Fails if its database does
    /// not answer, or the bridge's name stands for something else.
    pub(super) async fn resolve(&self, host: &HostNet, id: &Name, ovs: &mut Ovs) -> Result<(), StepError> {
        let netdev = self.netdev(host, ovs).await?;
        ovs.isolated |= self.config.isolate && ovs.iface_id.is_some() && !ovs.is_trunk();
        if ovs.guest.is_some() {
            ovs.per_port_bridge |= self.config.per_port_bridge;
            ovs.settle_guest();
            return Ok(());
        }
        let wanted = ovs.datapath_type.or(self.config.datapath_type);
        let netdev = netdev.unwrap_or_else(|| wanted != Some(DatapathType::System));
        let able = netdev && self.switch.has_vhost_user().await?;
        match *ovs.attach.get_or_insert(if able { Attach::VhostUser } else { Attach::Tap }) {
            Attach::Tap => {}
            Attach::VhostUser if able => self.name_socket(id, ovs)?,
            Attach::VhostUser => return Err(StepError::NoVhostUser { bridge: ovs.bridge.to_string() }),
        }
        Ok(())
    }

    fn name_socket(&self, id: &Name, ovs: &mut Ovs) -> Result<(), StepError> {
        if ovs.socket.is_none() {
            let path = self.config.socket_dir.join(ovs.tap(id).as_str());
            ovs.socket = Some(
                path.display()
                    .to_string()
                    .parse()
                    .expect("the configuration's directory leaves room for a name"),
            );
        }
        Ok(())
    }

    /// Whether the bridge, if it is there, forwards in user space. Fails if its name stands for something else.
    async fn netdev(&self, host: &HostNet, ovs: &Ovs) -> Result<Option<bool>, StepError> {
        let bridge = ovs.bridge.as_str();
        match self.switch.datapath_type(bridge).await? {
            Some(kind) => Ok(Some(kind == ovsdb::DatapathType::Netdev.name())),
            None => refuse_other_link(host, bridge).await.map(|()| None),
        }
    }

    /// The directory for sockets that we share with ovs-vswitchd, if this one is beneath it.
    pub(super) fn directory_of(&self, socket: &Socket) -> Option<PathBuf> {
        let dir = &self.config.socket_dir;
        socket.path.as_path().starts_with(dir).then(|| dir.clone())
    }

    /// Makes that directory if it is not there.
    pub(super) async fn make_directory(&self) -> Result<(), StepError> {
        let dir = &self.config.socket_dir;
        if tokio::fs::try_exists(dir).await.unwrap_or(false) {
            return Ok(());
        }
        let failed = |cause| StepError::SwitchDirectory { path: dir.display().to_string(), cause };
        fail_point::pass(format_args!("make {}", dir.display()));
        tokio::fs::create_dir_all(dir).await.map_err(failed)?;
        fail_point::pass(format_args!("set the permissions of {}", dir.display()));
        let permissions = PermissionsExt::from_mode(DIRECTORY_MODE);
        tokio::fs::set_permissions(dir, permissions).await.map_err(failed)
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
        let datapath_default = match self.netdev(host, ovs).await? {
            Some(true) => DatapathType::Netdev,
            Some(false) => DatapathType::System,
            None if ovs.vhost_user().is_some() => DatapathType::Netdev,
            None => self.config.datapath_type.unwrap_or_else(datapath_of_kernel),
        };
        let bridge = PortSpec {
            bridge: ovs.bridge.to_string(),
            datapath_type: ovs.datapath_type.map(Into::into),
            datapath_default: datapath_default.into(),
            owner: id.to_string(),
            ..PortSpec::default()
        };
        if !ovs.makes_port() {
            return Ok(self.switch.ensure_bridge(&bridge).await?);
        }
        let ports = self.ports(id, spec, ovs, &bridge, device(host, id, spec, ovs).await?);
        let [first, patch @ ..] = ports.as_slice() else { return Ok(false) };
        let changed = self.switch.ensure_port(first).await?;
        Ok(self.switch.ensure_ports(&patch.iter().collect::<Vec<_>>()).await? || changed)
    }

    /// Whether the kernel takes frames from the bridge's TAPs, and does what is left to it. ovs-vswitchd, when it forwards
    /// itself, reads packets without what else belongs to them.
    pub(super) async fn is_forwarded_by_kernel(&self, ovs: &Ovs) -> Result<bool, StepError> {
        let kind = self.switch.datapath_type(ovs.bridge.as_str()).await?;
        Ok(kind.as_deref() == Some(ovsdb::DatapathType::System.name()))
    }

    /// The plug's ports: first the one that the guest is behind, last the logical one, so that whoever sees that sees all.
    fn ports(
        &self,
        id: &Name,
        spec: &PlugSpec,
        ovs: &Ovs,
        bridge: &PortSpec,
        device: Device,
    ) -> Vec<PortSpec> {
        let in_kernel = ovs.vhost_user().is_none()
            && devargs(spec).is_none()
            && ovs.datapath_type != Some(DatapathType::Netdev);
        let mut ports: Vec<_> = ovs
            .ports(id)
            .into_iter()
            .map(|port| PortSpec {
                bridge: port.bridge,
                name: port.name,
                kind: port.peer.as_ref().map(|_| "patch".into()).unwrap_or_default(),
                options: port.peer.map(|peer| ("peer".into(), peer)).into_iter().collect(),
                ..bridge.clone()
            })
            .collect();
        if let Some(last) = ports.last_mut() {
            last.external_ids = external_ids(spec, ovs);
            last.isolated = ovs.isolated;
        }
        if let Some(first) = ports.first_mut() {
            first.device = device;
            first.mtu = Some(spec.mtu_bytes());
            first.qos = self.config.qos_type.clone().filter(|_| in_kernel);
            if let Some(socket) = ovs.vhost_user() {
                first.kind = ovsdb::VHOST_USER.into();
                first.options = [("vhost-server-path".to_owned(), socket.path.to_string())].into();
            }
            if let Some(devargs) = devargs(spec) {
                first.kind = "dpdk".into();
                first.options = [("dpdk-devargs".to_owned(), devargs.to_owned())].into();
            }
        }
        ports
    }

    /// Removes the plug's ports.
    pub(super) async fn remove_ports(&self, id: &Name, ovs: &Ovs) -> Result<(), StepError> {
        for port in ovs.ports(id).iter().rev() {
            self.switch.remove_port(&port.bridge, &port.name, id.as_str()).await?;
        }
        Ok(())
    }

    /// Removes the bridges that nobody needs any more.
    pub(super) async fn remove_bridges(&self, id: &Name, ovs: &Ovs) -> Result<(), StepError> {
        if let Some(own) = ovs.own_bridge(id) {
            self.switch.remove_bridge(&own, true).await?;
        }
        self.switch.remove_bridge(ovs.bridge.as_str(), ovs.is_trunk()).await?;
        Ok(())
    }

    /// Whether somebody else has taken away what the plug needs.
    pub(super) fn is_amiss(&self, id: &Name, ovs: &Ovs) -> bool {
        self.lacking(id, ovs).is_some()
    }

    /// What somebody else has taken away.
    pub(super) fn lacking(&self, id: &Name, ovs: &Ovs) -> Option<String> {
        self.lookout.seen().view.as_ref().ok().and_then(|view| lacking(view, id, ovs))
    }

    /// What is missing for the plug's port to forward.
    pub(super) fn missing(&self, id: &Name, spec: &PlugSpec, ovs: &Ovs) -> Vec<Condition> {
        let seen = self.lookout.seen();
        let mut messages = match &seen.view {
            Err(cause) => vec![format!("how Open vSwitch is cannot be told: {cause}")],
            Ok(view) => match lacking(view, id, ovs) {
                Some(message) => vec![message],
                None => missing_in(view, id, spec, ovs),
            },
        };
        if seen.switch_is_down {
            messages.push(format!("ovs-vswitchd, which forwards for bridge {}, does not run", ovs.bridge));
        }
        if let (true, Ok(view), Some(port)) = (seen.controller_is_down, &seen.view, &ovs.iface_id)
            && view.ovn_bridge() == Some(ovs.bridge.as_str())
        {
            messages
                .push(format!("ovn-controller, which keeps the flows of logical port {port}, does not run"));
        }
        let condition = |message| Condition { phase: Phase::Forwarding, whose: Whose::Host, message };
        messages.into_iter().map(condition).collect()
    }

    /// Tells when something was seen to have changed; only the first who asks, who has to run [`follow`](Self::follow).
    pub(super) fn changes(&self) -> Option<Receiver<u64>> {
        self.lookout.begin()
    }

    /// Follows what becomes of it, for ever.
    pub(super) async fn follow(&self) {
        self.lookout.follow().await;
    }
}

/// What the switch is to open for the first port.
async fn device(host: &HostNet, id: &Name, spec: &PlugSpec, ovs: &Ovs) -> Result<Device, StepError> {
    if ovs.vhost_user().is_some() || devargs(spec).is_some() {
        return Ok(Device::Own);
    }
    if ovs.hybrid.is_none() && !ovs.makes_tap() {
        return Ok(Device::ToCome);
    }
    let port = ovs.port(id);
    let missing = || hostnet::Error::Missing { name: port.to_string() };
    Ok(Device::Host(host.link(port.as_str()).await?.ok_or_else(missing)?.ifindex))
}

/// What it is to open with DPDK as the representor of a guest's device.
fn devargs(spec: &PlugSpec) -> Option<&str> {
    spec.device().and_then(|device| device.devargs())
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
fn datapath_of_kernel() -> DatapathType {
    if Path::new(KERNEL_MODULE).exists() { DatapathType::System } else { DatapathType::Netdev }
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

/// The first thing of a plug's that is not there.
fn lacking(view: &View, id: &Name, ovs: &Ovs) -> Option<String> {
    if !ovs.makes_port() {
        let bridge = ovs.bridge.as_str();
        return (!view.has_bridge(bridge)).then(|| format!("there is no Open vSwitch bridge {bridge}"));
    }
    let ports = ovs.ports(id);
    let port = ports.iter().find(|port| view.bridge_of(&port.name) != Some(port.bridge.as_str()))?;
    Some(format!("{} is not in Open vSwitch bridge {}", port.name, port.bridge))
}

/// What is missing for ports that are there.
fn missing_in(view: &View, id: &Name, spec: &PlugSpec, ovs: &Ovs) -> Vec<String> {
    let ports = ovs.ports(id);
    let mut messages: Vec<_> = ports.iter().filter_map(|port| not_open(view, &port.name)).collect();
    let interface = |port: Option<&SwitchPort>| view.interface(&port?.name);
    let mtu = spec.mtu_bytes();
    if let Some(found) = interface(ports.first()).and_then(|first| first.mtu)
        && found != i64::from(mtu)
    {
        messages.push(format!("{} has MTU {found} in Open vSwitch, the plug {mtu}", ovs.port(id)));
    }
    if let Some(iface_id) = ovs.iface_id.as_ref()
        && view.ovn_bridge() == Some(ovs.bridge.as_str())
        && interface(ports.last()).is_some_and(|last| !last.ovn_installed)
    {
        messages
            .push(format!("OVN has no flows for logical port {iface_id} on this host yet: ovn-controller says ovn-installed when it has"));
    }
    messages
}

/// Why the switch does not have the port open.
fn not_open(view: &View, port: &str) -> Option<String> {
    let Some(interface) = view.interface(port) else {
        return Some(format!("{port} has no interface in Open vSwitch"));
    };
    if let Some(error) = &interface.error {
        return Some(format!("ovs-vswitchd cannot use {port}: {error}"));
    }
    let open = interface.ofport.is_some_and(|number| number >= 1);
    (!open).then(|| format!("ovs-vswitchd has not taken up {port} yet"))
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
        let id: Name = "vm1".parse().unwrap();
        let spec = spec.completed(&id).unwrap();
        missing_in(&view(interface), &id, &spec, spec.ovs().unwrap())
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
        let lacks = |view: &View, id: &Name, ovs: &Ovs| lacking(view, id, ovs).is_some();
        assert!(!lacks(&view, &id, &of("br-int")) && lacks(&view, &id, &of("br1")));
        let bridge_alone = KernelGuest { make_tap: false, make_port: false };
        assert!(!lacks(&view, &"vm2".parse().unwrap(), &Ovs { guest: Some(bridge_alone), ..of("br-int") }));
        assert!(lacks(&view, &id, &Ovs { guest: Some(bridge_alone), ..of("br1") }));
    }
}
