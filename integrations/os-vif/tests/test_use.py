"""os-vif as its users call it, with a daemon behind it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import os_vif
from bench import DaemonCase, as_nobody, instance
from os_vif import exception as vif_exc
from os_vif.objects import fields
from os_vif.objects import fixed_ip as os_fixed_ip
from os_vif.objects import instance_info as os_instance_info
from os_vif.objects import network as os_network
from os_vif.objects import subnet as os_subnet
from os_vif.objects import vif as vif_obj
from oslo_config import cfg


class UsageGuide(DaemonCase):
    """The example of os-vif's usage guide, call by call; the instance's fields are those that it reads from nova."""

    def test_it_works_as_written(self):
        os_vif.initialize()
        instance_info = os_instance_info.InstanceInfo(
            uuid="d7a730ca-3c28-49c3-8f26-4662b909fe8a", name="demo", project_id="b63b4a5fcf164d0fb53e7f3b04a4f4d5"
        )
        subnet = os_subnet.Subnet(cidr="192.168.1.0/24")
        subnets = os_subnet.SubnetList([subnet])
        network = os_network.Network(
            label="tenantnet",
            subnets=subnets,
            multi_host=False,
            should_provide_vlan=False,
            should_provide_bridge=False,
        )
        vif_uuid = uuid.uuid4()
        vif = vif_obj.VIFVHostUser(
            id=vif_uuid,
            address=None,
            network=network,
            plugin="vhostuser",
            path="/path/to/socket",
            mode=fields.VIFVHostUserMode.SERVER,
        )
        os_vif.plug(vif, instance_info)
        plug = self.daemon.plugs()[str(vif_uuid)]
        self.assertEqual(plug["spec"]["socket"], {"role": "connect", "path": "/path/to/socket"})
        self.assertEqual(plug["status"]["phase"], "attached")
        os_vif.unplug(vif, instance_info)

    def test_its_except_clauses_get_what_fails(self):
        vif = self.vif(path="not/absolute")
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(vif, instance())
        text = str(caught.exception)
        self.assertIn("Failed to plug VIF VIFVHostUser(", text)
        self.assertIn("vif.path", text)
        cause = caught.exception.kwargs["err"]
        self.assertIsInstance(cause, vif_exc.PlugException)
        self.assertEqual((cause.kwargs["problem"]["type"], cause.kwargs["problem"]["field"]), ("invalid", "vif.path"))

        with self.assertRaises(vif_exc.UnplugException) as caught:
            os_vif.unplug(vif_obj.VIFVHostUser(plugin="vhostuser"), instance())
        self.assertIn("vif.id", str(caught.exception))


class Plugging(DaemonCase):
    def test_plug_and_unplug_can_be_repeated(self):
        vif = self.vif()
        os_vif.unplug(vif, instance())
        for _ in range(2):
            os_vif.plug(vif, instance())
        for _ in range(2):
            os_vif.unplug(vif, instance())

    def test_the_socket_is_there_when_plug_returns(self):
        # QEMU, which connects once, ends if nobody listens.
        vif = self.vif()
        os_vif.plug(vif, instance())
        self.assertTrue(Path(vif.path).is_socket())
        os_vif.unplug(vif, instance())
        self.assertFalse(Path(vif.path).exists())

    def test_the_host_side_of_the_plugin_that_nova_asks_for(self):
        profile = vif_obj.VIFPortProfileFPTap(mac_address="52:54:00:00:00:09")
        vif = self.vif(plugin="vhostuser_fp", vif_name="tap0", port_profile=profile)
        os_vif.plug(vif, instance())
        self.assertIn("tap0", self.daemon.links())
        os_vif.unplug(vif, instance())

    def test_a_guest_that_nobody_filters_is_held_to_its_addresses(self):
        ips = os_fixed_ip.FixedIPList(objects=[os_fixed_ip.FixedIP(address="192.0.2.7")])
        subnets = os_subnet.SubnetList(objects=[os_subnet.Subnet(cidr="192.0.2.0/24", ips=ips)])
        network = os_network.Network(subnets=subnets)
        for anti_spoof, filtered, expected in (
            (True, False, {"addresses": ["192.0.2.7"]}),
            (True, True, None),
            (False, False, None),
        ):
            self.configure(anti_spoof=anti_spoof)
            vif = self.vif(network=network, address="52:54:00:00:00:07", has_traffic_filtering=filtered)
            os_vif.plug(vif, instance())
            self.assertEqual(self.daemon.plugs()[vif.id]["spec"].get("anti_spoof"), expected)
            os_vif.unplug(vif, instance())

    def test_a_conflict_names_the_field_and_the_way_out(self):
        vif = self.vif()
        os_vif.plug(vif, instance())
        other = self.vif(id=vif.id, path=vif.path, mode="server")
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(other, instance())
        for part in ("field: spec.socket", f"hint: `vhostd unplug {vif.id}` first"):
            self.assertIn(part, str(caught.exception))
        os_vif.unplug(vif, instance())

    def test_the_guest_can_be_waited_for(self):
        self.configure(wait="linked", timeout=2)
        vif = self.vif()
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(vif, instance())
        self.assertIn(f"waiting for a front end to connect to {vif.path}", str(caught.exception))
        self.assertEqual(caught.exception.kwargs["err"].kwargs["problem"]["type"], "timeout")
        os_vif.unplug(vif, instance())

    def test_an_object_that_is_too_large_is_refused_with_the_daemons_words(self):
        vif = self.vif(vif_name="x" * 500_000)
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(vif, instance())
        self.assertIn("longer than 65536 bytes", str(caught.exception))

    def test_what_wait_and_timeout_can_be_is_checked(self):
        for name, value in (("wait", "someday"), ("timeout", 0), ("timeout", 601)):
            with self.assertRaises(ValueError):
                cfg.CONF.set_override(name, value, group="os_vif_vhostuser")


class Many(DaemonCase):
    # Whoever may open the socket and is neither root nor the daemon's user gets 16 connections at once.
    CONFIG = "[api]\nmode = '666'\n"
    PORTS = 32

    def test_32_at_once(self):
        self.plug_all_at_once()

    def test_plugs_and_unplugs_of_one_port_race(self):
        profile = vif_obj.VIFPortProfileFPTap()
        vif = self.vif(vif_name="tap0", port_profile=profile)

        def again_and_again(act):
            for _ in range(25):
                act(vif, instance())

        with ThreadPoolExecutor() as pool:
            list(pool.map(again_and_again, [os_vif.plug, os_vif.unplug] * 2))
        os_vif.unplug(vif, instance())

    @unittest.skipUnless(os.geteuid() == 0, "only root can become somebody else")
    def test_32_at_once_as_an_ordinary_user(self):
        os_vif.unplug(self.vif(), instance())
        as_nobody(self.plug_all_at_once)

    @unittest.skipUnless(os.geteuid() == 0, "only root can become somebody else")
    def test_who_is_turned_away_comes_again(self):
        os_vif.unplug(self.vif(), instance())
        as_nobody(self.plug_with_all_places_taken)

    def plug_with_all_places_taken(self):
        vif = self.vif()
        taken = [socket.socket(socket.AF_UNIX) for _ in range(16)]
        for place in taken:
            place.connect(self.daemon.api)
        with ThreadPoolExecutor(1) as pool:
            plug = pool.submit(os_vif.plug, vif, instance())
            time.sleep(0.2)
            self.assertFalse(plug.done())
            for place in taken:
                place.close()
            plug.result()
        os_vif.unplug(vif, instance())

    def plug_all_at_once(self):
        vifs = [self.vif() for _ in range(self.PORTS)]
        together = threading.Barrier(self.PORTS)

        def with_all(act, vif):
            together.wait()
            act(vif, instance())

        with ThreadPoolExecutor(self.PORTS) as pool:
            list(pool.map(with_all, [os_vif.plug] * self.PORTS, vifs))
            self.assertEqual(set(self.daemon.plugs()), {vif.id for vif in vifs})
            list(pool.map(with_all, [os_vif.unplug] * self.PORTS, vifs))


class Registration(unittest.TestCase):
    def test_both_plugins_say_what_they_take(self):
        info = os_vif.host_info()
        for name in ("vhostuser", "vhostuser_fp"):
            plugin = info.get_plugin(name)
            self.assertEqual([vif.vif_object_name for vif in plugin.vif_info], ["VIFVHostUser"])
            vhost_user = plugin.get_vif("VIFVHostUser")
            self.assertEqual(vhost_user.get_common_version(), vif_obj.VIFVHostUser.VERSION)
            for profile in vhost_user.supported_port_profiles:
                known = getattr(vif_obj, profile.profile_object_name).VERSION
                self.assertEqual(profile.get_common_version(), known)

    def test_options_come_from_the_configuration_file_and_are_in_the_sample(self):
        # As nova-compute does: the file is parsed, then os-vif is initialised.
        script = """if True:
            import json, sys
            from oslo_config import cfg
            cfg.CONF(["--config-file", sys.argv[1]])
            import os_vif.opts
            sample = {name: [opt.name for opt in opts] for name, opts in os_vif.opts.list_plugins_opts()}
            for name in ("os_vif_vhostuser", "os_vif_vhostuser_fp"):
                print(json.dumps({opt: cfg.CONF[name][opt] for opt in sample[name]}))
        """
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("[os_vif_vhostuser_fp]\napi_socket = /a/b\ntimeout = 2.5\n")
            file.flush()
            command = [sys.executable, "-W", "ignore", "-c", script, file.name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        defaults = {"api_socket": "/run/vhostd/api.sock", "timeout": 30, "wait": "attached", "anti_spoof": True}
        read = [json.loads(line) for line in printed.splitlines()]
        self.assertEqual(read, [defaults, defaults | {"api_socket": "/a/b", "timeout": 2.5}])
