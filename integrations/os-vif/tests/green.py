"""A plug in a green thread, as in a nova-compute under eventlet: the daemon is silent, other green threads are not."""

import sys

import eventlet

eventlet.monkey_patch()

import os_vif  # noqa: E402
from os_vif import exception, objects  # noqa: E402
from oslo_config import cfg  # noqa: E402

os_vif.initialize()
cfg.CONF.set_override("api_socket", sys.argv[1], group="os_vif_vhostuser")
cfg.CONF.set_override("timeout", 0.3, group="os_vif_vhostuser")
ticks = 0


def tick():
    global ticks
    while True:
        eventlet.sleep(0.01)
        ticks += 1


eventlet.spawn(tick)
vif = objects.vif.VIFVHostUser(plugin="vhostuser", mode="server", path="/x")
try:
    os_vif.plug(vif, objects.instance_info.InstanceInfo())
    sys.exit("plugged?")
except exception.PlugException as error:
    assert "did not answer within 0.3 s" in str(error), error
assert ticks >= 5, ticks
