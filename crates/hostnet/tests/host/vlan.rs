use hostnet::{BRIDGE_MARK, Error, Kind};

use crate::namespace::{run, sh};

#[test]
fn vlan_is_made_where_the_kernel_has_them_and_said_to_be_missing_elsewhere() {
    run("vlan::vlan_is_made_where_the_kernel_has_them_and_said_to_be_missing_elsewhere", async |net| {
        sh("ip link add eth1 type veth peer name out1");
        let made = net.ensure_vlan("vlan7", "eth1", 7, Some(1400)).await;
        if let Err(error @ Error::Unsupported { .. }) = made {
            let text = "cannot make VLAN vlan7: this kernel lacks what it takes, load the module or use another kernel";
            assert_eq!(error.to_string(), text);
            assert_eq!(net.link("vlan7").await.unwrap(), None);
            return;
        }
        made.unwrap();
        let link = net.link("vlan7").await.unwrap().unwrap();
        let below = net.link("eth1").await.unwrap().unwrap();
        assert_eq!((&link.kind, link.lower, link.mtu), (&Kind::Vlan(Some(7)), Some(below.ifindex), 1400));
        assert_eq!((link.alias.as_deref(), link.up, below.up), (Some(BRIDGE_MARK), true, true));
        net.ensure_vlan("vlan7", "eth1", 7, Some(1400)).await.unwrap();
        assert_eq!(net.link("vlan7").await.unwrap(), Some(link), "nothing is touched");
        let other = net.ensure_vlan("vlan7", "eth1", 8, None).await.unwrap_err();
        assert!(matches!(other, Error::OtherVlan { id: 8, .. }), "{other}");
        assert!(net.remove_vlan("vlan7").await.unwrap());
        assert!(!net.remove_vlan("vlan7").await.unwrap());
        sh("ip link add link eth1 name vlan7 type vlan id 7");
        net.ensure_vlan("vlan7", "eth1", 7, None).await.unwrap();
        assert!(!net.remove_vlan("vlan7").await.unwrap(), "an administrator's stays");
    });
}

#[test]
fn what_cannot_be_a_vlan_is_refused_before_the_kernel_is_asked() {
    run("vlan::what_cannot_be_a_vlan_is_refused_before_the_kernel_is_asked", async |net| {
        sh("ip link add eth1 type veth peer name out1");
        for id in [0, 4095, u16::MAX] {
            let error = net.ensure_vlan("vlan0", "eth1", id, None).await.unwrap_err();
            assert_eq!(error.to_string(), format!("vlan0 cannot be VLAN {id}: give 1 to 4094"));
        }
        let error = net.ensure_vlan("vlan7", "eth9", 7, None).await.unwrap_err();
        assert!(matches!(&error, Error::Missing { name } if name == "eth9"), "{error}");
        let error = net.ensure_vlan("out1", "eth1", 7, None).await.unwrap_err();
        assert!(matches!(&error, Error::WrongKind { wanted: "a VLAN", .. }), "{error}");
        assert!(net.ensure_vlan("a23456789abcdef0", "eth1", 7, None).await.is_err());
    });
}
