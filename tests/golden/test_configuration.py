"""The configuration: its page shows what the code takes, and every mistake in a file is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from enforcer.cli import cli
from enforcer.config import Config, ConfigError, load

ROOT = Path(__file__).parents[2]


def test_the_page_has_what_the_command_prints_and_the_command_what_the_agent_takes(tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, ["config"]).output
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert f"```yaml\n{printed}```" in page, f"docs/configuration.md is not current; it is to hold:\n{printed}"
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    assert load(file) == Config()


def test_the_configuration_of_the_daemonset_is_taken() -> None:
    assert load(ROOT / "deploy" / "base" / "config.yaml") != Config()


def test_every_mistake_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "networking: none\nmasquerade: 7\nrevokedConnectionMark: 3\nnotMasqueraded: [x, 10.0.0.0/8, y]\n"
        "metricsAddress: 127.0.0.1:65536\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(file)
    first, *mistakes = str(caught.value).splitlines()
    assert str(file) in first
    assert [mistake.strip().split(":")[0] for mistake in mistakes] == [
        "`networking`",
        "`masquerade`",
        "`revokedConnectionMark`",
        "`metricsAddress`",
        "`notMasqueraded`",
        "`notMasqueraded`",
    ]
    assert "is it `network`?" in mistakes[0]


@pytest.mark.parametrize("content", ["[1]", "7", "{", "1: 2", "\0", "network: bridge\nnetwork: [none]"])
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(file)


@pytest.mark.parametrize("content", ["", "\n", "---\n", "# nothing\n", "null"])
def test_an_empty_file_is_all_defaults(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert load(file) == Config()
