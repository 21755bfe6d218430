"""Linux guests from libvirt's domain XML, without libvirt: the test guest (tests/guest) under QEMU, emulated."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from bench import wait_for

IMAGE = Path(__file__).parents[3] / "target/guest"
#: An emulated guest on a busy machine needs a multiple of its usual seconds.
BOOT_TIME = 120


class Guest:
    """A domain that boots. It dies with the thread that made it. Commands run in it one after the other."""

    def __init__(self, domain: str) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="guest")
        self._agent = f"{self._dir.name}/agent"
        self._log = open(f"{self._dir.name}/log", "w+")
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            *command_line(ET.fromstring(domain)),
            *agent_device(self._agent),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.settimeout(BOOT_TIME)
        self._replies = self._stream.makefile("rb")
        self._ids = itertools.count()

    def wait_for_boot(self) -> None:
        """Until it takes commands."""
        wait_for("QEMU to come up", self._connected)
        assert self._replies.readline() == b"ready\n"

    def run(self, command: str) -> str:
        """Runs a shell command that has to succeed and gives what it prints."""
        self._stream.sendall(b"%d %s\n" % (next(self._ids), command.encode()))
        _, status, size = self._replies.readline().split()
        printed = self._replies.read(int(size)).decode()
        assert status == b"0", f"{command}: {printed}"
        return printed

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._replies.close()
        self._stream.close()
        self._log.close()
        self._dir.cleanup()

    def _connected(self) -> bool:
        if self.process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"QEMU has ended: {self._log.read()}")
        return self._stream.connect_ex(self._agent) == 0


def command_line(domain: ET.Element) -> list[str]:
    """QEMU's for a domain, with kernel and initramfs of the test guest."""
    memory = f"memory-backend-memfd,id=ram,size={domain.findtext('memory')}K"
    if domain.find("memoryBacking/access[@mode='shared']") is not None:
        memory += ",share=on"
    line = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    line += ["-machine", "q35,accel=tcg,memory-backend=ram", "-object", memory, "-m", f"{domain.findtext('memory')}K"]
    line += ["-smp", domain.findtext("vcpu")]
    line += ["-kernel", f"{IMAGE}/vmlinux", "-initrd", f"{IMAGE}/initramfs.cpio"]
    line += ["-append", "console=ttyS0 quiet rdinit=/init mitigations=off"]
    for index, interface in enumerate(domain.findall("devices/interface[@type='vhostuser']")):
        line += network_card(index, interface)
    return line


def network_card(index: int, interface: ET.Element) -> list[str]:
    """What libvirt makes of <interface type="vhostuser">."""
    source, driver = interface.find("source"), interface.find("driver")
    assert interface.find("model").get("type") == "virtio"
    options: dict[str, Any] = {} if driver is None else dict(driver.attrib)
    queues = int(options.pop("queues", 1))
    options |= {"netdev": f"net{index}", "mac": interface.find("mac").get("address"), "romfile": ""}
    if queues > 1:
        options["mq"] = "on"
    if qemu_major() < 10:
        # Older ones crash when a vhost-user device of an emulated guest uses MSI-X.
        options["vectors"] = 0
    role = ",server=on,wait=off" if source.get("mode") == "server" else ""
    device = ",".join(["virtio-net-pci", *(f"{name}={value}" for name, value in options.items())])
    return [
        *("-chardev", f"socket,id=vhost{index},path={source.get('path')}{role}"),
        *("-netdev", f"vhost-user,id=net{index},chardev=vhost{index},queues={queues}"),
        *("-device", device),
    ]


def agent_device(path: str) -> list[str]:
    """The serial port through which the guest takes commands."""
    return [
        *("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent"),
    ]


def qemu_major() -> int:
    told = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"version (\d+)", told)[1])
