//! An unplug that the kernel refuses half-way, in a network namespace of its own: the test binary runs itself again in one.

use std::process::Command;

use dataplane::Poll;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use serde_json::json;

use super::*;
use crate::events::Read;

const INSIDE: &str = "VHOSTD_TEST_NAMESPACE";
/// For anything that must happen; far beyond what it takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this thread may change the network: the one that sends all netlink requests in a runtime of one thread.
fn may_change_the_network(may: bool) {
    let mut sets = capabilities(None).unwrap();
    sets.effective.set(CapabilitySet::NET_ADMIN, may);
    set_capabilities(None, sets).unwrap();
}

fn plugs(dir: &std::path::Path) -> Arc<Plugs> {
    let config = dataplane::Config {
        cpus: vec![],
        poll: Poll::Adaptive,
        ageing: Duration::from_secs(300),
        fdb_port_max: 16,
        on_event: Box::new(|_| ()),
    };
    let dataplane = Arc::new(Dataplane::start(config).unwrap());
    let store = Store::open(dir).unwrap();
    let host = HostNet::open().unwrap();
    Arc::new(Plugs::new(dataplane, host, Default::default(), SocketRules::default(), store, Arc::default()))
}

fn kinds(events: &Events) -> Vec<EventKind> {
    let Read::Events(events) = events.after(Some(0)) else { panic!("events were lost") };
    events.iter().map(|event| event.kind).collect()
}

fn interfaces() -> String {
    String::from_utf8(Command::new("ip").args(["-br", "link"]).output().unwrap().stdout).unwrap()
}

#[tokio::test]
async fn what_it_takes_to_make_a_plug_counts_for_who_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (plugs, id): (_, Name) = (plugs(dir.path()), "vm1".parse().unwrap());
    let socket = json!({"role": "connect", "path": dir.path().join("nobody.sock")});
    plugs.plug(id.clone(), serde_json::from_value(json!({"socket": socket})).unwrap()).await.unwrap();
    let timeout = 2 * PATIENCE;
    let asked = Instant::now().checked_sub(timeout).unwrap();
    let waiting = plugs.wait(&id, Phase::Linked, timeout, asked);
    let waited = tokio::time::timeout(PATIENCE, waiting).await.expect("its time is over");
    assert!(matches!(waited, Err(PlugError::Waiting { .. })), "{waited:?}");
}

#[test]
fn an_unplug_that_fails_half_way_finishes_by_itself() {
    if std::env::var_os(INSIDE).is_none() {
        let flags = if rustix::process::geteuid().is_root() { "-nm" } else { "-Urnm" };
        let test = std::env::current_exe().unwrap();
        let name = "plug::tests::an_unplug_that_fails_half_way_finishes_by_itself";
        let mut child = Command::new("unshare");
        child.arg(flags).arg(test).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    // A thread has the capabilities of the one that started it. The one that makes TAPs starts with the first plug and
    // stays, so that it never is one that may not.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).thread_keep_alive(10 * PATIENCE);
    runtime.build().unwrap().block_on(refused_and_finished());
}

async fn refused_and_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (plugs, id): (_, Name) = (plugs(dir.path()), "up".parse().unwrap());
    let spec = || serde_json::from_value(json!({"to": {"kind": "bridge", "bridge": "br0"}})).unwrap();
    plugs.plug(id.clone(), spec()).await.unwrap();

    may_change_the_network(false);
    for _ in 0..2 {
        let error = plugs.unplug(id.clone()).await.unwrap_err();
        assert!(matches!(error, PlugError::Unfinished { whose: Whose::Host, .. }), "{error}");
        let status = plugs.show(&id).unwrap().status;
        assert_eq!(status.phase, Phase::Pending);
        assert!(status.conditions[0].message.starts_with("being unplugged, will be tried again: "));
    }
    // Neither a plug of the same name nor one that needs the TAP may come before it.
    assert!(matches!(plugs.plug(id.clone(), spec()).await, Err(PlugError::Unfinished { .. })));
    let tap = serde_json::from_value(json!({"to": {"kind": "tap", "tap": "vhd-up"}})).unwrap();
    assert!(matches!(plugs.plug("b".parse().unwrap(), tap).await, Err(PlugError::Taken { .. })));
    assert!(interfaces().contains("vhd-up"));
    assert_eq!(kinds(&plugs.events), [EventKind::Plugged, EventKind::Failed], "once a reason");

    may_change_the_network(true);
    let deadline = Instant::now() + PATIENCE;
    let mut changes = plugs.events.subscribe();
    while plugs.show(&id).is_ok() {
        tokio::time::timeout_at(deadline, changes.changed()).await.expect("it is finished").unwrap();
    }
    assert!(!interfaces().contains("vhd-up") && !interfaces().contains("br0"), "{}", interfaces());
    assert_eq!(kinds(&plugs.events), [EventKind::Plugged, EventKind::Failed, EventKind::Unplugged]);
    assert!(!plugs.unplug(id.clone()).await.unwrap());
    assert_eq!(plugs.plug(id, spec()).await.unwrap(), Outcome::Created);
}
