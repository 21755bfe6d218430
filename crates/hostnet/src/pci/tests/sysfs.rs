//! A sysfs in a directory, and a stand-in for the kernel that answers what is written there.

use std::fs;
use std::io::Result;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};

/// The physical function of [`Sysfs::virtual_function`].
pub const PF: &str = "0000:03:00.0";

/// Devices and drivers as the kernel shows them; links are relative, as there.
#[derive(Debug)]
pub struct Sysfs(tempfile::TempDir);

impl Sysfs {
    /// One without devices.
    pub fn new() -> Result<Self> {
        let sysfs = Self(tempfile::tempdir()?);
        for dir in ["bus/pci/devices", "bus/pci/drivers", "class/net", "kernel/iommu_groups"] {
            fs::create_dir_all(sysfs.path(dir))?;
        }
        Ok(sysfs)
    }

    /// Where something in it is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn make_parent(&self, path: &str) -> Result<()> {
        self.path(path).parent().map_or(Ok(()), fs::create_dir_all)
    }

    /// Makes an attribute.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.make_parent(path)?;
        fs::write(self.path(path), text)
    }

    /// Makes a link.
    pub fn link(&self, path: &str, target: &str) -> Result<()> {
        self.make_parent(path)?;
        symlink(target, self.path(path))
    }

    /// A device without driver; its directory, within the tree.
    pub fn device(&self, address: &str) -> Result<String> {
        let dir = format!("devices/pci0000:00/{address}");
        self.write(&format!("{dir}/class"), "0x020000\n")?;
        self.write(&format!("{dir}/driver_override"), "(null)\n")?;
        self.link(&format!("bus/pci/devices/{address}"), &format!("../../../{dir}"))?;
        Ok(dir)
    }

    /// A virtual function.
    pub fn virtual_function(&self, number: u32, address: &str) -> Result<String> {
        let dir = self.device(address)?;
        self.link(&format!("{dir}/physfn"), &format!("../{PF}"))?;
        self.link(&format!("devices/pci0000:00/{PF}/virtfn{number}"), &format!("../{address}"))?;
        Ok(dir)
    }

    /// A network interface of a device, or of a virtio device in it.
    pub fn interface(&self, parent: &str, name: &str, mac: &str) -> Result<()> {
        let dir = format!("{parent}/net/{name}");
        self.write(&format!("{dir}/address"), &format!("{mac}\n"))?;
        self.link(&format!("{dir}/device"), "../..")?;
        self.link(&format!("class/net/{name}"), &format!("../../{dir}"))
    }

    /// Makes an interface a port of a switch.
    pub fn switch_port(&self, name: &str, switch: &str, port: &str) -> Result<()> {
        self.write(&format!("class/net/{name}/phys_switch_id"), &format!("{switch}\n"))?;
        self.write(&format!("class/net/{name}/phys_port_name"), &format!("{port}\n"))
    }

    /// A driver.
    pub fn driver(&self, name: &str) -> Result<()> {
        fs::create_dir_all(self.path(&format!("bus/pci/drivers/{name}")))
    }

    /// Binds a device to a driver.
    pub fn bound(&self, address: &str, driver: &str) -> Result<()> {
        self.driver(driver)?;
        let link = format!("devices/pci0000:00/{address}/driver");
        self.link(&link, &format!("../../../bus/pci/drivers/{driver}"))
    }

    /// Puts a device into an IOMMU group.
    pub fn in_group(&self, address: &str, group: u32) -> Result<()> {
        let dir = format!("kernel/iommu_groups/{group}");
        self.link(&format!("{dir}/devices/{address}"), &format!("../../../../devices/pci0000:00/{address}"))?;
        self.link(&format!("devices/pci0000:00/{address}/iommu_group"), &format!("../../../{dir}"))
    }

    /// The kernel's part: a device told to one of the drivers' `unbind` has none any more; one told to `drivers_probe` is taken
    /// by its override, unless that is `reluctant`, or else by `native`.
    pub fn answer_as_kernel(&self, drivers: &[&str], native: &str) -> Result<()> {
        for driver in drivers {
            self.driver(driver)?;
            let devices = self.path("bus/pci/devices");
            let path = self.path(&format!("bus/pci/drivers/{driver}/unbind"));
            on_each_line(&path, move |address| fs::remove_file(devices.join(address).join("driver")))?;
        }
        let (devices, native) = (self.path("bus/pci/devices"), native.to_owned());
        on_each_line(&self.path("bus/pci/drivers_probe"), move |address| {
            let only = fs::read_to_string(devices.join(address).join("driver_override"))?;
            let driver = match only.trim() {
                "reluctant" => return Ok(()),
                "" | "(null)" => &native,
                driver => driver,
            };
            symlink(format!("../../../bus/pci/drivers/{driver}"), devices.join(address).join("driver"))
        })
    }
}

/// Does something for each text that is written to a file. Its thread waits for the next one until the process ends.
fn on_each_line(path: &Path, act: impl Fn(&str) -> Result<()> + Send + 'static) -> Result<()> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let path = path.to_owned();
    std::thread::spawn(move || {
        while let Ok(text) = fs::read_to_string(&path) {
            if let Err(error) = act(text.trim()) {
                eprintln!("{}: {error}", path.display());
            }
        }
    });
    Ok(())
}
