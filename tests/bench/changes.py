"""Cold start, memory, the listing, and what each kind of change takes, at three sizes."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from enforcer.demo.lab import Lab
from tests.bench.common import (
    Cost,
    Meter,
    median,
    namespace,
    node,
    pod,
    policy,
    remote_pod,
    resident,
    selecting,
    write,
)

CHANGES, ADDS = 200, 100


@dataclass(frozen=True, slots=True)
class Size:
    """``local`` of the pods are on this node."""

    pods: int
    policies: int
    local: int

    @property
    def spaces(self) -> list[str]:
        return [f"ns-{n}" for n in range(max(1, self.policies // 10))]


SIZES = (Size(20, 10, 10), Size(1_000, 100, 50), Size(10_000, 1_000, 100))


def manifests(folder: Path, size: Size) -> None:
    """Deterministic: a List of the pods elsewhere, a file for each policy and each pod of this node.

    Each namespace has ten policies, and all of them select its pods of this node.
    """
    rng = random.Random(1)  # noqa: S311 - the same manifests at each run
    spaces = size.spaces
    remote = range(1, size.pods - size.local)
    write(folder / "namespaces.json", [namespace(name) for name in (*spaces, "free")])
    write(folder / "pods.json", [remote_pod(n, spaces[n % len(spaces)], rng.randrange(10)) for n in remote])
    for n in range(size.policies):
        write(folder / f"policy-{n}.json", [policy(n, spaces[n % len(spaces)], rng.randrange(10), f"policy-{n}")])
    for n in range(size.local):
        place = n % len(spaces)
        write(folder / f"local-{n}.json", [pod(f"local-{n}", spaces[place], f"app-{place % 10}")])
    # Two groups of their own in the first namespace, which a pod each keeps, and the peers that one of its pods may be.
    versions = [selecting(f"version-{v}", "ns-0", [{"from": [apps("app-3")]}], version=v) for v in "abcd"]
    kept = [pod(f"kept-{v}", "ns-0", "app-0", version=v) for v in "cd"]
    peers = selecting("peers", "ns-0", [{"from": [apps("app-0"), apps("app-1")]}], app="app-0")
    anew = pod("isolated-anew", "ns-0", "app-0", version="a")
    adds = [pod("isolated", "ns-0", "app-0"), anew, pod("open", "free", "a")]
    write(folder / "beside.json", [*versions, *kept, peers, *adds])


def apps(app: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": {"app": app}}}


def states() -> Iterator[tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Each kind of change: its words, and a file with what it holds before and after."""
    here = "local-0", "ns-0"
    yield "label of a pod elsewhere", "remote-0", [remote_pod(0, "ns-0", 0)], [remote_pod(0, "ns-0", 1)]
    yield "a pod elsewhere comes or goes", "remote-0", [], [remote_pod(0, "ns-0", 0)]
    yield "a policy's peers", "extra", [policy(0, "ns-0", 0, "extra")], [policy(0, "ns-0", 1, "extra")]
    yield "a policy comes or goes", "extra", [], [policy(0, "ns-0", 1, "extra")]
    for words, one, other in (("is new", "a", "b"), ("has other pods", "c", "d")):
        before, after = ([pod(*here, "app-0", version=version)] for version in (one, other))
        yield f"label of a pod here, the group that it goes to {words}", "local-0", before, after
    yield "label of a pod here, isolated or not", "local-0", [pod(*here, "app-0")], [pod(*here, "app-1")]


def measure(size: Size) -> None:
    """Cold start with attached pods and an empty kernel; then changes, from a file's rename to the kernel's word."""
    words = f"{size.pods:,} pods, {size.policies:,} policies, {size.local} pods here"
    with node() as (lab, folder):
        manifests(folder, size)
        for n in range(size.local):
            lab.add_pod(f"{size.spaces[n % len(size.spaces)]}/local-{n}")
        for version in "cd":
            lab.add_pod(f"ns-0/kept-{version}")
        print(f"{words}: cold start, JSON {cold(lab):.2f} s, {resident(lab):.0f} MB resident")
        listing = lab.nft("list", "table", "inet", "drawbridge")
        print(f"{words}: listing {len(listing.splitlines()):,} lines, {len(listing):,} bytes")
        meter = Meter(lab)
        for kind, name, one, other in states():
            path = folder / f"{name}.json"
            write(path, one)
            lab.status()
            meter.settle()
            costs = [meter.measure(partial(write, path, (one, other)[n % 2])) for n in range(1, CHANGES + 1)]
            report(f"{words}: {kind}", costs)
        for kind, key in (
            ("nothing isolates it", "free/open"),
            ("its group has other pods", "ns-0/isolated"),
            ("its group is new", "ns-0/isolated-anew"),
        ):
            lab.add_pod(key)
            costs = []
            for _ in range(ADDS):
                meter.measure(partial(lab.cni, "DEL", key))
                costs.append(meter.measure(partial(lab.cni, "ADD", key)))
            report(f"{words}: ADD, {kind}", costs)
            meter.measure(partial(lab.cni, "DEL", key))
        print(f"{words}: {resident(lab):.0f} MB resident at the end")
        as_yaml(folder)
        print(f"{words}: cold start, a YAML file a pod {cold(lab):.2f} s, {resident(lab):.0f} MB resident", flush=True)


def report(words: str, costs: list[Cost]) -> None:
    processor = statistics.median(cost.processor for cost in costs)
    print(f"{words}: processor time of the agent p50 {processor:.2f} ms; until it is committed "
          f"{median([cost.done for cost in costs])}; the commit alone {median([cost.commit for cost in costs])}",
          flush=True)  # fmt: skip


def cold(lab: Lab) -> float:
    """Seconds from the start of the agent's process until it is in sync, from an empty kernel."""
    lab.stop_agent()
    lab.nft("flush", "ruleset")
    started = time.perf_counter()
    lab.start_agent()
    return time.perf_counter() - started


def as_yaml(folder: Path) -> None:
    """Write the pods elsewhere as one YAML file each, in the place of the JSON list."""
    items = json.loads((folder / "pods.json").read_text())["items"]
    (folder / "pods.json").unlink()
    for item in items:
        (folder / f"{item['metadata']['name']}.yaml").write_text(yaml.safe_dump(item))


def main() -> None:
    for size in SIZES:
        measure(size)


if __name__ == "__main__":
    main()
