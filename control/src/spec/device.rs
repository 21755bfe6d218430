//! A device of the host that is a guest's.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Attach, Ovs, PortProfile, SpecError, VLAN_RANGE, bounded, is_false, tap_name};
use crate::names::{DriverName, IfName, Mac, Name, PciAddress};

/// A PCI device that the guest has itself: no frame of it goes through vhostd, unless the guest is behind a socket. Then the
/// device is the way out of its network, through a macvtap that has it for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where it is; left out of a new plug: it is the one whose interface has the guest's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<PciAddress>,
    /// How the guest gets it.
    #[serde(default)]
    pub dev_type: DeviceType,
    /// The VLAN that its frames are put into, which the guest does not see; of an `ethernet` one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 4094)]
    pub vlan: Option<u16>,
    /// Whether frames from another address than its own are dropped; of an `ethernet` one. Left out of a new plug: as the daemon's
    /// configuration says, else as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Whether the guest may have what is a host's: another address, frames for all. Of an `ethernet` one; left out, as
    /// `spoof_check` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// What the switch outside is told of the guest, by 802.1Qbh; of an `ethernet` one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PortProfile>,
    /// The driver that has it while it is plugged, as `vfio-pci`. Left out of a new plug: as the daemon's configuration says,
    /// else the one that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<DriverName>,
    /// Whether to take it although the host uses it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub force: bool,
    /// The port in Open vSwitch of its representor, whose name is the port's; left out, that stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Box<Ovs>>,
    /// As it was before the plug, and will be after it. Filled in by the daemon, whatever is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<Found>,
}

/// How a guest gets a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceType {
    /// As a PCI device like any other: nothing of it is set.
    #[default]
    Generic,
    /// As a virtual function, whose address, VLAN and the like are set through its physical function.
    Ethernet,
    /// As one that a container in this guest drives with DPDK: the daemon's configuration has the driver.
    Nested,
}

/// A device as it was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// The driver that had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The driver that alone might take it (`driver_override`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_override: Option<String>,
    /// Its IOMMU group: a guest opens `/dev/vfio/N`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// The host spoke IPv6 on its interface; of one behind a socket, whose address is the guest's meanwhile.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ipv6: bool,
    /// As its physical function held it; of an `ethernet` one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<FoundFunction>,
    /// Its representor, if that is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub representor: Option<FoundRepresentor>,
}

/// A virtual function as it was held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FoundFunction {
    /// Its physical function.
    pub physical: PciAddress,
    /// Its number there.
    pub number: u32,
    /// Its address; none if it was given none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Its VLAN; 0 for none.
    pub vlan: u16,
    /// Its priority in it.
    pub priority: u8,
    /// Whether frames from other addresses were dropped; only if the plug sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Whether it was trusted; only if the plug sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
}

/// A representor as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FoundRepresentor {
    /// Its name.
    pub name: IfName,
    /// It was up.
    pub up: bool,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// What ovs-vswitchd opens instead of it with DPDK (`options:dpdk-devargs`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devargs: Option<String>,
}

impl Device {
    /// The device at this address, with everything else left out.
    pub fn new(address: PciAddress) -> Self {
        Self { address: Some(address), ..Self::default() }
    }

    /// The macvtap on a device whose guest is behind a socket.
    pub fn tap(id: &Name) -> IfName {
        tap_name(id)
    }

    /// What ovs-vswitchd opens with DPDK in the representor's place.
    pub fn devargs(&self) -> Option<&str> {
        self.found.as_ref()?.representor.as_ref()?.devargs.as_deref()
    }

    /// The representor, if it is the host's to set up.
    pub fn representor(&self) -> Option<&FoundRepresentor> {
        self.found.as_ref()?.representor.as_ref().filter(|representor| representor.devargs.is_none())
    }

    /// Refuses what contradicts itself.
    pub(super) fn check(&self, mac: Option<Mac>, behind_socket: bool) -> Result<(), SpecError> {
        let ethernet = self.dev_type == DeviceType::Ethernet;
        match (self.address, mac) {
            (None, None) => return Err(SpecError::WhichDevice),
            (Some(_), None) if ethernet => return Err(SpecError::EthernetWithoutMac),
            _ => {}
        }
        if behind_socket && (self.driver.is_some() || self.dev_type == DeviceType::Nested) {
            return Err(SpecError::DeviceBehindSocket);
        }
        let is_chosen = |port: &Ovs| {
            let attached = port.attach.is_some_and(|how| how != Attach::Tap);
            attached || port.guest.is_some() || port.socket.is_some() || port.hybrid.is_some()
        };
        if self.port.as_deref().is_some_and(is_chosen) {
            return Err(SpecError::RepresentorIsPort);
        }
        let of_function = [
            ("spec.to.vlan", self.vlan.is_some()),
            ("spec.to.spoof_check", self.spoof_check.is_some()),
            ("spec.to.trust", self.trust.is_some()),
        ];
        let set = of_function.iter().find(|(_, is_set)| *is_set).map(|(field, _)| *field);
        let profile = self.profile.as_ref().map(|_| "spec.to.profile");
        match (set.or(profile), &self.profile) {
            (Some(field), _) if !ethernet => return Err(SpecError::WithoutEthernet(field)),
            (_, Some(PortProfile::Qbg { .. })) => return Err(SpecError::ProfileOfDevice),
            (_, Some(_)) if set.is_some() => return Err(SpecError::ProfileAlone),
            _ => {}
        }
        self.vlan.map_or(Ok(()), |vlan| bounded("spec.to.vlan", vlan, VLAN_RANGE))
    }

    /// The same, but what was left out, and what was found, as it is in a plug that is there.
    pub(super) fn keeping(self, before: &Self) -> Self {
        let port = match (self.port, &before.port) {
            (Some(mut port), Some(then)) => {
                let tap = port.tap.take().or_else(|| then.tap.clone());
                Some(Box::new(Ovs { tap, ..port.keeping(then) }))
            }
            (port, _) => port,
        };
        Self {
            address: self.address.or(before.address),
            driver: self.driver.or_else(|| before.driver.clone()),
            spoof_check: self.spoof_check.or(before.spoof_check),
            trust: self.trust.or(before.trust),
            found: before.found.clone(),
            port,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::PlugSpec;
    use serde_json::{Value, json};

    fn plug(mut to: Value, mut spec: Value) -> Result<PlugSpec, SpecError> {
        to["kind"] = "device".into();
        spec["to"] = to;
        serde_json::from_value::<PlugSpec>(spec).unwrap().completed(&"vm1".parse().unwrap())
    }

    const AT: &str = "0000:03:00.1";
    const UUID: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";

    #[test]
    fn a_device_is_a_guests_card_and_in_no_network() {
        let mac = json!({"mac": "52:54:00:00:00:01"});
        let card = plug(json!({"address": AT, "dev_type": "ethernet", "vlan": 4094}), mac.clone()).unwrap();
        assert!(!card.is_uplink() && card.network.is_none() && card.kernel_guest().is_some());
        plug(json!({}), mac).unwrap();
        plug(json!({"address": AT}), json!({})).unwrap();
        let socket = json!({"socket": {"role": "listen", "path": "/run/x.sock"}});
        let behind = plug(json!({"address": AT}), socket.clone()).unwrap();
        assert!(!behind.is_uplink() && behind.kernel_guest().is_none());
        let mut held = socket;
        held["mac"] = json!("52:54:00:00:00:01");
        plug(json!({"address": AT, "dev_type": "ethernet", "vlan": 7}), held).unwrap();
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let socket = || json!({"socket": {"role": "listen", "path": "/run/x.sock"}});
        let mac = || json!({"mac": "52:54:00:00:00:01"});
        let qbh = || json!({"protocol": "802.1Qbh", "profile_id": "web", "instance_id": UUID});
        let qbg = json!({"protocol": "802.1Qbg", "manager_id": 1, "type_id": 2, "type_id_version": 3,
                         "instance_id": UUID});
        plug(json!({"dev_type": "ethernet", "profile": qbh()}), mac()).unwrap();
        for (to, more, field) in [
            (json!({}), json!({}), "spec.to.address"),
            (json!({"address": AT, "dev_type": "ethernet"}), json!({}), "spec.mac"),
            (json!({"address": AT, "vlan": 7}), json!({}), "spec.to.vlan"),
            (json!({"address": AT, "spoof_check": false}), json!({}), "spec.to.spoof_check"),
            (json!({"address": AT, "trust": true}), socket(), "spec.to.trust"),
            (json!({"address": AT, "profile": qbh()}), json!({}), "spec.to.profile"),
            (json!({"dev_type": "ethernet", "profile": qbg}), mac(), "spec.to.profile"),
            (json!({"dev_type": "ethernet", "profile": qbh(), "trust": true}), mac(), "spec.to.profile"),
            (json!({"dev_type": "ethernet", "vlan": 4095}), mac(), "spec.to.vlan"),
            (json!({"address": AT, "driver": "vfio-pci"}), socket(), "spec.to"),
            (json!({"address": AT, "dev_type": "nested"}), socket(), "spec.to"),
            (
                json!({"address": AT, "port": {"bridge": "br0", "attach": "vhost_user"}}),
                json!({}),
                "spec.to.port",
            ),
        ] {
            assert_eq!(plug(to.clone(), more).unwrap_err().field(), Some(field), "{to}");
        }
    }

    #[test]
    fn what_was_found_stays_whatever_is_asked_for() {
        let to = json!({"address": AT, "port": {"bridge": "br0", "tap": "r1", "attach": "tap"},
                        "driver": "vfio-pci", "found": {"driver": "igbvf"}});
        let before = plug(to, json!({})).unwrap();
        let again = plug(json!({"address": AT, "port": {"bridge": "br0"}}), json!({})).unwrap();
        assert_eq!(again.keeping(&before).differences(&before), Vec::<String>::new());
        let other = plug(json!({"address": "0000:03:00.2", "found": {"driver": "x"}}), json!({})).unwrap();
        assert_eq!(other.keeping(&before).differences(&before), ["to.address", "to.port"]);
    }
}
