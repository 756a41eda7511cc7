"""The conflist names what is installed, us first, and nothing else."""

from __future__ import annotations

import pytest

from cni.plugin.conflist import conflist


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        (set(), ["drawbridge"]),
        ({"bandwidth", "bridge", "host-local"}, ["drawbridge", "bandwidth"]),
        ({"bandwidth", "drawbridge", "portmap"}, ["drawbridge", "portmap", "bandwidth"]),
    ],
)
def test_it_chains_what_is_installed_of_portmap_and_bandwidth(installed: set[str], named: list[str]) -> None:
    assert [plugin["type"] for plugin in conflist(installed)["plugins"]] == named


def test_the_runtime_passes_host_ports_and_rates_to_their_plugins_only() -> None:
    capabilities = {
        plugin["type"]: plugin.get("capabilities") for plugin in conflist({"portmap", "bandwidth"})["plugins"]
    }
    assert capabilities == {"drawbridge": None, "portmap": {"portMappings": True}, "bandwidth": {"bandwidth": True}}
