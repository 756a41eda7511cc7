"""What is kept of a run of the upstream suite, as JUnit, and the table that sums it up.

Names, outcomes and times; no logs, no paths, nothing that names a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as Xml

_TEST = "[It] "


@dataclass(frozen=True, slots=True)
class Result:
    """How a test ended: ``passed``, ``skipped`` or another word of ginkgo's, after how many seconds."""

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run of some parts of the suite on one cluster.

    Attributes:
        circumstances: under which it came about, by what they are called.
        seconds: that it took; tests run side by side.
        parts: the results of each, by its title.
    """

    circumstances: Mapping[str, str]
    seconds: float
    parts: Mapping[str, Sequence[Result]]

    def count(self, part: str, *outcomes: str) -> int:
        """How many tests of a part ended in one of these ways."""
        return sum(result.outcome in outcomes for result in self.parts[part])

    def sentence(self) -> str:
        """The run in one line."""
        ran = sum(self.count(part, "passed") for part in self.parts)
        return f"{', '.join(self.circumstances.values())}: {ran} tests passed in {self.seconds:.0f} s."


def read_suite(path: Path) -> list[Result]:
    """The results of all tests in a report of ginkgo's, also of those that were not asked for."""
    return [
        Result(name.removeprefix(_TEST), case.attrib["status"], float(case.attrib["time"]))
        for case in _root(path).iter("testcase")
        if (name := case.attrib["name"]).startswith(_TEST)
    ]


def write(run: Run, path: Path) -> None:
    """Keep a run as a JUnit report."""
    root = Xml.Element("testsuites", time=f"{run.seconds:.0f}")
    for part, results in run.parts.items():
        failed = len(results) - run.count(part, "passed", "skipped")
        counts = {"tests": len(results), "failures": failed, "skipped": run.count(part, "skipped")}
        suite = Xml.SubElement(root, "testsuite", {"name": part} | {key: str(value) for key, value in counts.items()})
        properties = Xml.SubElement(suite, "properties")
        for name, value in run.circumstances.items():
            Xml.SubElement(properties, "property", name=name, value=value)
        for result in sorted(results, key=lambda result: result.name):
            case = Xml.SubElement(suite, "testcase", classname=part, name=result.name, status=result.outcome)
            case.set("time", f"{result.seconds:.1f}")
            if result.outcome != "passed":
                Xml.SubElement(case, "skipped" if result.outcome == "skipped" else "failure")
    Xml.indent(root)
    path.write_text(Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def read(path: Path) -> Run:
    """A run as it was kept."""
    root = _root(path)
    circumstances = {element.attrib["name"]: element.attrib["value"] for element in root.iter("property")}
    parts = {
        suite.attrib["name"]: [
            Result(case.attrib["name"], case.attrib["status"], float(case.attrib["time"]))
            for case in suite.iter("testcase")
        ]
        for suite in root.iter("testsuite")
    }
    return Run(circumstances, float(root.attrib["time"]), parts)


def table(runs: Iterable[Run]) -> str:
    """Runs as a table, one line a part."""
    lines = [
        "| addresses | tests | in the suite | passed | failed | left out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        for part, results in run.parts.items():
            passed, skipped = run.count(part, "passed"), run.count(part, "skipped")
            cells = (
                run.circumstances["addresses"],
                part,
                len(results),
                passed,
                len(results) - passed - skipped,
                skipped,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _root(path: Path) -> Xml.Element:
    return Xml.parse(path).getroot()  # noqa: S314 - written by our own runs
