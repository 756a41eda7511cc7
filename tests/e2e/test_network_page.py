"""docs/network.md shows what a node prints in each mode, so it is compared with nodes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.e2e.site import Place, Site

pytestmark = pytest.mark.netns
PAGE = Path(__file__).parents[2] / "docs" / "network.md"
MAC = re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b")


def lines(text: str) -> list[str]:
    """Lines without what differs from node to node: hardware addresses, and the width of blanks."""
    return [" ".join(MAC.sub("MAC", line).split()) for line in text.splitlines()]


@pytest.mark.parametrize(("mode", "second"), [("direct", Place(1, 2)), ("vxlan", Place(2, 1))])
def test_the_page_shows_what_a_node_prints(tmp_path: Path, mode: str, second: Place) -> None:
    (block,) = re.findall(rf"<!-- test: {mode} -->\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with Site(tmp_path) as site:
        site.add("a", Place(1, 1))
        site.add("b", second)
        site.add_pod("a", "pod")
        site.settle()
        commands = block.split("$ ")[1:]
        assert commands
        for command, _, shown in (part.partition("\n") for part in commands):
            printed = lines(site.inside("a", *shlex.split(command)))
            assert shown.strip(), f"{command}: the page shows nothing"
            assert [line for line in lines(shown) if line not in printed] == [], f"{command} prints {printed}"
