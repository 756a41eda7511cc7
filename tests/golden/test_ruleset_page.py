"""docs/ruleset.md shows real output, so it is compared with it."""

from __future__ import annotations

from pathlib import Path

import yaml
from click.testing import CliRunner

from enforcer.cli import cli

ROOT = Path(__file__).parents[2]


def test_the_ruleset_page_shows_what_render_prints() -> None:
    manifests = ROOT / "tests" / "golden" / "shop.yaml"
    done = CliRunner().invoke(cli, ["render", "--node-name", "node-1", str(manifests)])
    assert done.exit_code == 0, done.output
    page = (ROOT / "docs" / "ruleset.md").read_text()
    assert done.output in page, f"docs/ruleset.md is not current; it is to hold:\n{done.output}"
    assert manifests.read_text() in page


def test_check_finds_nothing_wrong_with_the_manifests_that_ship() -> None:
    done = CliRunner().invoke(cli, ["check", str(ROOT / "enforcer" / "demo" / "manifests")])
    assert done.exit_code == 0, done.output


def test_check_fails_and_names_the_field_of_a_bad_policy(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "golden" / "shop.yaml").read_text().replace("192.168.4.0/24", "10.0.0.0/8")
    (tmp_path / "bad.yaml").write_text(text)
    done = CliRunner().invoke(cli, ["check", str(tmp_path)])
    assert done.exit_code == 1
    assert "spec.ingress[0].from[1].ipBlock.except[0]" in done.output


def test_the_rules_of_the_readme_are_those_of_the_demo(tmp_path: Path) -> None:
    demo = ROOT / "enforcer" / "demo" / "manifests"
    pods = list(yaml.safe_load_all((demo / "pods.yaml").read_text()))
    for number, pod in enumerate((entry for entry in pods if entry["kind"] == "Pod"), 2):
        pod["status"] = {"podIPs": [{"ip": f"10.84.0.{number}"}]}
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    arguments = ["render", str(tmp_path / "pods.yaml"), str(demo / "policies.yaml")]
    rendered = {line.strip(" \t,}") for line in CliRunner().invoke(cli, arguments).stdout.splitlines()}
    block = (ROOT / "README.md").read_text().partition("```\nchain to-pod {")[2].partition("```")[0]
    shown = [line.partition(" # ")[0].strip(" \t,}") for line in block.splitlines()]
    assert len(shown) > 10
    for line in shown:
        assert line in rendered or line == "…", line
