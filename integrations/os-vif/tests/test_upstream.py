"""os-vif's own unit tests, with this plugin installed beside those of os-vif."""

import subprocess
import sys
import unittest
from pathlib import Path

import os_vif

SITE = Path(os_vif.__file__).parents[1]


class Upstream(unittest.TestCase):
    def test_they_pass(self):
        running = {}
        for package in ("os_vif", "vif_plug_ovs", "vif_plug_noop", "vif_plug_linux_bridge"):
            tests = SITE / package / "tests/unit"
            # linux_bridge was removed in 5.0.
            if tests.is_dir():
                command = [sys.executable, "-m", "unittest", "discover", "-s", str(tests), "-t", str(SITE)]
                running[package] = subprocess.Popen(command, cwd=SITE, stderr=subprocess.PIPE, text=True)
        self.assertIn("os_vif", running)
        for package, ran in running.items():
            with self.subTest(package=package):
                _, told = ran.communicate()
                self.assertEqual(ran.returncode, 0, told[-4000:])
                self.assertRegex(told, r"Ran [1-9]\d* tests")
