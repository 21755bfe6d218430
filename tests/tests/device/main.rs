//! Devices that guests get: found in a sysfs of the test's own making, in which the test plays the kernel; their interfaces are
//! real ones. A virtual function `v1` and its representor `r1` are the two ends of a cable.
//!
//! ```text
//! vm1 ── vhostd ── macvtap on v1 ══ r1 ── br0 of Open vSwitch ── r2 ══ v2 under a macvtap ── vhostd ── vm2
//! ```
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod igb;

use std::env;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::exchange::{self, GUESTS};
use e2e::kill::{kill, killed_at_every_step};
use e2e::netns::Netns;
use e2e::osvif::{VIF as ID, envelope};
use e2e::ovs::{Dpdk, Ovs, datapath_type};
use e2e::peer::{Peer, PeerConfig};
use e2e::qemu::{MARK, SPARE_MAC};
use e2e::sysfs::{PF, Sysfs};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
/// The virtual functions.
const VFS: [&str; 2] = ["0000:03:00.1", "0000:03:00.2"];
const SWITCH: &str = "0a0b0c0d";
const PRECONDITION: i32 = 7;
const CONFLICT: i32 = 4;

struct Host {
    daemon: Daemon,
    sysfs: Sysfs,
}

impl Host {
    /// A card with two virtual functions, each bound to `igbvf`, with an interface and a representor. Macvtaps' devices are named
    /// by interface numbers in one directory for all namespaces of the machine: those behind `others` are this test's.
    fn start(others: u32, configuration: impl FnOnce(&Arc<Netns>) -> Result<String>) -> Result<Self> {
        let (netns, sysfs) = (Arc::new(Netns::new()?), Sysfs::new()?);
        netns.run(&format!(
            "for n in $(seq {others}); do echo link add f$n type bridge; done | ip -batch -"
        ))?;
        netns.run("ip link add p0 type veth peer name uplink")?;
        let pf = sysfs.device(PF)?;
        sysfs.interface(&pf, "p0", "52:54:00:00:00:f0")?;
        sysfs.switch_port("p0", SWITCH, "p0")?;
        sysfs.answer_as_kernel(&["igbvf", "vfio-pci", "uio_pci_generic"], "igbvf")?;
        for (number, address) in (0_u32..).zip(VFS) {
            let (vf, representor) = (format!("v{}", number + 1), format!("r{}", number + 1));
            netns.run(&format!("ip link add {vf} type veth peer name {representor}"))?;
            let dir = sysfs.virtual_function(number, address)?;
            sysfs.interface(&dir, &vf, &format!("52:54:00:00:00:a{number}"))?;
            sysfs.bound(address, "igbvf")?;
            sysfs.in_group(address, number + 7)?;
            sysfs.interface(&pf, &representor, &format!("52:54:00:00:00:b{number}"))?;
            sysfs.switch_port(&representor, SWITCH, &format!("pf0vf{number}"))?;
        }
        let devices = format!("[devices]\nsysfs = {:?}\n{}", sysfs.path(""), configuration(&netns)?);
        Ok(Self { daemon: Daemon::start_on(netns, &devices)?, sysfs })
    }

    fn plug(&self, document: &Value) -> Result<Output> {
        plug(&self.daemon, document)
    }

    fn dry_run(&self, document: &Value) -> Result<String> {
        let path = self.daemon.socket("document.json");
        fs::write(&path, document.to_string())?;
        self.daemon.run(&["plug", "-f", path.to_str().unwrap(), "--dry-run"])
    }

    fn plugged(&self, document: &Value) -> Result<()> {
        plugged(&self.daemon, document)
    }

    fn state(&self) -> Result<String> {
        state(&self.sysfs, self.daemon.host())
    }

    /// What the kernel does in sysfs when an interface gets another name.
    fn renamed(&self, from: &str, to: &str) -> Result<()> {
        renamed(&self.sysfs, from, to)
    }

    fn guest(&self, name: &str) -> Result<Peer> {
        guest(&self.daemon, name)
    }
}

fn plug(daemon: &Daemon, document: &Value) -> Result<Output> {
    let path = daemon.socket("document.json");
    fs::write(&path, document.to_string())?;
    daemon.command(&["plug", "-f", path.to_str().unwrap()])
}

fn plugged(daemon: &Daemon, document: &Value) -> Result<()> {
    let output = plug(daemon, document)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn guest(daemon: &Daemon, name: &str) -> Result<Peer> {
    let path = daemon.socket(name);
    let connect = || Ok(Peer::connect(&path, PeerConfig::default()).ok());
    let mut guest = wait_for_some("the port's socket", SOON, connect)?;
    guest.offer_all();
    daemon.wait_for_forwarding(&[name])?;
    Ok(guest)
}

/// Driver and override of each device; names, addresses, MTUs of all links and whether they are up.
fn state(sysfs: &Sysfs, host: &Netns) -> Result<String> {
    let drivers = VFS.map(|vf| {
        let dir = sysfs.path(&format!("bus/pci/devices/{vf}"));
        let driver = fs::read_link(dir.join("driver")).unwrap_or_default();
        let only = fs::read_to_string(dir.join("driver_override")).unwrap_or_default();
        (driver, only.trim().replace("(null)", ""))
    });
    // Whether a veth's other end is up is told in its flags, too.
    let links = "ip -oneline link show type veth | sed 's/,LOWER_UP//;s/NO-CARRIER,//;s/ state [A-Z]*//;s/ qdisc [a-z]*//'";
    Ok(format!("{drivers:?}\n{}", host.run(links)?))
}

fn renamed(sysfs: &Sysfs, from: &str, to: &str) -> Result<()> {
    Ok(fs::rename(sysfs.path(&format!("class/net/{from}")), sysfs.path(&format!("class/net/{to}")))?)
}

fn said(output: &Output, code: i32) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{:?}, not {code}: {errors}", output.status);
    Ok(errors)
}

/// The daemon's configuration for this switch, behind that for devices.
fn with_switch(ovs: &Ovs) -> String {
    let (database, kind) = (ovs.socket().display().to_string(), datapath_type());
    format!("driver = \"vfio-pci\"\n[ovs]\ndatabase = \"unix:{database}\"\ndatapath_type = \"{kind}\"\n")
}

/// A VIFHostDevice as nova makes one of a port of vnic type `direct`, but for `dev_type`.
fn host_device(dev_type: &str, dev_address: &str) -> Value {
    let network = envelope("Network", "1.1", &json!({"id": ID, "bridge": "br0", "mtu": 1450}));
    let mut data = json!({"id": ID, "address": "22:52:25:62:e2:aa", "network": network, "dev_type": dev_type,
                          "dev_address": dev_address});
    data["port_profile"] = envelope("VIFPortProfileBase", "1.1", &json!({}));
    envelope("VIFHostDevice", "1.0", &data)
}

#[test]
fn a_device_is_given_to_the_guest_and_given_back_also_after_a_kill() -> Result<()> {
    let mut host = Host::start(0, |_| Ok("driver = \"vfio-pci\"\n".into()))?;
    let before = host.state()?;
    let vif = host_device("generic", VFS[0]);
    let dry = host.dry_run(&vif)?;
    assert!(dry.contains("bind 0000:03:00.1 to driver vfio-pci, which is bound to igbvf"), "{dry}");
    assert_eq!(host.state()?, before);
    for round in 0..2 {
        host.plugged(&vif)?;
        let shown = host.daemon.json(&["show", ID])?;
        assert_eq!(shown["spec"]["to"]["driver"], "vfio-pci");
        assert_eq!(shown["spec"]["to"]["found"], json!({"driver": "igbvf", "iommu_group": 7}));
        assert_eq!(shown["status"]["phase"], "forwarding");
        assert!(host.daemon.run(&["show", ID])?.contains("/dev/vfio/7"));
        assert!(host.state()?.contains("drivers/vfio-pci"));
        host.plugged(&vif)?;
        if round == 1 {
            host.daemon.kill_and_restart()?;
            host.daemon.wait_for_forwarding(&[ID])?;
            assert_eq!(host.daemon.json(&["show", ID])?["spec"], shown["spec"]);
        }
        host.daemon.run(&["unplug", ID])?;
        assert_eq!(host.state()?, before);
    }
    Ok(())
}

#[test]
fn a_kill_in_the_middle_leaves_nothing_behind() -> Result<()> {
    let mut host = Host::start(0, |_| Ok("driver = \"vfio-pci\"\n".into()))?;
    let before = host.state()?;
    // The driver does not let go: nobody reads what is written there.
    let unbind = host.sysfs.path("bus/pci/drivers/stuck/unbind");
    host.sysfs.driver("stuck")?;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &unbind,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )?;
    let driver = host.sysfs.path(&format!("bus/pci/devices/{}/driver", VFS[0]));
    fs::remove_file(&driver)?;
    host.sysfs.bound(VFS[0], "stuck")?;
    let body = json!({"vif": host_device("generic", VFS[0]), "instance_info": null}).to_string();
    std::thread::scope(|scope| -> Result<()> {
        let daemon = &host.daemon;
        scope.spawn(move || daemon.http("POST", "/v1/os-vif/plug", &body));
        let only = host.sysfs.path(&format!("bus/pci/devices/{}/driver_override", VFS[0]));
        wait_for_some("the change of drivers to have begun", SOON, || {
            Ok((fs::read_to_string(&only)?.trim() == "vfio-pci").then_some(()))
        })?;
        kill(daemon)
    })?;
    host.daemon.kill_and_restart_after(|| {
        fs::remove_file(&driver)?;
        host.sysfs.bound(VFS[0], "igbvf")?;
        Ok(())
    })?;
    // It goes on where it was, from what it recorded; what had the device then cannot have it any more.
    host.daemon.wait_for_forwarding(&[ID])?;
    assert_eq!(host.daemon.json(&["show", ID])?["spec"]["to"]["found"]["driver"], "stuck");
    fs::remove_dir_all(host.sysfs.path("bus/pci/drivers/stuck"))?;
    let unfinished = host.daemon.command(&["unplug", ID])?;
    assert!(!unfinished.status.success(), "a driver that is gone takes nothing back");
    host.sysfs.driver("stuck")?;
    wait_for_some("the device to be given back", SOON, || {
        Ok((host.daemon.json(&["ls"])?.as_array().is_some_and(Vec::is_empty)).then_some(()))
    })?;
    fs::remove_file(&driver)?;
    host.sysfs.bound(VFS[0], "igbvf")?;
    assert_eq!(host.state()?, before);
    Ok(())
}

#[test]
fn a_daemon_killed_at_every_step_leaves_a_device_with_one_driver_or_the_other() -> Result<()> {
    let Host { mut daemon, sysfs } = Host::start(0, |_| Ok(String::new()))?;
    let host = daemon.netns();
    let to = json!({"kind": "device", "address": VFS[0], "driver": "vfio-pci"});
    killed_at_every_step(&mut daemon, &json!({"to": to}), || state(&sysfs, &host))
}

/// In sysfs the representor keeps its name, which is the port's.
#[test]
fn a_daemon_killed_at_every_step_leaves_a_device_behind_a_socket_whole_or_not_at_all() -> Result<()> {
    let mut ovs = None;
    let Host { mut daemon, sysfs } = Host::start(300, |netns| {
        let started = Ovs::start(netns, Dpdk::Off)?;
        let configuration = with_switch(&started);
        ovs = Some(started);
        Ok(configuration)
    })?;
    let (ovs, host) = (ovs.unwrap(), daemon.netns());
    host.run("ip link set v1 up")?;
    let socket = json!({"role": "listen", "path": daemon.socket("vm1")});
    let to = json!({"kind": "device", "address": VFS[0], "port": {"bridge": "br0", "iface_id": "lsp1"}});
    let spec = json!({"socket": socket, "mac": "52:54:00:00:00:01", "mtu": 1400, "to": to});
    killed_at_every_step(&mut daemon, &spec, || Ok(format!("{}\n{}", state(&sysfs, &host)?, ovs.state()?)))
}

#[test]
fn another_driver_than_the_guests_is_put_right_and_told() -> Result<()> {
    let host = Host::start(0, |_| Ok("driver = \"vfio-pci\"\n".into()))?;
    let before = host.state()?;
    host.plugged(&host_device("generic", VFS[0]))?;
    let plugged = host.state()?;
    let mut events = host.daemon.events()?;
    let driver = host.sysfs.path(&format!("bus/pci/devices/{}/driver", VFS[0]));
    for other in [Some("igbvf"), None] {
        fs::remove_file(&driver)?;
        other.map_or(Ok(()), |other| host.sysfs.bound(VFS[0], other))?;
        let now = other.unwrap_or("none");
        events.wait_for("repaired", &format!("is bound to driver {now}, not to vfio-pci"))?;
        assert_eq!(host.state()?, plugged);
    }
    // A device that has gone is said to be, until it is back.
    let at = host.sysfs.path(&format!("bus/pci/devices/{}", VFS[0]));
    let away = at.with_file_name("away");
    fs::rename(&at, &away)?;
    events.wait_for("failed", "this host has no PCI device 0000:03:00.1")?;
    let conditions = host.daemon.json(&["show", ID])?["status"]["conditions"].to_string();
    ensure!(conditions.matches("no PCI device 0000:03:00.1").count() == 1, "{conditions}");
    fs::rename(&away, &at)?;
    host.daemon.wait_for_forwarding(&[ID])?;
    host.daemon.run(&["unplug", ID])?;
    assert_eq!(host.state()?, before);
    Ok(())
}

#[test]
fn what_no_guest_can_have_is_refused_and_untouched() -> Result<()> {
    let host = Host::start(0, |_| Ok(String::new()))?;
    let before = host.state()?;
    let generic = |more: Value| {
        let mut to = json!({"kind": "device", "address": VFS[0]});
        to.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"id": "vm1", "spec": {"to": to}})
    };
    let refused = |document: &Value, code, text: &str| -> Result<()> {
        let errors = said(&host.plug(document)?, code)?;
        ensure!(errors.contains(text), "{errors}");
        ensure!(host.state()? == before, "something was touched");
        ensure!(host.daemon.json(&["ls"])? == json!([]));
        Ok(())
    };
    refused(&generic(json!({"address": "0000:09:00.0"})), PRECONDITION, "no PCI device 0000:09:00.0")?;
    refused(&generic(json!({"driver": "igc"})), PRECONDITION, "modprobe igc")?;
    refused(&host_device("ethernet", VFS[0]), PRECONDITION, "p0 has no virtual function 0")?;
    let mut vif = host_device("ethernet", VFS[0]);
    vif["versioned_object.data"]["port_profile"] =
        envelope("VIFPortProfile8021Qbh", "1.1", &json!({"profile_id": "web"}));
    let instance = envelope("InstanceInfo", "1.0", &json!({"uuid": ID}));
    let told = json!({"vif": vif, "instance_info": instance});
    let dry = host.dry_run(&told)?;
    let step = "tell the switch at 0000:03:00.0 by 802.1Qbh of 22:52:25:62:e2:aa on 0000:03:00.1";
    ensure!(dry.contains(step), "{dry}");
    refused(&told, PRECONDITION, "p0 cannot be told a port profile: its driver does not do 802.1Qbh")?;
    let physical = json!({"id": "vm1", "spec": {"mac": "52:54:00:00:00:01",
                          "to": {"kind": "device", "address": PF, "dev_type": "ethernet"}}});
    refused(&physical, PRECONDITION, "no virtual function")?;
    host.sysfs.in_group("0000:03:00.0", 7)?;
    host.sysfs.bound(PF, "igb")?;
    refused(&generic(json!({"driver": "vfio-pci"})), CONFLICT, "igb has 0000:03:00.0")?;
    host.daemon.host().run("ip addr add 192.0.2.1/24 dev v1")?;
    refused(&generic(json!({})), CONFLICT, "192.0.2.1")?;
    host.plugged(&generic(json!({"force": true})))?;
    host.daemon.host().run("ip addr del 192.0.2.1/24 dev v1")?;
    let errors = said(&host.plug(&host_device("generic", VFS[0]))?, CONFLICT)?;
    assert!(errors.contains("belongs to plug vm1"), "{errors}");
    host.daemon.run(&["unplug", "vm1"])?;
    Ok(())
}

#[test]
fn a_nested_containers_device_is_found_by_its_address() -> Result<()> {
    let host = Host::start(0, |_| Ok(String::new()))?;
    let before = host.state()?;
    let profile = envelope("VIFPortProfileK8sDPDK", "1.1", &json!({"l3_setup": false}));
    let vif = |mac: &str| {
        let data = json!({"id": ID, "address": mac, "port_profile": profile});
        envelope("VIFNestedDPDK", "1.0", &data)
    };
    host.plugged(&vif("52:54:00:00:00:a1"))?;
    let to = host.daemon.json(&["show", ID])?["spec"]["to"].take();
    assert_eq!((&to["address"], &to["driver"]), (&json!(VFS[1]), &json!("uio_pci_generic")));
    assert_eq!(to["found"]["driver"], "igbvf");
    host.plugged(&vif("52:54:00:00:00:a1"))?;
    host.daemon.run(&["unplug", ID])?;
    assert_eq!(host.state()?, before);
    let unknown = said(&host.plug(&vif("52:54:00:00:00:ff"))?, PRECONDITION)?;
    assert!(unknown.contains("52:54:00:00:00:ff"), "{unknown}");
    fs::write(host.sysfs.path("class/net/v1/address"), "52:54:00:00:00:a1\n")?;
    let ambiguous = said(&host.plug(&vif("52:54:00:00:00:a1"))?, CONFLICT)?;
    assert!(ambiguous.contains("v1 and v2"), "{ambiguous}");
    Ok(())
}

#[test]
fn guests_behind_sockets_reach_open_vswitch_through_their_virtual_functions() -> Result<()> {
    let mut ovs = None;
    let mut host = Host::start(120, |netns| {
        let started = Ovs::start(netns, Dpdk::Off)?;
        let configuration = with_switch(&started);
        ovs = Some(started);
        Ok(configuration)
    })?;
    let ovs = ovs.unwrap();
    let before = host.state()?;
    for (number, (name, address)) in ["vm1", "vm2"].into_iter().zip(GUESTS).enumerate() {
        let mac = address.map(|byte| format!("{byte:02x}")).join(":");
        let port = json!({"bridge": "br0", "tap": format!("tap-{name}"), "iface_id": format!("lsp-{name}")});
        let spec = json!({"socket": {"role": "listen", "path": host.daemon.socket(name)}, "mac": mac,
                          "to": {"kind": "device", "address": VFS[number], "port": port}});
        host.plugged(&json!({"id": name, "spec": spec}))?;
        host.renamed(&format!("r{}", number + 1), &format!("tap-{name}"))?;
    }
    assert_eq!(ovs.vsctl("list-ports br0")?, "tap-vm1\ntap-vm2");
    let ids = ovs.vsctl("get Interface tap-vm1 external_ids")?;
    for id in ["iface-id=lsp-vm1", "iface-status=active", "attached-mac="] {
        assert!(ids.contains(id), "{ids}");
    }
    let silenced = host.daemon.host().run("cat /proc/sys/net/ipv6/conf/v1/disable_ipv6")?;
    assert_eq!(silenced, "1\n", "it would speak with the guest's address");
    exchange::exchange(&mut host.guest("vm1")?, &mut host.guest("vm2")?)?;
    host.daemon.kill_and_restart()?;
    let (mut vm1, mut vm2) = (host.guest("vm1")?, host.guest("vm2")?);
    exchange::exchange(&mut vm1, &mut vm2)?;

    // What somebody else does to them is put right, and told.
    let mut events = host.daemon.events()?;
    let links = "ip -oneline link show | grep -v 'state DOWN' | cut -d' ' -f2 | sort";
    let plugged = host.daemon.host().run(links)?;
    for (action, told) in [
        ("ip link set tap-vm1 down", "tap-vm1 is down"),
        ("ip link set vhd-vm1 mtu 1400", "vhd-vm1 has MTU 1400, the plug 1500"),
        ("ip link set tap-vm2 down name r2", "interface tap-vm2 is gone"),
        ("ip link del vhd-vm2", "interface vhd-vm2 is gone"),
    ] {
        if action.ends_with("r2") {
            host.renamed("tap-vm2", "r2")?;
        }
        host.daemon.host().run(action)?;
        events.wait_for("repaired", told).with_context(|| format!("after {action}"))?;
        if action.ends_with("r2") {
            host.renamed("r2", "tap-vm2")?;
        }
        host.daemon.wait_for_forwarding(&["vm1", "vm2"])?;
        exchange::exchange(&mut vm1, &mut vm2).with_context(|| format!("after {action}"))?;
        assert_eq!(host.daemon.host().run(links)?, plugged, "after {action}");
    }
    ovs.vsctl("--no-wait del-port tap-vm1")?;
    events.wait_for("repaired", "it is not in Open vSwitch as it was")?;
    host.daemon.wait_for_forwarding(&["vm1"])?;
    exchange::exchange(&mut vm1, &mut vm2)?;
    for name in ["vm1", "vm2"] {
        host.daemon.run(&["unplug", name])?;
    }
    assert_eq!(host.daemon.host().run("cat /proc/sys/net/ipv6/conf/v1/disable_ipv6")?, "0\n");
    // A device below a macvtap is set up, and stays so.
    host.daemon.host().run("ip link set v1 down; ip link set v2 down")?;
    assert_eq!(host.state()?, before);
    assert_eq!(ovs.vsctl("list-br")?, "");
    Ok(())
}

/// A switch with DPDK opens representors itself, by what it is told of them; here it finds none.
#[test]
fn a_switch_with_dpdk_is_told_of_the_representor() -> Result<()> {
    let mut ovs = None;
    let host = Host::start(0, |netns| {
        let started = Ovs::start(netns, Dpdk::On)?;
        let database = started.socket().display().to_string();
        ovs = Some(started);
        Ok(format!("[ovs]\ndatabase = \"unix:{database}\"\ndatapath_type = \"netdev\"\n"))
    })?;
    let before = host.state()?;
    let to = json!({"kind": "device", "address": VFS[1], "port": {"bridge": "br0"}});
    let errors = said(&host.plug(&json!({"id": ID, "spec": {"to": to}}))?, PRECONDITION)?;
    assert!(
        errors.contains("vfrdc065497-3c") && errors.contains(&format!("{PF},representor=[1]")),
        "{errors}"
    );
    assert_eq!(host.state()?, before);
    assert_eq!(ovs.unwrap().vsctl("list-br")?, "");
    Ok(())
}

/// Not a PCI device, but for the rest what a card with an embedded switch is: its virtual functions are told by a tree of ours, its
/// interfaces and what they say of themselves are the kernel's.
#[test]
fn a_netdevsim_holds_its_virtual_function_and_its_representor_is_named() -> Result<()> {
    if !Path::new("/sys/bus/netdevsim").exists() {
        eprintln!(
            "SKIPPED: this kernel has no netdevsim; it is in the test guest (tests/setup.sh netdevsim)"
        );
        return Ok(());
    }
    let netns = Arc::new(Netns::new()?);
    let ovs = Ovs::start(&netns, Dpdk::Off)?;
    netns.run(
        "echo '10 1' >/sys/bus/netdevsim/new_device; echo 2 >/sys/bus/netdevsim/devices/netdevsim10/sriov_numvfs",
    )?;
    let physical = netns.run("ls /sys/bus/netdevsim/devices/netdevsim10/net")?.trim().to_owned();
    netns.run(&format!(
        "devlink dev eswitch set netdevsim/netdevsim10 mode switchdev; ip link set {physical} up; \
         ip link set {physical} vf 0 mac 52:54:00:00:00:f0 vlan 5 qos 3"
    ))?;
    let sysfs = Sysfs::new()?;
    let card = sysfs.device(PF)?;
    fs::create_dir_all(sysfs.path(&format!("{card}/net/{physical}")))?;
    sysfs.virtual_function(0, VFS[0])?;
    fs::remove_dir(sysfs.path("class/net"))?;
    sysfs.link("class/net", "/sys/class/net")?;
    let configuration = format!(
        "[devices]\nsysfs = {:?}\ntrust = true\n[ovs]\ndatabase = \"unix:{}\"\n",
        sysfs.path(""),
        ovs.socket().display()
    );
    let mut host = Host { daemon: Daemon::start_on(netns, &configuration)?, sysfs };
    // Being up once gives an interface its queueing discipline.
    let shown = "ip -oneline link show | grep -v ovs-system | sed 's/ qdisc [a-z]*//'";
    let links = |host: &Host| host.daemon.host().run(shown);
    let before = links(&host)?;
    for text in ["vlan 5, qos 3", "spoof checking off", "trust off"] {
        assert!(before.contains(text), "{text}: {before}");
    }

    let port = json!({"bridge": "br0", "tap": "tap1", "iface_id": "lsp1"});
    let to = json!({"kind": "device", "address": VFS[0], "dev_type": "ethernet", "vlan": 7, "port": port,
                    "spoof_check": true});
    let document = json!({"id": "vm1", "spec": {"mac": "52:54:00:00:00:01", "mtu": 1450, "to": to}});
    let dry = host.dry_run(&document)?;
    assert!(dry.contains("address 52:54:00:00:00:01, VLAN 7, spoof check on, trust on"), "{dry}");
    for _ in 0..2 {
        host.plugged(&document)?;
        host.daemon.wait_for_forwarding(&["vm1"])?;
        // What the guest may not change nobody else changes for long.
        let mut events = host.daemon.events()?;
        host.daemon.host().run(&format!("ip link set {physical} vf 0 mac 52:54:00:00:00:99 vlan 9"))?;
        events.wait_for("repaired", "address 52:54:00:00:00:99, VLAN 9, priority 0, not with")?;
        let now = links(&host)?;
        for text in ["52:54:00:00:00:01", "vlan 7", "spoof checking on", "trust on"] {
            assert!(now.contains(text), "{text}: {now}");
        }
        assert_eq!(host.daemon.host().run("cat /sys/class/net/tap1/phys_port_name")?.trim(), "pf0vf0");
        assert_eq!(ovs.vsctl("list-ports br0")?, "tap1");
        host.daemon.kill_and_restart()?;
    }
    let found = host.daemon.json(&["show", "vm1"])?["spec"]["to"]["found"].take();
    let function = &found["function"];
    assert_eq!(
        (&function["vlan"], &function["spoof_check"], &function["trust"]),
        (&json!(5), &json!(false), &json!(false))
    );
    host.daemon.run(&["unplug", "vm1"])?;
    assert_eq!(links(&host)?, before);
    netdevsim_has_no_port_profiles(&host)?;
    assert_eq!(links(&host)?, before);
    assert_eq!(ovs.vsctl("list-br")?, "");
    host.daemon.host().run("echo 10 >/sys/bus/netdevsim/del_device")?;
    Ok(())
}

/// Its virtual function is not even given the guest's address, which nobody would take back.
fn netdevsim_has_no_port_profiles(host: &Host) -> Result<()> {
    let profile = json!({"protocol": "802.1Qbh", "profile_id": "web", "instance_id": "01020304-0506-0708-090a-0b0c0d0e0f10"});
    let to = json!({"kind": "device", "address": VFS[0], "dev_type": "ethernet", "profile": profile});
    let document = json!({"id": "vm1", "spec": {"mac": "52:54:00:00:00:01", "to": to}});
    let errors = said(&host.plug(&document)?, PRECONDITION)?;
    ensure!(errors.contains("its driver does not do 802.1Qbh"), "{errors}");
    ensure!(host.daemon.json(&["ls"])? == json!([]));
    Ok(())
}

/// The card that the test guest has for this: drivers of a real kernel take it and let go of it.
#[test]
fn a_device_of_the_test_guest_changes_its_driver() -> Result<()> {
    if env::var_os(MARK).is_none() {
        eprintln!("SKIPPED: no device of this machine is ours to give away; the test guest has one");
        return Ok(());
    }
    let netns = Arc::new(Netns::new()?);
    // It came up with the guest; its interface is where the daemon looks from now on.
    let look = format!("ip -oneline link | grep {SPARE_MAC} | cut -d: -f2");
    let interface = output("sh", &["-c", &look])?;
    let device = fs::canonicalize(format!("/sys/class/net/{interface}/device"))?;
    let address = device.parent().and_then(Path::file_name).unwrap().to_str().unwrap().to_owned();
    output("ip", &["link", "set", &interface, "netns", &netns.pid().to_string()])?;
    let driver = || fs::read_link(format!("/sys/bus/pci/devices/{address}/driver"));
    let is_bound = |name: &str| driver().is_ok_and(|driver| driver.ends_with(name));
    let mut daemon = Daemon::start_on(netns, "")?;

    let nested = envelope("VIFNestedDPDK", "1.0", &json!({"id": ID, "address": SPARE_MAC}));
    plugged(&daemon, &nested)?;
    assert!(is_bound("uio_pci_generic"), "{:?}", driver());
    assert_eq!(daemon.json(&["show", ID])?["spec"]["to"]["found"]["driver"], "virtio-pci");
    daemon.run(&["unplug", ID])?;
    assert!(is_bound("virtio-pci"), "{:?}", driver());

    let generic = |driver: &str| json!({"id": "vm1", "spec": {"to": {"kind": "device", "address": address, "driver": driver}}});
    let errors = said(&plug(&daemon, &generic("pcieport"))?, PRECONDITION)?;
    assert!(errors.contains("did not take") && is_bound("virtio-pci"), "{errors}");
    plugged(&daemon, &generic("vfio-pci"))?;
    assert!(is_bound("vfio-pci"), "{:?}", driver());
    let group = daemon.json(&["show", "vm1"])?["spec"]["to"]["found"]["iommu_group"].to_string();
    assert!(Path::new(&format!("/dev/vfio/{group}")).exists(), "{group}");
    daemon.kill_and_restart()?;
    daemon.run(&["unplug", "vm1"])?;
    assert!(is_bound("virtio-pci"), "{:?}", driver());
    let only = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/driver_override"))?;
    assert_eq!(only.trim(), "(null)");
    Ok(())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
