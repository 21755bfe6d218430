//! `VIFHostDevice` and `VIFNestedDPDK`: a PCI device that the guest has itself; and the representor in Open vSwitch of a
//! virtual function, which other VIFs have, too.

use vif::profile::OpenVSwitchProfile;
use vif::vif::{HostDeviceType, HostDeviceVif, NestedDpdkVif};
use vif::{DatapathOffload, Network, PortProfile, ProfileKind};

use super::direct::qbh;
use super::{missing, open_vswitch, parsed, required, unsupported};
use crate::names::PciAddress;
use crate::problem::Problem;
use crate::spec::{Device, DeviceType, Ovs};

/// A device, and its representor if the profile is one of Open vSwitch's, or what a switch outside is told of it. The same behind
/// a socket: what the guest sends through the device is in the network by the address and the VLAN that the physical function
/// holds.
pub(super) fn host_device(asked: &vif::Plug, card: &HostDeviceVif) -> Result<Device, Problem> {
    let vif = &asked.vif;
    let address: PciAddress = parsed("vif.dev_address", required("vif.dev_address", &card.dev_address)?)?;
    let dev_type = match required("vif.dev_type", &card.dev_type)? {
        HostDeviceType::Ethernet => DeviceType::Ethernet,
        HostDeviceType::Generic => DeviceType::Generic,
    };
    let device = Device { dev_type, ..Device::new(address) };
    let Some(profile) = vif.port_profile.value().filter(|profile| !is_plain(profile)) else {
        let vlan =
            vif.network.value().filter(|_| dev_type == DeviceType::Ethernet).map(vlan_of).transpose()?;
        return Ok(Device { vlan: vlan.flatten(), ..device });
    };
    if let (ProfileKind::Ieee8021Qbh(profile), DeviceType::Ethernet) = (&profile.kind, dev_type) {
        return Ok(Device { profile: Some(qbh(asked, profile)?), ..device });
    }
    let behind = representor(asked, profile)?;
    match behind.address {
        Some(other) if other != address => {
            let field = "vif.port_profile.representor_address";
            let detail =
                format!("{field} is {other}, and vif.dev_address {address}: a device has one address");
            Err(Problem::invalid(detail).field(field))
        }
        _ => Ok(Device { port: Some(Box::new(behind.port)), ..device }),
    }
}

/// A device that a container in this guest drives: at its address, or else the one whose interface has the VIF's.
pub(super) fn nested(asked: &vif::Plug, card: &NestedDpdkVif) -> Result<Device, Problem> {
    let vif = &asked.vif;
    match vif.port_profile.value().map(|profile| &profile.kind) {
        None | Some(ProfileKind::Base) => {}
        Some(ProfileKind::K8sDpdk(profile)) if profile.l3_setup.value() != Some(&true) => {}
        Some(_) => return Err(unsupported("a VIFNestedDPDK with l3_setup, or with another profile's,")),
    }
    let given = card.pci_address.value().filter(|address| !address.is_empty());
    let address = given.map(|address| parsed("vif.pci_address", address)).transpose()?;
    if address.is_none() && vif.address.value().is_none() {
        return Err(missing("vif.address"));
    }
    Ok(Device { address, dev_type: DeviceType::Nested, ..Device::default() })
}

/// A representor as a profile has it.
pub(super) struct Representor {
    /// Its port in Open vSwitch, with the name that it is to have.
    pub(super) port: Ovs,
    /// Its virtual function.
    pub(super) address: Option<PciAddress>,
}

/// Whether the switching is a virtual function's, by whichever of the two ways that os-vif has of saying so.
pub(super) fn is_offloaded(profile: &PortProfile) -> bool {
    matches!(profile.kind, ProfileKind::OvsRepresentor(..)) || offload(profile).is_some()
}

/// The representor of a profile of Open vSwitch's. Where the profile and its offload object say the same thing, the object, which
/// came to replace the profile, goes before.
pub(super) fn representor(asked: &vif::Plug, profile: &PortProfile) -> Result<Representor, Problem> {
    let (ovs, older): (&OpenVSwitchProfile, _) = match &profile.kind {
        ProfileKind::OpenVSwitch(ovs) => (ovs, None),
        ProfileKind::OvsRepresentor(ovs, older) => (ovs, Some(older)),
        _ => return Err(unsupported(&format!("a device with port profile {}", profile.class))),
    };
    let newer = offload(profile);
    let name = newer.and_then(|newer| newer.representor_name.value());
    let name = name.or_else(|| older?.representor_name.value()).filter(|name| !name.is_empty());
    let address = newer.and_then(|newer| newer.representor_address.value()).filter(|text| !text.is_empty());
    let address = address.cloned().or_else(|| Some(older?.representor_address.value()?.to_string()));
    let tap = name.map(|name| parsed("vif.port_profile.representor_name", name)).transpose()?;
    Ok(Representor {
        port: Ovs { tap, ..open_vswitch::port(asked, ovs)? },
        address: address.map(|text| parsed("vif.port_profile.representor_address", &text)).transpose()?,
    })
}

fn offload(profile: &PortProfile) -> Option<&vif::profile::RepresentorOffload> {
    match profile.datapath_offload.value() {
        Some(DatapathOffload::Representor(offload)) => Some(offload),
        _ => None,
    }
}

fn is_plain(profile: &PortProfile) -> bool {
    matches!(profile.kind, ProfileKind::Base) && offload(profile).is_none()
}

/// Neutron counts from 1; its 0 is no VLAN.
fn vlan_of(network: &Network) -> Result<Option<u16>, Problem> {
    let field = "vif.network.vlan";
    let number =
        |vlan: i64| vlan.try_into().map_err(|_| Problem::invalid(format!("{field} is {vlan}")).field(field));
    network.vlan.value().filter(|vlan| **vlan != 0).map(|vlan| number(*vlan)).transpose()
}
