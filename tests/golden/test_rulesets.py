"""Manifests and the rulesets that they become: a change of either is seen in the difference of a file.

After a change that is meant: ``drawbridge render X.yaml > X.nft``, and read what has changed. ``nodes.nft`` is of Node
objects, which ``render`` does not read.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from enforcer.cli import cli
from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import Node
from enforcer.model.tunnel import Vxlan
from enforcer.nodes.ownership import resolve_ownership
from enforcer.ruleset.listing import listing
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.base import BaseSettings
from enforcer.translate.translator import Translator

FOLDER = Path(__file__).parent / "rulesets"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
RULESETS = sorted(FOLDER.glob("*.nft"))


@pytest.mark.parametrize("manifests", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_become_the_ruleset_beside_them(manifests: Path) -> None:
    done = CliRunner().invoke(cli, ["render", str(manifests)])
    assert done.exit_code == 0, done.output
    assert done.stdout == manifests.with_suffix(".nft").read_text()


def test_nodes_become_the_masquerade_and_the_tunnel_of_nodes_nft() -> None:
    def node(name: str, networks: list[str], addresses: list[str]) -> Node:
        return Node(name, tuple(map(Network.parse, networks)), tuple(map(parse_address, addresses)))

    exempt = tuple(map(Network.parse, ("172.16.0.0/12", "2001:db8::/32")))
    ruleset = Ruleset()
    translator = Translator(ruleset, BaseSettings(masquerade=True, not_masqueraded=exempt, tunnel=Vxlan(84, 4789)))
    one = node("one", ["10.244.1.0/24", "fd44:1::/64"], ["192.0.2.1", "fd08::1"])
    two = node("two", ["10.244.2.0/24", "fd44:2::/64"], ["192.0.2.2", "fd08::2"])
    translator.ownership_changed(resolve_ownership({"one": one, "two": two}, own="one"))
    assert listing(ruleset) == (FOLDER / "nodes.nft").read_text()


@pytest.mark.netns
@pytest.mark.parametrize("ruleset", RULESETS, ids=lambda path: path.stem)
def test_the_kernel_takes_the_ruleset_and_nft_lists_it_as_it_is_written(ruleset: Path) -> None:
    listing = ["unshare", "--net", "sh", "-euc", f"nft -f {ruleset}; nft -s list ruleset"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert words(listed) == words(ruleset.read_text())


def words(text: str) -> list[str]:
    """All words, sorted: nft orders objects and elements otherwise, and lists no comment of a table."""
    lines = [line for line in text.splitlines() if not line.startswith('\tcomment "')]
    return sorted(word.rstrip(",") for word in " ".join(lines).split())
