//! The steps that make a plug work, each of them repeatable, and the same backwards.

use std::path::PathBuf;
use std::sync::Arc;

use dataplane::{Dataplane, Link, PortId, PortSpec};
use hostnet::HostNet;
use tokio::sync::{MutexGuard, watch};
use vhost_user::{Access, Endpoint};

use super::bridge::LinuxBridges;
use super::device::Devices;
use super::error::StepError;
use super::links::{Flaw, Links};
use super::ovs::OpenVSwitch;
use super::plan::plan;
use super::table::Others;
use super::{bridge, macvtap, tap};
use crate::config::{DevicesConfig, OvsConfig};
use crate::names::Name;
use crate::spec::{Macvtap, PlugSpec, PortProfile, Role, Socket, To};
use crate::status::{Condition, Phase, Status, Whose};

/// How sockets that we make look, and where sockets may be.
#[derive(Clone, Debug, Default)]
pub struct SocketRules {
    /// Directories under which sockets may be; empty: anywhere.
    pub dirs: Vec<PathBuf>,
    /// Permission bits of a socket that we make.
    pub mode: u32,
    /// Its group.
    pub gid: Option<u32>,
}

impl SocketRules {
    /// The directory that a socket's path has to stay beneath. Only the names are compared here: what they stand for is
    /// looked at when the socket is made or dialled, and not before, since it may change.
    fn dir_of(&self, socket: &Socket) -> Result<Option<PathBuf>, StepError> {
        let above = |dir: &&PathBuf| socket.path.as_path().starts_with(dir);
        let innermost = self.dirs.iter().filter(above).max_by_key(|dir| dir.components().count());
        if innermost.is_some() || self.dirs.is_empty() {
            return Ok(innermost.cloned());
        }
        let dirs = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
        Err(StepError::Directory { path: socket.path.to_string(), dirs })
    }
}

/// What others change, too.
#[derive(Clone, Copy, Debug)]
pub(super) enum World {
    /// The host's links.
    Links,
    /// Open vSwitch's database.
    OpenVSwitch,
    /// What switches outside know of guests.
    Switches,
    /// The guests' devices.
    Devices,
}

/// The worlds that the steps act on.
pub(super) struct Steps {
    dataplane: Arc<Dataplane>,
    host: HostNet,
    ovs: OpenVSwitch,
    rules: SocketRules,
    bridges: LinuxBridges,
    devices: Devices,
    links: Links,
}

impl Steps {
    pub(super) fn new(
        dataplane: Arc<Dataplane>,
        host: HostNet,
        (ovs, devices): (OvsConfig, DevicesConfig),
        rules: SocketRules,
    ) -> Self {
        let (ovs, devices) = (OpenVSwitch::new(ovs), Devices::new(devices));
        let (bridges, links) = (LinuxBridges::default(), Links::default());
        Self { dataplane, host, ovs, rules, bridges, devices, links }
    }

    /// Decides what a new plug leaves to us, and fails if what it needs is not there, such as an Open vSwitch that answers:
    /// taking back what was done would have to wait for it.
    pub(super) async fn resolve(&self, id: &Name, mut spec: PlugSpec) -> Result<PlugSpec, StepError> {
        match &mut spec.to {
            Some(To::Ovs(ovs)) => self.ovs.resolve(&self.host, id, ovs).await?,
            Some(To::Device(device)) => {
                let guest = (spec.mac, spec.socket.is_some());
                self.devices.resolve(&self.host, &self.ovs, id, guest, device).await?;
            }
            _ => {}
        }
        Ok(spec)
    }

    /// What would be done, in sentences.
    pub(super) async fn plan(&self, id: &Name, spec: &PlugSpec) -> Result<Vec<String>, StepError> {
        if let Some(socket) = &spec.socket {
            self.rules.dir_of(socket)?;
        }
        plan(&self.host, &self.ovs, id, spec).await
    }

    /// Keeps devices as they are, from a look at how one is until the plug has its place, and while one is given back: what a
    /// plug finds is never what another has made of it. Nothing to keep for a plug without one.
    pub(super) async fn hold_devices(&self, spec: &PlugSpec) -> Option<MutexGuard<'_, ()>> {
        match spec.device() {
            Some(_) => Some(self.devices.hold().await),
            None => None,
        }
    }

    /// Takes every step but those of [`join`](Self::join). A failure takes back the ports; the host's part stays, because
    /// the plug may be wanted still, and a TAP that is in a bridge must never be made anew: whoever gives the plug up
    /// detaches it.
    pub(super) async fn attach(&self, id: &Name, spec: &PlugSpec) -> Result<Vec<PortId>, StepError> {
        let mut ports = Vec::new();
        let attached = match self.attach_all(id, spec, &mut ports).await {
            Ok(()) => self.look(id, spec, true).await,
            failed => failed,
        };
        let Err(error) = attached else { return Ok(ports) };
        self.remove_ports(ports).await;
        Err(error)
    }

    /// Takes the steps that others have a part in, once the ports are there: a switch that does not answer keeps no port
    /// waiting that it serves already. True if something was missing.
    pub(super) async fn join(&self, id: &Name, spec: &PlugSpec, ports: &[PortId]) -> Result<bool, StepError> {
        let Some(ovs) = spec.ovs() else { return Ok(false) };
        let changed = self.ovs.ensure(&self.host, id, spec, ovs).await?;
        let by_kernel = self.ovs.is_forwarded_by_kernel(ovs).await?;
        for port in ports {
            // Other ports than TAPs have agreed on offloads with their other side.
            self.dataplane.leave_offloads(*port, by_kernel);
        }
        Ok(changed)
    }

    /// Whether somebody else has undone a step.
    pub(super) fn is_amiss(&self, id: &Name, spec: &PlugSpec) -> bool {
        spec.ovs().is_some_and(|ovs| self.ovs.is_amiss(id, ovs))
            || self.flaws_seen(id, spec).iter().any(|flaw| flaw.ours)
    }

    /// What somebody else has undone, as of now.
    pub(super) async fn flaws(&self, id: &Name, spec: &PlugSpec) -> Result<Vec<String>, StepError> {
        self.look(id, spec, false).await?;
        let mut flaws = self.flaws_of_ours(id, spec).0;
        flaws.extend(spec.ovs().and_then(|ovs| self.ovs.lacking(id, ovs)));
        Ok(flaws)
    }

    /// Puts right what somebody else has done to the plug's links, to its device, and to what a switch outside knows of its guest.
    /// Gives its ports, of which the TAP's is another one where the TAP had to be made anew, and what was wrong.
    pub(super) async fn mend(
        &self,
        id: &Name,
        spec: &PlugSpec,
        mut ports: Vec<PortId>,
    ) -> Result<(Vec<PortId>, Vec<String>), StepError> {
        self.look(id, spec, false).await?;
        let (flaws, is_tap_gone) = self.flaws_of_ours(id, spec);
        let Some(to) = spec.to.as_ref().filter(|_| !flaws.is_empty()) else { return Ok((ports, flaws)) };
        if is_tap_gone {
            // Until there is a new one the former stays: what is sent to it is counted.
            let link = self.ensure_host_side(id, spec, to).await?;
            if let (Some(link), Some(port)) = (link, ports.first_mut()) {
                self.remove_ports(vec![*port]).await;
                *port = self.add_host_port(id, spec, link).await?;
            }
        } else {
            self.mend_host_side(id, spec, to).await?;
        }
        self.look(id, spec, is_tap_gone).await?;
        Ok((ports, flaws))
    }

    /// Looks at the plug's links and its device as they are now. `attached` says that the TAP is one that we have just opened.
    async fn look(&self, id: &Name, spec: &PlugSpec, attached: bool) -> Result<(), StepError> {
        self.devices.look(&self.host, id, spec).await;
        self.links.look(&self.host, id, spec, attached).await
    }

    /// What was not as it has to be when it was last looked at.
    fn flaws_seen(&self, id: &Name, spec: &PlugSpec) -> Vec<Flaw> {
        let mut flaws = self.links.flaws(id, spec);
        flaws.extend(self.devices.flaws(id));
        flaws.extend(self.devices.associations().flaw(id));
        flaws
    }

    /// What is ours to put right, and whether the TAP that we have open is gone.
    fn flaws_of_ours(&self, id: &Name, spec: &PlugSpec) -> (Vec<String>, bool) {
        let flaws: Vec<_> = self.flaws_seen(id, spec).into_iter().filter(|flaw| flaw.ours).collect();
        let is_tap_gone = flaws.iter().any(|flaw| flaw.is_gone);
        (flaws.into_iter().map(|flaw| flaw.message).collect(), is_tap_gone)
    }

    /// Tells when plugs such as this may be amiss; the first who asks has to [`follow`](Self::follow) what is told of.
    pub(super) fn changes(&self, spec: &PlugSpec) -> Vec<(World, watch::Receiver<u64>)> {
        let ovs = spec.ovs().and_then(|_| self.ovs.changes()).map(|changes| (World::OpenVSwitch, changes));
        let links = spec.to.as_ref().and_then(|_| self.links.begin()).map(|changes| (World::Links, changes));
        let is_told =
            matches!(&spec.to, Some(To::Macvtap(Macvtap { profile: Some(PortProfile::Qbg { .. }), .. })));
        let switches = is_told.then(|| self.devices.associations().begin()).flatten();
        let switches = switches.map(|changes| (World::Switches, changes));
        let devices =
            spec.device().and_then(|_| self.devices.begin()).map(|changes| (World::Devices, changes));
        ovs.into_iter().chain(links).chain(switches).chain(devices).collect()
    }

    /// Follows what others do, for ever.
    pub(super) async fn follow(&self, world: World) {
        match world {
            World::Links => self.links.follow(&self.host).await,
            World::OpenVSwitch => self.ovs.follow().await,
            World::Switches => self.devices.associations().follow().await,
            World::Devices => self.devices.follow(&self.host).await,
        }
    }

    /// Tells a guest's address, if it is known, to its network. False if it is not.
    pub(super) fn announce(&self, port: PortId) -> bool {
        self.dataplane.announce(port)
    }

    /// Undoes every step. What is not there is undone already.
    pub(super) async fn detach(
        &self,
        id: &Name,
        spec: &PlugSpec,
        ports: Vec<PortId>,
        others: &Others<'_>,
    ) -> Result<(), StepError> {
        self.remove_ports(ports).await;
        self.remove_sockets(spec).await;
        self.links.forget(id);
        self.devices.forget(id);
        self.remove_host_side(id, spec, others).await
    }

    /// Removes what a daemon that was killed has left of sockets that it made. Whatever else is there stays.
    async fn remove_sockets(&self, spec: &PlugSpec) {
        for socket in spec.sockets().filter(|socket| socket.role.is_ours_to_make()) {
            let Ok(beneath) = self.beneath(&socket) else { continue };
            let path = socket.path.as_path().to_owned();
            let remove = move || vhost_user::remove_stale(&path, beneath.as_deref());
            if matches!(tokio::task::spawn_blocking(remove).await, Ok(Ok(true))) {
                tracing::info!(path = %socket.path, "socket that was left removed");
            }
        }
    }

    /// The directory that a socket's path has to stay beneath.
    fn beneath(&self, socket: &Socket) -> Result<Option<PathBuf>, StepError> {
        match self.ovs.directory_of(socket) {
            None => self.rules.dir_of(socket),
            ours => Ok(ours),
        }
    }

    /// How far the plug's ports have come.
    pub(super) fn status(&self, id: &Name, spec: &PlugSpec, ports: &[PortId]) -> Status {
        let reports: Vec<_> = ports.iter().filter_map(|port| self.dataplane.port(*port)).collect();
        if reports.len() < ports.len() {
            return Status::pending(Whose::Vhostd, "the dataplane has lost a port");
        }
        let condition =
            |flaw: Flaw| Condition { phase: Phase::Forwarding, whose: Whose::Host, message: flaw.message };
        let mut missing: Vec<_> = self.flaws_seen(id, spec).into_iter().map(condition).collect();
        missing.extend(spec.ovs().into_iter().flat_map(|ovs| self.ovs.missing(id, spec, ovs)));
        Status::of_ports(spec, &reports).and(missing)
    }

    async fn attach_all(&self, id: &Name, spec: &PlugSpec, ports: &mut Vec<PortId>) -> Result<(), StepError> {
        let endpoint = match &spec.socket {
            Some(socket) => Some(self.endpoint(socket, self.rules.dir_of(socket)?)),
            None => None,
        };
        if let Some(to) = &spec.to
            && let Some(link) = self.ensure_host_side(id, spec, to).await?
        {
            ports.push(self.add_host_port(id, spec, link).await?);
        }
        if let Some(endpoint) = endpoint {
            let link = if spec.is_front_end() {
                Link::FrontEnd { endpoint, queue_pairs: spec.front_end_queues() }
            } else {
                let (mac, queue_pairs) = (spec.mac.map(|mac| mac.0), spec.guest_queues());
                Link::VhostUser { endpoint, mac, queue_pairs, policy: spec.policy() }
            };
            let (network, mtu) = (spec.network_of(id), spec.mtu_bytes());
            ports.push(self.add_port(PortSpec { name: id.to_string(), network, mtu, link }).await?);
        }
        Ok(())
    }

    /// The port on the host's side. One name a port: the socket's bears the plug's, if there is a socket.
    async fn add_host_port(&self, id: &Name, spec: &PlugSpec, link: Link) -> Result<PortId, StepError> {
        let side = if matches!(link, Link::FrontEnd { .. }) { "switch" } else { "tap" };
        let name = if spec.socket.is_some() { format!("{id}:{side}") } else { id.to_string() };
        self.add_port(PortSpec { name, network: spec.network_of(id), mtu: spec.mtu_bytes(), link }).await
    }

    /// What the plug needs of the host, up to where a port can be opened on it. Nothing to forward for if the guest's VMM
    /// opens it.
    async fn ensure_host_side(&self, id: &Name, spec: &PlugSpec, to: &To) -> Result<Option<Link>, StepError> {
        match to {
            To::Tap(_) => tap::ensure(&self.host, id, spec, to).await,
            To::Ovs(ovs) => match ovs.vhost_user() {
                Some(socket) => Ok(Some(self.ensure_switch_socket(spec, &socket).await?)),
                None => {
                    let link = tap::ensure(&self.host, id, spec, to).await?;
                    bridge::join_hybrid(&self.host, id, spec, ovs).await?;
                    Ok(link)
                }
            },
            To::Bridge(bridge) => {
                let link = tap::ensure(&self.host, id, spec, to).await?;
                self.bridges.join(&self.host, id, spec, bridge).await?;
                Ok(link)
            }
            To::Macvtap(macvtap) => {
                macvtap::ensure(&self.host, self.devices.associations(), id, spec, macvtap).await
            }
            To::Device(device) => self.devices.attach(&self.host, id, spec, device).await,
        }
    }

    /// The same where the TAP is there, and open.
    async fn mend_host_side(&self, id: &Name, spec: &PlugSpec, to: &To) -> Result<(), StepError> {
        match to {
            To::Tap(_) => tap::mend(&self.host, id, spec, to).await,
            To::Bridge(bridge) => {
                tap::mend(&self.host, id, spec, to).await?;
                self.bridges.join(&self.host, id, spec, bridge).await
            }
            To::Ovs(ovs) => {
                tap::mend(&self.host, id, spec, to).await?;
                bridge::join_hybrid(&self.host, id, spec, ovs).await
            }
            To::Macvtap(macvtap) => {
                macvtap::mend(&self.host, self.devices.associations(), id, spec, macvtap).await
            }
            To::Device(device) => self.devices.mend(&self.host, id, spec, device).await,
        }
    }

    /// The front end to which the switch connects, once the directory for its socket is there.
    async fn ensure_switch_socket(&self, spec: &PlugSpec, socket: &Socket) -> Result<Link, StepError> {
        if self.ovs.directory_of(socket).is_some() {
            self.ovs.make_directory().await?;
        }
        let beneath = self.beneath(socket)?;
        Ok(Link::FrontEnd { endpoint: self.endpoint(socket, beneath), queue_pairs: spec.front_end_queues() })
    }

    /// The TAP goes last out of Open vSwitch, which holds it by its number, and first out of a Linux bridge, which lets it go.
    async fn remove_host_side(
        &self,
        id: &Name,
        spec: &PlugSpec,
        others: &Others<'_>,
    ) -> Result<(), StepError> {
        match &spec.to {
            None => Ok(()),
            Some(to @ To::Tap(_)) => tap::remove(&self.host, id, to).await,
            Some(to @ To::Bridge(bridge)) => {
                tap::remove(&self.host, id, to).await?;
                self.bridges.leave(&self.host, bridge, others).await
            }
            Some(to @ To::Ovs(ovs)) => {
                self.ovs.remove_ports(id, ovs).await?;
                tap::remove(&self.host, id, to).await?;
                bridge::leave_hybrid(&self.host, id, ovs).await?;
                self.ovs.remove_bridges(id, ovs).await
            }
            Some(To::Macvtap(macvtap)) => {
                macvtap::remove(&self.host, self.devices.associations(), id, macvtap).await
            }
            Some(To::Device(device)) => {
                if let Some(port) = &device.port {
                    self.ovs.remove_ports(id, port).await?;
                }
                self.devices.detach(&self.host, id, spec, device).await?;
                match &device.port {
                    Some(port) => self.ovs.remove_bridges(id, port).await,
                    None => Ok(()),
                }
            }
        }
    }

    fn endpoint(&self, socket: &Socket, beneath: Option<PathBuf>) -> Endpoint {
        let access = Access { mode: self.rules.mode, owner: None, group: self.rules.gid };
        let role = match socket.role {
            Role::Listen | Role::FrontendListen => vhost_user::Role::Listen(access),
            Role::Connect | Role::FrontendConnect => vhost_user::Role::Connect,
        };
        Endpoint { path: socket.path.as_path().to_owned(), beneath, role, users: Vec::new() }
    }

    async fn add_port(&self, spec: PortSpec) -> Result<PortId, StepError> {
        Ok(self.blocking(move |dataplane| dataplane.add_port(spec)).await?)
    }

    /// Latest first, so that a guest's port goes before the uplink that it sends to.
    async fn remove_ports(&self, ports: Vec<PortId>) {
        self.blocking(move |dataplane| {
            for port in ports.into_iter().rev() {
                dataplane.remove_port(port);
            }
        })
        .await;
    }

    /// The dataplane's calls wait for the turns of its workers: not on a thread that serves the API.
    async fn blocking<T: Send + 'static>(&self, call: impl FnOnce(&Dataplane) -> T + Send + 'static) -> T {
        let dataplane = self.dataplane.clone();
        tokio::task::spawn_blocking(move || call(&dataplane))
            .await
            .expect("the dataplane's calls do not panic")
    }
}
