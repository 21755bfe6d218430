"""Two guests as nova plugs and describes them: from Neutron's binding to vhostd, from libvirt's XML to QEMU."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from bench import DaemonCase, OpenVSwitch
from guest import Guest
from nova import context, objects
from nova.network import neutron
from nova.virt.libvirt import config as libvirt_config
from nova.virt.libvirt import vif as libvirt_vif

objects.register_all()

NETWORK = {"id": str(uuid.uuid4()), "name": "demo", "tenant_id": "demo", "mtu": 1450}
SUBNET = {
    "id": str(uuid.uuid4()),
    "network_id": NETWORK["id"],
    "cidr": "10.0.0.0/24",
    "ip_version": 4,
    "enable_dhcp": False,
    "gateway_ip": None,
    "dns_nameservers": [],
    "host_routes": [],
}
FLAVOR = {
    "memory_mb": 256,
    "vcpus": 2,
    "root_gb": 0,
    "ephemeral_gb": 0,
    "extra_specs": {"hw:vif_multiqueue_enabled": "true"},
}


class Neutron:
    """What nova asks Neutron for when it builds its model of a port."""

    def list_subnets(self, **_):
        return {"subnets": [SUBNET]}

    def list_ports(self, **_):
        return {"ports": []}

    def list_floatingips(self, **_):
        return {"floatingips": []}

    def list_extensions(self, **_):
        return {"extensions": []}

    def show_network(self, *_, **__):
        return {"network": NETWORK}


class Server:
    """A server with one port, bound as a mechanism driver for vhostd would bind it."""

    def __init__(self, number, mode, socket, **details):
        self.address = f"10.0.0.{number}"
        self.flavor = objects.Flavor(**FLAVOR)
        self.instance = objects.Instance(id=number, uuid=str(uuid.uuid4()), project_id="demo", flavor=self.flavor)
        self.image = objects.ImageMeta.from_dict({})
        port = {
            "id": str(uuid.uuid4()),
            "network_id": NETWORK["id"],
            "mac_address": f"52:54:00:00:00:{number:02x}",
            "fixed_ips": [{"subnet_id": SUBNET["id"], "ip_address": self.address}],
            "status": "DOWN",
            "admin_state_up": True,
            "binding:vnic_type": "normal",
            "binding:vif_type": "vhostuser",
            "binding:vif_details": details
            | {"vhostuser_fp_plug": True, "vhostuser_mode": mode, "vhostuser_socket": socket},
        }
        with mock.patch.object(neutron, "get_client", lambda *_, **__: Neutron()):
            self.vif = neutron.API()._build_vif_model(context.get_admin_context(), Neutron(), port, [NETWORK], [])

    def plug(self):
        libvirt_vif.LibvirtGenericVIFDriver().plug(self.instance, self.vif)

    def unplug(self):
        libvirt_vif.LibvirtGenericVIFDriver().unplug(self.instance, self.vif)

    def domain(self):
        """The XML that libvirt gets, as far as it matters here."""
        guest = libvirt_config.LibvirtConfigGuest()
        guest.virt_type = "kvm"
        guest.name, guest.uuid = self.instance.name, self.instance.uuid
        guest.memory, guest.vcpus = self.flavor.memory_mb * 1024, self.flavor.vcpus
        # As with [libvirt] file_backed_memory.
        guest.membacking = libvirt_config.LibvirtConfigGuestMemoryBacking()
        guest.membacking.filesource = guest.membacking.sharedaccess = True
        driver = libvirt_vif.LibvirtGenericVIFDriver()
        guest.add_device(driver.get_config(self.instance, self.vif, self.image, self.flavor, "kvm"))
        return guest.to_xml()


class Boot(DaemonCase):
    def test_in_a_linux_bridge(self):
        servers = self.servers()
        for server in servers:
            server.plug()
        taps = {server.vif["devname"] for server in servers}
        self.assertEqual(self.daemon.links() - self.links, taps | {f"brq{NETWORK['id']}"[:14]})
        self.reach_each_other(servers)

    def test_in_open_vswitch(self):
        switch = OpenVSwitch(self.daemon)
        self.addCleanup(switch.close)
        servers = self.servers(vhostuser_ovs_plug=True)
        for server in servers:
            server.plug()
            wanted = f"external_ids:iface-id={server.vif['id']}"
            port = switch.vsctl("--columns=name", "--bare", "find", "Interface", wanted)
            self.assertEqual(port, [server.vif["devname"]])
        self.links = {"lo", "br-int", "ovs-netdev"}
        self.reach_each_other(servers)
        self.assertEqual(switch.bridges(), {"br-int": []})

    def servers(self, **details):
        """Two, in one role of QEMU each."""
        sockets = self.daemon.socket("one"), self.daemon.socket("two")
        return [Server(11, "server", sockets[0], **details), Server(12, "client", sockets[1], **details)]

    def reach_each_other(self, servers):
        """Boots plugged servers and lets them talk; they are unplugged in the end."""
        guests = [Guest(server.domain()) for server in servers]
        for server, guest in zip(servers, guests, strict=True):
            self.addCleanup(guest.close)
            guest.wait_for_boot()
            guest.run(f"ip address add {server.address}/24 dev eth0 && ip link set eth0 mtu {NETWORK['mtu']} up")
        guests[0].run(f"ping -c 1 -w 30 {servers[1].address}")

        # A restart of nova-compute plugs everything again.
        with ThreadPoolExecutor() as pool:
            pings = pool.submit(guests[1].run, f"ping -c 30 -i 0.1 -s {NETWORK['mtu'] - 28} {servers[0].address}")
            while not pings.done():
                for server in servers:
                    server.plug()
        self.assertIn(" 30 packets received, 0% packet loss", pings.result())
        missing = [condition for plug in self.daemon.plugs().values() for condition in plug["status"]["conditions"]]
        self.assertEqual(missing, [])

        for server in servers:
            server.unplug()
