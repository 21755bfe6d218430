use hostnet::{Error, HostNet, Kind, LinkState, Veth, VethSpec, tap_mark};

use crate::namespace::{run, sh};

fn spec() -> VethSpec {
    VethSpec { ends: ends(), owner: "web-1".into(), mtu: Some(1450) }
}

fn ends() -> [String; 2] {
    ["qvb0".into(), "qvo0".into()]
}

async fn both(net: &HostNet) -> [LinkState; 2] {
    [net.link("qvb0").await.unwrap().unwrap(), net.link("qvo0").await.unwrap().unwrap()]
}

#[test]
fn made_pair_has_everything() {
    run("veth::made_pair_has_everything", async |net| {
        let pair = net.ensure_veth(&spec()).await.unwrap();
        assert!(pair.created);
        let links = both(&net).await;
        for (link, peer) in links.iter().zip(links.iter().rev()) {
            assert_eq!((&link.kind, link.lower, link.master), (&Kind::Veth, Some(peer.ifindex), None));
            assert_eq!((link.mtu, link.up, link.carrier, link.group), (1450, true, true, 0));
            assert_eq!(link.alias, Some(tap_mark("web-1")));
            assert!(sh(&format!("ip link show {}", link.name)).contains("PROMISC"));
            assert_eq!(sh(&format!("ip -6 addr show dev {}", link.name)), "");
        }
        assert_eq!(pair.ifindexes, [links[0].ifindex, links[1].ifindex]);
        assert_eq!(net.ensure_veth(&spec()).await.unwrap(), Veth { created: false, ..pair });
        assert_eq!(both(&net).await, links, "nothing is touched");
    });
}

#[test]
fn what_others_changed_is_put_right() {
    run("veth::what_others_changed_is_put_right", async |net| {
        let pair = net.ensure_veth(&spec()).await.unwrap();
        let before = both(&net).await;
        sh("ip link set qvb0 down mtu 1300");
        sh("ip link set qvo0 mtu 1400");
        assert_eq!(net.ensure_veth(&spec()).await.unwrap(), Veth { created: false, ..pair });
        assert_eq!(both(&net).await, before);
        // An end that has another name, or none here, leaves the other without use.
        sh("ip link set qvo0 name elsewhere");
        let anew = net.ensure_veth(&spec()).await.unwrap();
        assert!(anew.created && anew.ifindexes != pair.ifindexes);
        assert_eq!(net.link("elsewhere").await.unwrap(), None);
    });
}

#[test]
fn what_is_somebody_elses_is_refused_and_stays() {
    run("veth::what_is_somebody_elses_is_refused_and_stays", async |net| {
        sh("ip link add qvb0 type veth peer name other");
        let error = net.ensure_veth(&spec()).await.unwrap_err();
        assert!(matches!(&error, Error::Foreign { name } if name == "qvb0"), "{error}");
        assert!(!net.remove_veth(&ends(), "web-1").await.unwrap());
        sh("ip link del qvb0");
        sh("ip link add qvo0 type bridge");
        let error = net.ensure_veth(&spec()).await.unwrap_err().to_string();
        assert!(
            error.starts_with("interface qvo0 exists and is a bridge, not an end of a veth pair"),
            "{error}"
        );
        assert_eq!(net.link("qvb0").await.unwrap(), None, "nothing is left");
        sh("ip link del qvo0");

        net.ensure_veth(&spec()).await.unwrap();
        let error = net.ensure_veth(&VethSpec { owner: "web-2".into(), ..spec() }).await.unwrap_err();
        assert!(matches!(&error, Error::OtherPlug { owner, .. } if owner == "web-1"), "{error}");
        assert!(!net.remove_veth(&ends(), "web-2").await.unwrap());
        both(&net).await;
        for long in [["a23456789abcdef0", "qvo0"], ["qvb0", ""]] {
            let ends = long.map(ToOwned::to_owned);
            assert!(net.ensure_veth(&VethSpec { ends, ..spec() }).await.is_err());
        }
    });
}

#[test]
fn removal_is_by_either_end_and_of_half_made_pairs_too() {
    run("veth::removal_is_by_either_end_and_of_half_made_pairs_too", async |net| {
        assert!(!net.remove_veth(&ends(), "web-1").await.unwrap(), "nothing there is success");
        net.ensure_veth(&spec()).await.unwrap();
        assert!(net.remove_veth(&ends(), "web-1").await.unwrap());
        net.ensure_veth(&spec()).await.unwrap();
        sh("ip link set qvb0 name elsewhere");
        assert!(net.remove_veth(&ends(), "web-1").await.unwrap());
        assert_eq!(net.link("elsewhere").await.unwrap(), None);
        let half_made = u32::from_be_bytes(*b"vhst");
        sh(&format!("ip link add qvb0 group {half_made} type veth peer name qvo0"));
        assert!(net.ensure_veth(&spec()).await.unwrap().created);
        net.remove_veth(&ends(), "web-1").await.unwrap();
        sh(&format!("ip link add qvb0 group {half_made} type veth peer name qvo0"));
        net.remove_veth(&ends(), "web-1").await.unwrap();
        assert_eq!(net.link("qvo0").await.unwrap(), None);
    });
}
