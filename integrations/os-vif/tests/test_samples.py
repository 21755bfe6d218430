"""VIFs of every class as nova and others make them: plugged by the daemon, or refused in its words."""

import json
from pathlib import Path

import os_vif
from bench import DaemonCase, OpenVSwitch, instance
from os_vif import exception as vif_exc
from os_vif import objects
from oslo_versionedobjects.exception import IncompatibleObjectVersion

SAMPLES = Path(__file__).parents[3] / "crates/vif/testdata/samples.jsonl"


def samples():
    """Names and primitives of the VIFs among the samples."""
    for line in SAMPLES.read_text().splitlines():
        sample = json.loads(line)
        if sample["object"]["versioned_object.name"].startswith("VIF"):
            yield sample["name"], sample["object"]


class WithSwitch(DaemonCase):
    """A host with Open vSwitch and its integration bridge."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.switch = OpenVSwitch(cls.daemon, kernel="dummy")
        cls.addClassCleanup(cls.switch.close)

    def prepare_for(self, vif):
        """As a host of the VIF's cloud is, where the bridge has the datapath that the VIF names."""
        profile = vif.port_profile if "port_profile" in vif else ()
        datapath = profile.datapath_type if "datapath_type" in profile else None
        self.switch.vsctl("set", "Bridge", "br-int", f"datapath_type={datapath or 'netdev'}")
        self.links = self.daemon.links()

    def tearDown(self):
        super().tearDown()
        self.assertEqual(self.switch.bridges(), {"br-int": []})


class Samples(WithSwitch):
    def test_each_is_plugged_or_refused_in_the_daemons_words(self):
        outcomes = {"plugged": [], "refused": [], "newer than this os-vif": []}
        for name, primitive in samples():
            with self.subTest(sample=name):
                outcomes[self.outcome(primitive)].append(name)
        for name in ("vif_vhostuser_readme", "nova_vhostuser_generic_server", "nova_vhostuser_fp_lb"):
            self.assertIn(name, outcomes["plugged"])
        self.assertNotIn("nova_vhostuser_fp_ovs_plain", outcomes["refused"])

    def outcome(self, primitive):
        try:
            vif = objects.vif.VIFBase.obj_from_primitive(primitive)
        except IncompatibleObjectVersion:
            return "newer than this os-vif"
        # Whoever it was meant for. The directory of its socket is there.
        vif.plugin = "vhostuser"
        if "path" in vif:
            vif.path = self.daemon.socket(Path(vif.path).name)
        self.prepare_for(vif)
        both = {"vif": vif.obj_to_primitive(), "instance_info": instance().obj_to_primitive()}
        try:
            os_vif.plug(vif, instance())
        except vif_exc.PlugException as error:
            status, problem = self.daemon.request("POST", "/v1/os-vif/plug", both)
            self.assertGreaterEqual(status, 400)
            self.assertIn(problem["detail"], str(error))
            return "refused"
        self.assertEqual(self.daemon.plugs().keys(), {vif.id})
        os_vif.unplug(vif, instance())
        self.tearDown()
        return "plugged"


class Described(WithSwitch):
    def test_every_profile_that_is_described_is_served(self):
        described = os_vif.host_info().get_plugin("vhostuser").get_vif("VIFVHostUser").supported_port_profiles
        for profile in described:
            with self.subTest(profile=profile.profile_object_name):
                made = getattr(objects.vif, profile.profile_object_name)()
                if "bridge_name" in made.fields:
                    made.bridge_name = "br-fp"
                network = objects.network.Network(bridge="br-int")
                vif = self.vif(vif_name="tap0", address="52:54:00:00:00:01", network=network, port_profile=made)
                self.prepare_for(vif)
                if "representor_address" in made.fields:
                    made.representor_address = "ffff:ff:1f.7"
                    with self.assertRaisesRegex(vif_exc.PlugException, "no PCI device ffff:ff:1f.7"):
                        os_vif.plug(vif, instance())
                    continue
                os_vif.plug(vif, instance())
                os_vif.unplug(vif, instance())
