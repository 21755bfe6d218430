use std::time::Duration;

use hostnet::{LinkEvent, Watch};

use crate::namespace::{run, sh};
use crate::tap::spec;

async fn until(watch: &mut Watch, wanted: impl Fn(&LinkEvent) -> bool) {
    let found = async { while !wanted(&watch.next().await.expect("the connection stands")) {} };
    tokio::time::timeout(Duration::from_secs(10), found).await.expect("the event comes");
}

#[test]
fn changes_and_removals_are_told() {
    run("watch::changes_and_removals_are_told", async |net| {
        let mut watch = net.watch().unwrap();
        let tap = net.ensure_tap(&spec("t0")).await.unwrap();
        let ifindex = tap.ifindex;
        until(
            &mut watch,
            |event| matches!(event, LinkEvent::Changed(link) if link.ifindex == ifindex && link.carrier),
        )
        .await;
        drop(tap);
        until(
            &mut watch,
            |event| matches!(event, LinkEvent::Changed(link) if link.ifindex == ifindex && !link.carrier),
        )
        .await;
        sh("ip link del t0");
        until(&mut watch, |event| matches!(event, LinkEvent::Removed(link) if link.name == "t0")).await;
    });
}

#[test]
fn several_may_look_at_once() {
    run("watch::several_may_look_at_once", async |net| {
        drop(net.ensure_tap(&spec("t0")).await.unwrap());
        let look = async || (net.all_links().await.unwrap().len(), net.uses("lo").await.unwrap());
        let all = futures::future::join_all((0..40).map(|_| look())).await;
        assert!(all.iter().all(|seen| *seen == all[0] && seen.0 >= 2), "{all:?}");
    });
}
