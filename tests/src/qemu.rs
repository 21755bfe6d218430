//! Linux guests under QEMU, with network cards on vhost-user sockets.
//!
//! A guest is Debian's kernel and a busybox initramfs (`tests/setup.sh guest` makes both), emulated (TCG), with its memory in
//! a memfd that the back end can map. It is up in a few seconds. Commands run in it through a virtio-serial port
//! (`agent`), QEMU itself is steered through QMP (`qmp`); the guest's console and QEMU's messages are the process's log.

mod agent;
mod qmp;

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::agent::Agent;
pub use self::agent::{Job, Output};
use self::qmp::Qmp;
use crate::deadline::wait_for_some;
use crate::process::{Process, Signal};

/// A guest on a busy machine needs a multiple of its usual three seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// For commands that only look or configure.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// Where `tests/setup.sh guest` puts kernel and initramfs, and `tests/setup.sh igb` a QEMU.
pub const IMAGE_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");

/// Set in the environment of a program that `guest` (src/bin/guest.rs) runs in a guest.
pub const MARK: &str = "E2E_GUEST";

/// QEMU's side of a vhost-user socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// QEMU connects, and connects again when the back end goes. It does not start its guest before it has connected.
    Client,
    /// QEMU listens. It does not start its guest, nor answer QMP, before a back end has come.
    Server,
}

/// A virtio network card.
#[derive(Clone, Debug)]
pub struct Nic {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who connects.
    pub role: Role,
    /// The card's address, which the guest's interface takes.
    pub mac: String,
    /// Queue pairs. The guest uses as many as it has CPUs until it says otherwise (`ethtool -L`).
    pub queues: u16,
    /// Largest MTU, told to the guest (VIRTIO_NET_F_MTU) and to the back end (NET_SET_MTU).
    pub mtu: Option<u16>,
    /// Further properties of the device, as `rx_queue_size=1024` or `mrg_rxbuf=off`.
    pub properties: Vec<String>,
}

impl Nic {
    /// One queue pair, no MTU.
    pub fn new(socket: &Path, role: Role, mac: &str) -> Self {
        Self { socket: socket.into(), role, mac: mac.into(), queues: 1, mtu: None, properties: Vec::new() }
    }
}

/// A directory for the guest. What is mounted in it has inode numbers of its own, so they are mapped.
const HOST_DIR: &str = "local,mount_tag=host,security_model=none,readonly=on,multidevs=remap,path=";

/// Address of a guest's spare virtio card.
pub const SPARE_MAC: &str = "52:54:00:0f:0f:01";

/// The QEMU that is installed.
const INSTALLED: &str = "qemu-system-x86_64";

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Its name in messages.
    pub name: String,
    /// eth0, eth1, ...
    pub nics: Vec<Nic>,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// CPUs.
    pub cpus: u16,
    /// Network cards without cables, and an IOMMU: for tests that give devices away. One is virtio's and has the address
    /// [`SPARE_MAC`]. If `tests/setup.sh igb` found a QEMU that has it, another is an Intel 82576 (igb), which has virtual
    /// functions.
    pub spare_nics: bool,
    /// A directory of this machine that the guest sees, read-only, as /host.
    pub host_dir: Option<PathBuf>,
    /// Be the destination of a migration from a guest of the same shape, which comes over this socket.
    pub incoming: Option<PathBuf>,
}

impl GuestConfig {
    /// One CPU, 256 MiB.
    pub fn new(name: &str, nics: Vec<Nic>) -> Self {
        let name = name.into();
        Self { name, nics, memory_mib: 256, cpus: 1, spare_nics: false, host_dir: None, incoming: None }
    }
}

/// A running guest. Dropping it kills its QEMU.
#[derive(Debug)]
pub struct Guest {
    name: String,
    agent: Arc<Agent>,
    qmp: Mutex<Qmp>,
    process: Process,
    /// Holds the sockets.
    _dir: TempDir,
}

impl Guest {
    /// Starts a guest and waits until it takes commands; the destination of a migration: until QEMU is ready for it.
    pub fn boot(config: &GuestConfig) -> Result<Self> {
        let image = Path::new(IMAGE_DIR);
        ensure!(
            image.join("initramfs.cpio").exists(),
            "the test guest is not built: run tests/setup.sh guest"
        );
        let dir = tempfile::Builder::new().prefix("guest").tempdir()?;
        let agent_socket = dir.path().join("agent");
        let qmp_socket = dir.path().join("qmp");
        let newer = image.join("qemu/usr/bin").join(INSTALLED);
        let program = if config.spare_nics && newer.exists() { newer } else { INSTALLED.into() };
        let version = Version::of(&program)?;

        let mut qemu = Command::new(program);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .args(["-machine", "q35,accel=tcg,memory-backend=memory", "-smp", &config.cpus.to_string()])
            .args(["-m", &format!("{}M", config.memory_mib)])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=memory,size={}M,share=on", config.memory_mib),
            ])
            .args(["-append", "console=ttyS0 quiet rdinit=/init mitigations=off intel_iommu=on"])
            .arg("-kernel")
            .arg(image.join("vmlinux"))
            .arg("-initrd")
            .arg(image.join("initramfs.cpio"))
            .arg("-chardev")
            .arg(option("socket,id=agent,server=on,wait=off,path=", &agent_socket))
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent"])
            .arg("-chardev")
            .arg(option("socket,id=qmp,server=on,wait=off,path=", &qmp_socket))
            .args(["-mon", "chardev=qmp,mode=control"]);
        for (index, nic) in config.nics.iter().enumerate() {
            nic.add_to(&mut qemu, index, version);
        }
        if config.spare_nics {
            // Interrupts by pins are left to the device: remapping those is KVM's to split.
            qemu.args(["-device", "intel-iommu,intremap=off"]);
            qemu.args(["-device", &format!("virtio-net-pci,vectors=0,romfile=,mac={SPARE_MAC}")]);
            if version.has_igb() {
                qemu.args(["-device", "pcie-root-port,id=root0", "-device", "igb,bus=root0,romfile="]);
            }
        }
        if let Some(dir) = &config.host_dir {
            qemu.arg("-virtfs").arg(option(HOST_DIR, dir));
        }
        if let Some(socket) = &config.incoming {
            let mut uri = OsString::from("unix:");
            uri.push(socket);
            qemu.arg("-incoming").arg(uri);
        }

        let mut process = Process::spawn(&config.name, &qemu)?;
        let agent = Agent::start(connect(&mut process, &agent_socket)?)?;
        let qmp = Qmp::start(connect(&mut process, &qmp_socket)?, BOOT_TIMEOUT);
        // A QEMU that has ended says more than a monitor that is gone.
        process.check_running()?;
        let mut guest = Self { name: config.name.clone(), agent, qmp: Mutex::new(qmp?), process, _dir: dir };
        if config.incoming.is_none() {
            guest.wait_for_boot(1)?;
        }
        Ok(guest)
    }

    /// Runs a shell command in the guest, for at most a minute.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, RUN_TIMEOUT)
    }

    /// Runs a shell command in the guest.
    pub fn run_for(&self, command: &str, timeout: Duration) -> Result<Output> {
        self.spawn(command)?.wait(timeout).with_context(|| self.name.clone())
    }

    /// Runs a shell command that has to succeed and gives its output.
    pub fn check(&self, command: &str) -> Result<String> {
        let output = self.run(command)?;
        ensure!(
            output.status == 0,
            "{}: exit code {}: {command}\n{}",
            self.name,
            output.status,
            output.stdout
        );
        Ok(output.stdout)
    }

    /// Starts a shell command in the guest, beside others.
    pub fn spawn(&self, command: &str) -> Result<Job> {
        self.agent.spawn(command).with_context(|| self.name.clone())
    }

    /// Runs a QMP command and gives what it returns.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.execute(command, arguments).with_context(|| self.name.clone())
    }

    /// Resets the machine, as its button does, and waits until it is up again.
    pub fn reset(&mut self) -> Result<()> {
        let boots = self.agent.boots();
        self.qmp("system_reset", &json!({}))?;
        self.wait_for_boot(boots + 1)
    }

    /// Moves the guest into the QEMU that waits for it at `destination` and waits for the end of it.
    pub fn migrate(&self, destination: &Path, timeout: Duration) -> Result<()> {
        let uri = format!("unix:{}", destination.display());
        self.qmp("migrate", &json!({ "uri": uri }))?;
        wait_for_some("the end of the migration", timeout, || {
            let info = self.qmp("query-migrate", &json!({}))?;
            let status = info["status"].as_str().unwrap_or_default();
            ensure!(!matches!(status, "failed" | "cancelled"), "migration of {}: {info}", self.name);
            Ok((status == "completed").then_some(()))
        })
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends a signal to QEMU: STOP and CONT make a front end that hangs.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Kills QEMU with SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        Ok(())
    }

    /// The guest's console and QEMU's own messages so far.
    pub fn console(&self) -> Result<String> {
        self.process.log()
    }

    fn wait_for_boot(&mut self, boots: u32) -> Result<()> {
        wait_for_some(&format!("{} to come up", self.name), BOOT_TIMEOUT, || {
            self.process.check_running()?;
            Ok((self.agent.boots() >= boots).then_some(()))
        })
        .with_context(|| self.process.log().unwrap_or_default())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.agent.close();
    }
}

impl Nic {
    fn add_to(&self, qemu: &mut Command, index: usize, version: Version) {
        let role = match self.role {
            Role::Server => "server=on,wait=off",
            Role::Client => version.reconnect(),
        };
        let mut device = format!("virtio-net-pci,netdev=net{index},mac={},romfile=", self.mac);
        if self.queues > 1 {
            device.push_str(",mq=on");
        }
        if let Some(mtu) = self.mtu {
            device.push_str(&format!(",host_mtu={mtu}"));
        }
        if !version.can_use_msix() {
            device.push_str(",vectors=0");
        }
        for property in &self.properties {
            device.push(',');
            device.push_str(property);
        }
        qemu.arg("-chardev")
            .arg(option(&format!("socket,id=vhost{index},{role},path="), &self.socket))
            .args([
                "-netdev",
                &format!("vhost-user,id=net{index},chardev=vhost{index},queues={}", self.queues),
            ])
            .args(["-device", &device]);
    }
}

/// QEMU's version: major, minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    fn of(program: &Path) -> Result<Self> {
        let output = Command::new(program).arg("--version").output();
        let version = output.ok().and_then(|output| Self::parse(&String::from_utf8_lossy(&output.stdout)));
        let none = || format!("no {} that tells its version: run tests/setup.sh guest", program.display());
        version.with_context(none)
    }

    /// From "QEMU emulator version 7.2.22 (...)".
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.strip_prefix("QEMU emulator version ")?.split('.').map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// Connect again as soon as this version can; it gained milliseconds in 9.2.
    fn reconnect(self) -> &'static str {
        if self >= Self(9, 2) { "reconnect-ms=20" } else { "reconnect=1" }
    }

    /// Older ones crash when a vhost-user device of an emulated guest uses MSI-X: give them the interrupt line. (7.2 crashes,
    /// 10.0 does not.)
    fn can_use_msix(self) -> bool {
        self >= Self(10, 0)
    }

    fn has_igb(self) -> bool {
        self >= Self(8, 0)
    }
}

/// An option that ends in a path; QEMU takes a doubled comma as one.
fn option(prefix: &str, path: &Path) -> String {
    format!("{prefix}{}", path.display().to_string().replace(',', ",,"))
}

/// Connects to a socket that `process` makes.
fn connect(process: &mut Process, socket: &Path) -> Result<UnixStream> {
    wait_for_some(&format!("the socket {}", socket.display()), BOOT_TIMEOUT, || {
        process.check_running()?;
        Ok(UnixStream::connect(socket).ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_decide_about_quirks() {
        let old = Version::parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\n").unwrap();
        assert_eq!((old, old.can_use_msix(), old.reconnect()), (Version(7, 2), false, "reconnect=1"));
        assert!(!old.has_igb());
        let new = Version::parse("QEMU emulator version 10.0.2\n").unwrap();
        assert_eq!((new, new.can_use_msix(), new.reconnect()), (Version(10, 0), true, "reconnect-ms=20"));
        assert!(new.has_igb());
        assert_eq!(Version::parse("something else 1.2"), None);
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        assert_eq!(option("path=", Path::new("/a,b")), "path=/a,,b");
    }
}
