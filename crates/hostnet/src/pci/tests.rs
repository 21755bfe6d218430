//! Devices in a sysfs of our own making.

#[allow(unreachable_pub, reason = "the end-to-end tests have it, too")]
mod sysfs;

use std::fs;

use self::sysfs::{PF, Sysfs};
use super::*;

const VF: &str = "0000:03:00.3";

fn pci(sysfs: &Sysfs) -> Pci {
    Pci::new(sysfs.path(""))
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn binding(driver: Option<&str>, driver_override: Option<&str>) -> Binding {
    Binding { driver: driver.map(Into::into), driver_override: driver_override.map(Into::into) }
}

/// A card with a physical function, its interface `p0` and one virtual function, number 1, of interface `v1`.
fn card() -> Sysfs {
    let sysfs = Sysfs::new().unwrap();
    let pf = sysfs.device(PF).unwrap();
    sysfs.interface(&pf, "p0", "52:54:00:00:00:10").unwrap();
    let vf = sysfs.virtual_function(1, VF).unwrap();
    sysfs.interface(&vf, "v1", "52:54:00:00:00:11").unwrap();
    // Where the kernel has bonds.
    sysfs.write("class/net/bonding_masters", "bond0\n").unwrap();
    sysfs
}

#[test]
fn addresses_are_read_as_the_kernel_writes_them() {
    for text in ["0000:03:00.1", "ffff:ff:1f.7", "10000:e1:00.0"] {
        assert_eq!(at(text).to_string(), text);
    }
    assert_eq!(at("0000:AB:1c.0").to_string(), "0000:ab:1c.0");
    for bad in ["", "03:00.1", "0000:03:00", "0000:03:20.0", "0000:03:00.8", "0000:3:00.1", "0000:03:00.+1"] {
        assert_eq!(bad.parse::<PciAddress>(), Err(NotAnAddress), "{bad:?}");
    }
    assert!("123456789:03:00.1".parse::<PciAddress>().is_err());
}

#[test]
fn a_device_is_seen_with_all_that_matters() {
    let sysfs = card();
    sysfs.bound(VF, "igbvf").unwrap();
    sysfs.in_group(VF, 7).unwrap();
    let vf = pci(&sysfs).device(at(VF)).unwrap();
    assert_eq!(vf.function, Function::Virtual { of: at(PF), number: 1 });
    assert_eq!((vf.interface().unwrap(), vf.iommu_group), ("v1", Some(7)));
    assert_eq!(vf.binding, binding(Some("igbvf"), None));
    let pf = pci(&sysfs).device(at(PF)).unwrap();
    assert_eq!((&pf.function, pf.iommu_group, &pf.binding), (&Function::Physical, None, &Binding::default()));
    let error = Pci::check_functions(&pf).unwrap_err();
    assert!(error.to_string().contains(&format!("its driver lets go of it: {VF};")), "{error}");
    Pci::check_functions(&vf).unwrap();
}

#[test]
fn the_interface_of_a_virtio_device_is_the_pci_devices() {
    let sysfs = Sysfs::new().unwrap();
    let dir = sysfs.device(PF).unwrap();
    sysfs.interface(&format!("{dir}/virtio0"), "eth0", "52:54:00:00:00:10").unwrap();
    assert_eq!(pci(&sysfs).device(at(PF)).unwrap().interface().unwrap(), "eth0");
    let found = pci(&sysfs).device_with([0x52, 0x54, 0, 0, 0, 0x10]).unwrap();
    assert_eq!(found.address, at(PF));
}

#[test]
fn a_device_is_found_by_its_address_if_that_is_its_alone() {
    let sysfs = card();
    let found = |last| pci(&sysfs).device_with([0x52, 0x54, 0, 0, 0, last]);
    assert_eq!(found(0x11).unwrap().address, at(VF));
    assert!(matches!(found(0x12), Err(PciError::NoInterface { .. })));
    // Neither a second interface of the device nor one on top of it is another device.
    sysfs.interface(&format!("devices/pci0000:00/{VF}"), "v2", "52:54:00:00:00:11").unwrap();
    sysfs.write("devices/virtual/net/vlan7/address", "52:54:00:00:00:11\n").unwrap();
    sysfs.link("class/net/vlan7", "../../devices/virtual/net/vlan7").unwrap();
    assert_eq!(found(0x11).unwrap().address, at(VF));
    let twin = sysfs.virtual_function(2, "0000:03:00.4").unwrap();
    sysfs.interface(&twin, "v3", "52:54:00:00:00:11").unwrap();
    let error = found(0x11).unwrap_err();
    assert!(matches!(error, PciError::Ambiguous { .. }), "{error}");
    assert!(error.to_string().contains("v1 and v2 and v3"), "{error}");
}

#[test]
fn what_is_gone_or_odd_is_named() {
    let sysfs = card();
    let device = |address: &str| pci(&sysfs).device(at(address)).unwrap_err();
    assert!(matches!(device("0000:09:00.0"), PciError::Absent { .. }));

    let outside = tempfile::tempdir().unwrap();
    sysfs.link("bus/pci/devices/0000:0a:00.0", outside.path().to_str().unwrap()).unwrap();
    assert!(matches!(device("0000:0a:00.0"), PciError::Odd { .. }));
    sysfs.link("bus/pci/devices/0000:0b:00.0", "0000:0b:00.0").unwrap();
    assert!(matches!(device("0000:0b:00.0"), PciError::Read { .. }), "a loop");
    sysfs.link("bus/pci/devices/0000:0c:00.0", "../nowhere").unwrap();
    assert!(matches!(device("0000:0c:00.0"), PciError::Absent { .. }), "gone half-way");

    for (link, target) in [("physfn", "../elsewhere"), ("physfn", ".."), ("iommu_group", "../../x")] {
        let dir = sysfs.device("0000:0d:00.0").unwrap();
        sysfs.link(&format!("{dir}/{link}"), target).unwrap();
        let error = device("0000:0d:00.0");
        assert!(error.to_string().contains(link), "{error}");
        fs::remove_dir_all(sysfs.path(&dir)).unwrap();
        fs::remove_file(sysfs.path("bus/pci/devices/0000:0d:00.0")).unwrap();
    }
    // A virtual function that its physical one does not know, and one that has gone.
    let dir = sysfs.device("0000:0e:00.0").unwrap();
    sysfs.link(&format!("{dir}/physfn"), &format!("../{PF}")).unwrap();
    assert!(matches!(device("0000:0e:00.0"), PciError::Odd { .. }));
    for (name, target) in [("virtfnx", "../0000:0e:00.0"), ("virtfn7", "../elsewhere")] {
        let link = format!("devices/pci0000:00/{PF}/{name}");
        sysfs.link(&link, target).unwrap();
        let error = device("0000:0e:00.0");
        assert!(matches!(&error, PciError::Odd { path, .. } if path.ends_with(name)), "{error}");
        fs::remove_file(sysfs.path(&link)).unwrap();
    }
}

#[test]
fn an_attribute_that_cannot_be_read_is_named() {
    let sysfs = card();
    let class = sysfs.path(&format!("devices/pci0000:00/{VF}/class"));
    fs::remove_file(&class).unwrap();
    fs::create_dir(&class).unwrap();
    let error = pci(&sysfs).device(at(VF)).unwrap_err();
    assert!(matches!(&error, PciError::Read { path, .. } if path.ends_with("class")), "{error}");
}

#[test]
fn a_group_that_the_host_uses_is_refused() {
    let sysfs = card();
    let pci = pci(&sysfs);
    let check = || pci.check_group(&pci.device(at(VF)).unwrap());
    assert!(matches!(check(), Err(PciError::NoIommu { .. })));
    sysfs.bound(VF, "igbvf").unwrap();
    sysfs.in_group(VF, 7).unwrap();
    let bridge = sysfs.device("0000:00:1c.0").unwrap();
    sysfs.write(&format!("{bridge}/class"), "0x060400\n").unwrap();
    sysfs.bound("0000:00:1c.0", "pcieport").unwrap();
    sysfs.in_group("0000:00:1c.0", 7).unwrap();
    sysfs.device("0000:03:00.5").unwrap();
    sysfs.bound("0000:03:00.5", "vfio-pci").unwrap();
    sysfs.in_group("0000:03:00.5", 7).unwrap();
    check().unwrap();
    sysfs.bound(PF, "igb").unwrap();
    sysfs.in_group(PF, 7).unwrap();
    let error = check().unwrap_err().to_string();
    assert!(error.contains(&format!("igb has {PF} in its IOMMU group 7")), "{error}");
}

#[test]
fn a_device_changes_its_driver_and_goes_back() {
    for before in [binding(Some("igbvf"), None), binding(Some("igbvf"), Some("igbvf")), Binding::default()] {
        let sysfs = card();
        let pci = pci(&sysfs);
        sysfs.answer_as_kernel(&["igbvf", "vfio-pci"], "igbvf").unwrap();
        if let Some(driver) = &before.driver {
            sysfs.bound(VF, driver).unwrap();
        }
        if let Some(only) = &before.driver_override {
            sysfs.write(&format!("devices/pci0000:00/{VF}/driver_override"), &format!("{only}\n")).unwrap();
        }
        let now = || pci.device(at(VF)).unwrap().binding;
        assert_eq!(now(), before);
        for _ in 0..2 {
            pci.bind(at(VF), "vfio-pci").unwrap();
            assert_eq!(now(), binding(Some("vfio-pci"), Some("vfio-pci")));
        }
        for _ in 0..2 {
            pci.restore(at(VF), &before).unwrap();
            assert_eq!(now(), before);
        }
    }
}

#[test]
fn a_driver_takes_the_device_again_also_when_that_was_cut_short() {
    let sysfs = card();
    let pci = pci(&sysfs);
    sysfs.answer_as_kernel(&["igbvf"], "igbvf").unwrap();
    sysfs.bound(VF, "igbvf").unwrap();
    let before = pci.device(at(VF)).unwrap().binding;
    pci.take_again(at(VF), &before).unwrap();
    assert_eq!(pci.device(at(VF)).unwrap().binding, before);
    let dir = format!("devices/pci0000:00/{VF}");
    sysfs.write(&format!("{dir}/driver_override"), "igbvf\n").unwrap();
    fs::remove_file(sysfs.path(&format!("{dir}/driver"))).unwrap();
    pci.take_again(at(VF), &before).unwrap();
    assert_eq!(pci.device(at(VF)).unwrap().binding, before);
    fs::remove_dir_all(sysfs.path(&format!("{dir}/net"))).unwrap();
    let error = pci.take_again(at(VF), &before).unwrap_err();
    assert!(matches!(&error, PciError::Unbound { .. }), "{error}");
}

#[test]
fn a_driver_that_does_not_take_it_leaves_it_as_it_was() {
    let sysfs = card();
    let pci = pci(&sysfs);
    sysfs.answer_as_kernel(&["igbvf", "reluctant"], "igbvf").unwrap();
    sysfs.bound(VF, "igbvf").unwrap();
    let before = pci.device(at(VF)).unwrap();
    let error = pci.bind(at(VF), "reluctant").unwrap_err();
    assert!(matches!(&error, PciError::Refused { found: None, .. }), "{error}");
    assert_eq!(pci.device(at(VF)).unwrap(), before);
    assert!(matches!(pci.bind(at(VF), "vfio-pci"), Err(PciError::NoDriver { .. })));
    for name in ["", "..", "../igb", "a b"] {
        assert!(matches!(pci.bind(at(VF), name), Err(PciError::DriverName { .. })), "{name:?}");
    }
    assert_eq!(pci.device(at(VF)).unwrap(), before);
}

#[test]
fn a_write_that_is_refused_is_named() {
    let sysfs = card();
    sysfs.bound(VF, "igbvf").unwrap();
    sysfs.driver("vfio-pci").unwrap();
    // Root may write anything; an attribute that is not there nobody can.
    fs::remove_file(sysfs.path(&format!("devices/pci0000:00/{VF}/driver_override"))).unwrap();
    let error = pci(&sysfs).bind(at(VF), "vfio-pci").unwrap_err();
    assert!(matches!(&error, PciError::Write { text, .. } if text == "vfio-pci"), "{error}");
    assert_eq!(pci(&sysfs).device(at(VF)).unwrap().binding.driver.as_deref(), Some("igbvf"));
}

#[test]
fn the_representor_shares_the_switch_and_bears_the_numbers() {
    let sysfs = card();
    let named = |name: &str, switch: &str, port: &str| sysfs.switch_port(name, switch, port).unwrap();
    let found = || pci(&sysfs).representor(at(VF));
    assert!(matches!(pci(&sysfs).representor(at(PF)), Err(PciError::NotVirtual { .. })));
    assert!(matches!(found(), Err(PciError::NoSwitch { .. })));
    named("p0", "0102", "p0");
    for (name, switch, port) in
        [("r0", "0102", "pf0vf0"), ("other", "0a0b", "pf0vf1"), ("second", "0102", "pf1vf1")]
    {
        named(name, switch, port);
    }
    assert!(matches!(found(), Err(PciError::NoRepresentor { number: 1, .. })));
    named("r1", "0102", "pf0vf1");
    assert_eq!(found().unwrap(), Representor { name: "r1".into(), physical: at(PF), number: 1 });
    named("r2", "0102", "1");
    let error = found().unwrap_err();
    assert!(matches!(&error, PciError::Representors { names, .. } if names == &["r1", "r2"]), "{error}");
}
