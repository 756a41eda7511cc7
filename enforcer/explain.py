"""Why a packet passes or not: the model's verdict, the kernel's own rules, and what would allow it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from enforcer.model.addresses import Address, Family, family_of, format_address, parse_address
from enforcer.model.objects import Direction
from enforcer.policy.resolve import Cluster
from enforcer.policy.verdict import Decision, Packet, decide
from enforcer.ruleset.evaluate import Outcome, View, evaluate

NODE = "node"
"""The word for this node itself."""

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1}


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A flow: ``source`` and ``destination`` are ``namespace/pod``, an address, or ``node``."""

    source: str
    destination: str
    protocol: str
    port: int | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of one flow.

    ``kernel`` is the rule that the kernel has for it (None: not asked, or nothing here judges it), and ``agrees``
    whether it says what the model says. ``advice`` is what would allow a denied flow.
    """

    direction: str
    allowed: bool
    pod: str
    reason: str
    advice: str = ""
    kernel: str | None = None
    agrees: bool | None = None
    packets: int | None = None


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """The explanation of a flow for one pair of addresses."""

    source: str
    destination: str
    protocol: str
    port: int | None
    allowed: bool
    answers: list[Answer]


class QuestionError(Exception):
    """A question that has no answer; the text says what in it is not known."""


def explain(
    cluster: Cluster,
    question: Question,
    view: View | None = None,
    counters: Mapping[str, tuple[int, int]] | None = None,
) -> list[Flow]:
    """Explain a flow for each family that both of its ends have.

    Raises:
        QuestionError: an end is not known, or the ends have no family in common.
    """
    if question.protocol not in PROTOCOLS:
        raise QuestionError(f"{question.protocol}: not a protocol; use one of {', '.join(PROTOCOLS)}")
    sources = _addresses(cluster, question.source)
    destinations = _addresses(cluster, question.destination)
    flows = []
    for family in Family:
        source, destination = (_of_family(ends, family) for ends in (sources, destinations))
        if (source is None and question.source != NODE) or (destination is None and question.destination != NODE):
            continue
        flows.append(_flow(cluster, question, (source, destination), view=view, counters=counters or {}))
    if not flows:
        raise QuestionError(f"{question.source} and {question.destination} have no IP family in common")
    return flows


def _addresses(cluster: Cluster, end: str) -> tuple[Address, ...]:
    if end == NODE:
        return ()
    if "/" in end:
        for endpoint in cluster.endpoints.values():
            if endpoint.key.split(" ")[0] == end:
                return endpoint.addresses
        raise QuestionError(f"{end}: no such pod with an address on the pod network; see `drawbridge pods`")
    try:
        return (parse_address(end),)
    except ValueError:
        raise QuestionError(f"{end}: not namespace/pod, an IP address or `{NODE}`") from None


def _of_family(addresses: tuple[Address, ...], family: Family) -> Address | None:
    return next((address for address in addresses if family_of(address) is family), None)


def _flow(
    cluster: Cluster,
    question: Question,
    ends: tuple[Address | None, Address | None],
    *,
    view: View | None,
    counters: Mapping[str, tuple[int, int]],
) -> Flow:
    source, destination = ends
    answers = []
    if source is not None:
        answers.append(_answer(cluster, question, Direction.EGRESS, ends=ends, view=view, counters=counters))
    if source is not None and destination is not None:
        answers.append(_answer(cluster, question, Direction.INGRESS, ends=ends, view=view, counters=counters))
    return Flow(
        source=question.source if source is None else format_address(source),
        destination=question.destination if destination is None else format_address(destination),
        protocol=question.protocol,
        port=question.port,
        allowed=all(answer.allowed for answer in answers),
        answers=answers,
    )


def _answer(
    cluster: Cluster,
    question: Question,
    direction: Direction,
    *,
    ends: tuple[Address | None, Address | None],
    view: View | None,
    counters: Mapping[str, tuple[int, int]],
) -> Answer:
    source, destination = ends
    assumed = destination or bytes(len(source or b""))
    decision = decide(
        cluster, Packet(source or assumed, assumed, PROTOCOLS[question.protocol], question.port), direction
    )
    outcome = None
    if view is not None:
        chain = "to-pod" if direction is Direction.INGRESS else "from-pod" if destination is not None else "to-node"
        outcome = evaluate(view, chain, _fields(source or assumed, assumed, question))
    counter = _counter(outcome)
    return Answer(
        direction=direction.value,
        allowed=decision.allowed,
        pod=", ".join(decision.endpoints),
        reason=_reason(decision),
        advice="" if decision.allowed else _advice(decision, question),
        kernel=None if outcome is None else outcome.rule or "no rule: the chain's policy accepts",
        agrees=None if outcome is None else outcome.accepted is decision.allowed,
        packets=counters[counter][0] if counter in counters else None,
    )


def _reason(decision: Decision) -> str:
    if decision.policy is not None:
        return f"{decision.policy} allows it: {decision.direction.value}[{decision.rule}]"
    if decision.group is None:
        return "no policy isolates the pod in this direction" if decision.endpoints else "the address is no pod's"
    if not decision.group.policies:
        return "closed: the pod's object is not known yet, or two pods claim its address"
    names = ", ".join(decision.group.policies)
    if decision.group.closed:
        return f"closed: rejected, or together with a rejected policy: {names}"
    return f"isolated by {names}, and no rule of theirs matches"


def _advice(decision: Decision, question: Question) -> str:
    group = decision.group
    if group is None or not group.policies:
        return "wait for the pod's object, or see `drawbridge status`"
    if group.closed:
        return "correct the rejected policy; `drawbridge policies` has the reason"
    peer = question.destination if decision.direction is Direction.EGRESS else question.source
    word = "to" if decision.direction is Direction.EGRESS else "from"
    port = f", port {question.port}/{question.protocol}" if question.port is not None else ""
    return (
        f"add to a policy that selects {', '.join(decision.endpoints)}: {decision.direction.value} {word} {peer}{port}"
    )


def _fields(source: Address, destination: Address, question: Question) -> dict[str, str]:
    v4 = family_of(source) is Family.V4
    ip = "ip" if v4 else "ip6"
    fields = {
        f"{ip} saddr": format_address(source),
        f"{ip} daddr": format_address(destination),
        "meta nfproto": "ipv4" if v4 else "ipv6",
        "meta l4proto": question.protocol,
        "ct state": "new",
    }
    if question.port is not None:
        fields |= {f"{question.protocol} dport": str(question.port), "th dport": str(question.port)}
    return fields


def _counter(outcome: Outcome | None) -> str:
    if outcome is None or outcome.rule is None:
        return ""
    return outcome.rule.partition('counter name "')[2].partition('"')[0]
