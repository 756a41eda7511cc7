"""The configuration by which a runtime calls us, and after us the plugins that pods have hostPorts and bandwidth by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

FILE_NAME = "10-drawbridge.conflist"
"""In the runtime's configuration folder, where the first name in order is the pod network."""

_DRAWBRIDGE = {"type": "drawbridge"}
# portmap before 1.6 passes over ``backend`` and uses iptables. Without ``snat``, no pod reaches its own hostPort.
_CHAINED = (
    {"type": "portmap", "backend": "nftables", "snat": True, "capabilities": {"portMappings": True}},
    {"type": "bandwidth", "capabilities": {"bandwidth": True}},
)


def conflist(plugins: Collection[str]) -> dict[str, Any]:
    """The network configuration list (CNI specification, section 1).

    Args:
        plugins: the executables in the runtime's plugin folder. One that is not there is not named, since no pod would
            start; what pods ask of it is then not done.

    Returns:
        What is written to ``FILE_NAME`` as JSON.
    """
    chained = [plugin for plugin in _CHAINED if plugin["type"] in plugins]
    return {"cniVersion": "1.0.0", "name": "drawbridge", "plugins": [_DRAWBRIDGE, *chained]}
