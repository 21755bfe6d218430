//! What can go wrong with a PCI device, in words for people.

use std::io;
use std::path::PathBuf;

use super::{DRIVER_LIMIT, PciAddress};

/// Why a device is not as asked. Each names the device, the cause and the way out.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// There is no such device.
    #[error("this host has no PCI device {address}: give one that lspci -D lists")]
    Absent {
        /// Where it would be.
        address: PciAddress,
    },
    /// No network driver has it.
    #[error(
        "PCI device {address} has no network interface, its driver is {}: bind it to its network driver",
        driver.as_deref().unwrap_or("none")
    )]
    Unbound {
        /// The device.
        address: PciAddress,
        /// What has it.
        driver: Option<String>,
    },
    /// Nothing has that link-layer address.
    #[error("no network interface on a PCI device of this host has address {mac}: attach the device first")]
    NoInterface {
        /// The address.
        mac: String,
    },
    /// Several devices have that link-layer address.
    #[error(
        "address {mac} is that of {}, on different PCI devices: give each an address of its own",
        interfaces.join(" and ")
    )]
    Ambiguous {
        /// The address.
        mac: String,
        /// The interfaces.
        interfaces: Vec<String>,
    },
    /// A virtual function was asked for.
    #[error(
        "PCI device {address} is no virtual function: give one that its physical function made (sriov_numvfs)"
    )]
    NotVirtual {
        /// The device.
        address: PciAddress,
    },
    /// The physical function is no switch.
    #[error(
        "PCI device {address}, the physical function of {of}, is in no embedded switch: \
         devlink dev eswitch set pci/{address} mode switchdev"
    )]
    NoSwitch {
        /// The physical function.
        address: PciAddress,
        /// The virtual one.
        of: PciAddress,
    },
    /// The switch shows no representor.
    #[error(
        "virtual function {address} has no representor, none of switch {switch} has the port name of number {number}: \
         devlink port show"
    )]
    NoRepresentor {
        /// The virtual function.
        address: PciAddress,
        /// Its number.
        number: u32,
        /// The switch's id.
        switch: String,
    },
    /// The switch shows several that could be it.
    #[error("virtual function {address} could have any of the representors {}: see devlink port show", names.join(", "))]
    Representors {
        /// The virtual function.
        address: PciAddress,
        /// The interfaces.
        names: Vec<String>,
    },
    /// No such driver.
    #[error("this kernel has no PCI driver {driver} for {address}: load its module (modprobe {driver})")]
    NoDriver {
        /// The device.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// A text that cannot be a driver's name.
    #[error("{name:?} is not a driver's name: give one that is in /sys/bus/pci/drivers")]
    DriverName {
        /// As given.
        name: String,
    },
    /// The driver did not take the device.
    #[error(
        "driver {driver} did not take PCI device {address}, {} has it: see dmesg, the device may not suit it",
        found.as_deref().unwrap_or("none")
    )]
    Refused {
        /// The device.
        address: PciAddress,
        /// The driver asked for.
        driver: String,
        /// Which has it.
        found: Option<String>,
    },
    /// A driver that has to let go or take the device does not come back.
    #[error(
        "driver {driver} did not {doing} PCI device {address} within {} s: end what uses the device",
        DRIVER_LIMIT.as_secs()
    )]
    Stuck {
        /// The device.
        address: PciAddress,
        /// The driver.
        driver: String,
        /// What it was to do.
        doing: &'static str,
    },
    /// Other devices of the IOMMU group are in use.
    #[error(
        "PCI device {address} cannot be given to a guest alone: {} in its IOMMU group {group}: \
         bind them to vfio-pci, too, or unbind them",
        others.join(", ")
    )]
    Group {
        /// The device.
        address: PciAddress,
        /// The group.
        group: u32,
        /// Each with its driver.
        others: Vec<String>,
    },
    /// The device has virtual functions.
    #[error(
        "PCI device {address} has virtual functions, which go when its driver lets go of it: {}; give one of these, or \
         remove them first (sriov_numvfs), or ask for it nevertheless",
        functions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    HasFunctions {
        /// The device.
        address: PciAddress,
        /// Where they are.
        functions: Vec<PciAddress>,
    },
    /// There is no IOMMU.
    #[error("PCI device {address} is in no IOMMU group: switch the IOMMU on (firmware, intel_iommu=on)")]
    NoIommu {
        /// The device.
        address: PciAddress,
    },
    /// Something in sysfs that the kernel does not write.
    #[error("{} says {found:?}, which the kernel does not write: is sysfs mounted there?", path.display())]
    Odd {
        /// Where.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// Something in sysfs cannot be read.
    #[error("cannot read {}: let the daemon's user read sysfs", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses a change.
    #[error("cannot write {text:?} to {}: this needs root, and a sysfs that is not mounted read-only", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// What.
        text: String,
        /// Why.
        source: io::Error,
    },
}
