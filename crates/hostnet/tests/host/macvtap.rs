use hostnet::{Error, HostNet, Kind, LinkState, MacvtapMode, MacvtapSpec, Tap, tap_mark};
use rustix::io::{read, write};

use crate::namespace::{run, sh};

const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];

fn spec(name: &str, mode: MacvtapMode) -> MacvtapSpec {
    let (name, owner, device) = (name.to_owned(), "web-1".to_owned(), "d0".to_owned());
    MacvtapSpec { name, owner, device, mode, queues: 1, mtu: None, address: Some(OWN) }
}

/// A pair of Ethernets, of which `d0` is the device, and so many interfaces before: devices of macvtaps are named by their
/// interface's number in one directory for all namespaces, so tests that run side by side need numbers of their own.
async fn device(net: &HostNet, before: u32) {
    for number in 0..before {
        sh(&format!("ip link add f{number} type veth peer name g{number}"));
    }
    sh("ip link add d0 type veth peer name d1");
    sh("ip link set d1 up");
    assert!(!state(net, "d0").await.up);
}

async fn state(net: &HostNet, name: &str) -> LinkState {
    net.link(name).await.unwrap().unwrap_or_else(|| panic!("there is no {name}"))
}

/// A frame, header in front, that says `text`.
fn frame(to: [u8; 6], from: [u8; 6], text: &[u8]) -> Vec<u8> {
    [&[0; 12][..], &to, &from, &[0x88, 0xb5], text, &[0; 46]].concat()
}

/// Sends a frame out of one and waits for it at the other.
fn pass(from: &Tap, to: &Tap, frame: &[u8]) -> Option<Vec<u8>> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    write(&from.queues[0], frame).unwrap();
    let mut buffer = vec![0; 2048];
    let limit = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    while poll(&mut [PollFd::new(&to.queues[0], PollFlags::IN)], Some(&limit)).unwrap() != 0 {
        let len = read(&to.queues[0], &mut buffer).unwrap();
        // The kernel speaks, too.
        if buffer[24..26] == [0x88, 0xb5] {
            return Some(buffer[..len].to_vec());
        }
    }
    None
}

#[test]
fn made_with_everything_and_removed() {
    run("macvtap::made_with_everything_and_removed", async |net| {
        device(&net, 20).await;
        let asked = MacvtapSpec { mtu: Some(1400), queues: 3, ..spec("m0", MacvtapMode::Bridge) };
        let made = net.ensure_macvtap(&asked).await.unwrap();
        assert_eq!((made.queues.len(), made.created, made.ours), (3, true, true));
        let link = state(&net, "m0").await;
        assert_eq!(link.kind, Kind::Macvtap(Some(MacvtapMode::Bridge)));
        assert_eq!((link.up, link.mtu, &link.address[..]), (true, 1400, &OWN[..]));
        assert_eq!(
            (link.alias.clone(), link.lower),
            (Some(tap_mark("web-1")), Some(state(&net, "d0").await.ifindex))
        );
        assert!(state(&net, "d0").await.up, "its device is up, too");
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv6/conf/m0/disable_ipv6").unwrap(), "1\n");

        drop(made);
        sh("ip link set m0 mtu 1300 down address 52:54:00:00:00:08");
        let again = net.ensure_macvtap(&asked).await.unwrap();
        assert_eq!((again.ifindex, again.created), (link.ifindex, false), "it is the same");
        assert_eq!(state(&net, "m0").await, link, "what others changed is put right");

        assert!(!net.remove_macvtap("m0", "web-2").await.unwrap());
        assert!(!net.remove_tap("m0", "web-1").await.unwrap());
        assert!(net.remove_macvtap("m0", "web-1").await.unwrap());
        assert!(!net.remove_macvtap("m0", "web-1").await.unwrap(), "nothing there is success");
        assert_eq!(net.link("m0").await.unwrap(), None);
    });
}

/// One that a killed process had just made has its group, and no mark yet.
#[test]
fn one_that_was_just_made_is_made_again_or_removed() {
    run("macvtap::one_that_was_just_made_is_made_again_or_removed", async |net| {
        device(&net, 120).await;
        let group = u32::from_be_bytes(*b"vhst");
        let make = || {
            sh(&format!("ip link add link d0 name m0 group {group} type macvtap mode passthru"));
        };
        make();
        let made = net.ensure_macvtap(&spec("m0", MacvtapMode::Passthrough)).await.unwrap();
        let now = state(&net, "m0").await;
        assert_eq!((made.created, now.group, now.alias), (true, 0, Some(tap_mark("web-1"))));
        drop(made);
        assert!(net.remove_macvtap("m0", "web-1").await.unwrap());
        make();
        assert!(!net.remove_macvtap("m0", "web-1").await.unwrap());
        assert_eq!(net.link("m0").await.unwrap(), None);
    });
}

#[test]
fn an_idle_one_takes_no_frame_from_who_has_it_open() {
    run("macvtap::an_idle_one_takes_no_frame_from_who_has_it_open", async |net| {
        device(&net, 100).await;
        let asked = spec("m0", MacvtapMode::Bridge);
        let ifindex = net.ensure_idle_macvtap(&asked).await.unwrap();
        let held = net.ensure_macvtap(&asked).await.unwrap();
        assert_eq!((held.ifindex, held.created), (ifindex, false));
        let other = [0x52, 0x54, 0, 0, 0, 9];
        let peer = MacvtapSpec { address: Some(other), ..spec("m1", MacvtapMode::Bridge) };
        let peer = net.ensure_macvtap(&peer).await.unwrap();
        for n in 0..20 {
            assert_eq!(net.ensure_idle_macvtap(&asked).await.unwrap(), ifindex);
            let sent = frame(OWN, other, &[n]);
            assert!(pass(&peer, &held, &sent).is_some_and(|got| got[12..] == sent[12..]), "{n}");
        }
    });
}

#[test]
fn modes_say_who_is_reached() {
    run("macvtap::modes_say_who_is_reached", async |net| {
        device(&net, 40).await;
        let other = [0x52, 0x54, 0, 0, 0, 9];
        for (mode, reached) in [(MacvtapMode::Bridge, true), (MacvtapMode::Vepa, false)] {
            let one = net.ensure_macvtap(&spec("m0", mode)).await.unwrap();
            let two = MacvtapSpec { address: Some(other), ..spec("m1", mode) };
            let two = net.ensure_macvtap(&two).await.unwrap();
            let sent = frame(other, OWN, b"neighbour");
            assert_eq!(pass(&one, &two, &sent).is_some_and(|got| got[12..] == sent[12..]), reached, "{mode}");
            for name in ["m0", "m1"] {
                assert!(net.remove_macvtap(name, "web-1").await.unwrap());
            }
        }
    });
}

#[test]
fn passthrough_takes_the_address_and_gives_it_back() {
    run("macvtap::passthrough_takes_the_address_and_gives_it_back", async |net| {
        device(&net, 60).await;
        let before = state(&net, "d0").await.address;
        let made = net.ensure_macvtap(&spec("m0", MacvtapMode::Passthrough)).await.unwrap();
        assert_eq!(state(&net, "d0").await.address, OWN);
        let error = net.ensure_macvtap(&spec("m1", MacvtapMode::Bridge)).await.unwrap_err();
        assert!(matches!(&error, Error::DeviceTaken { device, .. } if device == "d0"), "{error}");
        drop(made);
        assert!(net.remove_macvtap("m0", "web-1").await.unwrap());
        assert_eq!(state(&net, "d0").await.address, before);
        assert_eq!(net.link("m1").await.unwrap(), None);
    });
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    run("macvtap::what_cannot_be_is_refused_and_leaves_nothing", async |net| {
        device(&net, 80).await;
        let base = || spec("m0", MacvtapMode::Bridge);
        let missing = net.ensure_macvtap(&MacvtapSpec { device: "d9".into(), ..base() }).await.unwrap_err();
        assert_eq!(missing.to_string(), "there is no interface d9");
        let long = net.ensure_macvtap(&MacvtapSpec { mtu: Some(9000), ..base() }).await.unwrap_err();
        assert_eq!(long.to_string(), "macvtap m0 cannot have an MTU of 9000: d0 has 1500, raise that first");
        let none = net.ensure_macvtap(&MacvtapSpec { queues: 0, ..base() }).await.unwrap_err();
        assert!(matches!(none, Error::Queues { queues: 0, .. }));
        for name in ["a/b", "0123456789abcdef"] {
            assert!(matches!(net.ensure_macvtap(&spec(name, MacvtapMode::Vepa)).await, Err(Error::Tap(_))));
        }
        sh("ip link add b0 type bridge");
        sh("ip link set d0 master b0");
        let port = net.ensure_macvtap(&base()).await.unwrap_err();
        assert!(matches!(port, Error::DeviceTaken { .. }), "{port}");
        sh("ip link set d0 nomaster");
        assert_eq!(net.link("m0").await.unwrap(), None, "nothing is left");

        sh("ip link add link d0 name m1 type macvtap mode bridge");
        let foreign = net.ensure_macvtap(&spec("m1", MacvtapMode::Bridge)).await.unwrap_err();
        assert!(matches!(foreign, Error::Foreign { .. }), "{foreign}");
        let kind = net.ensure_macvtap(&spec("b0", MacvtapMode::Bridge)).await.unwrap_err();
        assert_eq!(
            kind.to_string(),
            "interface b0 exists and is a bridge, not a macvtap: give another name, or remove it"
        );

        let made = net.ensure_macvtap(&base()).await.unwrap();
        let mode = net.ensure_macvtap(&spec("m0", MacvtapMode::Vepa)).await.unwrap_err();
        assert_eq!(
            mode.to_string(),
            "macvtap m0 exists, but not on d0 in mode vepa: unplug it and make it anew"
        );
        let owner = net.ensure_macvtap(&MacvtapSpec { owner: "web-2".into(), ..base() }).await.unwrap_err();
        assert!(matches!(owner, Error::OtherPlug { .. }), "{owner}");
        drop(made);
        assert!(net.remove_macvtap("m0", "web-1").await.unwrap());
    });
}
