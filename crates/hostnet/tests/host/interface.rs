use hostnet::{Error, FunctionState, Use};

use crate::namespace::{run, sh};

#[test]
fn what_the_host_does_with_an_interface_is_seen() {
    run("interface::what_the_host_does_with_an_interface_is_seen", async |net| {
        sh("ip link add d0 type veth peer name d1");
        sh("ip link set d0 up");
        sh("ip link set d1 up");
        assert_eq!(net.uses("d0").await.unwrap(), [], "link-local addresses and a peer are no use");
        net.refuse_used("d0").await.unwrap();
        sh("ip addr add 192.0.2.1/24 dev d0");
        sh("ip route add default via 192.0.2.2");
        sh("ip -6 addr add 2001:db8::1/64 dev d0 nodad");
        sh("ip link add link d0 name m0 type macvlan");
        let below = Use::Below("m0".into());
        let addresses = ["192.0.2.1", "2001:db8::1"].map(|address| Use::Address(address.into()));
        let mut uses = vec![below];
        uses.extend(addresses);
        uses.push(Use::DefaultRoute);
        assert_eq!(net.uses("d0").await.unwrap(), uses);
        assert_eq!(net.uses("d1").await.unwrap(), []);
        sh("ip route del default");
        sh("ip route add default nexthop via 192.0.2.2 nexthop via 192.0.2.3");
        sh("ip -6 route add default via 2001:db8::2");
        assert!(net.uses("d0").await.unwrap().contains(&Use::DefaultRoute));
        sh("ip route del default");
        assert!(net.uses("d0").await.unwrap().contains(&Use::DefaultRoute), "the other family's");

        sh("ip link add b0 type bridge");
        sh("ip link set d1 master b0");
        let error = net.refuse_used("d1").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "interface d1 is used by the host: it is a port of b0; end that first, or ask for it nevertheless"
        );
        assert!(matches!(net.uses("d9").await, Err(Error::Missing { .. })));
    });
}

#[test]
fn an_interface_is_renamed_up_or_down() {
    run("interface::an_interface_is_renamed_up_or_down", async |net| {
        sh("ip link add d0 type veth peer name d1");
        let before = net.link("d0").await.unwrap().unwrap();
        for up in [true, false] {
            let mtu = if up { 1400 } else { before.mtu };
            net.set_interface("d0", up, mtu).await.unwrap();
            net.set_interface("d0", up, mtu).await.unwrap();
            net.rename("d0", "tap0").await.unwrap();
            let now = net.link("tap0").await.unwrap().unwrap();
            assert_eq!((now.ifindex, now.up, now.mtu), (before.ifindex, up, mtu));
            net.rename("tap0", "d0").await.unwrap();
        }
        let taken = net.rename("d0", "d1").await.unwrap_err();
        assert!(matches!(&taken, Error::NameTaken { to, .. } if to == "d1"), "{taken}");
        assert!(matches!(net.rename("d9", "d8").await, Err(Error::Missing { .. })));
        assert!(matches!(net.set_interface("d9", true, 1500).await, Err(Error::Missing { .. })));
        for bad in ["", "a/b", "0123456789abcdef"] {
            assert!(matches!(net.rename("d0", bad).await, Err(Error::Tap(_))), "{bad:?}");
        }
    });
}

#[test]
fn an_interface_without_virtual_functions_says_so() {
    run("interface::an_interface_without_virtual_functions_says_so", async |net| {
        sh("ip link add d0 type veth peer name d1");
        let error = net.virtual_function("d0", 3).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "interface d0 has no virtual function 3: see sriov_numvfs of its device"
        );
        let wanted = FunctionState { vlan: 7, ..FunctionState::default() };
        assert!(matches!(net.set_virtual_function("d0", 0, &wanted).await, Err(Error::NoFunction { .. })));
        assert!(matches!(net.virtual_function("d9", 0).await, Err(Error::Missing { .. })));
    });
}
