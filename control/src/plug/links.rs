//! The host's links as plugs need them: followed as they change, and what is amiss told.
//!
//! A link of a plug's can be deleted, set down, taken out of its bridge or given another MTU by anybody. The kernel tells that
//! something changed; what is believed is what a question that came after says. Links of a plug that we have just changed are
//! looked at by name, and whatever else there is in one go, a moment after the first news: the answer that was asked for later
//! counts.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use hostnet::{HostNet, LinkState};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::error::StepError;
use crate::names::Name;
use crate::spec::{Bridge, PlugSpec, To};

/// Links change in bursts: one look is for all news of this time.
const SETTLE: Duration = Duration::from_millis(20);
/// Share of a processor that looking may take, where there are very many links: one part in this.
const LOOK_SHARE: u32 = 5;
/// Pause before the kernel is asked again to tell news.
const RETRY: Duration = Duration::from_secs(1);

/// A link that a plug needs, and how it has to be.
#[derive(Debug)]
struct Need {
    name: String,
    /// The bridge that it is a port of.
    bridge: Option<String>,
    mtu: Mtu,
    /// Its number, if we have it open.
    number: Option<u32>,
    /// Somebody else makes it, sooner or later.
    to_come: bool,
}

/// Bytes of payload that a link must have room for.
#[derive(Clone, Copy, Debug)]
enum Mtu {
    /// So many, and we see to it.
    Ours(u16),
    /// So many, and somebody else sees to it.
    Theirs(u16),
    /// Not fewer. A bridge adapts itself to its ports, and the host's own interfaces are not ours to change.
    AtLeast(u16),
    /// Open vSwitch sees to it, and tells.
    Switch,
}

/// Something that is not as it has to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) message: String,
    /// It is ours to put right.
    pub(super) ours: bool,
    /// The link that we have open is not there any more.
    pub(super) is_gone: bool,
}

/// The host's links as they were last seen.
#[derive(Default)]
pub(super) struct Links {
    seen: Mutex<Seen>,
    /// Counts what was seen.
    changes: watch::Sender<u64>,
    begun: OnceLock<()>,
}

#[derive(Default)]
struct Seen {
    /// By name, with when it was asked for; `None` if there was none of that name.
    links: HashMap<String, (Option<LinkState>, u64)>,
    /// All links have been seen: what is not among them is not there.
    all: bool,
    /// Counts questions.
    clock: u64,
    /// Numbers of the TAPs that plugs have open.
    held: HashMap<Name, u32>,
}

impl Links {
    /// Tells when something was seen to have changed. Only the first time: whoever is given it has to run
    /// [`follow`](Self::follow).
    pub(super) fn begin(&self) -> Option<watch::Receiver<u64>> {
        self.begun.set(()).is_ok().then(|| self.changes.subscribe())
    }

    /// Follows the links, whatever becomes of them, for ever.
    pub(super) async fn follow(&self, host: &HostNet) {
        loop {
            match host.watch() {
                Ok(mut watch) => loop {
                    // All news until here, and what comes from now on is news again.
                    while watch.next().now_or_never().flatten().is_some() {}
                    let start = Instant::now();
                    if let Err(error) = self.look_at_all(host).await {
                        tracing::warn!("cannot see the host's links: {error}");
                    }
                    self.changes.send_modify(|count| *count = count.wrapping_add(1));
                    let took = start.elapsed();
                    if watch.next().await.is_none() {
                        break;
                    }
                    sleep(SETTLE.max(took * LOOK_SHARE)).await;
                },
                Err(error) => tracing::warn!("cannot follow the host's links: {error}"),
            }
            sleep(RETRY).await;
        }
    }

    async fn look_at_all(&self, host: &HostNet) -> Result<(), hostnet::Error> {
        let asked = self.tick();
        let links = host.all_links().await?;
        let mut seen = self.seen();
        seen.links.retain(|_, (_, when)| *when > asked);
        for link in links {
            seen.links.entry(link.name.clone()).or_insert((Some(link), asked));
        }
        seen.all = true;
        Ok(())
    }

    /// Looks at the plug's links as they are now. `attached` says that the TAP is one that we have just opened.
    pub(super) async fn look(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        attached: bool,
    ) -> Result<(), StepError> {
        for need in needs(id, spec, None) {
            let asked = self.tick();
            let link = host.link(&need.name).await?;
            let mut seen = self.seen();
            if seen.links.get(&need.name).is_none_or(|(_, when)| *when < asked) {
                seen.links.insert(need.name, (link, asked));
            }
        }
        if attached && let Some(tap) = driven(id, spec) {
            let mut seen = self.seen();
            if let Some((Some(link), _)) = seen.links.get(&tap) {
                let number = link.ifindex;
                seen.held.insert(id.clone(), number);
            }
        }
        Ok(())
    }

    /// The plug is gone.
    pub(super) fn forget(&self, id: &Name) {
        self.seen().held.remove(id);
    }

    /// What is not as it has to be.
    pub(super) fn flaws(&self, id: &Name, spec: &PlugSpec) -> Vec<Flaw> {
        let seen = self.seen();
        let needs = needs(id, spec, seen.held.get(id).copied());
        needs.iter().flat_map(|need| seen.flaws(need, spec.mtu_bytes())).collect()
    }

    fn tick(&self) -> u64 {
        let mut seen = self.seen();
        seen.clock += 1;
        seen.clock
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no holder of this lock panics")
    }
}

impl Seen {
    fn flaws(&self, need: &Need, plug: u16) -> Vec<Flaw> {
        let name = &need.name;
        let flaw = |message, ours| Flaw { message, ours, is_gone: false };
        let gone = |message| vec![Flaw { message, ours: true, is_gone: need.number.is_some() }];
        let link = match self.links.get(name) {
            Some((Some(link), _)) => link,
            None if !self.all => return Vec::new(),
            _ if need.to_come => return Vec::new(),
            _ => return gone(format!("interface {name} is gone")),
        };
        if need.number.is_some_and(|number| number != link.ifindex) {
            return gone(format!("interface {name} is another one than it was"));
        }
        let mut flaws = Vec::new();
        if let Some(bridge) = &need.bridge
            && link.master.is_none_or(|master| !self.is_number_of(master, bridge))
        {
            flaws.push(flaw(format!("{name} is not in bridge {bridge}"), true));
        }
        if !link.up && !need.to_come {
            flaws.push(flaw(format!("{name} is down"), true));
        }
        let found = link.mtu;
        let (is_right, ours) = match need.mtu {
            Mtu::Ours(mtu) => (found == u32::from(mtu), true),
            Mtu::Theirs(mtu) => (found == u32::from(mtu), false),
            Mtu::AtLeast(mtu) => (found >= u32::from(mtu) || self.is_empty(link), false),
            Mtu::Switch => (true, false),
        };
        if !is_right {
            flaws.push(flaw(format!("{name} has MTU {found}, the plug {plug}"), ours));
        }
        flaws
    }

    fn is_number_of(&self, number: u32, name: &str) -> bool {
        matches!(self.links.get(name), Some((Some(link), _)) if link.ifindex == number)
    }

    /// Whether the link is a bridge that has no ports to adapt itself to.
    fn is_empty(&self, link: &LinkState) -> bool {
        let is_port = |(other, _): &(Option<LinkState>, u64)| {
            other.as_ref().is_some_and(|other| other.master == Some(link.ifindex))
        };
        link.kind == hostnet::Kind::Bridge && !self.links.values().any(is_port)
    }
}

/// The TAP or macvtap that we have open ourselves.
fn driven(id: &Name, spec: &PlugSpec) -> Option<String> {
    let to = spec.to.as_ref()?;
    let by_socket = spec.ovs().is_some_and(|ovs| ovs.vhost_user().is_some());
    (spec.kernel_guest().is_none() && !by_socket).then(|| to.tap(id).to_string())
}

/// All links of a plug's, `number` being that of the TAP that we have open.
fn needs(id: &Name, spec: &PlugSpec, number: Option<u32>) -> Vec<Need> {
    let mtu = Mtu::Ours(spec.mtu_bytes());
    let need = |name: &dyn ToString, bridge: Option<&dyn ToString>, mtu| Need {
        name: name.to_string(),
        bridge: bridge.map(ToString::to_string),
        mtu,
        number: None,
        to_come: false,
    };
    let at_least = Mtu::AtLeast(spec.mtu_bytes());
    let Some(to) = &spec.to else { return Vec::new() };
    let tap = to.tap(id);
    match to {
        // A device that the guest has is no link of the host's: its representor is, and a macvtap on it.
        To::Device(device) => {
            let representor = device.representor().and(device.port.as_ref()).map(|port| port.tap(id));
            let mut needs: Vec<_> = representor.iter().map(|name| need(name, None, Mtu::Switch)).collect();
            if spec.socket.is_some() {
                needs.push(Need { number, ..need(&tap, None, mtu) });
            }
            needs
        }
        To::Tap(_) | To::Macvtap(_) => vec![Need { number, ..need(&tap, None, mtu) }],
        To::Bridge(Bridge { bridge, uplink, guest, tap: named }) => {
            let mut needs = vec![need(bridge, None, at_least)];
            needs.extend(uplink.iter().map(|uplink| need(&uplink.port(), Some(bridge), at_least)));
            if !guest {
                needs.push(Need { number, ..need(&tap, Some(bridge), mtu) });
            } else if let Some(tap) = named {
                let theirs = Mtu::Theirs(spec.mtu_bytes());
                needs.push(Need { to_come: true, ..need(tap, None, theirs) });
            }
            needs
        }
        To::Ovs(ovs) => {
            let bridge = ovs.hybrid.as_ref().map(|bridge| bridge as &dyn ToString);
            let mut needs: Vec<_> = ovs.hybrid.iter().map(|bridge| need(bridge, None, at_least)).collect();
            if let Some([near, far]) = ovs.veth(id) {
                needs.extend([need(&near, bridge, mtu), need(&far, None, Mtu::Switch)]);
            }
            if ovs.makes_tap() && ovs.vhost_user().is_none() {
                let mtu = if bridge.is_some() { mtu } else { Mtu::Switch };
                needs.push(Need { number, ..need(&tap, bridge, mtu) });
            } else if let (Some(_), Some(tap)) = (bridge, ovs.tap.as_ref()) {
                let theirs = Mtu::Theirs(spec.mtu_bytes());
                needs.push(Need { to_come: true, ..need(tap, None, theirs) });
            }
            needs
        }
    }
}
