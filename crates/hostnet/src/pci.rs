//! PCI devices of the host, through sysfs: what they are, whose virtual function one is, which driver has it.
//!
//! A [`PciDevice`] is one look at a device, checked as a whole. Links are read for the name at their end, and never
//! followed out of sysfs: what does not read as the kernel writes it is an error that names the file.
//!
//! Where sysfs is can be chosen, for a host's that is mounted elsewhere.
//!
//! Reading is a matter of microseconds. Changing the driver ([`bind`](Pci::bind), [`restore`](Pci::restore)) waits for the
//! driver, at most [`DRIVER_LIMIT`]: not on a thread that others wait for.

mod driver;
mod error;
mod representor;
mod tree;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

pub use self::driver::{Binding, DRIVER_LIMIT};
pub use self::error::PciError;
pub use self::representor::Representor;
use self::tree::{Entry, Tree};

/// Where a PCI function is: `0000:03:00.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// PCI domain.
    pub domain: u32,
    /// Bus in the domain.
    pub bus: u8,
    /// Device on the bus, 0..=31.
    pub device: u8,
    /// Function of the device, 0..=7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a PCI address such as 0000:03:00.1")]
pub struct NotAnAddress;

/// The host's PCI devices.
#[derive(Clone, Debug)]
pub struct Pci {
    tree: Tree,
}

/// A device as it was at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// Where it is.
    pub address: PciAddress,
    /// Whose it is, and what the kernel was told about that.
    pub binding: Binding,
    /// Its network interfaces; none while no network driver has it.
    pub interfaces: Vec<String>,
    /// Its part in SR-IOV.
    pub function: Function,
    /// The virtual functions that it has made, by number.
    pub virtual_functions: Vec<PciAddress>,
    /// Its IOMMU group; none without an IOMMU.
    pub iommu_group: Option<u32>,
    /// It connects buses, and is nobody's to take.
    pub is_bridge: bool,
}

/// A device's part in SR-IOV (PCI Express, single root I/O virtualisation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// A device of its own, or a physical function.
    Physical,
    /// A virtual function.
    Virtual {
        /// Of this physical one.
        of: PciAddress,
        /// Its number there, from 0.
        number: u32,
    },
}

impl Default for Pci {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Pci {
    /// The devices in the sysfs that is mounted there.
    pub fn new(sysfs: impl Into<PathBuf>) -> Self {
        Self { tree: Tree::new(sysfs.into()) }
    }

    /// Looks at a device.
    ///
    /// # Errors
    /// [`PciError::Absent`]; [`PciError::Odd`] and [`PciError::Read`] for a sysfs that is not as the kernel makes it.
    pub fn device(&self, address: PciAddress) -> Result<PciDevice, PciError> {
        let dir = self.tree.device(address)?;
        let iommu_group = match dir.link_name("iommu_group")? {
            Some(name) => Some(name.parse().map_err(|_| dir.odd("iommu_group", &name))?),
            None => None,
        };
        // PCI code and ID assignment, 1.7: base class 06h is a bridge.
        let is_bridge = dir.text("class")?.is_some_and(|class| class.starts_with("0x06"));
        Ok(PciDevice {
            address,
            binding: driver::binding(&dir)?,
            interfaces: interfaces(&dir)?,
            function: self.function(address, &dir)?,
            virtual_functions: virtual_functions(&dir)?.into_iter().map(|(_, address)| address).collect(),
            iommu_group,
            is_bridge,
        })
    }

    /// The device that a network interface is on; none if it is on none, or not there.
    ///
    /// # Errors
    /// As for [`device`](Self::device).
    pub fn device_of(&self, interface: &str) -> Result<Option<PciDevice>, PciError> {
        let link = self.tree.dir("class/net".into()).dir(interface);
        self.tree.device_behind(&link)?.map(|address| self.device(address)).transpose()
    }

    /// All devices of an IOMMU group: a guest gets all of them, or none.
    ///
    /// # Errors
    /// As for [`device`](Self::device).
    pub fn group(&self, number: u32) -> Result<Vec<PciDevice>, PciError> {
        let dir = self.tree.dir(format!("kernel/iommu_groups/{number}"));
        let names = dir.names("devices")?;
        let address = |name: String| name.parse().map_err(|_| dir.odd("devices", &name));
        names.into_iter().map(|name| self.device(address(name)?)).collect()
    }

    /// The one PCI device whose network interface has this address.
    ///
    /// # Errors
    /// [`PciError::NoInterface`], [`PciError::Ambiguous`]; as for [`device`](Self::device).
    pub fn device_with(&self, mac: [u8; 6]) -> Result<PciDevice, PciError> {
        let text = mac.map(|byte| format!("{byte:02x}")).join(":");
        let class = self.tree.dir("class/net".into());
        let mut found: Vec<(String, PciAddress)> = Vec::new();
        for name in class.names("")? {
            let link = class.dir(&name);
            if link.text("address")?.is_some_and(|address| address.eq_ignore_ascii_case(&text))
                && let Some(address) = self.tree.device_behind(&link)?
            {
                found.push((name, address));
            }
        }
        // One device may have several interfaces; those of another are what makes it ambiguous.
        match found.as_slice() {
            [] => Err(PciError::NoInterface { mac: text }),
            [(_, first), rest @ ..] if rest.iter().all(|(_, other)| other == first) => self.device(*first),
            _ => {
                let interfaces = found.into_iter().map(|(name, _)| name).collect();
                Err(PciError::Ambiguous { mac: text, interfaces })
            }
        }
    }

    fn function(&self, address: PciAddress, dir: &Entry) -> Result<Function, PciError> {
        let Some(physical) = dir.link_name("physfn")? else { return Ok(Function::Physical) };
        let of: PciAddress = physical.parse().map_err(|_| dir.odd("physfn", &physical))?;
        let of_physical = virtual_functions(&self.tree.device(of)?)?;
        if let Some((number, _)) = of_physical.into_iter().find(|(_, other)| *other == address) {
            return Ok(Function::Virtual { of, number });
        }
        Err(dir.odd("physfn", &format!("{of}, which has no virtfn link to it")))
    }
}

impl PciDevice {
    /// Its network interface.
    ///
    /// # Errors
    /// [`PciError::Unbound`].
    pub fn interface(&self) -> Result<&str, PciError> {
        let unbound = || PciError::Unbound { address: self.address, driver: self.binding.driver.clone() };
        self.interfaces.first().map(String::as_str).ok_or_else(unbound)
    }
}

/// Those that a physical function has made, each with its number.
fn virtual_functions(dir: &Entry) -> Result<Vec<(u32, PciAddress)>, PciError> {
    let mut found = Vec::new();
    for name in dir.names("")? {
        let Some(number) = name.strip_prefix("virtfn") else { continue };
        // One that goes away is none any more.
        let Some(end) = dir.link_name(&name)? else { continue };
        match (number.parse(), end.parse()) {
            (Ok(number), Ok(address)) => found.push((number, address)),
            _ => return Err(dir.odd(&name, &end)),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Its own, or, of a virtio device, those of the device inside.
fn interfaces(dir: &Entry) -> Result<Vec<String>, PciError> {
    let mut found = dir.names("net")?;
    for name in dir.names("")?.into_iter().filter(|name| name.starts_with("virtio")) {
        found.extend(dir.dir(&name).names("net")?);
    }
    Ok(found)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = NotAnAddress;

    /// As the kernel and os-vif write it; domains beyond 16 bits have more digits.
    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        let hex = |digits: &str, count: std::ops::RangeInclusive<usize>| {
            let is_hex = count.contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            is_hex.then(|| u32::from_str_radix(digits, 16).ok()).flatten().ok_or(NotAnAddress)
        };
        let byte = |digits, count| hex(digits, count)?.try_into().map_err(|_| NotAnAddress);
        let (domain, rest) = text.split_once(':').ok_or(NotAnAddress)?;
        let (bus, rest) = rest.split_once(':').ok_or(NotAnAddress)?;
        let (device, function) = rest.split_once('.').ok_or(NotAnAddress)?;
        let address = Self {
            domain: hex(domain, 4..=8)?,
            bus: byte(bus, 2..=2)?,
            device: byte(device, 2..=2)?,
            function: byte(function, 1..=1)?,
        };
        if address.device < 32 && address.function < 8 { Ok(address) } else { Err(NotAnAddress) }
    }
}

#[cfg(test)]
mod tests;
