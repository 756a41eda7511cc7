"""Manifests and the rulesets that they become: a change of either is seen in the difference of a file.

After a change that is meant: ``drawbridge render X.yaml > X.nft``, and read what has changed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from enforcer.cli import cli

MANIFESTS = sorted((Path(__file__).parent / "rulesets").glob("*.yaml"))


@pytest.mark.parametrize("manifests", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_become_the_ruleset_beside_them(manifests: Path) -> None:
    done = CliRunner().invoke(cli, ["render", str(manifests)])
    assert done.exit_code == 0, done.output
    assert done.stdout == manifests.with_suffix(".nft").read_text()


@pytest.mark.netns
@pytest.mark.parametrize("manifests", MANIFESTS, ids=lambda path: path.stem)
def test_the_kernel_takes_the_ruleset_and_nft_lists_it_as_it_is_written(manifests: Path) -> None:
    ruleset = manifests.with_suffix(".nft")
    listing = ["unshare", "--net", "sh", "-euc", f"nft -f {ruleset}; nft -s list ruleset"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert words(listed) == words(ruleset.read_text())


def words(text: str) -> list[str]:
    """All words, sorted: nft orders objects and elements otherwise, and lists no comment of a table."""
    lines = [line for line in text.splitlines() if not line.startswith('\tcomment "')]
    return sorted(word.rstrip(",") for word in " ".join(lines).split())
