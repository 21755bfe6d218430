//! A plug's side in Open vSwitch.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Role, Socket, SpecError, hashed, is_false, tap_name};
use crate::names::{ExternalId, IfName, Name, SocketPath};

/// Characters of a UUID.
const UUID_CHARS: usize = 36;
/// Characters of a plug's id in the names of its veth pair.
const PAIR_ID_CHARS: usize = 11;

/// Trunk bridges of Neutron, one a trunk port, are named so and go with their port.
const TRUNK_PREFIX: &str = "tbr-";

/// A port of an Open vSwitch bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Ovs {
    /// The bridge; made if it is not there.
    pub bridge: IfName,
    /// Linux bridge between the TAP and Open vSwitch, where others filter; made if it is not there. A veth pair leads on from
    /// it, `qvb…` to `qvo…`, and that is the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hybrid: Option<IfName>,
    /// The port, and the TAP behind it, if there is one; named after the plug if left out. Of a hybrid plug the TAP only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<IfName>,
    /// What joins us with the switch. Left out of a new plug: vhost-user if the bridge forwards in user space, with DPDK,
    /// else a TAP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach: Option<Attach>,
    /// The socket by which vhost-user joins us with the switch: we make it, the switch connects. Left out of a new plug: in
    /// the daemon's directory for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<SocketPath>,
    /// What the bridge has to be; left out: whatever it is, and one that is made is as the daemon's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath_type: Option<DatapathType>,
    /// `external_ids:iface-id` of the interface: the logical port in OVN and Neutron.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iface_id: Option<ExternalId>,
    /// `external_ids:vm-uuid` of the interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<ExternalId>,
    /// A port that is made starts in the dead VLAN (tag 4095), out of which somebody else takes it. The daemon's
    /// configuration may say so for every new port with an iface-id.
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
    /// The port is in a bridge of its own, which two patch ports join with `bridge`; the one in `bridge` is the logical port.
    /// The daemon's configuration may say so for every new port that is a guest's card.
    #[serde(default, skip_serializing_if = "is_false")]
    pub per_port_bridge: bool,
    /// The TAP itself is the guest's card: its VMM opens it, and no frame of it goes through vhostd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<KernelGuest>,
}

/// What is made for a guest whose card is the TAP; the VMM makes the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelGuest {
    /// The TAP; only with the port in Open vSwitch, if there is to be one: whoever makes that makes both.
    pub make_tap: bool,
    /// The port of the bridge.
    pub make_port: bool,
}

/// What joins us with a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Attach {
    /// A TAP
    Tap,
    /// A vhost-user socket at which we are a guest to the switch: `dpdkvhostuserclient`
    VhostUser,
}

/// One of a plug's ports in Open vSwitch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchPort {
    /// Its bridge.
    pub bridge: String,
    /// Its name.
    pub name: String,
    /// The patch port that it is joined with, if it is one.
    pub peer: Option<String>,
}

/// Where an Open vSwitch bridge forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DatapathType {
    /// In the kernel.
    System,
    /// In ovs-vswitchd.
    Netdev,
}

impl From<DatapathType> for ovsdb::DatapathType {
    fn from(kind: DatapathType) -> Self {
        match kind {
            DatapathType::System => Self::System,
            DatapathType::Netdev => Self::Netdev,
        }
    }
}

impl Ovs {
    /// A port of this bridge, with everything else left out.
    pub fn new(bridge: IfName) -> Self {
        Self {
            bridge,
            hybrid: None,
            tap: None,
            attach: None,
            socket: None,
            datapath_type: None,
            iface_id: None,
            vm_uuid: None,
            isolated: false,
            per_port_bridge: false,
            guest: None,
        }
    }

    /// The port's name, and its TAP's.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }

    /// Fills in what follows from the rest, which must not contradict itself.
    pub(super) fn complete(&mut self, id: &Name) -> Result<(), SpecError> {
        self.tap.get_or_insert_with(|| tap_name(id));
        if self.hybrid.is_some() && self.guest.is_none() {
            // What is in a Linux bridge is a link.
            if *self.attach.get_or_insert(Attach::Tap) == Attach::VhostUser || self.socket.is_some() {
                return Err(SpecError::HybridSocket);
            }
        }
        match (self.guest, self.attach, &self.socket) {
            (None, None, Some(_)) => self.attach = Some(Attach::VhostUser),
            (Some(_), Some(_), _) => return Err(SpecError::CardAttached),
            (Some(_), None, Some(_)) | (None, Some(Attach::Tap), Some(_)) => {
                return Err(SpecError::StraySocket);
            }
            _ => {}
        }
        Ok(())
    }

    /// The same, but what was left out as it is in a plug that is there.
    pub(super) fn keeping(self, before: &Self) -> Self {
        let mut ovs = Self {
            attach: self.attach.or(before.attach),
            socket: self.socket.or_else(|| before.socket.clone()),
            isolated: self.isolated || before.isolated,
            per_port_bridge: self.per_port_bridge || before.per_port_bridge,
            ..self
        };
        ovs.settle_guest();
        ovs
    }

    /// A port in a bridge of its own is ours to make in any case, and without a port of ours there is no TAP of ours.
    pub fn settle_guest(&mut self) {
        let own_bridge = self.per_port_bridge;
        if let Some(guest) = &mut self.guest {
            guest.make_port |= own_bridge;
            guest.make_tap &= guest.make_port;
        }
    }

    /// The socket that we share with the switch.
    pub fn vhost_user(&self) -> Option<Socket> {
        let path = self.socket.clone().filter(|_| self.attach == Some(Attach::VhostUser))?;
        Some(Socket { role: Role::FrontendListen, path })
    }

    /// The port's own bridge. os-vif has the first 14 characters of `pb` and the VIF's UUID; of another name they would not
    /// be enough.
    pub fn own_bridge(&self, id: &Name) -> Option<String> {
        let cut = || format!("pb{}", &id.as_str()[..12]);
        let name = || if id.as_str().len() == UUID_CHARS { cut() } else { format!("pb{}", hashed(id)) };
        self.per_port_bridge.then(name)
    }

    /// The ports that are ours to make: first the one behind which the guest is, last the logical port.
    pub fn ports(&self, id: &Name) -> Vec<SwitchPort> {
        let (bridge, name) = (self.bridge.to_string(), self.port(id).to_string());
        if !self.makes_port() {
            return Vec::new();
        }
        let Some(own) = self.own_bridge(id) else { return vec![SwitchPort { bridge, name, peer: None }] };
        let (outer, inner) = (format!("pbp{id}"), format!("ibp{id}"));
        vec![
            SwitchPort { bridge: own.clone(), name, peer: None },
            SwitchPort { bridge: own, name: outer.clone(), peer: Some(inner.clone()) },
            SwitchPort { bridge, name: inner, peer: Some(outer) },
        ]
    }

    /// The ends of the veth pair of a hybrid plug, in the Linux bridge and in Open vSwitch. os-vif has the first 14 characters
    /// of `qvb` or `qvo` and the VIF's UUID; of another long name they would not be enough.
    pub fn veth(&self, id: &Name) -> Option<[IfName; 2]> {
        self.hybrid.as_ref()?;
        let id = match id.as_str() {
            uuid if uuid.len() == UUID_CHARS => uuid[..PAIR_ID_CHARS].to_owned(),
            short if short.len() <= PAIR_ID_CHARS => short.to_owned(),
            _ => hashed(id),
        };
        let name =
            |prefix| format!("{prefix}{id}").parse().expect("15 characters of a name are an interface's");
        Some([name("qvb"), name("qvo")])
    }

    /// The port's name: that of the device behind it.
    pub fn port(&self, id: &Name) -> IfName {
        match self.veth(id) {
            Some([_, port]) => port,
            None => self.tap(id),
        }
    }

    /// Whether the TAP is ours to make.
    pub fn makes_tap(&self) -> bool {
        self.guest.is_none_or(|guest| guest.make_tap)
    }

    /// Whether the port is ours to make.
    pub fn makes_port(&self) -> bool {
        self.guest.is_none_or(|guest| guest.make_port)
    }

    /// Whether the bridge belongs to a trunk port, and to it alone.
    pub fn is_trunk(&self) -> bool {
        self.bridge.as_str().starts_with(TRUNK_PREFIX)
    }
}
