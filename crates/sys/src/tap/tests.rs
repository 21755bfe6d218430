//! With the kernel's own TAPs, each test in a network namespace of its own.

use super::*;

use std::net::UdpSocket;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, FdFlags, fcntl_getfd, read, write};

const INSIDE: &str = "SYS_TAP_NAMESPACE";

/// True in a network namespace made for `test`. Outside, runs the test there, in a process of its own, and returns
/// false.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let flags = if rustix::process::geteuid().is_root() { "-n" } else { "-Urn" };
    if let Err(why) = run("unshare", &[flags, "test", "-r", CLONE_DEVICE, "-a", "-w", CLONE_DEVICE]) {
        eprintln!("SKIPPED {test}: no network namespace with {CLONE_DEVICE} for this user: {why}");
        return false;
    }
    let mut child = Command::new("unshare");
    child.arg(flags).arg(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("tap::tests::{test}"), "--nocapture"]).env(INSIDE, "1");
    let output = child.output().unwrap();
    assert!(output.status.success(), "in its namespace:\n{}", String::from_utf8_lossy(&output.stderr));
    false
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{program} {arguments:?}: {stderr}")) }
}

fn ip(line: &str) {
    run("ip", &line.split(' ').collect::<Vec<_>>()).unwrap();
}

/// The number of the interface, if there is one.
fn index(name: &str) -> Option<String> {
    let output = Command::new("ip").args(["-o", "link", "show", "dev", name]).output().unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    output.status.success().then(|| line.split(':').next().unwrap().to_owned())
}

fn errno<T: std::fmt::Debug>(result: Result<T, TapError>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// Waits until a frame can be read.
fn frame(queue: &TapQueue) -> Vec<u8> {
    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&timeout)), Ok(1), "no frame came");
    let mut bytes = vec![0; 2048];
    let len = read(queue, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

#[test]
fn bad_names_are_refused() {
    for name in ["", ".", "..", "a/b", "a b", "a\tb", "a\n", "tap%d", "a:1", "a\0", "ü", "0123456789abcdef"]
    {
        assert!(matches!(TapQueue::open(name, false), Err(TapError::Name { .. })), "{name:?}");
    }
    for name in ["a", "tap0", "0123456789abcde", "tap-1_x.y", "..."] {
        check_name(name).unwrap();
    }
}

#[test]
fn device_has_the_right_shape() {
    if !inside("device_has_the_right_shape") {
        return;
    }
    let queue = TapQueue::open("t0", false).unwrap();
    assert_eq!(queue.name().unwrap(), "t0");
    let flags = queue.flags().unwrap();
    for (bit, set) in [(libc::IFF_TAP, true), (libc::IFF_NO_PI, true), (libc::IFF_VNET_HDR, true)]
        .into_iter()
        .chain([(libc::IFF_MULTI_QUEUE, false), (libc::IFF_PERSIST, false)])
    {
        assert_eq!(flags & bit.cast_unsigned() != 0, set, "{bit:#x}");
    }
    assert_ne!(queue.features().unwrap() & libc::IFF_MULTI_QUEUE.cast_unsigned(), 0);
    assert!(fcntl_getfl(&queue).unwrap().contains(OFlags::NONBLOCK));
    assert!(fcntl_getfd(&queue).unwrap().contains(FdFlags::CLOEXEC));
    ip("link set t0 name t1");
    assert_eq!(queue.name().unwrap(), "t1");
    ip("link del t1");
    assert_eq!(errno(queue.name()), libc::EBADFD);
}

#[test]
fn only_a_persistent_device_stays() {
    if !inside("only_a_persistent_device_stays") {
        return;
    }
    drop(TapQueue::open("t0", false).unwrap());
    assert_eq!(index("t0"), None);
    let queue = TapQueue::create("t0", false).unwrap();
    queue.set_persist(true).unwrap();
    let first = index("t0").unwrap();
    drop(queue);
    let queue = TapQueue::open("t0", false).unwrap();
    assert_ne!(queue.flags().unwrap() & libc::IFF_PERSIST.cast_unsigned(), 0);
    assert_eq!(index("t0").unwrap(), first);
    queue.set_persist(false).unwrap();
    drop(TapQueue::from(OwnedFd::from(queue)));
    assert_eq!(index("t0"), None);
}

#[test]
fn taken_and_foreign_devices_are_refused() {
    if !inside("taken_and_foreign_devices_are_refused") {
        return;
    }
    let single = TapQueue::create("t0", false).unwrap();
    assert_eq!(errno(TapQueue::open("t0", false)), libc::EBUSY);
    assert_eq!(errno(TapQueue::create("t0", false)), libc::EBUSY);
    assert_eq!(errno(TapQueue::open("t0", true)), libc::EINVAL, "one queue only");
    assert_eq!(errno(TapQueue::open("lo", false)), libc::EINVAL, "no TAP");
    assert_eq!(errno(single.set_enabled(false)), libc::EINVAL, "one queue only");
    let error = TapQueue::open("t0", false).unwrap_err();
    assert_eq!(error.to_string(), "cannot attach to TAP t0");
}

#[test]
fn queues_can_be_switched() {
    if !inside("queues_can_be_switched") {
        return;
    }
    let queues = [0, 1].map(|_| TapQueue::open("t0", true).unwrap());
    queues[1].set_enabled(false).unwrap();
    assert_eq!(errno(queues[1].set_enabled(false)), libc::EINVAL, "off already");
    queues[1].set_enabled(true).unwrap();
    assert_eq!(queues[1].name().unwrap(), "t0");
}

#[test]
fn offloads_are_set_together() {
    if !inside("offloads_are_set_together") {
        return;
    }
    let queue = TapQueue::open("t0", false).unwrap();
    let tso = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    assert_eq!(queue.set_offload(tso).unwrap(), tso);
    let all = tso | TUN_F_USO4 | TUN_F_USO6;
    let set = queue.set_offload(all).unwrap();
    assert!(set == all || set == tso, "{set:#x}");
    // Takes the way back that a kernel without USO needs.
    assert_eq!(queue.set_offload(tso | TUN_F_USO4).unwrap(), tso);
    assert_eq!(errno(queue.set_offload(0x8000)), libc::EINVAL);
    assert_eq!(queue.set_offload(0).unwrap(), 0);
}

#[test]
fn frames_pass_with_a_little_endian_header() {
    if !inside("frames_pass_with_a_little_endian_header") {
        return;
    }
    let queue = TapQueue::open("t0", false).unwrap();
    queue.set_offload(TUN_F_CSUM).unwrap();
    assert_eq!(read(&queue, &mut [0_u8; 2048]), Err(Errno::AGAIN));
    std::fs::write("/proc/sys/net/ipv6/conf/t0/disable_ipv6", "1").unwrap();
    ip("addr add 10.9.0.1/24 dev t0");
    ip("link set t0 up");
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev t0");
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.send_to(b"hello", "10.9.0.2:7").unwrap();
    let mut bytes = frame(&queue);
    assert_eq!(bytes.len(), VNET_HEADER_LEN + 14 + 20 + 8 + 5);
    // virtio 1.2, 5.1.6: flags NEEDS_CSUM, no GSO, csum_start 34, csum_offset 6.
    assert_eq!((bytes[0], bytes[1]), (1, 0));
    assert_eq!(bytes[6..10], [34, 0, 6, 0]);

    // The same frame back: addresses and ports exchanged, which leaves the partial checksum as it is.
    let frame = &mut bytes[VNET_HEADER_LEN..];
    let (to, from) = frame[..12].split_at_mut(6);
    to.swap_with_slice(from);
    let (from, to) = frame[26..34].split_at_mut(4);
    from.swap_with_slice(to);
    let (from, to) = frame[34..38].split_at_mut(2);
    from.swap_with_slice(to);
    assert_eq!(write(&queue, &bytes), Ok(bytes.len()));
    socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let mut back = [0; 16];
    let (len, peer) = socket.recv_from(&mut back).unwrap();
    assert_eq!((&back[..len], peer.to_string().as_str()), (&b"hello"[..], "10.9.0.2:7"));
}

#[test]
fn lack_of_privilege_is_told() {
    if std::env::var_os(INSIDE).is_some() {
        assert_eq!(errno(TapQueue::create("denied0", false)), libc::EPERM);
        return;
    }
    // A user namespace without a network namespace: no privilege over this one.
    if let Err(why) = run("unshare", &["-U", "test", "-r", CLONE_DEVICE, "-a", "-w", CLONE_DEVICE]) {
        return eprintln!("SKIPPED lack_of_privilege_is_told: {why}");
    }
    let mut child = Command::new("unshare");
    child.arg("-U").arg(std::env::current_exe().unwrap());
    child.args(["--exact", "tap::tests::lack_of_privilege_is_told"]).env(INSIDE, "1");
    assert!(child.status().unwrap().success());
}

#[test]
fn the_device_of_a_macvtap_is_looked_at_before_it_is_used() {
    let node = |path: &str| TapQueue::open_node("m0", &[2; 6], Path::new(path)).unwrap_err();
    assert!(matches!(node("/dev/tap-no-such"), TapError::Node { .. }));
    for other in ["/dev/null", "/etc/passwd", "/dev"] {
        let error = node(other);
        assert!(matches!(error, TapError::OtherNode { .. }), "{error}");
        assert!(error.to_string().starts_with(&format!("{other} is not the device of macvtap m0")));
    }
    assert!(matches!(TapQueue::open_macvtap("a/b", 1, &[2; 6]), Err(TapError::Name { .. })));
}
