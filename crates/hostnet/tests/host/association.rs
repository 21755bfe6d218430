//! Port profiles: to lldpad, whose part another socket of ours plays, and to the kernel, whose drivers here have none.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hostnet::{Association, AssociationError, Error, HostNet, Listener, Profile, Request, Response};
use rtnetlink::packet_core::{DefaultNla, NetlinkMessage, NetlinkPayload, Nla};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, LinkVfPort, VfPort};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::namespace::{run, sh};

/// A number that no process has (its limit is 2^22), and so no socket that the kernel named.
const PORT: u32 = 1 << 23;
const UUID: [u8; 16] = [7; 16];
const NLMSG_DONE: u16 = 3;
const EOPNOTSUPP: i32 = -95;

/// How the stand-in answers.
#[derive(Clone, Debug)]
enum Part {
    /// It takes requests, and has these responses of the switch in turn, the last for ever; `None`: none yet.
    Responses(Vec<Option<u16>>),
    /// It refuses requests.
    Refuse,
    /// It answers with something else.
    Odd(Vec<u8>),
    /// It does not answer.
    Silent,
}

/// Interface and request of a message.
type Asked = (u32, Option<u8>);

/// A listener, and what it was asked.
struct Lldpad {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Lldpad {
    fn start(part: Part) -> Self {
        let lldpad = Self { dir: tempfile::tempdir().unwrap(), asked: Arc::default() };
        std::fs::write(lldpad.listener().pid_file, format!("{PORT}\n")).unwrap();
        let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
        socket.bind(&SocketAddr::new(PORT, 0)).unwrap();
        let asked = lldpad.asked.clone();
        std::thread::spawn(move || {
            let mut responses = match &part {
                Part::Responses(responses) => responses.clone(),
                _ => Vec::new(),
            };
            // The last clone of what was asked is this thread's when the test is over.
            while Arc::strong_count(&asked) > 1 {
                let (bytes, from) = socket.recv_from_full().unwrap();
                let (ifindex, request) = parts(&bytes);
                asked.lock().unwrap().push((ifindex, request));
                let answer = match (&part, request) {
                    (Part::Responses(_), Some(_)) => error(&bytes, 0),
                    (Part::Responses(_), None) => {
                        let next = responses[0];
                        if responses.len() > 1 {
                            responses.remove(0);
                        }
                        link(ifindex, next)
                    }
                    (Part::Refuse, _) => error(&bytes, EOPNOTSUPP),
                    (Part::Odd(answer), _) => answer.clone(),
                    (Part::Silent, _) => continue,
                };
                socket.send_to(&answer, &from, 0).unwrap();
            }
        });
        lldpad
    }

    fn listener(&self) -> Listener {
        Listener { pid_file: self.dir.path().join("lldpad.pid"), limit: Duration::from_millis(400) }
    }

    /// What was asked to be done.
    fn requests(&self) -> Vec<u8> {
        self.asked.lock().unwrap().iter().filter_map(|(_, request)| *request).collect()
    }
}

impl Drop for Lldpad {
    fn drop(&mut self) {
        self.asked = Arc::default();
        // Wakes it, so that its port is free again.
        let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
        socket.bind_auto().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while socket.send_to(&[0; 32], &SocketAddr::new(PORT, 0), 0).is_ok() {
            assert!(Instant::now() < deadline, "the stand-in ends");
            std::thread::yield_now();
        }
    }
}

fn parts(bytes: &[u8]) -> Asked {
    let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else { return (0, None) };
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::SetLink(link) | RouteNetlinkMessage::GetLink(link)) =
        message.payload
    else {
        return (0, None);
    };
    let request = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::VfPorts(ports) => value(&ports[0], 6).map(|value| value[0]),
        _ => None,
    });
    (link.header.index, request)
}

fn value(port: &LinkVfPort, kind: u16) -> Option<Vec<u8>> {
    let attribute = port.0.iter().find(|attribute| attribute.kind() == kind)?;
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    Some(value)
}

/// NLMSG_ERROR about a message: netlink(7), struct nlmsgerr.
fn error(about: &[u8], code: i32) -> Vec<u8> {
    let header = [&36_u32.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[0; 2], &[0; 8]].concat();
    [&header, &code.to_ne_bytes()[..], &about[..16]].concat()
}

/// What lldpad knows of the interface.
fn link(ifindex: u32, response: Option<u16>) -> Vec<u8> {
    let mut port = vec![VfPort::Other(DefaultNla::new(4, UUID.to_vec()))];
    port.extend(response.map(|code| VfPort::Other(DefaultNla::new(7, code.to_ne_bytes().to_vec()))));
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes.push(LinkAttribute::VfPorts(vec![LinkVfPort(port)]));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewLink(link));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes[4..6].copy_from_slice(&NLMSG_DONE.to_ne_bytes());
    bytes
}

fn guest(device: &str) -> Association {
    let profile = Profile::Qbg { manager: 1, type_id: 2, type_version: 3, instance: UUID };
    Association { device: device.into(), address: [0x52, 0x54, 0, 0, 0, 7], profile }
}

async fn associate(net: &HostNet, part: Part) -> (Result<(), AssociationError>, Vec<u8>) {
    let lldpad = Lldpad::start(part);
    let done = net.associate(&lldpad.listener(), &guest("d0")).await;
    (done, lldpad.requests())
}

const ASSOCIATE: u8 = 2;
const DISASSOCIATE: u8 = 3;

#[test]
fn every_response_of_the_switch_is_told() {
    run("association::every_response_of_the_switch_is_told", async |net| {
        sh("ip link add d0 type veth peer name d1");
        for responses in
            [vec![Some(0)], vec![Some(0x100)], vec![None, Some(0)], vec![Some(0x101), None, Some(0)]]
        {
            let (done, asked) = associate(&net, Part::Responses(responses)).await;
            done.unwrap();
            assert_eq!(asked, [ASSOCIATE]);
        }
        for code in (1..=6).chain(0x102..=0x105).chain([0x4711]) {
            let (done, asked) = associate(&net, Part::Responses(vec![None, Some(code)])).await;
            let error = done.unwrap_err();
            assert!(
                matches!(&error, AssociationError::Rejected { response: Response(found), .. } if *found == code),
                "{error}"
            );
            assert!(error.to_string().contains(&Response(code).to_string()), "{error}");
            assert_eq!(asked, [ASSOCIATE, DISASSOCIATE], "what is refused is taken back");
        }
        let (done, asked) = associate(&net, Part::Responses(vec![None])).await;
        let error = done.unwrap_err();
        assert!(matches!(&error, AssociationError::TimedOut { request: Request::Associate, .. }), "{error}");
        assert_eq!(asked, [ASSOCIATE, DISASSOCIATE]);
    });
}

#[test]
fn a_listener_that_does_not_do_its_part_is_named() {
    run("association::a_listener_that_does_not_do_its_part_is_named", async |net| {
        sh("ip link add d0 type veth peer name d1");
        let (done, _) = associate(&net, Part::Refuse).await;
        assert!(matches!(done, Err(AssociationError::Refused { listener: "lldpad", .. })), "{done:?}");
        for odd in [vec![0; 4], vec![0xff; 64], error(&[0; 16], 0)[..18].to_vec(), {
            let mut overrun = link(7, Some(0));
            overrun[32] = 0xff;
            overrun
        }] {
            let (done, _) = associate(&net, Part::Odd(odd)).await;
            assert!(matches!(done, Err(AssociationError::Odd { pid: PORT, .. })), "{done:?}");
        }
        let (done, asked) = associate(&net, Part::Silent).await;
        assert!(matches!(done, Err(AssociationError::Silent { .. })), "{done:?}");
        assert_eq!(asked, [ASSOCIATE]);
    });
}

#[test]
fn without_lldpad_there_is_nobody_to_ask_and_nothing_to_take_back() {
    run("association::without_lldpad_there_is_nobody_to_ask_and_nothing_to_take_back", async |net| {
        sh("ip link add d0 type veth peer name d1");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let nowhere = |pid_file: PathBuf| Listener { pid_file, ..Listener::default() };
        for text in [None, Some(""), Some("0"), Some("x"), Some("8388609")] {
            if let Some(text) = text {
                std::fs::write(&file, text).unwrap();
            }
            let error = net.associate(&nowhere(file.clone()), &guest("d0")).await.unwrap_err();
            assert!(matches!(error, AssociationError::NoAgent { .. }), "{text:?}: {error}");
            net.disassociate(&nowhere(file.clone()), &guest("d0")).await.unwrap();
        }
        let gone = net.associate(&nowhere(file.clone()), &guest("d9")).await.unwrap_err();
        assert!(matches!(gone, AssociationError::Host(Error::Missing { .. })), "{gone}");
        net.disassociate(&nowhere(file), &guest("d9")).await.unwrap();
    });
}

#[test]
fn the_interface_below_all_others_is_the_one_that_is_told() {
    run("association::the_interface_below_all_others_is_the_one_that_is_told", async |net| {
        sh("ip link add d0 type veth peer name d1");
        sh("ip link add link d0 name m0 type macvlan mode bridge");
        let below = net.link("d0").await.unwrap().unwrap().ifindex;
        let lldpad = Lldpad::start(Part::Responses(vec![Some(0)]));
        net.associate(&lldpad.listener(), &guest("m0")).await.unwrap();
        net.disassociate(&lldpad.listener(), &guest("m0")).await.unwrap();
        assert_eq!(lldpad.requests(), [ASSOCIATE, DISASSOCIATE]);
        assert!(lldpad.asked.lock().unwrap().iter().all(|(ifindex, _)| *ifindex == below));
    });
}

#[test]
fn a_device_without_port_extension_says_so() {
    run("association::a_device_without_port_extension_says_so", async |net| {
        sh("ip link add d0 type veth peer name d1");
        let profile = Profile::Qbh { profile: "web".into(), guest: UUID, host: Some(UUID) };
        let guest = Association { profile, ..guest("d0") };
        let error = net.associate(&Listener::default(), &guest).await.unwrap_err();
        assert!(matches!(&error, AssociationError::NoHardware { device } if device == "d0"), "{error}");
        net.disassociate(&Listener::default(), &guest).await.unwrap();
    });
}
