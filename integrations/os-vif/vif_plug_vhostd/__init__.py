"""An os-vif plugin that has vhostd serve VIFs.

A plug goes this way: os_vif.plug -> plugin.py, which os-vif loads and nova configures -> client.py, which posts the
VIF as os-vif serialises it to the daemon's API. What a VIF asks for is decided by the daemon alone.
"""
