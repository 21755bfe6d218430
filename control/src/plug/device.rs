//! A plug's PCI device: found, given to the guest, and given back as it was found.
//!
//! ```text
//! resolve   which device, what it is now, and whether the guest can have it         before anything is recorded
//! attach    address, VLAN or port profile → driver → representor's name → macvtap   each repeatable
//! detach    the same backwards, to what the record says
//! ```
//!
//! What others do to it meanwhile is put right ([`watch`]).
//!
//! What is to be given back is recorded with the plug before anything is changed: a daemon that is killed at any step goes on
//! from there when it is back. What is gone by then, the device or its physical function, needs nothing back.

mod watch;

use dataplane::Link;
use hostnet::{Association, Binding, Function, FunctionState, HostNet, Pci, PciDevice, PciError};

use super::association::{Associations, profile_of};
use super::error::StepError;
use super::macvtap;
use super::ovs::OpenVSwitch;
use crate::config::DevicesConfig;
use crate::names::{IfName, Mac, Name, PciAddress};
use crate::spec::{
    Attach, Device, DeviceType, Found, FoundFunction, FoundRepresentor, Macvtap, MacvtapMode, Ovs, PlugSpec,
};

/// Drivers of this name leave a device to a guest, and need all of its IOMMU group.
const VFIO_PREFIX: &str = "vfio";
/// Characters of os-vif's names for ports that it makes up.
const PORT_CHARS: usize = 14;

/// The host's devices.
pub(super) struct Devices {
    pci: Pci,
    config: DevicesConfig,
    changing: tokio::sync::Mutex<()>,
    associations: Associations,
    lookout: watch::Lookout,
}

impl Devices {
    pub(super) fn new(config: DevicesConfig) -> Self {
        let pci = Pci::new(&config.sysfs);
        let associations = Associations::new(config.lldpad.clone(), pci.clone());
        let (changing, lookout) = (tokio::sync::Mutex::default(), watch::Lookout::default());
        Self { pci, config, changing, associations, lookout }
    }

    /// The guests of which switches outside are told.
    pub(super) fn associations(&self) -> &Associations {
        &self.associations
    }

    pub(super) async fn hold(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// Decides what a new plug leaves to us, and looks at how the device is. Fails if the guest cannot have it.
    pub(super) async fn resolve(
        &self,
        host: &HostNet,
        ovs: &OpenVSwitch,
        id: &Name,
        (mac, behind_socket): (Option<Mac>, bool),
        device: &mut Device,
    ) -> Result<(), StepError> {
        let (address, by_mac) = (device.address, mac.map(|mac| mac.0).unwrap_or_default());
        let now = self
            .pci(move |pci| match address {
                Some(address) => pci.device(address.0),
                None => pci.device_with(by_mac),
            })
            .await?;
        device.address = Some(PciAddress(now.address));
        // Behind a socket it is driven by its network driver.
        if device.driver.is_none() && !behind_socket {
            device.driver = match device.dev_type {
                DeviceType::Nested => Some(self.config.nested_driver.clone()),
                DeviceType::Ethernet | DeviceType::Generic => self.config.driver.clone(),
            };
        }
        if device.dev_type == DeviceType::Ethernet && device.profile.is_none() {
            device.spoof_check = device.spoof_check.or(self.config.spoof_check);
            device.trust = device.trust.or(self.config.trust);
        }
        let mut found = Found {
            driver: now.binding.driver.clone(),
            driver_override: now.binding.driver_override.clone(),
            iommu_group: now.iommu_group,
            ..Found::default()
        };
        if device.dev_type == DeviceType::Ethernet {
            found.function = Some(self.function(host, device, &now).await?);
        }
        self.check(host, device, &now, behind_socket).await?;
        if behind_socket && let Some(interface) = now.interfaces.first() {
            found.ipv6 = host.speaks_ipv6(interface).await?;
        }
        if let Some(port) = &mut device.port {
            found.representor = Some(self.resolve_port(host, ovs, id, &now, port).await?);
        }
        device.found = Some(found);
        Ok(())
    }

    /// Refuses a device that the host needs, and one that no driver can give to a guest.
    async fn check(
        &self,
        host: &HostNet,
        device: &Device,
        now: &PciDevice,
        behind_socket: bool,
    ) -> Result<(), StepError> {
        if !device.force {
            for interface in &now.interfaces {
                host.refuse_used(interface).await?;
            }
            if !behind_socket {
                Pci::check_functions(now)?;
            }
        }
        if device.driver.as_ref().is_some_and(|driver| driver.as_str().starts_with(VFIO_PREFIX)) {
            let now = now.clone();
            self.pci(move |pci| pci.check_group(&now)).await?;
        }
        Ok(())
    }

    /// The virtual function. The driver that has port profiles does not tell how it holds one.
    async fn function(
        &self,
        host: &HostNet,
        device: &Device,
        now: &PciDevice,
    ) -> Result<FoundFunction, StepError> {
        let Function::Virtual { of, number } = now.function else {
            return Err(PciError::NotVirtual { address: now.address }.into());
        };
        let interface = self.physical_interface(PciAddress(of)).await?;
        let held = match device.profile {
            None => host.virtual_function(&interface, number).await?,
            Some(_) => FunctionState::default(),
        };
        Ok(FoundFunction {
            physical: PciAddress(of),
            number,
            // All zero, or what no station can have: none.
            mac: Mac(held.address).to_string().parse().ok(),
            vlan: held.vlan,
            priority: held.priority,
            spoof_check: device.spoof_check.and(held.spoof_check),
            trust: device.trust.and(held.trust),
        })
    }

    /// The representor, or with DPDK what ovs-vswitchd opens in its place.
    async fn resolve_port(
        &self,
        host: &HostNet,
        ovs: &OpenVSwitch,
        id: &Name,
        now: &PciDevice,
        port: &mut Ovs,
    ) -> Result<FoundRepresentor, StepError> {
        let address = now.address;
        let found = self.pci(move |pci| pci.representor(address)).await?;
        let missing = || hostnet::Error::Missing { name: found.name.clone() };
        let link = host.link(&found.name).await?.ok_or_else(missing)?;
        let asked = port.attach.take();
        let name: IfName = named(&found.name)?;
        port.tap.get_or_insert_with(|| name.clone());
        ovs.resolve(host, id, port).await?;
        // It would join us with a switch that has DPDK by vhost-user: that one opens representors itself.
        let by_switch = asked.is_none() && port.attach == Some(Attach::VhostUser);
        (port.attach, port.socket) = (Some(Attach::Tap), None);
        let mut devargs = None;
        if by_switch {
            devargs = Some(format!("{},representor=[{}]", found.physical, found.number));
            port.tap = Some(named(&format!("vfr{id}").chars().take(PORT_CHARS).collect::<String>())?);
        }
        Ok(FoundRepresentor { name, up: link.up, mtu: link.mtu, devargs })
    }

    /// Gives the device to the guest. If that is behind a socket, gives what forwards to it.
    pub(super) async fn attach(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        device: &Device,
    ) -> Result<Option<Link>, StepError> {
        match self.give(host, id, spec, device).await? {
            Some(alone) => macvtap::ensure(host, &self.associations, id, spec, &alone).await,
            None => Ok(None),
        }
    }

    /// Puts right what somebody else has done to the device, and to the macvtap on it, which we have open.
    pub(super) async fn mend(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        device: &Device,
    ) -> Result<(), StepError> {
        match self.give(host, id, spec, device).await? {
            Some(alone) => macvtap::mend(host, &self.associations, id, spec, &alone).await,
            None => Ok(()),
        }
    }

    /// All but the macvtap, which is given as it has to be if the guest is behind a socket.
    async fn give(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        device: &Device,
    ) -> Result<Option<Macvtap>, StepError> {
        let (Some(address), Some(found)) = (device.address, &device.found) else {
            return Err(StepError::Unresolved);
        };
        if let (Some(function), Some(mac)) = (&found.function, spec.mac) {
            let interface = self.physical_interface(function.physical).await?;
            if let Some(guest) = association(interface.clone(), function, Some(mac), device).await {
                self.associations.associate(host, id, guest).await?;
            } else {
                let wanted = function_wanted(mac, device);
                host.set_virtual_function(&interface, function.number, &wanted).await?;
            }
        }
        if let Some(driver) = &device.driver {
            let driver = driver.to_string();
            self.pci(move |pci| pci.bind(address.0, &driver)).await?;
        }
        if let (Some(port), Some(_)) = (&device.port, device.representor()) {
            let now = self.pci(move |pci| pci.representor(address.0)).await?.name;
            let wanted = port.tap(id);
            if now != wanted.as_str() {
                host.rename(&now, wanted.as_str()).await?;
            }
            host.set_interface(wanted.as_str(), true, spec.mtu_bytes().into()).await?;
        }
        if spec.socket.is_none() {
            return Ok(None);
        }
        if let (Some(_), Some(mac)) = (&found.function, spec.mac) {
            self.take_again_unless(host, address, found, |own| own == mac.0).await?;
        }
        let now = self.pci(move |pci| pci.device(address.0)).await?;
        let below = named(now.interface()?)?;
        // With the address that the interface has of the macvtap, what the host says there would be the guest's.
        host.set_ipv6(below.as_str(), false).await?;
        let tap = Some(Device::tap(id));
        Ok(Some(Macvtap { mode: MacvtapMode::Passthrough, tap, ..Macvtap::new(below) }))
    }

    /// Gives the device back. Its port is out of Open vSwitch by now: a switch that holds a representor under one name does not
    /// know it under another.
    pub(super) async fn detach(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        device: &Device,
    ) -> Result<(), StepError> {
        let (Some(address), Some(found)) = (device.address, &device.found) else { return Ok(()) };
        if spec.socket.is_some() {
            host.remove_macvtap(Device::tap(id).as_str(), id.as_str()).await?;
        }
        if let Some(FoundRepresentor { name, up, mtu, .. }) = device.representor() {
            let representor = gone_is_none(self.pci(move |pci| pci.representor(address.0)).await)?;
            if let Some(now) = representor.map(|representor| representor.name) {
                if now != name.as_str() {
                    host.rename(&now, name.as_str()).await?;
                }
                host.set_interface(name.as_str(), *up, *mtu).await?;
            }
        }
        if let Some(function) = &found.function {
            if let Some(interface) = gone_is_none(self.physical_interface(function.physical).await)? {
                self.give_back(host, id, spec, device, (interface, function)).await?;
            }
            if let (Some(_), Some(mac)) = (&spec.socket, spec.mac) {
                self.take_again_unless(host, address, found, |own| own != mac.0).await?;
            }
        }
        if found.ipv6
            && let Some(now) = gone_is_none(self.pci(move |pci| pci.device(address.0)).await)?
            && let Some(interface) = now.interfaces.first()
        {
            host.set_ipv6(interface, true).await?;
        }
        if device.driver.is_some() {
            let before = binding(found);
            gone_is_none(self.pci(move |pci| pci.restore(address.0, &before)).await)?;
        }
        Ok(())
    }

    /// Gives a virtual function back, or has the switch forget the guest that has it.
    async fn give_back(
        &self,
        host: &HostNet,
        id: &Name,
        spec: &PlugSpec,
        device: &Device,
        (interface, function): (String, &FoundFunction),
    ) -> Result<(), StepError> {
        let guest = association(interface.clone(), function, spec.mac, device).await;
        if let Some(guest) = guest {
            return Ok(self.associations.disassociate(host, id, &guest).await?);
        }
        let before = FunctionState {
            address: function.mac.map(|mac| mac.0).unwrap_or_default(),
            vlan: function.vlan,
            priority: function.priority,
            spoof_check: function.spoof_check,
            trust: function.trust,
        };
        match host.restore_virtual_function(&interface, function.number, &before).await {
            Err(hostnet::Error::NoFunction { .. } | hostnet::Error::Missing { .. }) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Has the network driver take a virtual function again, unless it has it and the interface's address is right: what the
    /// physical function holds is not the interface's before. Then only what a daemon may have left that was killed meanwhile is
    /// cleared away. Nothing if the function is gone, or was nobody's.
    async fn take_again_unless(
        &self,
        host: &HostNet,
        address: PciAddress,
        found: &Found,
        is_right: impl Fn(&[u8]) -> bool,
    ) -> Result<(), StepError> {
        let Some(now) = gone_is_none(self.pci(move |pci| pci.device(address.0)).await)? else {
            return Ok(());
        };
        let is_right = match now.interfaces.first() {
            Some(name) => host.link(name).await?.is_some_and(|link| is_right(&link.address)),
            None => false,
        };
        let binding = binding(found);
        let taken = self.pci(move |pci| match is_right {
            true => pci.restore(address.0, &binding),
            false => pci.take_again(address.0, &binding),
        });
        gone_is_none(taken.await)?;
        Ok(())
    }

    async fn physical_interface(&self, physical: PciAddress) -> Result<String, PciError> {
        self.pci(move |pci| pci.device(physical.0)?.interface().map(str::to_owned)).await
    }

    /// sysfs is read and written on a thread that may wait: a driver that lets go of a device takes its time.
    async fn pci<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Pci) -> Result<T, PciError> + Send + 'static,
    ) -> Result<T, PciError> {
        let pci = self.pci.clone();
        tokio::task::spawn_blocking(move || call(&pci)).await.expect("looking at a device does not panic")
    }
}

/// What attaching a resolved device does, one sentence a step.
pub(super) fn plan(id: &Name, spec: &PlugSpec, device: &Device) -> Vec<String> {
    let (Some(address), Some(found)) = (device.address, &device.found) else { return Vec::new() };
    let mut steps = Vec::new();
    if let (Some(function), Some(mac)) = (&found.function, spec.mac) {
        let physical = function.physical;
        steps.push(match &device.profile {
            None => format!("have {physical} hold {address} with address {mac}{}", settings(device)),
            Some(profile) => {
                let protocol = profile.protocol();
                format!("tell the switch at {physical} by {protocol} of {mac} on {address}, and wait for its answer")
            }
        });
    }
    if let Some(driver) = &device.driver {
        let now = found.driver.as_deref().unwrap_or("none");
        steps.push(format!("bind {address} to driver {driver}, which is bound to {now}"));
    }
    if let (Some(port), Some(FoundRepresentor { name, .. })) = (&device.port, device.representor()) {
        let wanted = port.tap(id);
        let named = if *name == wanted { String::new() } else { format!(", call it {wanted}") };
        steps.push(format!("take {name}, the representor of {address}{named}, and set it up"));
    }
    if spec.socket.is_some() {
        if let (Some(_), Some(driver)) = (&found.function, &found.driver) {
            steps.push(format!("have {driver} take {address} again, unless it has that address"));
        }
        steps.push(format!("make {}, a macvtap that has {address} for itself", Device::tap(id)));
    }
    steps
}

/// What a virtual function is held with beside its address.
fn settings(device: &Device) -> String {
    let vlan = device.vlan.map(|vlan| format!(", VLAN {vlan}"));
    let switch = |name, on: Option<bool>| on.map(|on| format!(", {name} {}", if on { "on" } else { "off" }));
    let all = [vlan, switch("spoof check", device.spoof_check), switch("trust", device.trust)];
    all.into_iter().flatten().collect()
}

/// What the switch is told of a guest with a virtual function, if it is to be told.
async fn association(
    device: String,
    function: &FoundFunction,
    mac: Option<Mac>,
    asked: &Device,
) -> Option<Association> {
    let (profile, address) = (profile_of(asked.profile.as_ref()?).await, mac?.0);
    Some(Association { device, function: Some(function.number), address, profile })
}

/// How the device was bound when it was found.
fn binding(found: &Found) -> Binding {
    Binding { driver: found.driver.clone(), driver_override: found.driver_override.clone() }
}

/// How a guest's virtual function has to be held.
fn function_wanted(mac: Mac, device: &Device) -> FunctionState {
    FunctionState {
        address: mac.0,
        vlan: device.vlan.unwrap_or_default(),
        priority: 0,
        spoof_check: device.spoof_check,
        trust: device.trust,
    }
}

/// What there is nothing to give back to.
fn gone_is_none<T>(result: Result<T, PciError>) -> Result<Option<T>, PciError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(
            PciError::Absent { .. }
            | PciError::NotVirtual { .. }
            | PciError::NoSwitch { .. }
            | PciError::NoRepresentor { .. }
            | PciError::Unbound { .. },
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A name that the kernel gave.
fn named(interface: &str) -> Result<IfName, StepError> {
    interface.parse().map_err(|cause| StepError::Name { cause })
}
