//! What an os-vif VIF asks of us. The one place that knows both os-vif's objects and a plug's spec.
//!
//! ```text
//! VIFVHostUser, no profile       a port of the network that vif.network names
//!               FPTap            joined with the TAP vif_name
//!               FPBridge         joined with the TAP vif_name in the profile's bridge
//!               FPOpenVSwitch    joined with the TAP vif_name in the network's bridge of Open vSwitch; if hybrid, in the
//!                                profile's Linux bridge, from which a veth pair leads on into that of Open vSwitch
//!               OpenVSwitch      the same; either by vhost-user instead of a TAP if that bridge forwards with DPDK
//!               OVSRepresentor   joined with a virtual function, whose representor is in the network's bridge of Open vSwitch; so
//!                                with any of Open vSwitch's profiles that has a DatapathOffloadRepresentor
//! VIFOpenVSwitch, OpenVSwitch    the TAP vif_name in the network's bridge of Open vSwitch is the guest's card; the profile
//!                                says whether TAP and port are ours to make (create_tap, create_port)
//! VIFBridge, OpenVSwitch         hybrid, too: Linux bridge and veth pair; the guest's card is a TAP that its VMM puts there
//!            no profile          the Linux bridge, with the network's bridge_interface or a VLAN of it if os-vif is to provide
//!                                that; the guest's card is a TAP that its VMM puts there
//! VIFGeneric                       the TAP vif_name is the guest's card
//! VIFDirect, no profile            a macvtap on vlan_name, or on the interface of PCI device dev_address, is the guest's card
//!            8021Qbg, 8021Qbh    the same, and the switch outside is told of it
//! VIFHostDevice, no profile        PCI device dev_address is the guest's card
//!            OVSRepresentor      the same, its representor is in the network's bridge of Open vSwitch
//!            8021Qbh             the same, and the switch outside is told of it; a virtual function that gets the VIF's address
//! VIFNestedDPDK, none, K8sDPDK     the PCI device of that MAC address is a container's in this guest, which drives it by DPDK
//! ```
//!
//! Where a TAP or macvtap is the guest's card, whoever asks may name a vhost-user socket beside the VIF: then that is joined
//! with the TAP, which we make and open ourselves.
//!
//! os-vif's `mode` is the VMM's side of the socket: `client` means that we listen. A guest behind a socket whose
//! `has_traffic_filtering` is false may send from its addresses in the network's subnets only, if there are any. `plugin`,
//! `active` and `preserve_on_delete` say nothing about forwarding frames and are not looked at.

mod bridge;
mod device;
mod direct;
mod open_vswitch;
#[cfg(test)]
mod tests;
mod vhost_user;

use std::fmt::Display;
use std::str::FromStr;

use vif::{Field, Network, Vif, VifKind};

use crate::names::{IpPrefix, Name};
use crate::problem::{Kind, Problem};
use crate::spec::{AntiSpoof, Macvtap, PlugSpec, Socket, Tap, To};

const SUPPORTED: &str = "supported are VIFVHostUser without port profile and with VIFPortProfileFPTap, \
                         VIFPortProfileFPBridge, VIFPortProfileFPOpenVSwitch, VIFPortProfileOpenVSwitch or \
                         VIFPortProfileOVSRepresentor, VIFOpenVSwitch, VIFBridge, VIFGeneric, VIFDirect without port \
                         profile and with VIFPortProfile8021Qbg or VIFPortProfile8021Qbh, VIFHostDevice without port \
                         profile and with VIFPortProfileOVSRepresentor or (dev_type ethernet) \
                         VIFPortProfile8021Qbh, and VIFNestedDPDK without port profile and \
                         with VIFPortProfileK8sDPDK";

/// The plug that serves a VIF, through `socket` if one is given: instead of the guest's VMM we open its TAP then.
pub fn plug_of(asked: &vif::Plug, socket: Option<Socket>) -> Result<(Name, PlugSpec), Problem> {
    let vif = &asked.vif;
    let id = id_of(vif)?;
    let network = vif.network.value();
    let guest = socket.is_none();
    let mut spec = PlugSpec {
        socket,
        mac: vif.address.value().map(|mac| parsed("vif.address", mac)).transpose()?,
        mtu: network.map(mtu_of).transpose()?.flatten(),
        ..PlugSpec::default()
    };
    match &vif.kind {
        VifKind::VhostUser(card) => vhost_user::fill_in(&mut spec, asked, card)?,
        VifKind::Bridge(card) => spec.to = Some(bridge::host_side(asked, card, guest)?),
        VifKind::OpenVSwitch(card) => open_vswitch::fill_in(&mut spec, asked, card)?,
        VifKind::Generic(card) => {
            let tap = parsed("vif.vif_name", required("vif.vif_name", &card.vif_name)?)?;
            spec.to = Some(To::Tap(Tap { guest, ..Tap::new(tap) }));
        }
        VifKind::Direct(card) => {
            spec.to = Some(To::Macvtap(Macvtap { guest, ..direct::macvtap(asked, card)? }));
        }
        VifKind::HostDevice(card) => spec.to = Some(To::Device(device::host_device(asked, card)?)),
        VifKind::NestedDpdk(card) => spec.to = Some(To::Device(device::nested(asked, card)?)),
        _ => return Err(unsupported(&format!("a VIF of class {}", vif.class))),
    }
    if spec.socket.is_some() && spec.mac.is_some() && vif.has_traffic_filtering.value() == Some(&false) {
        spec.anti_spoof = network.and_then(anti_spoof_of);
    }
    Ok((id, spec))
}

/// Nobody else filters what the guest sends, so we do as far as its addresses are known.
fn anti_spoof_of(network: &Network) -> Option<AntiSpoof> {
    let subnets = network.subnets.value().into_iter().flatten();
    let fixed = subnets.flat_map(|subnet| subnet.ips.value().into_iter().flatten());
    let addresses: Vec<_> =
        fixed.filter_map(|ip| ip.address.value()).map(|address| IpPrefix::from(*address)).collect();
    (!addresses.is_empty()).then_some(AntiSpoof { addresses })
}

/// The plug's id is the VIF's.
pub fn id_of(vif: &Vif) -> Result<Name, Problem> {
    parsed("vif.id", required("vif.id", &vif.id)?)
}

fn mtu_of(network: &Network) -> Result<Option<u16>, Problem> {
    let field = "vif.network.mtu";
    let in_range =
        |mtu: i64| mtu.try_into().map_err(|_| Problem::invalid(format!("{field} is {mtu}")).field(field));
    // os-vif's own plug-ins take 0 as "not told".
    network.mtu.value().filter(|mtu| **mtu != 0).map(|mtu| in_range(*mtu)).transpose()
}

fn required<'a, T>(field: &str, value: &'a Field<T>) -> Result<&'a T, Problem> {
    value.value().ok_or_else(|| missing(field))
}

fn missing(field: &str) -> Problem {
    Problem::invalid(format!("{field} is not set, and a plug needs it")).field(field)
}

fn parsed<T: FromStr<Err: Display>>(field: &str, value: &impl ToString) -> Result<T, Problem> {
    value.to_string().parse().map_err(|e| Problem::invalid(format!("{field}: {e}")).field(field))
}

fn unsupported(what: &str) -> Problem {
    Problem::new(Kind::Unsupported, format!("{what} is not supported")).hint(SUPPORTED)
}
