//! The messages: linux/if_link.h, "Virtual port management".

use std::fmt;

use super::{Association, DefaultNla, Facing, LinkAttribute, LinkMessage, LinkVfPort, Profile, VfPort};
use rtnetlink::packet_core::{Emitable, Nla};
use rtnetlink::packet_route::link::{LinkVfInfo, VfInfo, VfInfoMac, VfInfoVlan};

const IFLA_PORT_SELF: u16 = 25;
const IFLA_PORT_VF: u16 = 1;
const IFLA_PORT_PROFILE: u16 = 2;
const IFLA_PORT_VSI_TYPE: u16 = 3;
const IFLA_PORT_INSTANCE_UUID: u16 = 4;
const IFLA_PORT_HOST_UUID: u16 = 5;
const IFLA_PORT_REQUEST: u16 = 6;
const IFLA_PORT_RESPONSE: u16 = 7;

/// Not one of its virtual functions but the interface itself (`PORT_SELF_VF`).
const PORT_SELF_VF: u32 = u32::MAX;

/// What is asked of the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// To make ready, without frames.
    Preassociate = 0,
    /// The same, with the resources reserved.
    PreassociateReserved = 1,
    /// To carry its frames.
    Associate = 2,
    /// To forget it.
    Disassociate = 3,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preassociate => "preassociate",
            Self::PreassociateReserved => "preassociate with reservation",
            Self::Associate => "associate",
            Self::Disassociate => "disassociate",
        })
    }
}

/// What the switch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response(pub u16);

impl Response {
    const VDP_SUCCESS: u16 = 0;
    const SUCCESS: u16 = 0x100;
    const IN_PROGRESS: u16 = 0x101;

    /// It is done.
    pub fn is_success(self) -> bool {
        matches!(self.0, Self::VDP_SUCCESS | Self::SUCCESS)
    }

    /// There will be no other.
    pub fn is_final(self) -> bool {
        self.0 != Self::IN_PROGRESS
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Self::VDP_SUCCESS | Self::SUCCESS => "done",
            1 => "the request has an invalid format",
            2 | 0x104 => "it has no resources left",
            3 => "it does not know that VSI type (unused VTID)",
            4 => "that VSI type is not for this port (VTID violation)",
            5 => "that VSI type has another version (VTID version violation)",
            6 => "it is out of step with this host (out of sync)",
            Self::IN_PROGRESS => "not yet",
            0x102 => "there is no such profile",
            0x103 => "the port is in no state for that",
            0x105 => "an error that it does not name",
            other => return write!(f, "response {other:#x}, which no standard names"),
        })
    }
}

/// What is asked, beside the interface's number.
pub(super) fn attributes(facing: &Facing, guest: &Association, request: Request) -> Vec<LinkAttribute> {
    let asked = nla(IFLA_PORT_REQUEST, &[request as u8]);
    match &guest.profile {
        Profile::Qbg { manager, type_id, type_version, instance } => {
            let [low, middle, high, _] = type_id.to_le_bytes();
            let vsi = nla(IFLA_PORT_VSI_TYPE, &[*manager, low, middle, high, *type_version, 0, 0, 0]);
            // lldpad refuses a request without a VLAN (EINVAL); 0 is none.
            let vlan = facing.vlan.unwrap_or_default().into();
            let station = vec![
                VfInfo::Mac(VfInfoMac::new(PORT_SELF_VF, &guest.address)),
                VfInfo::Vlan(VfInfoVlan::new(PORT_SELF_VF, vlan, 0)),
            ];
            let port = vec![vsi, nla(IFLA_PORT_INSTANCE_UUID, instance), asked];
            vec![
                LinkAttribute::VfInfoList(vec![LinkVfInfo(station)]),
                LinkAttribute::VfPorts(vec![LinkVfPort(port)]),
            ]
        }
        Profile::Qbh { profile, guest: uuid, host } => {
            let name = [profile.as_bytes(), &[0]].concat();
            let mut port = vec![nla(IFLA_PORT_PROFILE, &name), nla(IFLA_PORT_INSTANCE_UUID, uuid)];
            port.extend(host.map(|host| nla(IFLA_PORT_HOST_UUID, &host)));
            port.push(asked);
            match facing.function {
                Some(number) => of_function(number, guest.address, port, request),
                None => of_itself(&port),
            }
        }
    }
}

/// The driver tells the switch the address that it holds for the function, and so has to hold the guest's by then: the kernel
/// sets addresses first.
fn of_function(number: u32, address: [u8; 6], mut port: Vec<VfPort>, request: Request) -> Vec<LinkAttribute> {
    port.insert(0, nla(IFLA_PORT_VF, &number.to_ne_bytes()));
    let ports = LinkAttribute::VfPorts(vec![LinkVfPort(port)]);
    if request == Request::Disassociate {
        return vec![ports];
    }
    let station = vec![VfInfo::Mac(VfInfoMac::new(number, &address))];
    vec![LinkAttribute::VfInfoList(vec![LinkVfInfo(station)]), ports]
}

fn of_itself(port: &[VfPort]) -> Vec<LinkAttribute> {
    let mut value = vec![0; port.buffer_len()];
    port.emit(&mut value);
    // The crate's own attribute of that name is written with the header of IFLA_VF_PORT inside.
    vec![LinkAttribute::Other(DefaultNla::new(IFLA_PORT_SELF, value))]
}

fn nla(kind: u16, value: &[u8]) -> VfPort {
    VfPort::Other(DefaultNla::new(kind, value.to_vec()))
}

/// Whether the interface's driver has port extension: it lists ports, even if none of its virtual functions has a profile.
pub(super) fn has_ports(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::VfPorts(_)))
}

/// Which of the ports that a link's message tells of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Port<'a> {
    /// The interface's own.
    Itself,
    /// That of a virtual function of its.
    Function(u32),
    /// That of a VSI instance.
    Instance(&'a [u8; 16]),
}

/// The switch's response to the last request for this port. None is one to come.
pub(super) fn response_in(link: &LinkMessage, of: Port<'_>) -> Response {
    let ports = link.attributes.iter().flat_map(|attribute| match (attribute, of) {
        (LinkAttribute::PortSelf(port), Port::Itself) => std::slice::from_ref(port),
        (LinkAttribute::VfPorts(ports), Port::Function(_) | Port::Instance(_)) => ports.as_slice(),
        _ => &[],
    });
    let is_meant = |port: &&LinkVfPort| match of {
        Port::Itself => true,
        Port::Function(number) => {
            value(port, IFLA_PORT_VF).as_deref() == Some(number.to_ne_bytes().as_slice())
        }
        Port::Instance(uuid) => uuid_in(port).as_ref() == Some(uuid),
    };
    let mut responses =
        ports.filter(is_meant).filter_map(|port| match value(port, IFLA_PORT_RESPONSE)?.as_slice() {
            &[low, high, ..] => Some(Response(u16::from_ne_bytes([low, high]))),
            _ => None,
        });
    responses.next_back().unwrap_or(Response(Response::IN_PROGRESS))
}

/// What is asked for a port.
pub(super) fn request_in(port: &LinkVfPort) -> Option<u8> {
    value(port, IFLA_PORT_REQUEST)?.first().copied()
}

/// The VSI instance of a port.
pub(super) fn uuid_in(port: &LinkVfPort) -> Option<[u8; 16]> {
    value(port, IFLA_PORT_INSTANCE_UUID)?.try_into().ok()
}

fn value(port: &LinkVfPort, kind: u16) -> Option<Vec<u8>> {
    let attribute = port.0.iter().find(|attribute| attribute.kind() == kind)?;
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    Some(value)
}

/// A link's message without netlink's own header.
pub(super) fn link_message(ifindex: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes = attributes;
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

    const ADDRESS: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];

    fn bytes(vlan: Option<u16>, function: Option<u32>, profile: Profile, request: Request) -> Vec<u8> {
        let guest = Association { device: "eth1".into(), function, address: ADDRESS, profile };
        let facing = Facing { name: "eth1".into(), ifindex: 7, vlan, function };
        let message = link_message(7, attributes(&facing, &guest, request));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    /// struct ifla_vf_mac.
    fn mac(number: u32) -> Vec<u8> {
        [&number.to_ne_bytes()[..], &ADDRESS, &[0; 26]].concat()
    }

    /// struct ifinfomsg of interface 7.
    const HEADER: [u8; 16] = [0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    /// An attribute of this type, its value padded to four bytes, which its length does not count.
    fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let pad = vec![0; value.len().next_multiple_of(4) - value.len()];
        [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value, &pad].concat()
    }

    #[test]
    fn a_request_of_802_1qbg_is_what_the_header_file_says() {
        let profile = Profile::Qbg { manager: 11, type_id: 0x0003_0201, type_version: 5, instance: UUID };
        let vlan = |id: u32| [u32::MAX, id, 0].map(u32::to_ne_bytes).concat();
        // IFLA_VFINFO_LIST 22, IFLA_VF_INFO 1, IFLA_VF_MAC 1, IFLA_VF_VLAN 2; IFLA_VF_PORTS 24, IFLA_VF_PORT 1.
        let station = |id| nla(22, &nla(1, &[nla(1, &mac(u32::MAX)), nla(2, &vlan(id))].concat()));
        let vsi = nla(3, &[11, 1, 2, 3, 5, 0, 0, 0]);
        let port = |request| nla(24, &nla(1, &[vsi.clone(), nla(4, &UUID), nla(6, &[request])].concat()));
        for (request, number) in [
            (Request::Preassociate, 0),
            (Request::PreassociateReserved, 1),
            (Request::Associate, 2),
            (Request::Disassociate, 3),
        ] {
            let expected = [HEADER.to_vec(), station(42), port(number)].concat();
            assert_eq!(bytes(Some(42), None, profile.clone(), request), expected);
        }
        let expected = [HEADER.to_vec(), station(0), port(2)].concat();
        assert_eq!(bytes(None, None, profile, Request::Associate), expected);
    }

    #[test]
    fn a_request_of_802_1qbh_is_what_the_header_file_says() {
        let host = UUID.map(|byte| byte + 16);
        for host in [Some(host), None] {
            let profile = Profile::Qbh { profile: "web".into(), guest: UUID, host };
            let of_host = host.map(|host| nla(5, &host)).unwrap_or_default();
            let port =
                |request| [nla(2, b"web\0"), nla(4, &UUID), of_host.clone(), nla(6, &[request])].concat();
            // IFLA_PORT_SELF 25.
            let expected = [HEADER.to_vec(), nla(25, &port(3))].concat();
            assert_eq!(bytes(None, None, profile.clone(), Request::Disassociate), expected);

            // IFLA_PORT_VF 1; the address of the function is in front, since it is set first.
            let port = |request| nla(24, &nla(1, &[nla(1, &3_u32.to_ne_bytes()), port(request)].concat()));
            let station = nla(22, &nla(1, &nla(1, &mac(3))));
            let expected = [HEADER.to_vec(), station, port(2)].concat();
            assert_eq!(bytes(Some(42), Some(3), profile.clone(), Request::Associate), expected);
            let expected = [HEADER.to_vec(), port(3)].concat();
            assert_eq!(bytes(None, Some(3), profile, Request::Disassociate), expected);
        }
    }

    fn port(kind: u16, value: &[u8], response: &[u8]) -> LinkVfPort {
        LinkVfPort(vec![super::nla(kind, value), super::nla(IFLA_PORT_RESPONSE, response)])
    }

    #[test]
    fn the_response_is_the_last_one_for_the_instance() {
        let port = |uuid: &[u8], response: &[u8]| port(IFLA_PORT_INSTANCE_UUID, uuid, response);
        let link = |ports| link_message(7, vec![LinkAttribute::VfPorts(ports)]);
        let code = |code: u16| code.to_ne_bytes();
        let of = |ports| response_in(&link(ports), Port::Instance(&UUID));
        assert!(of(vec![port(&UUID, &code(0))]).is_success());
        assert_eq!(of(vec![port(&UUID, &code(6)), port(&UUID, &code(0x100))]), Response(0x100));
        for others in [
            vec![],
            vec![port(&[0; 16], &code(0))],
            vec![port(&UUID[..8], &code(0))],
            vec![port(&UUID, &[0])],
            vec![port(&UUID, &[])],
            vec![LinkVfPort(vec![])],
        ] {
            assert!(!of(others).is_final(), "no response is one to come");
        }
    }

    #[test]
    fn the_response_to_an_interface_is_not_that_to_its_virtual_functions() {
        let code = |code: u16| code.to_ne_bytes();
        let of_function = |number: u32, response| port(IFLA_PORT_VF, &number.to_ne_bytes(), &code(response));
        let ports = vec![
            of_function(0, 0x103),
            of_function(1, 0x100),
            port(IFLA_PORT_VF, &[2], &code(0)),
            port(IFLA_PORT_VF, &[], &code(0)),
        ];
        let own = LinkAttribute::PortSelf(port(IFLA_PORT_PROFILE, b"web\0", &code(0x102)));
        let link = link_message(7, vec![LinkAttribute::VfPorts(ports.clone()), own.clone()]);
        assert_eq!(response_in(&link, Port::Itself), Response(0x102));
        assert_eq!(response_in(&link, Port::Function(0)), Response(0x103));
        assert_eq!(response_in(&link, Port::Function(1)), Response(0x100));
        assert!(!response_in(&link, Port::Function(2)).is_final());
        let others = link_message(7, vec![LinkAttribute::VfPorts(ports)]);
        assert!(!response_in(&others, Port::Itself).is_final());
        assert!(has_ports(&others) && !has_ports(&link_message(7, vec![own])));
        assert!(has_ports(&link_message(7, vec![LinkAttribute::VfPorts(Vec::new())])));
    }

    #[test]
    fn every_response_has_words() {
        for code in (0..=6).chain(0x100..=0x105) {
            assert!(!Response(code).to_string().contains("no standard"), "{code:#x}");
        }
        assert_eq!(Response(0x4711).to_string(), "response 0x4711, which no standard names");
        assert!(Response(0x4711).is_final() && !Response(0x4711).is_success());
    }
}
