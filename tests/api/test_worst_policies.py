"""The largest policies that the API server takes: bounded in the kernel and in the agent, and nobody else waits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.processes import wait_until
from tests.api.test_agent import PORT, ApiLab, lab, reached  # noqa: F401 - a fixture
from tests.api.test_reflector import apply, pod, policy

pytestmark = pytest.mark.netns


def selectors(count: int) -> list[dict[str, Any]]:
    return [{"podSelector": {"matchLabels": {f"k{n}": "v"}}} for n in range(count)]


def blocks(count: int, excepts: int) -> list[dict[str, Any]]:
    heads = [f"{n // 200 + 20}.{n % 200}" for n in range(count)]
    return [
        {"ipBlock": {"cidr": f"{head}.0.0/16", "except": [f"{head}.{e}.0/25" for e in range(excepts)]}}
        for head in heads
    ]


def ports(count: int, *, named: bool = False) -> list[dict[str, Any]]:
    return [{"port": f"p{n}" if named else 1000 + 2 * n} for n in range(count)]


def large(peers: list[dict[str, Any]], numbers: list[dict[str, Any]]) -> dict[str, Any]:
    """The ``spec`` of a policy that selects every pod of its namespace."""
    return {"podSelector": {}, "ingress": [{"from": peers, "ports": numbers}]}


# Specs of objects up to the 1.5 MiB that etcd takes, and what is to become of them; those that are accepted come first.
WORST = {
    "120 selectors by 120 named ports": (large(selectors(120), ports(120, named=True)), None),
    "100 selectors by 1,000 ports": (large(selectors(100), ports(1000)), None),
    "700 blocks with excepts": (large(blocks(700, 10), ports(2)), None),
    "1,200 selectors by 1,200 ports": (large(selectors(1200), ports(1200)), "2411 rules"),
    "20,000 ports": (large(selectors(1), ports(20_000)), "20000 elements"),
    "10,000 selectors": (large(selectors(10_000), ports(1)), "20011 rules"),
}


def resident_peak(lab: ApiLab) -> int:  # noqa: F811
    """The most memory that the agent has had, in MiB."""
    with open(f"/proc/{lab.pid}/status") as status:  # noqa: PTH123 - the kernel's
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM"))


def test_each_is_bounded_or_rejected_by_its_figure_and_other_namespaces_go_on(lab: ApiLab) -> None:  # noqa: F811
    here = {"nodeName": lab.name}
    lab.plane.kubectl("create", "namespace", "other")
    apply(lab.plane, pod("victim", "other", **here), pod("db", "default", **here), pod("web", "default", **here))
    for key in ("other/victim", "default/db", "default/web"):
        lab.add_pod(key)
    lab.listen(lab.pods["default/db"], PORT)
    denied, allowed = policy("db", "default"), policy("db", "default")
    allowed["spec"] = allowed["spec"] | {"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]}
    for number, (title, (spec, rejected)) in enumerate(WORST.items()):
        # They stay, side by side.
        name = f"worst-{number}"
        worst = policy(name, "other") | {"spec": spec}
        # Without the annotation of a client-side apply, which would not take an object of this size.
        lab.plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(worst))
        # What others do takes effect meanwhile.
        apply(lab.plane, allowed if number % 2 else denied)
        reached(lab, bool(number % 2))
        apply(lab.plane, pod(f"new-{number}", "default", **here))
        lab.add_pod(f"default/new-{number}")

        def is_there(name: str = name, rejected: str | None = rejected) -> bool:
            reasons = [entry["reason"] for entry in lab.status()["rejected"] if entry["name"] == name]
            return any(rejected in reason for reason in reasons) if rejected else not reasons

        wait_until(is_there, title, seconds=30)
        listed = lab.nft("list", "table", "inet", "drawbridge")
        assert listed.count("goto allow-") < 2000, title
        assert len(listed) < 2 << 20, title
        closed = [line for line in listed.splitlines() if 'comment "other/victim" : jump' in line]
        assert closed, title
        assert ("jump closed/" in closed[0]) is (rejected is not None), title
    assert resident_peak(lab) < 200


# Policies of 190 KB, eleven of which are within the 2 MiB of a namespace, and of 1.4 MB, none of which is.
@pytest.mark.parametrize(("values", "count", "accepted"), [(4_100, 300, 11), (29_000, 60, 0)])
def test_a_namespace_full_of_large_policies_takes_little_memory_and_each_comes_in_when_there_is_room(
    lab: ApiLab,  # noqa: F811
    values: int,
    count: int,
    accepted: int,
) -> None:
    here = {"nodeName": lab.name}
    lab.plane.kubectl("create", "namespace", "full")
    apply(lab.plane, pod("victim", "full", **here))
    lab.add_pod("full/victim")
    expression = {"key": "k", "operator": "In", "values": ["v" * 40 + f"-{n:05}" for n in range(values)]}
    spec = large([{"podSelector": {"matchExpressions": [expression]}}], ports(1))
    names = [f"large-{number:03}" for number in range(count)]
    for first in range(0, count, 10):
        items = [policy(name, "full") | {"spec": spec} for name in names[first : first + 10]]
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        lab.plane.kubectl("create", "--validate=false", "-f", "-", stdin=stdin, seconds=120)

    def rejected() -> list[str]:
        return sorted(entry["name"] for entry in lab.status()["rejected"] if entry["namespace"] == "full")

    wait_until(lambda: rejected() == names[accepted:], "all but the first are rejected", seconds=60)
    assert resident_peak(lab) < 200
    lab.plane.kubectl("delete", "networkpolicy", "-n", "full", *names[:5])
    left = names[accepted + 5 if accepted else 5 :]
    assert lab.status(wait=30)["synced"]
    assert rejected() == left, "as many more are accepted as have gone"
    lab.stop_agent()
    lab.start_agent()
    wait_until(lambda: rejected() == left, "and the same after a restart", seconds=60)
    assert resident_peak(lab) < 200
