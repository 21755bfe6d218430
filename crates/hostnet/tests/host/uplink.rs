use std::process::Command;

use hostnet::{BRIDGE_MARK, Error, HostNet};

use crate::namespace::{run, sh};

/// A host whose only way out is eth1, with everything that one can have on it.
fn host() {
    sh("ip link set lo up");
    sh("ip link add eth1 type veth peer name out1");
    sh("ip link set eth1 up");
    sh("ip link set out1 up");
    for address in ["192.0.2.5/24 brd +", "192.0.2.6/24", "203.0.113.1 peer 203.0.113.9/32"] {
        sh(&format!("ip addr add {address} dev eth1"));
    }
    sh("ip addr add 2001:db8::5/64 dev eth1 nodad");
    for route in [
        "default via 192.0.2.1 metric 50",
        "198.51.100.0/24 via 192.0.2.2 src 192.0.2.5 proto static",
        "10.1.0.1 scope link",
        "10.2.0.0/16 via 10.1.0.1 table 77",
    ] {
        sh(&format!("ip route add {route} dev eth1"));
    }
    sh("ip -6 route add default via 2001:db8::1 dev eth1");
}

/// Addresses and routes of a device, as if it were another.
fn ways(device: &str) -> Vec<String> {
    let text = sh(&format!("ip route show table all type unicast dev {device}"));
    let routes = text.lines().map(|line| line.trim().replace(" linkdown", ""));
    let mut ways: Vec<_> = routes.filter(|route| !route.starts_with("fe80::")).collect();
    let addresses = sh(&format!("ip -oneline addr show dev {device} scope global"));
    for line in addresses.lines() {
        let words = line.split_whitespace().skip(2).filter(|word| word.trim_end_matches('\\') != device);
        ways.push(words.collect::<Vec<_>>().join(" "));
    }
    ways.sort();
    ways
}

/// As it is before anything is moved.
fn mark_uplink() {
    let marked = Command::new("ip").args(["link", "set", "br0", "alias", "vhostd uplink eth1"]).status();
    assert!(marked.unwrap().success());
}

async fn joined(net: &HostNet) -> bool {
    net.ensure_bridge("br0").await.unwrap();
    net.ensure_uplink("eth1", "br0").await.unwrap()
}

#[test]
fn addresses_and_routes_go_to_the_bridge_and_come_back() {
    run("uplink::addresses_and_routes_go_to_the_bridge_and_come_back", async |net| {
        host();
        let (before, address) = (ways("eth1"), net.link("eth1").await.unwrap().unwrap().address);
        assert!(before.len() >= 11, "{before:#?}");
        assert!(joined(&net).await);
        assert_eq!(ways("br0"), before);
        assert_eq!(ways("eth1"), [""; 0]);
        let bridge = net.link("br0").await.unwrap().unwrap();
        assert_eq!(bridge.address, address, "the neighbours know the host by it");
        assert_eq!(bridge.alias.as_deref(), Some("vhostd uplink eth1"));
        assert_eq!(net.link("eth1").await.unwrap().unwrap().master, Some(bridge.ifindex));
        assert!(net.ensure_bridge("br0").await.unwrap().ours);
        assert!(!joined(&net).await, "nothing is touched");

        assert!(net.release_uplink("br0").await.unwrap());
        assert_eq!(ways("eth1"), before);
        assert_eq!(net.link("eth1").await.unwrap().unwrap().master, None);
        assert_eq!(net.link("br0").await.unwrap().unwrap().alias.as_deref(), Some(BRIDGE_MARK));
        assert!(!net.release_uplink("br0").await.unwrap());

        joined(&net).await;
        assert!(net.remove_bridge("br0").await.unwrap(), "its uplink keeps no bridge");
        assert_eq!(ways("eth1"), before);
    });
}

/// Each state that somebody who is killed can leave behind.
#[test]
fn a_move_that_was_cut_short_is_finished_in_either_direction() {
    run("uplink::a_move_that_was_cut_short_is_finished_in_either_direction", async |net| {
        host();
        let before = ways("eth1");
        let cut: [&[&str]; 5] = [
            &[],
            &["ip link set eth1 master br0"],
            &[
                "ip link set eth1 master br0",
                "ip addr add 192.0.2.5/24 brd + dev br0",
                "ip addr add 192.0.2.6/24 dev br0",
                "ip addr del 192.0.2.5/24 dev eth1",
            ],
            &[
                "ip link set eth1 master br0",
                "ip addr add 192.0.2.5/24 brd + dev br0",
                "ip route append default via 192.0.2.1 metric 50 dev br0",
                "ip route del default via 192.0.2.1 metric 50 dev eth1",
            ],
            // Of these the kernel makes one route of two paths.
            &[
                "ip link set eth1 master br0",
                "sysctl -qw net.ipv6.conf.br0.disable_ipv6=0",
                "ip addr add 2001:db8::5/64 dev br0 nodad",
                "ip -6 route append default via 2001:db8::1 dev br0",
            ],
        ];
        for states in cut {
            for forward in [true, false] {
                net.ensure_bridge("br0").await.unwrap();
                mark_uplink();
                for state in states {
                    sh(state);
                }
                if forward {
                    joined(&net).await;
                    assert_eq!((ways("br0"), ways("eth1")), (before.clone(), Vec::new()), "{states:?}");
                }
                assert!(net.remove_bridge("br0").await.unwrap());
                assert_eq!(ways("eth1"), before, "{states:?}");
            }
        }
    });
}

#[test]
fn what_is_not_ours_to_join_is_refused_and_stays() {
    run("uplink::what_is_not_ours_to_join_is_refused_and_stays", async |net| {
        host();
        let before = ways("eth1");
        sh("ip link add name adm type bridge");
        let error = net.ensure_uplink("eth1", "adm").await.unwrap_err();
        assert!(matches!(&error, Error::ForeignBridge { bridge, .. } if bridge == "adm"), "{error}");
        joined(&net).await;
        net.ensure_bridge("br1").await.unwrap();
        let error = net.ensure_uplink("eth1", "br1").await.unwrap_err();
        assert!(matches!(&error, Error::Enslaved { master, .. } if master == "br0"), "{error}");
        assert!(net.remove_bridge("br1").await.unwrap(), "eth1 is not its port");
        assert_ne!(ways("br0"), [""; 0]);
        sh("ip link add eth2 type veth peer name out2");
        let error = net.ensure_uplink("eth2", "br0").await.unwrap_err();
        assert!(matches!(&error, Error::OtherUplink { uplink, .. } if uplink == "eth1"), "{error}");
        for (device, bridge) in [("eth9", "br0"), ("eth1", "br9")] {
            let error = net.ensure_uplink(device, bridge).await.unwrap_err();
            assert!(matches!(error, Error::Missing { .. }), "{error}");
        }
        // A port beside the uplink keeps the bridge, and the uplink in it.
        sh("ip link set eth2 master br0");
        assert!(!net.remove_bridge("br0").await.unwrap());
        assert_eq!(ways("br0"), before);
        sh("ip link del eth2");
        net.remove_bridge("br0").await.unwrap();
        // An administrator's bridge that has the device is as it should be.
        sh("ip link set eth1 master adm");
        assert!(!net.ensure_uplink("eth1", "adm").await.unwrap());
        assert!(!net.release_uplink("adm").await.unwrap());
        assert_eq!(ways("eth1"), before);
    });
}
