"""Addresses from another IPAM plugin, where the network configuration has an ``ipam`` section.

The plugin gets the configuration and the environment that our executable got, with another command
(CNI specification, section 4).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni.plugin.protocol import ADDRESS_FAILURE, INVALID_CONFIGURATION, CniError
from enforcer.model.addresses import Address, Family, family_of, parse_address

_SECONDS = 10
_LINK_LOCAL_GATEWAYS = {Family.V4: parse_address("169.254.1.1"), Family.V6: parse_address("fe80::1")}
"""For a plugin that names no gateway: the pod has a permanent neighbour for it, so any address will do."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What the plugin gave: the addresses, the gateway of each family, and ``dns`` for the result."""

    addresses: tuple[Address, ...]
    gateways: dict[Family, Address]
    dns: dict[str, Any]


def add(config: bytes, environment: Mapping[str, str]) -> Lease:
    """Have the plugin reserve addresses.

    Raises:
        CniError: it did not, and holds nothing.
    """
    answer = run("ADD", config, environment)
    try:
        result = json.loads(answer)
        found = [(parse_address(ip["address"].partition("/")[0]), ip.get("gateway")) for ip in result["ips"]]
        gateways = {family_of(a): parse_address(g) if g else _LINK_LOCAL_GATEWAYS[family_of(a)] for a, g in found}
    except (KeyError, TypeError, ValueError) as error:
        run("DEL", config, environment)
        raise CniError(ADDRESS_FAILURE, "the IPAM plugin's result is not valid", repr(error)) from error
    return Lease(tuple(address for address, _ in found), gateways, result.get("dns") or {})


def run(command: str, config: bytes, environment: Mapping[str, str]) -> bytes:
    """Run the plugin that a configuration names.

    Returns:
        What it printed.

    Raises:
        CniError: it is not in CNI_PATH, did not end, or failed.
    """
    kind = str(json.loads(config)["ipam"]["type"])
    if "/" in kind:
        raise CniError(INVALID_CONFIGURATION, f"ipam.type {kind!r} is not a name")
    folders = filter(None, environment.get("CNI_PATH", "").split(":"))
    executable = next((path for folder in folders if (path := Path(folder, kind)).is_file()), None)
    if executable is None:
        raise CniError(INVALID_CONFIGURATION, f"the IPAM plugin {kind!r} is not in CNI_PATH")
    passed = {name: value for name, value in environment.items() if name.startswith("CNI_")} | {"CNI_COMMAND": command}
    try:
        done = subprocess.run(  # noqa: S603 - CNI_PATH is the runtime's
            [executable], input=config, env=passed, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CniError(ADDRESS_FAILURE, f"the IPAM plugin {kind!r} did not run", str(error)) from error
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).decode(errors="replace")
        raise CniError(ADDRESS_FAILURE, f"the IPAM plugin {kind!r} failed at {command}", said)
    return done.stdout
