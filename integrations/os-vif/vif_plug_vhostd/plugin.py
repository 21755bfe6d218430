"""What os-vif loads: the plugins ``vhostuser`` and ``vhostuser_fp``, which differ in name only.

``vhostuser_fp`` is the name that nova gives to vhost-user ports whose host side is a TAP, in a Linux bridge or in Open
vSwitch; ``vhostuser`` is for whoever makes VIF objects without nova. Options are in ``[os_vif_<name>]``. They are
read at each plug and nothing is connected before, so loading always succeeds.
"""

from __future__ import annotations

from typing import Any

from os_vif import exception, objects, plugin
from oslo_config import cfg

from vif_plug_vhostd.client import ApiError, Client

#: Port profiles that a VIFVHostUser may have, with the versions understood. One without a profile is served as well.
PROFILES = {
    "VIFPortProfileBase": ("1.0", "1.1"),
    "VIFPortProfileFPTap": ("1.0", "1.1"),
    "VIFPortProfileFPBridge": ("1.0", "1.1"),
    "VIFPortProfileFPOpenVSwitch": ("1.0", "1.4"),
    "VIFPortProfileOpenVSwitch": ("1.0", "1.4"),
    "VIFPortProfileOVSRepresentor": ("1.0", "1.4"),
}


class VhostUserPlugin(plugin.PluginBase):
    """Hands VIFs to vhostd."""

    NAME = "vhostuser"

    CONFIG_OPTS = [
        cfg.StrOpt(
            "api_socket",
            default="/run/vhostd/api.sock",
            help="Path of the socket of vhostd's API. The user who plugs must be able to open it: [api] group and mode "
            "in vhostd's configuration.",
        ),
        cfg.FloatOpt(
            "timeout",
            default=30,
            min=0.1,
            max=600,
            help="Seconds after which a plug or unplug without an answer has failed. If vhostd is not there, that is "
            "said after three seconds.",
        ),
        cfg.StrOpt(
            "wait",
            default="attached",
            choices=[
                ("attached", "the host's side is there, and vhostd listens on the VIF's socket or calls it for ever"),
                ("linked", "the guest's driver has set up the device as well"),
                ("forwarding", "frames flow"),
            ],
            help="What must be true before a plug has succeeded. nova plugs before it starts the guest, so that it can "
            "wait for the first only.",
        ),
        cfg.BoolOpt(
            "anti_spoof",
            default=True,
            help="Whether a guest whose VIF says that nobody filters its frames (has_traffic_filtering) is held to the MAC "
            "and IP addresses that the VIF says are its own. Switch it off where guests share addresses (VRRP, allowed "
            "address pairs).",
        ),
    ]

    def describe(self) -> objects.host_info.HostPluginInfo:
        profiles = [
            objects.host_info.HostPortProfileInfo(profile_object_name=name, min_version=first, max_version=last)
            for name, (first, last) in PROFILES.items()
        ]
        vhost_user = objects.host_info.HostVIFInfo(
            vif_object_name="VIFVHostUser", min_version="1.0", max_version="1.1", supported_port_profiles=profiles
        )
        return objects.host_info.HostPluginInfo(plugin_name=self.NAME, vif_info=[vhost_user])

    def plug(self, vif: objects.vif.VIFBase, instance_info: objects.instance_info.InstanceInfo) -> None:
        # The daemon gives up first, so that it can say what was missing.
        patience = max(self.config.timeout - 1, self.config.timeout / 2)
        query = {"wait": self.config.wait, "timeout": f"{patience * 1000:.0f}ms"}
        try:
            answer = self._post("/v1/os-vif/plug", query, vif, instance_info)
        except ApiError as error:
            raise exception.PlugException(str(error), problem=error.problem) from error
        if isinstance(vif, objects.vif.VIFNestedDPDK):
            _tell_device(vif, answer)

    def unplug(self, vif: objects.vif.VIFBase, instance_info: objects.instance_info.InstanceInfo) -> None:
        try:
            self._post("/v1/os-vif/unplug", {}, vif, instance_info)
        except ApiError as error:
            raise exception.UnplugException(str(error), problem=error.problem) from error

    def _post(self, resource: str, query: dict[str, str], *both: Any) -> dict[str, Any]:
        vif, instance_info = (object.obj_to_primitive() for object in both)
        if not self.config.anti_spoof:
            vif["versioned_object.data"]["has_traffic_filtering"] = True
        client = Client(self.config.api_socket, self.config.timeout)
        return client.post(resource, query, {"vif": vif, "instance_info": instance_info})


def _tell_device(vif: objects.vif.VIFNestedDPDK, plug: dict[str, Any]) -> None:
    """Where the device is that was found by the VIF's address, and the driver that it was bound to before."""
    device = plug.get("spec", {}).get("to", {})
    if device.get("address"):
        vif.pci_address = device["address"]
    if device.get("found", {}).get("driver"):
        vif.dev_driver = device["found"]["driver"]


class VhostUserFpPlugin(VhostUserPlugin):
    """The same, under the name that nova uses."""

    NAME = "vhostuser_fp"
