"""The configuration: its page shows what the code takes, and every mistake in a file is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from enforcer.cli import cli
from enforcer.config import Config, ConfigError, load
from enforcer.kubernetes.client import connect
from enforcer.model.sources import SourceError

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
        "networking: none\nmasquerade: 7\nconnectionMarkMask: 3\nnotMasqueraded: [x, 10.0.0.0/8, z]\n"
        "metricsAddress: 127.0.0.1:65536\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(file)
    first, *mistakes = str(caught.value).splitlines()
    assert str(file) in first
    assert [mistake.strip().split(":")[0] for mistake in mistakes] == [
        "`networking`",
        "`masquerade`",
        "`connectionMarkMask`",
        "`metricsAddress`",
        "`notMasqueraded`",
        "`notMasqueraded`",
    ]
    assert "is it `network`?" in mistakes[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("routing: x", "`routing`: Invalid enum value 'x'. One of: auto, direct, vxlan."),
        ("masquerade: 7", "`masquerade`: Expected `str`, got `int`. One of: disable, enable."),
        ("vxlanId: 0", "`vxlanId`: Expected `int` >= 1. From 1 to 16777215."),
        ("notMasqueraded: [7]", "as CIDRs."),
        ("metricsAddress: x", "`host:port`"),
    ],
)
def test_a_value_that_is_refused_is_answered_with_what_is_wanted(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert words in str(caught.value)


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("unknownPods: deny\nunknownPods: allow\n")
    with pytest.raises(ConfigError, match="'unknownPods' stands twice at line 2"):
        load(file)


def test_a_file_that_is_not_there_is_named_once_and_without_a_number() -> None:
    done = CliRunner().invoke(cli, ["agent", "--config", "/nope.yaml"])
    assert (done.exit_code, done.output) == (1, "Error: /nope.yaml: no such file or directory\n")


def test_an_agent_that_is_no_pod_is_told_in_one_sentence_how_to_reach_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SourceError, match=r"host/port is not set; give --kubeconfig or --source$"):
        connect(None)


def test_the_list_of_commands_has_each_description_whole() -> None:
    done = CliRunner().invoke(cli, ["--help"], terminal_width=80)
    assert "uninstall  Remove" in done.output
    assert "..." not in done.output.partition("Commands:")[2]


@pytest.mark.parametrize("content", ["[1]", "7", "{", "1: 2", "\0", "network: bridge\n---\nnetwork: none"])
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
