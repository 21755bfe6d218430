"""What the tests stand on: a real daemon on a host of its own, and VIFs for it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
import traceback
import unittest
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import os_vif
from os_vif import objects
from oslo_config import cfg

VHOSTD = os.environ.get("VHOSTD", str(Path(__file__).parents[3] / "target/debug/vhostd"))

#: The daemon's host: a network namespace, /sys that shows its links, and an empty /run, where no switch of ours is.
HOST = 'mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'

logging.getLogger("os_vif").addHandler(logging.NullHandler())
logging.getLogger("os_vif").propagate = False
os_vif.initialize()


class Daemon:
    """``vhostd serve`` in a namespace of its own. Dies with the test."""

    def __init__(self, config: str = "") -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="vhostd")
        self.dir = Path(self._dir.name)
        # Who may reach the API is said by the socket's mode.
        self.dir.chmod(0o755)
        self.api = str(self.dir / "api.sock")
        self.config = self.dir / "vhostd.toml"
        self.config.write_text(config)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        unshare = ["unshare", "--net", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
        serve = [VHOSTD, "--api", self.api, "serve", "--config", self.config, "--state-dir", self.dir / "state"]
        tied = ["setpriv", "--pdeathsig", "KILL", "--"]
        with open(self.dir / "log", "ab") as log:
            self.process = subprocess.Popen([*tied, *unshare, "sh", "-c", HOST, "sh", *serve], stdout=log, stderr=log)
        wait_for("vhostd to answer", self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"vhostd has ended: {(self.dir / 'log').read_text()}"
        try:
            return self.request("GET", "/v1/info")[0] == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.kill()
        self._dir.cleanup()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        stopped = lambda thread: "\nState:\tT" in (thread / "status").read_text()  # noqa: E731
        wait_for("vhostd to stop", lambda: all(map(stopped, threads.iterdir())))

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def socket(self, name: str) -> str:
        """A path for a VIF's socket."""
        return str(self.dir / name)

    def plugs(self) -> dict[str, Any]:
        """All plugs by id."""
        return {plug["id"]: plug for plug in self.request("GET", "/v1/plugs")[1]}

    def links(self) -> set[str]:
        """Names of the host's links."""
        shown = subprocess.run([*self.on_host(), "ip", "-json", "link"], check=True, capture_output=True, text=True)
        return {link["ifname"] for link in json.loads(shown.stdout)}

    def on_host(self) -> list[str]:
        """What makes a command run on the daemon's host."""
        enter = ["nsenter", "--target", str(self.process.pid), "--net", "--mount"]
        return enter if os.geteuid() == 0 else [*enter, "--user", "--preserve-credentials"]

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The API without the plugin: status and answer."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(30)
            line.connect(self.api)
            connection = http.client.HTTPConnection("vhostd")
            connection.sock = line
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                return response.status, json.loads(response.read())


class OpenVSwitch:
    """A real one on the host of a daemon, with the bridge br-int in user space. Dies with the test.

    With ``kernel="dummy"`` the kernel's datapath, which this one may lack, is played: there are bridges and ports of
    type "system", but no frames.
    """

    DIR = "/run/openvswitch"

    def __init__(self, daemon: Daemon, kernel: str = "") -> None:
        self.daemon = daemon
        self.processes: list[subprocess.Popen[bytes]] = []
        self.run("mkdir", self.DIR)
        self.run("ovsdb-tool", "create", f"{self.DIR}/conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
        self.spawn("ovsdb-server", "-vfile:off", f"--remote=punix:{self.DIR}/db.sock", f"{self.DIR}/conf.db")
        self.vsctl("--no-wait", "--retry", "init")
        dummy = ["--enable-dummy=system"] if kernel == "dummy" else []
        self.spawn("/usr/lib/openvswitch-switch/ovs-vswitchd", "-vfile:off", *dummy, f"unix:{self.DIR}/db.sock")
        self.vsctl("add-br", "br-int", "--", "set", "Bridge", "br-int", "datapath_type=netdev")

    def vsctl(self, *arguments: str) -> list[str]:
        """Lines that ovs-vsctl prints."""
        return self.run("ovs-vsctl", f"--db=unix:{self.DIR}/db.sock", "--timeout=30", *arguments).splitlines()

    def bridges(self) -> dict[str, list[str]]:
        """Ports by bridge."""
        return {bridge: self.vsctl("list-ports", bridge) for bridge in self.vsctl("list-br")}

    def run(self, *command: str) -> str:
        return subprocess.run([*self.daemon.on_host(), *command], check=True, capture_output=True, text=True).stdout

    def spawn(self, *command: str) -> None:
        tied = ["setpriv", "--pdeathsig", "KILL", "--", *self.daemon.on_host()]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen([*tied, *command], **quiet))

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


class DaemonCase(unittest.TestCase):
    """Tests against one daemon, which each leaves without a plug."""

    CONFIG = ""

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = Daemon(cls.CONFIG)
        cls.addClassCleanup(cls.daemon.close)
        cls.links = cls.daemon.links()

    def setUp(self) -> None:
        self.configure(api_socket=self.daemon.api)

    def tearDown(self) -> None:
        self.assertEqual(self.daemon.plugs(), {})
        self.assertEqual(self.daemon.links(), self.links)

    def configure(self, **options: Any) -> None:
        for group in ("os_vif_vhostuser", "os_vif_vhostuser_fp"):
            for name, value in options.items():
                cfg.CONF.set_override(name, value, group=group)
                self.addCleanup(cfg.CONF.clear_override, name, group=group)

    def vif(self, **fields: Any) -> objects.vif.VIFVHostUser:
        """A VIF whose socket the daemon makes; ``fields`` take precedence."""
        name = str(uuid.uuid4())
        given = {"id": name, "plugin": "vhostuser", "mode": "client", "path": self.daemon.socket(name)} | fields
        return objects.vif.VIFVHostUser(**given)


def instance() -> objects.instance_info.InstanceInfo:
    return objects.instance_info.InstanceInfo(
        uuid="d7a730ca-3c28-49c3-8f26-4662b909fe8a", name="demo", project_id="b63b4a5fcf164d0fb53e7f3b04a4f4d5"
    )


def as_nobody(act: Callable[[], None]) -> None:
    """Does it in a process of a user without rights, who may not be able to read a module that is not loaded yet."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the process of nobody ended with {status}"


def wait_for(what: str, condition: Callable[[], bool], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout} s in vain for {what}")
        time.sleep(0.01)
