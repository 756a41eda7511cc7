"""Events on the real API server: one for each rejected policy from all nodes, for as long as it is rejected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest

from enforcer.kubernetes.client import connect
from enforcer.kubernetes.events import MAX_MESSAGE, MAX_POLICIES, EventWriter, event_of, writers_of
from enforcer.kubernetes.validation import is_dns_subdomain
from enforcer.model.changes import Rejection
from tests.api.controlplane import ControlPlane
from tests.api.processes import ProgramError, wait_until
from tests.api.test_reflector import apply, policy

PERIOD = 2


@contextmanager
def writing(plane: ControlPlane, *, nodes: int = 1, period: int = PERIOD) -> Iterator[Callable[..., None]]:
    """Writers, as of several nodes; gives what tells all of them of rejections."""
    names = [f"node-{number}" for number in range(nodes)]
    writers = [
        EventWriter(connect(plane.kubeconfig), node=name, nodes=lambda: names, period_seconds=period, spread_seconds=0)
        for name in names
    ]

    def rejected(*rejections: Rejection) -> None:
        for writer in writers:
            writer.rejected(rejections)

    for writer in writers:
        writer.start()
    try:
        yield rejected
    finally:
        for writer in writers:
            writer.stop()


def rejection(plane: ControlPlane, namespace: str, name: str, reason: str = "spec: no") -> Rejection:
    """Of a policy that is made."""
    apply(plane, policy(name, namespace))
    uid = plane.get("networkpolicy", "-n", namespace, name)["metadata"]["uid"]
    return Rejection("NetworkPolicy", namespace, name, reason, uid)


def events(plane: ControlPlane, namespace: str, name: str) -> list[dict[str, Any]]:
    found = plane.get("events", "-n", namespace, f"--field-selector=involvedObject.name={name}")
    items: list[dict[str, Any]] = found["items"]
    return items


def answers(plane: ControlPlane, verb: str, code: int) -> float:
    """How many requests about Events the server has answered so."""
    lines = plane.kubectl("get", "--raw", "/metrics").splitlines()
    wanted = ("apiserver_request_total{", f'code="{code}"', 'resource="events"', f'verb="{verb}"')
    return sum(float(line.split()[-1]) for line in lines if all(word in line for word in wanted))


def test_two_nodes_make_one_event_and_one_write_a_period(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "one")
    refused = rejection(plane, "one", "db")
    conflicts, patches = answers(plane, "POST", 409), answers(plane, "PATCH", 200)
    with writing(plane, nodes=2) as rejected:
        rejected(refused)
        wait_until(lambda: answers(plane, "POST", 409) == conflicts + 1, "the second finds the first's", seconds=20)
        seen: dict[str, Any] = {}

        def patched() -> bool:
            (event,) = events(plane, "one", "db")
            seen.setdefault(event["lastTimestamp"], set()).add(event["metadata"]["resourceVersion"])
            return answers(plane, "PATCH", 200) >= patches + 6

        wait_until(patched, "both have written it again three times", seconds=30)
    written = [datetime.fromisoformat(time).timestamp() for time in sorted(seen)[1:]]
    assert len(written) >= 2
    assert all(time % PERIOD == 0 for time in written), written
    assert all(len(versions) == 1 for versions in seen.values()), seen


def test_an_event_that_is_gone_comes_back_and_a_corrected_policy_is_written_of_no_more(
    control_plane: ControlPlane,
) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "again")
    mended, broken = rejection(plane, "again", "mended"), rejection(plane, "again", "broken")

    def times() -> list[str]:
        return [event["lastTimestamp"] for name in ("mended", "broken") for event in events(plane, "again", name)]

    with writing(plane) as rejected:
        rejected(mended, broken)
        wait_until(lambda: len(times()) == 2, "both Events are there", seconds=20)
        plane.kubectl("delete", "events", "-n", "again", "--all")
        wait_until(lambda: len(times()) == 2, "they are back", seconds=20)
        rejected(broken)
        before = times()
        wait_until(lambda: times()[1] > before[1], "the other's is written again", seconds=20)
        stands = times()
        wait_until(lambda: times()[1] > stands[1], "and once more", seconds=20)
        assert times()[0] == stands[0]


def test_one_event_that_the_server_refuses_does_not_keep_others_back(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "others")
    with writing(plane, period=1200) as rejected:
        rejected(Rejection("NetworkPolicy", "absent", "a", "no", "uid"), rejection(plane, "others", "b"))
        wait_until(lambda: bool(events(plane, "others", "b")), "the Event is there", seconds=20)


def test_a_server_that_comes_back_gets_the_event(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "away")
    refused = rejection(plane, "away", "db")
    plane.stop_server()
    try:
        with writing(plane, period=1200) as rejected:
            rejected(refused)
            plane.start_server()
            wait_until(lambda: bool(events(plane, "away", "db")), "the Event is there", seconds=30)
    finally:
        plane.stop_server()
        plane.start_server()


def test_an_event_is_the_same_from_every_node_and_another_for_another_text_or_policy() -> None:
    one = Rejection("NetworkPolicy", "shop", "db", "spec: no", "uid-1")
    assert event_of(one) == event_of(Rejection("NetworkPolicy", "shop", "db", "spec: no", "uid-1"))
    others = [Rejection("NetworkPolicy", "shop", "db", *rest) for rest in (("spec: nay", "uid-1"), ("spec: no", "2"))]
    assert len({event_of(r)["metadata"]["name"] for r in (one, *others)}) == 3


def test_what_users_write_neither_lengthens_the_message_nor_hides_its_end() -> None:
    long = Rejection("NetworkPolicy", "shop", "a.-" * 84 + "a", "wrong\n\t " * 5000, "uid")
    event = event_of(long)
    assert len(event["message"]) == MAX_MESSAGE
    assert event["message"].endswith("closed in the directions of its policyTypes.")
    assert "\n" not in event["message"]
    assert is_dns_subdomain(
        event_of(Rejection("NetworkPolicy", "shop", "a." * 126 + "a", "", "uid"))["metadata"]["name"]
    )


def test_of_very_many_rejected_policies_the_same_few_are_written_of_on_every_node(control_plane: ControlPlane) -> None:
    writers = [
        EventWriter(connect(control_plane.kubeconfig), node=name, nodes=lambda: ["a", "b"]) for name in ("a", "b")
    ]
    many = [Rejection("NetworkPolicy", "many", f"p-{n}", "no", f"uid-{n}") for n in range(3 * MAX_POLICIES)]
    writers[0].rejected(many)
    writers[1].rejected(many[::-1])
    assert writers[0].standing == writers[1].standing
    assert len(writers[0].standing) == MAX_POLICIES


def test_a_policy_has_no_status_in_which_it_could_be_said(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "status")
    apply(plane, policy("db", "status"))
    words = ("--subresource=status", "--type=merge", "-p", '{"status": {"conditions": []}}')
    with pytest.raises(ProgramError, match=r"NotFound.*could not find the requested resource"):
        plane.kubectl("patch", "networkpolicy", "-n", "status", "db", *words)


def test_of_a_thousand_nodes_the_same_three_write_a_policys_event_and_others_anothers() -> None:
    nodes = [f"node-{number}" for number in range(1000)]
    chosen = {tuple(writers_of("some-uid", nodes, own)) for own in nodes}
    assert len(chosen) == 1
    assert len(set(*chosen)) == 3
    assert {tuple(writers_of("another-uid", nodes, "node-1"))}.isdisjoint(chosen)
    # A node whose own object is not known yet writes: nobody else may.
    assert writers_of("some-uid", [], "node-1") == ["node-1"]
