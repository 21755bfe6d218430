use std::time::Duration;

use hostnet::{BRIDGE_MARK, Bridge, Error, HostNet, LinkState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::tap::{TapQueue, VNET_HEADER_LEN};

use crate::namespace::{run, sh};
use crate::tap::spec;

async fn link(net: &HostNet, name: &str) -> LinkState {
    net.link(name).await.unwrap().unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn made_bridge_has_everything() {
    run("bridge::made_bridge_has_everything", async |net| {
        let bridge = net.ensure_bridge("br0").await.unwrap();
        assert!(bridge.created && bridge.ours);
        let made = link(&net, "br0").await;
        assert_eq!((made.ifindex, made.up, made.alias.as_deref()), (bridge.ifindex, true, Some(BRIDGE_MARK)));
        let details = sh("ip -d link show br0");
        assert!(details.contains(" forward_delay 0 "), "{details}");
        assert!(details.contains(" stp_state 0 ") && details.contains(" ageing_time 30000 "), "{details}");
        assert_eq!(settings("br0"), ["1", "1", "2"]);
        let again = net.ensure_bridge("br0").await.unwrap();
        assert_eq!(again, Bridge { created: false, ..bridge });
        assert_eq!(link(&net, "br0").await, made, "nothing is touched");
    });
}

/// What is set of the host's own IP on an interface: disable_ipv6, arp_ignore, arp_announce.
fn settings(name: &str) -> [String; 3] {
    ["ipv6.disable_ipv6", "ipv4.arp_ignore", "ipv4.arp_announce"].map(|key| {
        let (family, key) = key.split_once('.').unwrap();
        let path = format!("/proc/sys/net/{family}/conf/{name}/{key}");
        std::fs::read_to_string(path).unwrap().trim_end().to_owned()
    })
}

#[test]
fn bridge_of_one_plug_forgets_addresses_and_goes_with_it() {
    run("bridge::bridge_of_one_plug_forgets_addresses_and_goes_with_it", async |net| {
        let bridge = net.ensure_own_bridge("qbr0", "web-1").await.unwrap();
        assert!(bridge.created && bridge.ours);
        let details = sh("ip -d link show qbr0");
        for setting in [" ageing_time 0 ", " mcast_snooping 0 ", " forward_delay 0 ", " stp_state 0 "] {
            assert!(details.contains(setting), "{setting}: {details}");
        }
        assert_eq!(settings("qbr0"), ["1", "1", "2"]);
        let again = net.ensure_own_bridge("qbr0", "web-1").await.unwrap();
        assert_eq!(again, Bridge { created: false, ..bridge });

        let others = [net.ensure_own_bridge("qbr0", "web-2").await, net.ensure_bridge("qbr0").await];
        for refused in others {
            let error = refused.unwrap_err();
            assert!(matches!(&error, Error::OtherPlug { owner, .. } if owner == "web-1"), "{error}");
        }
        assert!(!net.remove_own_bridge("qbr0", "web-2").await.unwrap());
        assert!(!net.remove_bridge("qbr0").await.unwrap(), "it is not for everybody");
        sh("ip link add v0 type veth peer name v1");
        sh("ip link set v0 master qbr0");
        assert!(net.remove_own_bridge("qbr0", "web-1").await.unwrap(), "whatever is in it");
        assert!(!net.remove_own_bridge("qbr0", "web-1").await.unwrap());
        assert_eq!(link(&net, "v0").await.master, None);

        sh("ip link add qbr0 type bridge ageing_time 500");
        assert!(!net.ensure_own_bridge("qbr0", "web-1").await.unwrap().ours);
        assert!(
            sh("ip -d link show qbr0").contains(" ageing_time 500 "),
            "an administrator's stays as it is"
        );
        assert!(!net.remove_own_bridge("qbr0", "web-1").await.unwrap());
    });
}

/// A link that a killed process had just made has its group, and no mark yet.
#[test]
fn half_made_links_are_made_anew_or_removed() {
    run("bridge::half_made_links_are_made_anew_or_removed", async |net| {
        let half_made = u32::from_be_bytes(*b"vhst");
        sh(&format!("ip link add name br0 group {half_made} type bridge"));
        assert!(net.ensure_bridge("br0").await.unwrap().created);
        let made = link(&net, "br0").await;
        assert_eq!((made.group, made.alias.as_deref()), (0, Some(BRIDGE_MARK)));
        sh(&format!("ip link add name br1 group {half_made} type bridge"));
        assert!(!net.remove_bridge("br1").await.unwrap(), "it was never there");
        assert_eq!(net.link("br1").await.unwrap(), None);
        sh("ip link add name br2 group 7 type bridge");
        assert!(!net.ensure_bridge("br2").await.unwrap().created, "an administrator has groups, too");
    });
}

#[test]
fn bridge_keeps_its_address_when_ports_come_and_go() {
    run("bridge::bridge_keeps_its_address_when_ports_come_and_go", async |net| {
        net.ensure_bridge("br0").await.unwrap();
        let address = link(&net, "br0").await.address;
        let tap = net.ensure_tap(&spec("t0")).await.unwrap();
        net.enslave("t0", "br0").await.unwrap();
        sh("ip link add v0 address 02:00:00:00:00:01 type veth peer name v1");
        sh("ip link set v0 master br0");
        assert_eq!(link(&net, "br0").await.address, address);
        drop(tap);
        sh("ip link del v0");
        assert_eq!(link(&net, "br0").await.address, address);
    });
}

#[test]
fn tap_leaves_the_address_of_a_foreign_bridge() {
    run("bridge::tap_leaves_the_address_of_a_foreign_bridge", async |net| {
        sh("ip link add br0 type bridge");
        sh("ip link add v0 type veth peer name v1");
        sh("ip link set v0 master br0");
        let address = link(&net, "br0").await.address;
        for number in 0..8 {
            let name = format!("t{number}");
            drop(net.ensure_tap(&spec(&name)).await.unwrap());
            net.enslave(&name, "br0").await.unwrap();
            assert_eq!(link(&net, "br0").await.address, address);
        }
    });
}

#[test]
fn foreign_bridge_is_used_but_not_changed_or_removed() {
    run("bridge::foreign_bridge_is_used_but_not_changed_or_removed", async |net| {
        sh("ip link add br0 type bridge stp_state 1 forward_delay 400");
        let bridge = net.ensure_bridge("br0").await.unwrap();
        assert!(!bridge.created && !bridge.ours);
        let now = link(&net, "br0").await;
        assert_eq!((now.up, now.alias), (true, None));
        assert!(sh("ip -d link show br0").contains(" stp_state 1 "));
        assert!(!net.remove_bridge("br0").await.unwrap());
        link(&net, "br0").await;
    });
}

#[test]
fn other_kinds_are_refused_by_name() {
    run("bridge::other_kinds_are_refused_by_name", async |net| {
        sh("ip link add v0 type veth peer name v1");
        sh("ip link set v0 alias vhostd");
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        for (name, what) in [("v0", "an end of a veth pair"), ("t0", "a TAP")] {
            let before = link(&net, name).await;
            let error = net.ensure_bridge(name).await.unwrap_err().to_string();
            let text = format!(
                "interface {name} exists and is {what}, not a bridge: give another name, or remove it"
            );
            assert_eq!(error, text);
            assert_eq!(net.enslave("t0", name).await.unwrap_err().to_string(), text);
            assert!(!net.remove_bridge(name).await.unwrap());
            assert_eq!(link(&net, name).await, before);
        }
    });
}

#[test]
fn port_joins_once_and_is_not_taken_from_another() {
    run("bridge::port_joins_once_and_is_not_taken_from_another", async |net| {
        let bridge = net.ensure_bridge("br0").await.unwrap();
        net.ensure_bridge("br1").await.unwrap();
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        assert!(net.enslave("t0", "br0").await.unwrap());
        assert!(!net.enslave("t0", "br0").await.unwrap(), "there already");
        assert_eq!(link(&net, "t0").await.master, Some(bridge.ifindex));
        let error = net.enslave("t0", "br1").await.unwrap_err();
        let text = "t0 cannot join bridge br1: it is a port of br0, take it out there first";
        assert_eq!(error.to_string(), text);
        assert_eq!(link(&net, "t0").await.master, Some(bridge.ifindex));
        for (port, bridge, missing) in [("t9", "br0", "t9"), ("t0", "br9", "br9")] {
            let error = net.enslave(port, bridge).await.unwrap_err();
            assert!(matches!(&error, Error::Missing { name } if name == missing), "{error}");
        }
    });
}

#[test]
fn tap_stays_in_its_bridge_over_a_restart() {
    run("bridge::tap_stays_in_its_bridge_over_a_restart", async |net| {
        net.ensure_bridge("br0").await.unwrap();
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        net.enslave("t0", "br0").await.unwrap();
        let before = link(&net, "t0").await;
        drop(net);
        let net = HostNet::open().unwrap();
        assert!(!net.ensure_bridge("br0").await.unwrap().created);
        let tap = net.ensure_tap(&spec("t0")).await.unwrap();
        assert!(!net.enslave("t0", "br0").await.unwrap());
        assert_eq!((tap.ifindex, link(&net, "t0").await.master), (before.ifindex, before.master));
    });
}

#[test]
fn only_our_own_empty_bridge_is_removed() {
    run("bridge::only_our_own_empty_bridge_is_removed", async |net| {
        assert!(!net.remove_bridge("br0").await.unwrap(), "nothing there is success");
        net.ensure_bridge("br0").await.unwrap();
        net.ensure_bridge("br1").await.unwrap();
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        net.enslave("t0", "br0").await.unwrap();
        assert!(!net.remove_bridge("br0").await.unwrap(), "it has a port");
        assert!(net.remove_bridge("br1").await.unwrap());
        assert!(net.remove_tap("t0", "web-1").await.unwrap());
        assert!(net.remove_bridge("br0").await.unwrap());
        assert_eq!(net.link("br0").await.unwrap(), None);
    });
}

#[test]
fn frame_crosses_the_bridge_at_once() {
    run("bridge::frame_crosses_the_bridge_at_once", async |net| {
        net.ensure_bridge("br0").await.unwrap();
        let mut queues = Vec::new();
        for name in ["t0", "t1"] {
            queues.extend(net.ensure_tap(&spec(name)).await.unwrap().queues);
            net.enslave(name, "br0").await.unwrap();
        }
        let mut frame = vec![0; VNET_HEADER_LEN + 60];
        frame[VNET_HEADER_LEN..][..14].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x88\xb5");
        assert_eq!(rustix::io::write(&queues[0], &frame), Ok(frame.len()));
        while read(&queues[1]) != frame {}
    });
}

/// The next frame; the bridge itself may send some, too.
fn read(queue: &TapQueue) -> Vec<u8> {
    let timeout = Timespec::try_from(Duration::from_secs(5)).unwrap();
    assert_eq!(poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&timeout)), Ok(1), "no frame came");
    let mut frame = vec![0; 2048];
    let len = rustix::io::read(queue, &mut frame).unwrap();
    frame.truncate(len);
    frame
}
