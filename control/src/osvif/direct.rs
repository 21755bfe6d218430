//! `VIFDirect`: a macvtap on an interface of the host.

use std::path::Path;

use vif::vif::{DirectMode, DirectVif};
use vif::{ProfileKind, Vif};

use super::{missing, parsed, required, unsupported};
use crate::names::IfName;
use crate::problem::{Kind, Problem};
use crate::spec::{Macvtap, MacvtapMode};

/// Where the kernel shows PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
const NO_INTERFACE: &str = "is it there (lspci), and bound to its network driver, not to vfio-pci?";

/// The macvtap on the VLAN that is named, or on the device of that PCI address.
pub(super) fn macvtap(vif: &Vif, card: &DirectVif) -> Result<Macvtap, Problem> {
    if let Some(profile) = vif.port_profile.value().filter(|p| !matches!(p.kind, ProfileKind::Base)) {
        return Err(unsupported(&format!("a VIFDirect with port profile {}", profile.class)));
    }
    let device = match (card.vlan_name.value(), card.dev_address.value()) {
        (Some(vlan), _) if !vlan.is_empty() => parsed("vif.vlan_name", vlan)?,
        (_, Some(address)) => interface_of(Path::new(PCI_DEVICES), &address.to_string())?,
        _ => return Err(missing("vif.dev_address")),
    };
    let mode = match required("vif.mode", &card.mode)? {
        DirectMode::Vepa => MacvtapMode::Vepa,
        DirectMode::Passthrough => MacvtapMode::Passthrough,
        DirectMode::Bridge => MacvtapMode::Bridge,
    };
    let tap = card.vif_name.value().map(|name| parsed("vif.vif_name", name)).transpose()?;
    Ok(Macvtap { mode, tap, ..Macvtap::new(device) })
}

/// The network interface of a PCI device.
fn interface_of(devices: &Path, address: &str) -> Result<IfName, Problem> {
    let field = "vif.dev_address";
    let mut interfaces = devices.join(address).join("net").read_dir().into_iter().flatten();
    match interfaces.next() {
        Some(Ok(interface)) => parsed(field, &interface.file_name().to_string_lossy()),
        _ => {
            let problem = format!("{field}: this host has no network interface of PCI device {address}");
            Err(Problem::new(Kind::Precondition, problem).field(field).hint(NO_INTERFACE))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_device_is_known_by_its_interface() {
        let devices = tempfile::tempdir().unwrap();
        let bound = devices.path().join("0000:03:00.1/net/enp3s0f1");
        std::fs::create_dir_all(bound).unwrap();
        std::fs::create_dir_all(devices.path().join("0000:03:00.2/net")).unwrap();
        let interface = |address| interface_of(devices.path(), address);
        assert_eq!(interface("0000:03:00.1").unwrap().as_str(), "enp3s0f1");
        for unbound in ["0000:03:00.2", "0000:03:00.3"] {
            assert_eq!(interface(unbound).unwrap_err().kind, Kind::Precondition);
        }
    }
}
