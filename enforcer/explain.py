"""Why a packet passes or not: the model's verdict, the kernel's own rules, and what would allow it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from enforcer.model.addresses import Address, Family, family_of, format_address, parse_address
from enforcer.model.objects import Direction
from enforcer.policy.endpoints import Endpoint, Standing
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
    cluster: Cluster, question: Question, view: View | None = None, counters: Mapping[str, tuple[int, int]] | None = None
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
        flows.append(_flow(cluster, question, family, source, destination, view=view, counters=counters or {}))
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
