//! The same with a card whose drivers are the kernel's: igb, with two virtual functions, which the test guest has. The interfaces
//! of devices come into its first network namespace. There the tests have the card, one after the other.
//!
//! ```text
//! vm1 ── vhostd ── macvtap on function 0 ══ the card's switch ══ function 1 under a macvtap ── vhostd ── vm2
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

use e2e::kill::killed_at_steps;

use super::*;

/// Intel 82576: what sysfs says is the number of the device.
const CARD: &str = "0x10c9";
const DEVICES: &str = "/sys/bus/pci/devices";
/// The functions' addresses while they are nobody's.
const OWN: [&str; 2] = ["52:54:00:00:00:a0", "52:54:00:00:00:a1"];

static TAKEN: Mutex<()> = Mutex::new(());

struct Card {
    host: Arc<Netns>,
    /// The physical function.
    address: String,
    interface: String,
    functions: [String; 2],
    _alone: MutexGuard<'static, ()>,
}

impl Card {
    /// The card with two functions bound to `igbvf`, the first in VLAN 5, and a daemon with this in its section `[devices]`.
    fn take(configuration: &str) -> Result<Option<(Self, Daemon)>> {
        if env::var_os(MARK).is_none() {
            eprintln!("SKIPPED: no card of this machine is ours to give away; the test guest has one");
            return Ok(None);
        }
        let alone = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let is_card = |address: &String| {
            fs::read_to_string(format!("{DEVICES}/{address}/device"))
                .is_ok_and(|number| number.trim() == CARD)
        };
        let Some(address) = names(DEVICES)?.into_iter().find(is_card) else {
            eprintln!("SKIPPED: the test guest's QEMU has no igb (tests/setup.sh igb)");
            return Ok(None);
        };
        let (host, interface, dir) =
            (Arc::new(Netns::own()?), interface(&address)?, format!("{DEVICES}/{address}"));
        // While the functions are made, the physical one does not answer to them: drivers come later.
        host.run(&format!(
            "cd {dir}; ip link set {interface} up
             echo 0 >sriov_drivers_autoprobe; echo 2 >sriov_numvfs; echo 1 >sriov_drivers_autoprobe
             ip link set {interface} vf 0 mac {} vlan 5 qos 3; ip link set {interface} vf 1 mac {}
             for n in 0 1; do basename $(readlink virtfn$n) >/sys/bus/pci/drivers_probe; done",
            OWN[0], OWN[1]
        ))?;
        let function = |n| end(&format!("{dir}/virtfn{n}"))?.context("no virtual function");
        let functions = [function(0)?, function(1)?];
        let card = Self { host: host.clone(), address, interface, functions, _alone: alone };
        Ok(Some((card, Daemon::start_on(host, &format!("[devices]\n{configuration}\n"))?)))
    }

    /// What the physical function holds of each.
    fn held(&self) -> Result<[String; 2]> {
        let text = self.host.run(&format!("ip link show {} | grep ' vf '", self.interface))?;
        Ok(text.lines().map(str::to_owned).collect::<Vec<_>>().try_into().unwrap())
    }

    fn driver(&self, number: usize) -> Result<Option<String>> {
        end(&format!("{DEVICES}/{}/driver", self.functions[number]))
    }

    /// The same, each one's driver, override, and address of its own; and what is on top of them.
    fn state(&self) -> Result<String> {
        let [first, second] = self.held()?;
        let on_top = self.host.run("ip -brief link show type macvtap | cut -d@ -f1")?;
        let mut state = [first, second, on_top].join("\n");
        for (number, function) in self.functions.iter().enumerate() {
            let only = fs::read_to_string(format!("{DEVICES}/{function}/driver_override"))?;
            let own = interface(function)
                .and_then(|name| Ok(fs::read_to_string(format!("/sys/class/net/{name}/address"))?));
            let own = own.unwrap_or_default();
            state.push_str(&format!("\n{:?} {} {}", self.driver(number)?, only.trim(), own.trim()));
        }
        Ok(state)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Whoever takes it next would say so.
        let _ = fs::write(format!("{DEVICES}/{}/sriov_numvfs", self.address), "0");
    }
}

fn names(dir: &str) -> Result<Vec<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The device's only one.
fn interface(address: &str) -> Result<String> {
    names(&format!("{DEVICES}/{address}/net"))?.pop().with_context(|| format!("{address} has none"))
}

/// Last part of what a link says, if there is one.
fn end(link: &str) -> Result<Option<String>> {
    match fs::read_link(link) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        target => Ok(Some(target?.file_name().unwrap().to_str().unwrap().to_owned())),
    }
}

/// The plug of a guest with this address, whose way out of its socket is a function.
fn behind_socket(daemon: &Daemon, name: &str, mac: &str, function: &str, dev_type: &str) -> Value {
    json!({"socket": {"role": "listen", "path": daemon.socket(name)}, "mac": mac,
           "to": {"kind": "device", "address": function, "dev_type": dev_type}})
}

#[test]
fn an_igb_function_is_in_the_guests_network_and_goes_back() -> Result<()> {
    let Some((card, mut daemon)) = Card::take("")? else { return Ok(()) };
    let before = card.state()?;
    assert!(before.contains("vlan 5, qos 3"), "{before}");
    let mut vif = host_device("ethernet", &card.functions[0]);
    vif["versioned_object.data"]["network"]["versioned_object.data"]["vlan"] = json!(7);
    for _ in 0..2 {
        plugged(&daemon, &vif)?;
        daemon.wait_for_forwarding(&[ID])?;
        let [first, second] = card.held()?;
        ensure!(first.contains("22:52:25:62:e2:aa") && first.contains("vlan 7,"), "{first}");
        ensure!(second.contains(OWN[1]) && !second.contains("vlan"), "{second}");
        assert_eq!(card.driver(0)?.as_deref(), Some("igbvf"), "nobody asked for another");
        daemon.kill_and_restart()?;
    }
    let function = daemon.json(&["show", ID])?["spec"]["to"]["found"]["function"].take();
    assert_eq!((&function["mac"], &function["vlan"]), (&json!(OWN[0]), &json!(5)), "{function}");
    daemon.run(&["unplug", ID])?;
    assert_eq!(card.state()?, before);
    Ok(())
}

#[test]
fn an_igb_function_is_left_to_vfio_and_goes_back_also_after_a_kill() -> Result<()> {
    let Some((card, mut daemon)) = Card::take("driver = \"vfio-pci\"")? else { return Ok(()) };
    let before = card.state()?;
    let group = end(&format!("{DEVICES}/{}/iommu_group", card.functions[0]))?.unwrap();
    for dev_type in ["generic", "ethernet"] {
        plugged(&daemon, &host_device(dev_type, &card.functions[0]))?;
        assert_eq!(card.driver(0)?.as_deref(), Some("vfio-pci"));
        let found = daemon.json(&["show", ID])?["spec"]["to"]["found"].take();
        assert_eq!(found["iommu_group"].to_string(), group);
        assert!(daemon.run(&["show", ID])?.contains(&format!("/dev/vfio/{group}")));
        assert!(Path::new(&format!("/dev/vfio/{group}")).exists(), "{group}");
        let plugged = card.state()?;
        daemon.kill_and_restart()?;
        daemon.wait_for_forwarding(&[ID])?;
        assert_eq!(card.state()?, plugged);
        daemon.run(&["unplug", ID])?;
        assert_eq!(card.state()?, before, "{dev_type}");
    }
    Ok(())
}

#[test]
fn an_igb_function_is_whole_or_as_it_was_after_a_kill_in_the_middle() -> Result<()> {
    let Some((card, mut daemon)) = Card::take("")? else { return Ok(()) };
    let spec = behind_socket(&daemon, "vm1", "52:54:00:00:00:01", &card.functions[0], "ethernet");
    // An emulated guest takes its time for each.
    killed_at_steps(&mut daemon, &spec, 3, || card.state())
}

#[test]
fn an_igb_card_that_the_host_needs_is_refused() -> Result<()> {
    let Some((card, daemon)) = Card::take("")? else { return Ok(()) };
    let before = card.state()?;
    let first = interface(&card.functions[0])?;
    let device = |address: &str| json!({"kind": "device", "address": address, "driver": "vfio-pci"});
    let refused = |to: &Value, code, text: &str| -> Result<()> {
        let errors = said(&plug(&daemon, &json!({"id": "vm1", "spec": {"to": to}}))?, code)?;
        ensure!(errors.contains(text), "{errors}");
        ensure!(card.state()? == before, "something was touched");
        ensure!(daemon.json(&["ls"])? == json!([]));
        Ok(())
    };
    let missing = card.functions[1].replace(".2", ".6");
    refused(&device(&missing), PRECONDITION, &format!("no PCI device {missing}"))?;
    refused(&device(&card.address), CONFLICT, &format!("{}, {}", card.functions[0], card.functions[1]))?;
    card.host.run(&format!("ip addr add 192.0.2.1/24 dev {first}"))?;
    refused(&device(&card.functions[0]), CONFLICT, "192.0.2.1")?;
    card.host.run(&format!("ip addr add 192.0.2.2/24 dev {}", card.interface))?;
    refused(&device(&card.address), CONFLICT, "192.0.2.2")?;
    card.host.run(&format!("ip addr flush dev {first}; ip addr flush dev {}", card.interface))?;
    // Of the two only one can have it.
    plugged(&daemon, &host_device("generic", &card.functions[0]))?;
    let errors =
        said(&plug(&daemon, &json!({"id": "vm1", "spec": {"to": device(&card.functions[0])}}))?, CONFLICT)?;
    assert!(errors.contains(&format!("belongs to plug {ID}")), "{errors}");
    daemon.run(&["unplug", ID])?;
    assert_eq!(card.state()?, before);
    // Nobody drives it, so that it has no interface for a guest behind a socket.
    card.host.run(&format!("echo {} >/sys/bus/pci/drivers/igbvf/unbind", card.functions[0]))?;
    let before = card.state()?;
    let spec = behind_socket(&daemon, "vm1", "52:54:00:00:00:01", &card.functions[0], "ethernet");
    let errors = said(&plug(&daemon, &json!({"id": "vm1", "spec": spec}))?, PRECONDITION)?;
    assert!(errors.contains("its driver is none"), "{errors}");
    assert_eq!((card.state()?, daemon.json(&["ls"])?), (before, json!([])));
    Ok(())
}

#[test]
fn an_igb_function_of_a_nested_container_is_found_by_its_address() -> Result<()> {
    let Some((card, daemon)) = Card::take("nested_driver = \"vfio-pci\"")? else { return Ok(()) };
    let before = card.state()?;
    let vif = envelope("VIFNestedDPDK", "1.0", &json!({"id": ID, "address": OWN[1]}));
    plugged(&daemon, &vif)?;
    let to = daemon.json(&["show", ID])?["spec"]["to"].take();
    assert_eq!((&to["address"], &to["found"]["driver"]), (&json!(card.functions[1]), &json!("igbvf")));
    assert_eq!(card.driver(1)?.as_deref(), Some("vfio-pci"));
    daemon.run(&["unplug", ID])?;
    assert_eq!(card.state()?, before);
    Ok(())
}

/// Two guests behind sockets, each through one of the functions.
fn joined(card: &Card, daemon: &Daemon, dev_type: &str) -> Result<()> {
    for ((name, address), function) in ["vm1", "vm2"].into_iter().zip(GUESTS).zip(&card.functions) {
        let mac = address.map(|byte| format!("{byte:02x}")).join(":");
        let spec = behind_socket(daemon, name, &mac, function, dev_type);
        plugged(daemon, &json!({"id": name, "spec": spec}))?;
    }
    Ok(())
}

#[test]
fn guests_behind_sockets_reach_each_other_through_igb_functions() -> Result<()> {
    let Some((card, mut daemon)) = Card::take("")? else { return Ok(()) };
    let before = card.state()?;
    let refused = joined(&card, &daemon, "generic").unwrap_err().to_string();
    assert!(refused.contains("keeps its own") && refused.contains("dev_type ethernet"), "{refused}");
    assert_eq!((card.state()?, daemon.json(&["ls"])?), (before.clone(), json!([])));

    joined(&card, &daemon, "ethernet")?;
    for _ in 0..2 {
        exchange::exchange(&mut guest(&daemon, "vm1")?, &mut guest(&daemon, "vm2")?)?;
        daemon.kill_and_restart()?;
    }
    daemon.run(&["unplug", "vm1"])?;
    daemon.run(&["unplug", "vm2"])?;
    assert_eq!(card.state()?, before);

    // Functions that nobody has given an address take that of the macvtap, and theirs back.
    card.host.run(&format!(
        "ip link set {0} vf 0 mac 00:00:00:00:00:00 vlan 0; ip link set {0} vf 1 mac 00:00:00:00:00:00",
        card.interface
    ))?;
    joined(&card, &daemon, "generic")?;
    exchange::exchange(&mut guest(&daemon, "vm1")?, &mut guest(&daemon, "vm2")?)?;
    daemon.run(&["unplug", "vm1"])?;
    daemon.run(&["unplug", "vm2"])?;
    for (own, function) in OWN.iter().zip(&card.functions) {
        let found = fs::read_to_string(format!("/sys/class/net/{}/address", interface(function)?))?;
        assert_eq!(found.trim(), *own);
    }
    Ok(())
}
