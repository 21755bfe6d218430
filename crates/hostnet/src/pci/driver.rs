//! Which driver has a device, changed and changed back.
//!
//! `driver_override` says which driver alone may take the device (Documentation/ABI/testing/sysfs-bus-pci). It is set first: a
//! device that nobody has is taken by whoever comes, when a module is loaded for one. Then the device is taken from its driver
//! and offered again, and last it is looked at, since a driver that does not want it says so in the log only.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::tree::Entry;
use super::{Pci, PciAddress, PciDevice, PciError};

/// Longest wait for a driver to take a device or to let go of it. `vfio-pci` lets go when the guest does.
pub const DRIVER_LIMIT: Duration = Duration::from_secs(10);

/// For a driver to have done what the kernel has told it: some take a device in a thread of their own
/// (`PROBE_PREFER_ASYNCHRONOUS`).
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Drivers that leave a device to a guest (vfio of the kernel, `vfio_dev_viable`).
const STUB: &str = "pci-stub";
const VFIO_PREFIX: &str = "vfio";
/// What is in `driver_override` when nothing is.
const NO_OVERRIDE: &str = "(null)";

/// Whose a device is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// The driver that has it.
    pub driver: Option<String>,
    /// The driver that alone may take it.
    pub driver_override: Option<String>,
}

pub(super) fn binding(dir: &Entry) -> Result<Binding, PciError> {
    let driver_override = dir.text("driver_override")?;
    Ok(Binding {
        driver: dir.link_name("driver")?,
        driver_override: driver_override.filter(|name| !name.is_empty() && name != NO_OVERRIDE),
    })
}

impl Pci {
    /// Refuses a device that no guest can have: without an IOMMU, or in a group with devices that the host uses.
    ///
    /// # Errors
    /// [`PciError::NoIommu`], [`PciError::Group`]; as for [`device`](Self::device).
    pub fn check_group(&self, device: &PciDevice) -> Result<(), PciError> {
        let address = device.address;
        let group = device.iommu_group.ok_or(PciError::NoIommu { address })?;
        let in_use = |other: &PciDevice| {
            let driver = other.binding.driver.as_deref();
            let is_free = driver.is_none_or(|name| name.starts_with(VFIO_PREFIX) || name == STUB);
            other.address != address && !other.is_bridge && !is_free
        };
        let others: Vec<String> =
            self.group(group)?.iter().filter(|other| in_use(other)).map(named).collect();
        if others.is_empty() { Ok(()) } else { Err(PciError::Group { address, group, others }) }
    }

    /// Refuses a physical function with virtual ones: its driver takes them away when it lets go of it, whoever has them, and
    /// does not make them again.
    ///
    /// # Errors
    /// [`PciError::HasFunctions`].
    pub fn check_functions(device: &PciDevice) -> Result<(), PciError> {
        let (address, functions) = (device.address, device.virtual_functions.clone());
        if functions.is_empty() { Ok(()) } else { Err(PciError::HasFunctions { address, functions }) }
    }

    /// Gives the device to this driver, which takes it alone. If that does not want it, it is as it was.
    ///
    /// # Errors
    /// [`PciError::NoDriver`], [`PciError::DriverName`], [`PciError::Refused`], [`PciError::Stuck`], [`PciError::Write`]; as
    /// for [`device`](Self::device).
    pub fn bind(&self, address: PciAddress, driver: &str) -> Result<(), PciError> {
        let before = self.device(address)?.binding;
        let wanted = Binding { driver: Some(driver.into()), driver_override: Some(driver.into()) };
        if before == wanted {
            return Ok(());
        }
        self.check_driver(address, driver)?;
        let bound = self.change(address, &wanted);
        if bound.is_err() {
            // What matters to the caller is why it was not bound.
            let _ = self.restore(address, &before);
        }
        bound
    }

    /// Gives the device back as it was.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind).
    pub fn restore(&self, address: PciAddress, before: &Binding) -> Result<(), PciError> {
        if self.device(address)?.binding == *before {
            return Ok(());
        }
        if let Some(driver) = &before.driver {
            self.check_driver(address, driver)?;
        }
        self.change(address, before)
    }

    /// Has the device's driver let go of it and take it again, and waits for the interface that comes of it: what a physical
    /// function holds of a virtual one, drivers ask for when they take it.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind); [`PciError::Unbound`].
    pub fn take_again(&self, address: PciAddress, binding: &Binding) -> Result<(), PciError> {
        let nobody = Binding { driver: None, driver_override: binding.driver.clone() };
        self.change(address, &nobody)?;
        self.change(address, binding)?;
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            match self.device(address)?.interface() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
                found => return found.map(drop),
            }
        }
    }

    fn change(&self, address: PciAddress, wanted: &Binding) -> Result<(), PciError> {
        let dir = self.tree.device(address)?;
        let now = binding(&dir)?;
        if now.driver != wanted.driver {
            // Nobody but the one who is to have it may take it in between.
            let only = wanted.driver.as_deref().or(wanted.driver_override.as_deref());
            dir.write("driver_override", &line(only))?;
            if let Some(driver) = &now.driver {
                self.tell(address, driver, "let go of", &format!("drivers/{driver}/unbind"))?;
                if settled(&dir, None)?.is_some() {
                    return Err(PciError::Stuck { address, driver: driver.clone(), doing: "let go of" });
                }
            }
            if let Some(driver) = &wanted.driver {
                self.tell(address, driver, "take", "drivers_probe")?;
                let found = settled(&dir, Some(driver))?;
                if found.as_ref() != Some(driver) {
                    return Err(PciError::Refused { address, driver: driver.clone(), found });
                }
            }
        }
        if binding(&dir)?.driver_override != wanted.driver_override {
            dir.write("driver_override", &line(wanted.driver_override.as_deref()))?;
        }
        Ok(())
    }

    /// Writes the device's address to an attribute of the PCI bus, which the kernel answers when the driver has done it.
    fn tell(
        &self,
        address: PciAddress,
        driver: &str,
        doing: &'static str,
        attribute: &str,
    ) -> Result<(), PciError> {
        let (bus, attribute) = (self.tree.dir("bus/pci".into()), attribute.to_owned());
        let (done, answer) = mpsc::channel();
        // A thread of its own: one that the kernel keeps is not missed elsewhere.
        std::thread::spawn(move || done.send(bus.write(&attribute, &address.to_string())));
        let stuck = |_| PciError::Stuck { address, driver: driver.to_owned(), doing };
        answer.recv_timeout(DRIVER_LIMIT).map_err(stuck)?
    }

    fn check_driver(&self, address: PciAddress, driver: &str) -> Result<(), PciError> {
        let is_plain = driver.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        if !is_plain || driver.is_empty() || driver.starts_with('.') {
            return Err(PciError::DriverName { name: driver.to_owned() });
        }
        let drivers = self.tree.dir("bus/pci/drivers".into());
        if drivers.path(driver).is_dir() {
            return Ok(());
        }
        Err(PciError::NoDriver { address, driver: driver.to_owned() })
    }
}

/// The driver that has the device, when it is this one, or has had time to be.
fn settled(dir: &Entry, driver: Option<&String>) -> Result<Option<String>, PciError> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        let found = dir.link_name("driver")?;
        if found.as_ref() == driver || Instant::now() >= deadline {
            return Ok(found);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn named(device: &PciDevice) -> String {
    let driver = device.binding.driver.as_deref().unwrap_or_default();
    format!("{} has {}", driver, device.address)
}

/// An empty line clears an attribute; an empty write never reaches the kernel.
fn line(text: Option<&str>) -> String {
    format!("{}\n", text.unwrap_or_default())
}
