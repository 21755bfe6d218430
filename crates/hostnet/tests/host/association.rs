//! Port profiles: to lldpad and to the kernel, whose parts another socket of ours plays; and to the kernel itself, whose drivers
//! here have none.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hostnet::{
    Agent, Association, AssociationError, Error, HostNet, LetGo, Listener, Pci, Profile, Request, Response,
    SwitchWatch,
};
use rtnetlink::packet_core::{DefaultNla, Emitable, NetlinkMessage, NetlinkPayload, Nla};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    LinkAttribute, LinkMessage, LinkVfInfo, LinkVfPort, VfInfo, VfInfoMac, VfPort,
};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::namespace::{run, sh};

/// A number that no process has (its limit is 2^22), and so no socket that the kernel named.
const PORT: u32 = 1 << 23;
const UUID: [u8; 16] = [7; 16];
const NLMSG_DONE: u16 = 3;
const ENXIO: i32 = -6;
const EOPNOTSUPP: i32 = -95;

/// Whom the stand-in plays.
#[derive(Clone, Copy, Debug)]
enum Role {
    Lldpad,
    /// The kernel, for a driver that is told about its interface, or about a virtual function.
    Driver(Option<u32>),
}

/// How the stand-in answers.
#[derive(Clone, Debug)]
enum Part {
    /// It takes requests, and has these responses of the switch in turn, the last for ever; `None`: none yet.
    Responses(Vec<Option<u16>>),
    /// It refuses requests, with this error number.
    Refuse(i32),
    /// It answers with something else.
    Odd(Vec<u8>),
    /// It does not answer.
    Silent,
}

/// Interface and request of a message.
type Asked = (u32, Option<u8>);

/// A listener, and what it was asked.
struct StandIn {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl StandIn {
    fn start(role: Role, part: Part) -> Self {
        let stand_in = Self { dir: tempfile::tempdir().unwrap(), asked: Arc::default() };
        fs::write(stand_in.listener().pid_file, format!("{PORT}\n")).unwrap();
        let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
        socket.bind(&SocketAddr::new(PORT, 0)).unwrap();
        let asked = stand_in.asked.clone();
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
                        link(role, ifindex, next)
                    }
                    (Part::Refuse(code), _) => error(&bytes, *code),
                    (Part::Odd(answer), _) => answer.clone(),
                    (Part::Silent, _) => continue,
                };
                socket.send_to(&answer, &from, 0).unwrap();
            }
        });
        stand_in
    }

    fn listener(&self) -> Listener {
        let (dir, limit) = (self.dir.path(), Duration::from_millis(400));
        Listener { pid_file: dir.join("lldpad.pid"), limit, pci: Pci::new(dir), kernel: PORT, told_at: 0 }
    }

    /// What was asked to be done.
    fn requests(&self) -> Vec<u8> {
        self.asked.lock().unwrap().iter().filter_map(|(_, request)| *request).collect()
    }
}

impl Drop for StandIn {
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
        LinkAttribute::PortSelf(port) => value(port, 6).map(|value| value[0]),
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

/// What lldpad or the kernel knows of the interface.
fn link(role: Role, ifindex: u32, response: Option<u16>) -> Vec<u8> {
    let whose = match role {
        Role::Lldpad => (4, UUID.to_vec()),
        Role::Driver(number) => (1, number.unwrap_or(u32::MAX).to_ne_bytes().to_vec()),
    };
    let mut port = vec![VfPort::Other(DefaultNla::new(whose.0, whose.1))];
    port.extend(response.map(|code| VfPort::Other(DefaultNla::new(7, code.to_ne_bytes().to_vec()))));
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes.push(if let Role::Driver(None) = role {
        let mut own = vec![0; port.as_slice().buffer_len()];
        port.as_slice().emit(&mut own);
        LinkAttribute::Other(DefaultNla::new(25, own))
    } else {
        LinkAttribute::VfPorts(vec![LinkVfPort(port)])
    });
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewLink(link));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    if let Role::Lldpad = role {
        bytes[4..6].copy_from_slice(&NLMSG_DONE.to_ne_bytes());
    }
    bytes
}

fn guest(device: &str) -> Association {
    let profile = Profile::Qbg { manager: 1, type_id: 2, type_version: 3, instance: UUID };
    Association { device: device.into(), function: None, address: [0x52, 0x54, 0, 0, 0, 7], profile }
}

fn qbh(device: &str, function: Option<u32>) -> Association {
    let profile = Profile::Qbh { profile: "web".into(), guest: UUID, host: Some(UUID) };
    Association { function, profile, ..guest(device) }
}

async fn associate(net: &HostNet, part: Part) -> (Result<(), AssociationError>, Vec<u8>) {
    associate_with(net, Role::Lldpad, part).await
}

async fn associate_with(net: &HostNet, role: Role, part: Part) -> (Result<(), AssociationError>, Vec<u8>) {
    let stand_in = StandIn::start(role, part);
    let guest = match role {
        Role::Lldpad => guest("d0"),
        Role::Driver(function) => qbh("d0", function),
    };
    let done = net.associate(&stand_in.listener(), &guest).await;
    (done, stand_in.requests())
}

const ASSOCIATE: u8 = 2;
const DISASSOCIATE: u8 = 3;

#[test]
fn every_response_of_the_switch_is_told() {
    run("association::every_response_of_the_switch_is_told", async |net| {
        sh("ip link add d0 type veth peer name d1");
        for role in [Role::Lldpad, Role::Driver(None), Role::Driver(Some(3))] {
            for responses in
                [vec![Some(0)], vec![Some(0x100)], vec![None, Some(0)], vec![Some(0x101), None, Some(0)]]
            {
                let (done, asked) = associate_with(&net, role, Part::Responses(responses)).await;
                done.unwrap();
                assert_eq!(asked, [ASSOCIATE]);
            }
            for code in (1..=6).chain(0x102..=0x105).chain([0x4711]) {
                let (done, asked) = associate_with(&net, role, Part::Responses(vec![Some(code)])).await;
                let error = done.unwrap_err();
                assert!(
                    matches!(&error, AssociationError::Rejected { response: Response(found), .. } if *found == code),
                    "{error}"
                );
                assert!(error.to_string().contains(&Response(code).to_string()), "{error}");
                assert_eq!(asked, [ASSOCIATE, DISASSOCIATE], "what is refused is taken back");
            }
            let (done, asked) = associate_with(&net, role, Part::Responses(vec![None])).await;
            let error = done.unwrap_err();
            assert!(
                matches!(&error, AssociationError::TimedOut { request: Request::Associate, .. }),
                "{error}"
            );
            assert_eq!(asked, [ASSOCIATE, DISASSOCIATE]);
        }
    });
}

#[test]
fn a_listener_that_does_not_do_its_part_is_named() {
    run("association::a_listener_that_does_not_do_its_part_is_named", async |net| {
        sh("ip link add d0 type veth peer name d1");
        for (code, forgets) in [(EOPNOTSUPP, false), (ENXIO, true)] {
            let lldpad = StandIn::start(Role::Lldpad, Part::Refuse(code));
            let done = net.associate(&lldpad.listener(), &guest("d0")).await;
            assert!(
                matches!(done, Err(AssociationError::Refused { agent: Agent::Lldpad(PORT), .. })),
                "{done:?}"
            );
            let done = net.disassociate(&lldpad.listener(), &guest("d0")).await;
            assert_eq!(
                done.is_ok(),
                forgets,
                "where it speaks with no switch, none knows of the guest: {done:?}"
            );
        }
        for odd in [vec![0; 4], vec![0xff; 64], error(&[0; 16], 0)[..18].to_vec(), {
            let mut overrun = link(Role::Lldpad, 7, Some(0));
            overrun[32] = 0xff;
            overrun
        }] {
            let (done, _) = associate(&net, Part::Odd(odd)).await;
            assert!(
                matches!(done, Err(AssociationError::Odd { agent: Agent::Lldpad(PORT), .. })),
                "{done:?}"
            );
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
                fs::write(&file, text).unwrap();
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
        let lldpad = StandIn::start(Role::Lldpad, Part::Responses(vec![Some(0)]));
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
        for function in [None, Some(0)] {
            let guest = qbh("d0", function);
            let error = net.associate(&Listener::default(), &guest).await.unwrap_err();
            assert!(matches!(&error, AssociationError::NoHardware { device } if device == "d0"), "{error}");
            net.disassociate(&Listener::default(), &guest).await.unwrap();
        }
    });
}

/// Makes `v0` an interface of virtual function 3 of the device whose interface is `d0`.
fn be_virtual_function(sysfs: &Path) {
    let devices = ["0000:03:00.0", "0000:03:00.1"].map(|address| {
        let dir = sysfs.join("devices").join(address);
        fs::create_dir_all(dir.join("net")).unwrap();
        fs::create_dir_all(sysfs.join("bus/pci/devices")).unwrap();
        symlink(&dir, sysfs.join("bus/pci/devices").join(address)).unwrap();
        dir
    });
    fs::create_dir_all(sysfs.join("class/net/v0")).unwrap();
    fs::create_dir(devices[0].join("net/d0")).unwrap();
    symlink(&devices[1], sysfs.join("class/net/v0/device")).unwrap();
    symlink("../0000:03:00.0", devices[1].join("physfn")).unwrap();
    symlink("../0000:03:00.1", devices[0].join("virtfn3")).unwrap();
}

#[test]
fn of_a_virtual_function_the_physical_one_is_told() {
    run("association::of_a_virtual_function_the_physical_one_is_told", async |net| {
        sh("ip link add d0 type veth peer name v0");
        sh("ip link add link v0 name m0 type macvlan mode bridge");
        let physical = net.link("d0").await.unwrap().unwrap().ifindex;
        let driver = StandIn::start(Role::Driver(Some(3)), Part::Responses(vec![Some(0x100)]));
        be_virtual_function(driver.dir.path());
        for device in ["v0", "m0"] {
            let guest = qbh(device, None);
            net.associate(&driver.listener(), &guest).await.unwrap();
            net.disassociate(&driver.listener(), &guest).await.unwrap();
        }
        assert_eq!(driver.requests(), [ASSOCIATE, DISASSOCIATE, ASSOCIATE, DISASSOCIATE]);
        assert!(driver.asked.lock().unwrap().iter().all(|(ifindex, _)| *ifindex == physical));

        // A driver that lists no ports is not told an address that nobody would take back.
        let listener = Listener { kernel: 0, ..driver.listener() };
        let error = net.associate(&listener, &qbh("v0", None)).await.unwrap_err();
        assert!(error.to_string().starts_with("d0 cannot be told a port profile"), "{error}");
        fs::remove_dir(driver.dir.path().join("devices/0000:03:00.0/net/d0")).unwrap();
        let error = net.associate(&listener, &qbh("v0", None)).await.unwrap_err();
        assert!(error.to_string().contains("0000:03:00.0 has no network interface"), "{error}");
    });
}

/// What lldpad tells of an instance.
fn told(instance: [u8; 16], request: u8) -> Vec<u8> {
    let nla = |kind, value: &[u8]| VfPort::Other(DefaultNla::new(kind, value.to_vec()));
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![VfInfo::Mac(VfInfoMac::new(u32::MAX, &[2; 6]))])]),
        LinkAttribute::VfPorts(vec![LinkVfPort(vec![nla(4, &instance), nla(6, &[request, 0])])]),
    ];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::SetLink(link));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

#[test]
fn what_the_switch_lets_go_of_is_told_by_lldpad_alone() {
    run("association::what_the_switch_lets_go_of_is_told_by_lldpad_alone", async |_net| {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("lldpad.pid");
        let mut watch = SwitchWatch::open().unwrap();
        let to = SocketAddr::new(watch.port(), 0);
        let [mut lldpad, mut other] = [(); 2].map(|()| Socket::new(NETLINK_ROUTE).unwrap());
        lldpad.bind(&SocketAddr::new(PORT, 0)).unwrap();
        other.bind_auto().unwrap();
        let mut next = async || {
            let next = watch.next(&pid_file);
            tokio::time::timeout(Duration::from_secs(10), next).await.expect("it is told").unwrap()
        };

        fs::write(&pid_file, format!("{PORT}\n")).unwrap();
        other.send_to(&told([1; 16], DISASSOCIATE), &to, 0).unwrap();
        for passed_over in [vec![0xff; 64], vec![0; 1 << 16], told([2; 16], ASSOCIATE)] {
            lldpad.send_to(&passed_over, &to, 0).unwrap();
        }
        lldpad.send_to(&told(UUID, DISASSOCIATE), &to, 0).unwrap();
        assert_eq!(next().await, LetGo { instance: UUID, addresses: vec![[2; 6]] });

        // Another one has become lldpad.
        fs::write(&pid_file, other_pid(&other)).unwrap();
        lldpad.send_to(&told(UUID, DISASSOCIATE), &to, 0).unwrap();
        other.send_to(&told([3; 16], DISASSOCIATE), &to, 0).unwrap();
        assert_eq!(next().await.instance, [3; 16]);
    });
}

fn other_pid(socket: &Socket) -> String {
    let mut address = SocketAddr::new(0, 0);
    socket.get_address(&mut address).unwrap();
    address.port_number().to_string()
}
