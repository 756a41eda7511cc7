"""Which tests of the upstream suite are run, and how many they must be: ginkgo is content with none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.conformance.report import Result

# What no cluster of these tests can run: the kernel has no SCTP sockets, and there is no DNS for the pods.
LEFT_OUT = r"\[Feature:SCTPConnectivity\]|invalid conntrack state bug"


@dataclass(frozen=True, slots=True)
class Part:
    """Tests that belong together.

    Attributes:
        title: what they are called here.
        focus: a pattern that their names match, and no others.
        tests: how many of them the pinned version has.
        left_out: how many of these match ``LEFT_OUT``.
    """

    title: str
    focus: str
    tests: int
    left_out: int

    def of(self, results: Sequence[Result]) -> list[Result]:
        """Those of the whole suite's results that belong to the part."""
        return [result for result in results if re.search(self.focus, result.name)]

    def shortcomings(self, results: Sequence[Result]) -> list[str]:
        """What is wrong with the part's results: tests that did not pass, or are not there at all."""
        skipped = [result for result in results if result.outcome == "skipped" and re.search(LEFT_OUT, result.name)]
        wrong = [f"{r.outcome}: {r.name}" for r in results if r.outcome != "passed" and r not in skipped]
        if (len(results), len(skipped)) != (self.tests, self.left_out):
            expected = f"{self.tests} of which {self.left_out} are left out"
            wrong.append(f"{self.title}: {len(results)} tests of which {len(skipped)} are left out, not {expected}")
        return wrong


PARTS = (
    Part("Netpol", r"\] Netpol ", tests=51, left_out=3),
    Part("Granular Checks: Pods", r"Networking Granular Checks: Pods", tests=6, left_out=2),
    Part("Conntrack", r"\] Conntrack ", tests=7, left_out=1),
    Part("HostPort", r"\] HostPort ", tests=1, left_out=0),
    Part("Dual stack", r"\[Feature:IPv6DualStack\] should", tests=9, left_out=0),
)
