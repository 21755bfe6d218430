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


class Samples(DaemonCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.switch = OpenVSwitch(cls.daemon)
        cls.addClassCleanup(cls.switch.close)
        cls.bridges = cls.switch.bridges()
        cls.links = cls.daemon.links()

    def test_each_is_plugged_or_refused_in_the_daemons_words(self):
        outcomes = {"plugged": [], "refused": [], "newer than this os-vif": []}
        for name, primitive in samples():
            with self.subTest(sample=name):
                outcomes[self.outcome(primitive)].append(name)
        self.assertIn("vif_vhostuser_readme", outcomes["plugged"])
        self.assertIn("nova_vhostuser_fp_lb", outcomes["plugged"])
        self.assertNotIn("nova_vhostuser_generic_server", outcomes["newer than this os-vif"])

    def outcome(self, primitive):
        try:
            vif = objects.vif.VIFBase.obj_from_primitive(primitive)
        except IncompatibleObjectVersion:
            return "newer than this os-vif"
        # Whoever it was meant for. The directory of its socket is there.
        vif.plugin = "vhostuser"
        if "path" in vif:
            vif.path = self.daemon.socket(Path(vif.path).name)
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
        self.assertEqual(self.daemon.plugs(), {})
        self.assertEqual(self.daemon.links(), self.links)
        self.assertEqual(self.switch.bridges(), self.bridges)
        return "plugged"


class Described(DaemonCase):
    def test_every_profile_that_is_described_is_served(self):
        described = os_vif.host_info().get_plugin("vhostuser").get_vif("VIFVHostUser").supported_port_profiles
        for profile in described:
            with self.subTest(profile=profile.profile_object_name):
                fields = {"bridge_name": "br0"} if profile.profile_object_name == "VIFPortProfileFPBridge" else {}
                made = getattr(objects.vif, profile.profile_object_name)(**fields)
                vif = self.vif(vif_name="tap0", port_profile=made)
                os_vif.plug(vif, instance())
                os_vif.unplug(vif, instance())
