"""The figures of docs/conformance.md are those of the reports beside it, and these are whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.conformance import report
from tests.conformance.parts import PARTS, Part
from tests.tools.build import version

DOCS = Path(__file__).parents[2] / "docs"
KEPT = {path.stem: report.read(path) for path in sorted((DOCS / "conformance").glob("*.xml"))}


def test_the_page_has_the_figures_of_the_kept_reports() -> None:
    page = (DOCS / "conformance.md").read_text()
    assert report.table(KEPT.values()) in page
    for run in KEPT.values():
        assert run.sentence() in page
        assert run.circumstances["kubernetes"] == f"Kubernetes {version()}"


def test_the_kept_reports_have_every_test_of_both_families_and_all_passed() -> None:
    assert KEPT.keys() == {"ipv4", "ipv6"}
    for run in KEPT.values():
        assert run.parts.keys() == {part.title for part in PARTS}
        assert not [line for part in PARTS for line in part.shortcomings(run.parts[part.title])]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.title)
def test_a_test_that_fails_or_is_not_run_or_is_missing_is_a_shortcoming(part: Part) -> None:
    results = list(KEPT["ipv4"].parts[part.title])
    first = next(number for number, result in enumerate(results) if result.outcome == "passed")
    for outcome in ("failed", "skipped", "timedout"):
        other = [*results[:first], dataclasses.replace(results[first], outcome=outcome), *results[first + 1 :]]
        assert part.shortcomings(other)
    assert part.shortcomings(results[1:])
    assert part.shortcomings([])
    assert not part.shortcomings(part.of(results))
