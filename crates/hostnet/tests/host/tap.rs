use hostnet::{Error, HostNet, Kind, TapSpec, tap_mark};
use sys::tap::TapQueue;

use crate::namespace::{run, run_with, sh};

pub(crate) fn spec(name: &str) -> TapSpec {
    let (name, owner) = (name.to_owned(), "web-1".to_owned());
    TapSpec { name, owner, queues: 1, mtu: Some(1400), address: None, persistent: true, adopt: false }
}

async fn index(net: &HostNet, name: &str) -> Option<u32> {
    net.link(name).await.unwrap().map(|link| link.ifindex)
}

fn disable_ipv6(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6")).unwrap()
}

#[test]
fn made_tap_has_everything() {
    run("tap::made_tap_has_everything", async |net| {
        assert_eq!(net.link("t0").await.unwrap(), None);
        let tap = net.ensure_tap(&spec("t0")).await.unwrap();
        assert_eq!((tap.queues.len(), tap.created, tap.ours), (1, true, true));
        let link = net.link("t0").await.unwrap().unwrap();
        assert_eq!((link.ifindex, link.name.as_str(), link.mtu), (tap.ifindex, "t0", 1400));
        assert_eq!((link.up, link.carrier, link.master), (true, true, None));
        assert_eq!(link.alias, Some(tap_mark("web-1")));
        assert_eq!((link.address.len(), link.address[0]), (6, 0xfe));
        let Kind::Tap(tun) = link.kind else { panic!("{:?}", link.kind) };
        assert_eq!((tun.persistent, tun.multi_queue), (true, false));
        assert_eq!(disable_ipv6("t0"), "1\n");
        assert_eq!(sh("ip -6 addr show dev t0"), "");
    });
}

#[test]
fn tap_outlives_its_queues_and_is_attached_to_again() {
    run("tap::tap_outlives_its_queues_and_is_attached_to_again", async |net| {
        let first = net.ensure_tap(&spec("t0")).await.unwrap();
        let ifindex = first.ifindex;
        let before = net.link("t0").await.unwrap();
        for _ in 0..3 {
            drop(net.ensure_tap(&spec("t0")).await.unwrap_err());
        }
        drop(first);
        assert!(!net.link("t0").await.unwrap().unwrap().carrier, "nobody holds it");
        for _ in 0..3 {
            let again = net.ensure_tap(&spec("t0")).await.unwrap();
            assert_eq!((again.ifindex, again.created, again.ours), (ifindex, false, true));
            assert_eq!(net.link("t0").await.unwrap(), before, "nothing is touched");
        }
        sh("ip link set t0 down mtu 1300");
        let _again = net.ensure_tap(&spec("t0")).await.unwrap();
        assert_eq!(net.link("t0").await.unwrap(), before, "what others changed is put right");
    });
}

#[test]
fn idle_tap_is_for_others_to_open() {
    run("tap::idle_tap_is_for_others_to_open", async |net| {
        let wide = TapSpec { queues: 2, address: Some([2, 0, 0, 0, 0, 1]), ..spec("t0") };
        let ifindex = net.ensure_idle_tap(&wide).await.unwrap();
        let link = net.link("t0").await.unwrap().unwrap();
        assert_eq!((link.carrier, link.up, link.mtu), (false, true, 1400));
        assert_eq!(link.address, [2, 0, 0, 0, 0, 1]);
        let held = TapQueue::open("t0", true).unwrap();
        sh("ip link set t0 mtu 1300 down");
        assert_eq!(net.ensure_idle_tap(&wide).await.unwrap(), ifindex, "held by its guest");
        let link = net.link("t0").await.unwrap().unwrap();
        assert_eq!((link.up, link.mtu), (true, 1400));
        drop(held);

        let other = TapSpec { owner: "web-2".into(), ..spec("t0") };
        assert!(matches!(net.ensure_idle_tap(&other).await, Err(Error::OtherPlug { .. })));
        net.ensure_idle_tap(&spec("t1")).await.unwrap();
        let wider = TapSpec { queues: 2, ..spec("t1") };
        assert!(matches!(net.ensure_idle_tap(&wider).await, Err(Error::OneQueue { .. })));
        assert!(matches!(net.ensure_idle_tap(&spec("lo")).await, Err(Error::WrongKind { .. })));
    });
}

#[test]
fn tap_that_need_not_stay_goes_with_its_queues() {
    run("tap::tap_that_need_not_stay_goes_with_its_queues", async |net| {
        let spec = TapSpec { persistent: false, ..spec("t0") };
        drop(net.ensure_tap(&spec).await.unwrap());
        assert_eq!(index(&net, "t0").await, None);
    });
}

#[test]
fn tap_has_the_address_it_was_made_with() {
    run("tap::tap_has_the_address_it_was_made_with", async |net| {
        let own = [0x52, 0x54, 0, 0, 0, 9];
        let _tap = net.ensure_tap(&TapSpec { address: Some(own), ..spec("t0") }).await.unwrap();
        assert_eq!(net.link("t0").await.unwrap().unwrap().address, own);
    });
}

#[test]
fn queues_are_as_many_as_asked_for() {
    run("tap::queues_are_as_many_as_asked_for", async |net| {
        let four = TapSpec { queues: 4, ..spec("t0") };
        let tap = net.ensure_tap(&four).await.unwrap();
        let queues = async || match net.link("t0").await.unwrap().unwrap().kind {
            Kind::Tap(tun) => (tun.multi_queue, tun.queues),
            kind => panic!("{kind}"),
        };
        assert_eq!((tap.queues.len(), queues().await), (4, (true, 4)));
        tap.queues[3].set_enabled(false).unwrap();
        assert_eq!(queues().await, (true, 4), "one that is off is still held");
        assert!(matches!(net.ensure_tap(&four).await, Err(Error::Busy { .. })), "the kernel would allow it");
        assert_eq!(queues().await, (true, 4));
        drop(tap);
        let one = net.ensure_tap(&spec("t0")).await.unwrap();
        assert_eq!((one.created, queues().await), (false, (true, 1)));

        let all = TapSpec { queues: 256, ..spec("t1") };
        assert_eq!(net.ensure_tap(&all).await.unwrap().queues.len(), 256);
        let single = TapSpec { queues: 2, ..spec("t2") };
        drop(net.ensure_tap(&spec("t2")).await.unwrap());
        assert!(matches!(net.ensure_tap(&single).await, Err(Error::OneQueue { queues: 2, .. })));
    });
}

#[test]
fn held_tap_is_busy() {
    run("tap::held_tap_is_busy", async |net| {
        let _held = TapQueue::open("t0", false).unwrap();
        let error = net.ensure_tap(&TapSpec { adopt: true, ..spec("t0") }).await.unwrap_err();
        assert!(matches!(error, Error::Busy { .. }));
        assert_eq!(
            error.to_string(),
            "TAP t0 is held open by another process or plug: stop that, or choose another TAP"
        );
    });
}

#[test]
fn foreign_tap_is_used_only_when_asked_for_and_never_removed() {
    run("tap::foreign_tap_is_used_only_when_asked_for_and_never_removed", async |net| {
        sh("ip tuntap add dev admin0 mode tap");
        sh("ip link set admin0 alias mine mtu 1450");
        let before = net.link("admin0").await.unwrap().unwrap();
        assert!(matches!(net.ensure_tap(&spec("admin0")).await, Err(Error::Foreign { .. })));
        assert_eq!(net.link("admin0").await.unwrap().as_ref(), Some(&before));

        let adopt = TapSpec { adopt: true, mtu: None, ..spec("admin0") };
        let tap = net.ensure_tap(&adopt).await.unwrap();
        assert_eq!((tap.ifindex, tap.created, tap.ours), (before.ifindex, false, false));
        let now = net.link("admin0").await.unwrap().unwrap();
        assert_eq!((now.up, now.mtu, &now.alias, &now.address), (true, 1450, &before.alias, &before.address));
        assert_eq!(disable_ipv6("admin0"), "0\n");
        drop(tap);
        assert!(!net.remove_tap("admin0", "web-1").await.unwrap());
        assert_eq!(index(&net, "admin0").await, Some(before.ifindex));

        let tap = net.ensure_tap(&TapSpec { adopt: true, ..spec("admin0") }).await.unwrap();
        assert_eq!(net.link("admin0").await.unwrap().unwrap().mtu, 1400, "an MTU that was asked for is set");
        drop(tap);
    });
}

#[test]
fn tap_of_another_plug_is_left_alone() {
    run("tap::tap_of_another_plug_is_left_alone", async |net| {
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        for adopt in [false, true] {
            let other = TapSpec { owner: "web-2".into(), adopt, ..spec("t0") };
            let error = net.ensure_tap(&other).await.unwrap_err();
            assert!(matches!(&error, Error::OtherPlug { owner, .. } if owner == "web-1"), "{error}");
        }
        assert!(!net.remove_tap("t0", "web-2").await.unwrap());
        assert!(net.remove_tap("t0", "web-1").await.unwrap());
        assert!(!net.remove_tap("t0", "web-1").await.unwrap(), "nothing there is success");
        assert_eq!(index(&net, "t0").await, None);
    });
}

#[test]
fn other_kinds_are_refused_by_name() {
    run("tap::other_kinds_are_refused_by_name", async |net| {
        sh("ip link add v0 type veth peer name v1");
        sh("ip tuntap add dev tun0 mode tun");
        net.ensure_bridge("br0").await.unwrap();
        for (name, what) in [
            ("v0", "an end of a veth pair"),
            ("tun0", "of kind tun"),
            ("br0", "a bridge"),
            ("lo", "a device of its own (NIC or loopback)"),
        ] {
            let before = net.link(name).await.unwrap();
            let error = net.ensure_tap(&TapSpec { adopt: true, ..spec(name) }).await.unwrap_err();
            let text =
                format!("interface {name} exists and is {what}, not a TAP: give another name, or remove it");
            assert_eq!(error.to_string(), text);
            assert!(!net.remove_tap(name, "web-1").await.unwrap());
            assert_eq!(net.link(name).await.unwrap(), before);
        }
    });
}

#[test]
fn bad_specs_are_refused() {
    run("tap::bad_specs_are_refused", async |net| {
        for name in ["", "..", "a/b", "t%d", "0123456789abcdef"] {
            assert!(matches!(net.ensure_tap(&spec(name)).await, Err(Error::Tap(_))), "{name:?}");
            assert!(matches!(net.link(name).await, Err(Error::Tap(_))), "{name:?}");
            assert!(matches!(net.ensure_bridge(name).await, Err(Error::Tap(_))), "{name:?}");
        }
        for queues in [0, 257, u16::MAX] {
            let error = net.ensure_tap(&TapSpec { queues, ..spec("t0") }).await.unwrap_err();
            assert!(matches!(error, Error::Queues { .. }), "{error}");
        }
        for owner in [String::new(), "x".repeat(201)] {
            let error = net.ensure_tap(&TapSpec { owner, ..spec("t0") }).await.unwrap_err();
            assert!(matches!(error, Error::Owner { .. }), "{error}");
        }
        let longest = TapSpec { owner: "x".repeat(200), ..spec("t1") };
        drop(net.ensure_tap(&longest).await.unwrap());
        assert!(net.remove_tap("t1", &longest.owner).await.unwrap());
        assert_eq!(index(&net, "t0").await, None);
    });
}

#[test]
fn nothing_is_left_of_a_tap_made_in_vain() {
    run("tap::nothing_is_left_of_a_tap_made_in_vain", async |net| {
        let error = net.ensure_tap(&TapSpec { mtu: Some(10), ..spec("t0") }).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot set address and MTU of t0");
        assert_eq!(index(&net, "t0").await, None);
    });
}

#[test]
fn kernel_without_ipv6_will_do() {
    run("tap::kernel_without_ipv6_will_do", async |net| {
        sh("mount -t tmpfs none /proc/sys/net/ipv6");
        assert!(net.ensure_tap(&spec("t0")).await.unwrap().created);
    });
}

#[test]
fn many_at_once() {
    run("tap::many_at_once", async |net| {
        let specs: Vec<TapSpec> = (0..64).map(|number| spec(&format!("t{number}"))).collect();
        for created in [true, false] {
            let taps = futures::future::join_all(specs.iter().map(|spec| net.ensure_tap(spec))).await;
            assert!(taps.into_iter().all(|tap| tap.unwrap().created == created));
        }
    });
}

#[test]
fn lack_of_privilege_is_told() {
    // A user namespace only: no privilege over the network namespace.
    run_with("tap::lack_of_privilege_is_told", "-U", async |net| {
        let error = net.ensure_tap(&spec("hostnet-denied")).await.unwrap_err();
        let text = "this needs CAP_NET_ADMIN in the network namespace of the daemon";
        assert_eq!(error.to_string(), format!("cannot attach to TAP hostnet-denied: {text}"));
        let error = net.ensure_bridge("hostnet-denied").await.unwrap_err();
        assert_eq!(error.to_string(), format!("cannot make bridge hostnet-denied: {text}"));
    });
}

/// As when a host has many plugs and all of them come back at one time.
#[test]
fn as_many_questions_as_there_are_taps_are_answered() {
    run("tap::as_many_questions_as_there_are_taps_are_answered", async |net| {
        net.ensure_tap(&spec("t0")).await.unwrap();
        let asked = futures::future::join_all((0..1000).map(|_| net.link("t0")));
        let answers = tokio::time::timeout(std::time::Duration::from_secs(8), asked).await.unwrap();
        assert!(answers.into_iter().all(|link| link.unwrap().is_some()));
    });
}
