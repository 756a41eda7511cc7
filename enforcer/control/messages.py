"""What travels between the command line and the agent: a question, and the answer to it, as JSON.

``drawbridge … -o json`` prints the same answers.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from enforcer.model.changes import Rejection
from enforcer.model.sources import SourceStatus
from enforcer.reconcile.state import Stamps

MAX_WAIT_SECONDS = 86_400


class StatusQuestion(msgspec.Struct, frozen=True, tag_field="operation", tag="status"):
    """Whether the kernel holds all that the source holds; ``wait`` is in seconds, for a day at most."""

    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_SECONDS)] = 0.0


class PodsQuestion(msgspec.Struct, frozen=True, tag_field="operation", tag="pods"):
    """Which pods are known."""


class PoliciesQuestion(msgspec.Struct, frozen=True, tag_field="operation", tag="policies"):
    """Which policies there are, and what they did."""


class Question(msgspec.Struct, frozen=True, kw_only=True, tag_field="operation", tag="explain"):
    """Why a flow is allowed or denied; its ends are ``namespace/pod``, an address, or ``node``."""

    source: str
    destination: str
    protocol: str
    port: int | None = None


AnyQuestion = StatusQuestion | PodsQuestion | PoliciesQuestion | Question


class Pods(msgspec.Struct, frozen=True):
    """Numbers of pods: of this node, and of every node."""

    local: int
    cluster: int


class Kernel(msgspec.Struct, frozen=True):
    """What was found of the kernel when the agent started."""

    release: str
    missing: list[str]
    notes: list[str]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``StatusQuestion``.

    Attributes:
        synced: whether the kernel holds all that the source held when the agent was asked.
        node: this node's name.
        source: where objects come from.
        pods: how many there are.
        attachments: how many interfaces CNI ADDs made.
        policies: how many there are.
        rejected: objects that are not enforced as written.
        sources: how old what is known of each kind is.
        settings: settings of the node that are wrong.
        failure: why the kernel does not hold the rules; None if it does.
        stamps: what is known of the stamps of connections.
        unready: why no pod can be attached; None if one can.
        problems: what else is wrong on the node.
        kernel: what was found of the kernel.
        table: the nftables table, as ``nft list table`` takes it.
    """

    synced: bool
    node: str
    source: str
    pods: Pods
    attachments: int
    policies: int
    rejected: list[Rejection]
    sources: list[SourceStatus]
    settings: list[str]
    failure: str | None
    stamps: Stamps
    unready: str | None
    problems: list[str]
    kernel: Kernel
    table: str


class PodRow(msgspec.Struct, frozen=True, kw_only=True):
    """A pod in the answer to ``PodsQuestion``; ``port`` is its interface on this node, or ""."""

    pod: str
    addresses: list[str]
    local: bool
    standing: str
    port: str
    labels: dict[str, str]
    known: bool


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A policy, with packets by direction: those that began a flow which it allowed, and those that it denied."""

    policy: str
    pods: int
    rejected: str | None
    packets: dict[str, int]
    denied: dict[str, int]


class Policies(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``PoliciesQuestion``; ``denied`` are packets that no policy denied, by reason."""

    policies: list[PolicyRow]
    denied: dict[str, int]


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
