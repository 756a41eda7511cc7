"""Why a packet passes or not: the model's verdict, the kernel's own rules, and what would allow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from enforcer.control.messages import Answer, Flow, Question
from enforcer.model.addresses import Address, Family, Network, family_of, format_address, parse_address
from enforcer.model.objects import Direction
from enforcer.policy.resolve import Cluster
from enforcer.policy.verdict import Connection, Decision, decide
from enforcer.ruleset.evaluate import Outcome, View, evaluate

NODE = "node"
"""The word for this node itself."""

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1}


class QuestionError(Exception):
    """A question that has no answer; the text says what in it is not known."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What can be asked beside the model.

    ``view`` are the rules (the kernel's, or a rendered ruleset's), ``counters`` packets and bytes by name.
    ``node`` are the node's own addresses on the pod network, and ``node_open`` says that pods reach them whatever
    their egress policy says. ``closed`` are networks whose addresses are closed where no pod of this node has them.
    """

    view: View | None = None
    counters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    node: tuple[Address, ...] = ()
    node_open: bool = False
    closed: tuple[Network, ...] = ()


def explain(cluster: Cluster, question: Question, evidence: Evidence) -> list[Flow]:
    """Explain a flow for each family that both of its ends have.

    Raises:
        QuestionError: an end is not known, or the ends have no family in common.
    """
    if question.protocol not in PROTOCOLS:
        raise QuestionError(f"{question.protocol}: not a protocol; use one of {', '.join(PROTOCOLS)}")
    ends = [_addresses(cluster, end, evidence) for end in (question.source, question.destination)]
    pairs = [tuple(_of_family(addresses, family) for addresses in ends) for family in Family]
    flows = [
        _flow(cluster, question, Connection(source, destination, PROTOCOLS[question.protocol], question.port), evidence)
        for source, destination in pairs
        if source is not None and destination is not None
    ]
    if not flows:
        raise QuestionError(f"{question.source} and {question.destination} have no IP family in common")
    return flows


def _addresses(cluster: Cluster, end: str, evidence: Evidence) -> tuple[Address, ...]:
    if end == NODE:
        if not evidence.node:
            raise QuestionError(f"{NODE}: its addresses on the pod network are not known here; name one")
        return evidence.node
    if "/" in end:
        for endpoint in cluster.endpoints.values():
            if end in {endpoint.key, endpoint.claimed_pod}:
                return endpoint.addresses
        raise QuestionError(f"{end}: no such pod with an address on the pod network; see `drawbridge pods`")
    try:
        return (parse_address(end),)
    except ValueError:
        raise QuestionError(f"{end}: not namespace/pod, an IP address or `{NODE}`") from None


def _of_family(addresses: tuple[Address, ...], family: Family) -> Address | None:
    return next((address for address in addresses if family_of(address) is family), None)


def _flow(cluster: Cluster, question: Question, connection: Connection, evidence: Evidence) -> Flow:
    if connection.client in evidence.node:
        reason = "what a node sends to its own pods is not filtered"
        answers = [Answer(direction=Direction.INGRESS.value, allowed=True, pod=question.destination, reason=reason)]
    elif connection.server in evidence.node:
        answers = [_answer(cluster, question, connection, evidence, direction=Direction.EGRESS)]
    else:
        directions = (Direction.EGRESS, Direction.INGRESS)
        answers = [_answer(cluster, question, connection, evidence, direction=direction) for direction in directions]
    return Flow(
        source=format_address(connection.client),
        destination=format_address(connection.server),
        protocol=question.protocol,
        port=question.port,
        allowed=all(answer.allowed for answer in answers),
        answers=answers,
    )


def _answer(
    cluster: Cluster, question: Question, connection: Connection, evidence: Evidence, *, direction: Direction
) -> Answer:
    to_node = connection.server in evidence.node
    decision = decide(cluster, connection, direction)
    allowed = decision.allowed or (to_node and evidence.node_open)
    reason = "the agent lets pods reach their own node (podToOwnNode)" if allowed and not decision.allowed else ""
    here = any(cluster.endpoints[key].local for key in decision.endpoints)
    own = connection.client if direction is Direction.EGRESS else connection.server
    unknown = not here and any(own in network for network in evidence.closed)
    if unknown:
        allowed = to_node and evidence.node_open
        reason = "closed: an address of this node's pod networks that no pod of it is known for"
    outcome = None
    if evidence.view is not None and (here or unknown):
        # Another node's pod is judged there; this kernel has no rules for it.
        chain = "to-pod" if direction is Direction.INGRESS else "to-node" if to_node else "from-pod"
        outcome = evaluate(evidence.view, chain, connection_fields(connection, question.protocol))
    counter = _counter(outcome)
    return Answer(
        direction=direction.value,
        allowed=allowed,
        pod=", ".join(decision.endpoints),
        reason=reason or _reason(decision, here=here),
        advice="" if allowed else _advice(decision, question),
        kernel=None if outcome is None else outcome.rule or "no rule: the chain's policy accepts",
        agrees=None if outcome is None else outcome.accepted is allowed,
        packets=evidence.counters[counter][0] if counter in evidence.counters else None,
    )


def _reason(decision: Decision, *, here: bool) -> str:
    return _model_reason(decision) + ("" if here or not decision.endpoints else "; judged on the pod's node")


def _model_reason(decision: Decision) -> str:
    if decision.policy is not None:
        return f"{decision.policy} allows it: {decision.direction.value}[{decision.rule}]"
    if decision.group is None:
        return "no policy isolates the pod in this direction" if decision.endpoints else "the address is no pod's"
    if not decision.group.policies:
        return "closed: the pod's object is not known yet, or two pods claim its address"
    names = ", ".join(decision.group.policies)
    if decision.group.closed:
        return f"closed by rejected policies: {names}"
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


def connection_fields(connection: Connection, protocol: str) -> dict[str, str]:
    """The first packet of a new connection, by the names of nft's fields."""
    v4 = family_of(connection.client) is Family.V4
    ip = "ip" if v4 else "ip6"
    client, server = format_address(connection.client), format_address(connection.server)
    fields = {
        f"{ip} saddr": client,
        f"{ip} daddr": server,
        f"ct original {ip} saddr": client,
        f"ct reply {ip} saddr": server,
        "meta nfproto": "ipv4" if v4 else "ipv6",
        "meta l4proto": protocol,
        "ct protocol": protocol,
        # By a link that is not known here, but not from the node itself.
        "iifname": "",
        "ct state": "new",
        "ct mark": "0x00000000",
    }
    if connection.port is not None:
        fields |= {f"{protocol} dport": str(connection.port), "ct reply proto-src": str(connection.port)}
    return fields


def _counter(outcome: Outcome | None) -> str:
    if outcome is None or outcome.rule is None:
        return ""
    return outcome.rule.partition('counter name "')[2].partition('"')[0]
