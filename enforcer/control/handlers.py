"""What the agent answers to the command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import assert_never

from enforcer.control.explain import Evidence, QuestionError, explain
from enforcer.control.messages import (
    AnyQuestion,
    Flow,
    Kernel,
    PodRow,
    Pods,
    PodsQuestion,
    Policies,
    PoliciesQuestion,
    PolicyRow,
    Question,
    Status,
    StatusQuestion,
)
from enforcer.control.socket import ControlError
from enforcer.kernel.nftables import Tables
from enforcer.kernel.requirements import Findings
from enforcer.model.addresses import Address, format_address
from enforcer.model.sources import Source
from enforcer.policy.endpoints import Standing
from enforcer.reconcile.reconciler import Reconciler
from enforcer.reconcile.state import State
from enforcer.ruleset.objects import Table
from enforcer.supervision.housekeeping import Housekeeping
from enforcer.translate import names
from enforcer.translate.base import DENIED_BY_NO_POLICY


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlHandlers:
    """The answers of one agent, which are asked for from threads of the control socket.

    Attributes:
        reconciler: the loop, between whose transactions it is asked.
        tables: the kernel's.
        routes_made: waits until the routes are those of the last Nodes, for as many seconds; False if they are not.
        source: where objects come from; ``source_name`` is for people.
        node: this node's name.
        unready: why no pod can be attached now; None if one can, or if another attaches them.
        gateways: the node's own addresses on the pod network.
        closes_own_networks: whether addresses of this node's networks that no pod has are closed.
        node_open: whether egress policies pass over a pod's own node.
        housekeeping: what it found.
        kernel: what was found of the kernel.
        clock: seconds that never go back.
    """

    reconciler: Reconciler
    tables: Tables
    routes_made: Callable[[float], bool]
    source: Source
    source_name: str
    node: str
    unready: Callable[[], str | None]
    gateways: Callable[[], tuple[Address, ...]]
    closes_own_networks: bool
    node_open: bool
    housekeeping: Housekeeping
    kernel: Findings
    clock: Callable[[], float] = time.monotonic

    def answer(self, question: AnyQuestion) -> object:
        """Answer a question.

        Raises:
            ControlError: it has no answer; the text is for the one who asked.
        """
        match question:
            case StatusQuestion():
                return self._status(question)
            case PodsQuestion():
                return self.reconciler.call(self._pods)
            case PoliciesQuestion():
                return self.reconciler.call(self._policies)
            case Question():
                return self.reconciler.call(lambda: self._explain(question))
            case _:
                assert_never(question)

    def _catch_up(self, deadline: float) -> tuple[bool, State]:
        """Wait until the kernel holds what the source holds now; False if that took longer, or is not known."""
        held = self.source.catch_up(deadline - self.clock())
        held = self.reconciler.barrier(max(0.0, deadline - self.clock())) and held
        held = self.routes_made(max(0.0, deadline - self.clock())) and held
        return held, self.reconciler.call(self.reconciler.state)

    def _status(self, question: StatusQuestion) -> Status:
        deadline = self.clock() + question.wait
        held, state = self._catch_up(deadline)
        # What has been taken in may have made room for policies that have to be read again.
        while held and state.unread and self.clock() < deadline:
            held, state = self._catch_up(deadline)
        rejected = list(self.source.rejections())
        known = {(r.kind, r.namespace, r.name) for r in rejected}
        return Status(
            synced=held and state.synced and not state.unread,
            node=self.node,
            source=self.source_name,
            pods=Pods(state.local_pods, state.cluster_pods),
            attachments=state.attachments,
            policies=state.policies,
            rejected=rejected + [r for r in state.rejections if (r.kind, r.namespace, r.name) not in known],
            sources=list(self.source.status()),
            settings=self.housekeeping.settings,
            failure=state.failure,
            stamps=state.stamps,
            unready=self.unready(),
            problems=self.housekeeping.problems,
            kernel=Kernel(self.kernel.release, list(map(str, self.kernel.missing)), list(map(str, self.kernel.notes))),
            table=str(Table.POLICY),
        )

    def _pods(self) -> list[PodRow]:
        interfaces = {a.pod: a.host_interface for a in self.reconciler.desired.attachments}
        return [
            PodRow(
                pod=endpoint.key,
                addresses=[format_address(address) for address in endpoint.addresses],
                local=endpoint.local,
                standing=endpoint.standing.value,
                port=interfaces.get(endpoint.claimed_pod or endpoint.key, "") if endpoint.local else "",
                labels=dict(endpoint.labels),
                known=endpoint.standing is Standing.POD,
            )
            for endpoint in sorted(self.reconciler.desired.cluster.endpoints.values(), key=lambda e: e.key)
        ]

    def _policies(self) -> Policies:
        counters = self.tables.counters()
        packets = {name: counted for name, (counted, _) in counters.items()}
        totals = self.reconciler.denials.totals(counters)
        rows = [
            PolicyRow(
                policy=policy.key,
                pods=self.reconciler.desired.selected(policy.key),
                rejected=policy.rejected,
                packets={
                    direction.value: packets.get(names.policy_counter(policy.key, direction), 0)
                    for direction in policy.rules
                },
                denied={direction.value: totals.get((policy.key, direction), 0) for direction in policy.rules},
            )
            for policy in sorted(self.reconciler.desired.cluster.policies.values(), key=lambda policy: policy.key)
        ]
        denied = {reason: packets[name] for name, reason in DENIED_BY_NO_POLICY.items() if name in packets}
        return Policies(policies=rows, denied=denied)

    def _explain(self, question: Question) -> list[Flow]:
        evidence = Evidence(
            view=self.tables,
            counters=self.tables.counters(),
            node=self.gateways(),
            node_open=self.node_open,
            closed=self.reconciler.desired.own_networks if self.closes_own_networks else (),
        )
        try:
            return explain(self.reconciler.desired.cluster, question, evidence)
        except QuestionError as error:
            raise ControlError(str(error)) from error
