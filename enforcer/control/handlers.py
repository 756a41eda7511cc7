"""What the agent answers to the command line, by the name of the question."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from enforcer.control.explain import Evidence, Question, QuestionError, explain
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlHandlers:
    """The answers of one agent; each is JSON, and is asked for from threads of the control door.

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

    def by_name(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        """The answers, as ``ControlServer`` takes them."""
        return {
            "status": self._status,
            "pods": self._on_loop(self._pods),
            "policies": self._on_loop(self._policies),
            "explain": self._on_loop(self._explain),
        }

    def _on_loop(self, function: Any) -> Any:
        return lambda arguments: self.reconciler.call(lambda: function(arguments))

    def _catch_up(self, deadline: float) -> tuple[bool, State]:
        """Wait until the kernel holds what the source holds now; False if that took longer, or is not known."""
        held = self.source.catch_up(deadline - time.monotonic())
        held = self.reconciler.barrier(max(0.0, deadline - time.monotonic())) and held
        held = self.routes_made(max(0.0, deadline - time.monotonic())) and held
        return held, self.reconciler.call(self.reconciler.state)

    def _status(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + float(arguments.get("wait", 0))
        held, state = self._catch_up(deadline)
        # What has been taken in may have made room for policies that have to be read again.
        while held and state.unread and time.monotonic() < deadline:
            held, state = self._catch_up(deadline)
        known = {(r.kind, r.namespace, r.name) for r in self.source.rejections()}
        extra = [r for r in state.rejections if (r.kind, r.namespace, r.name) not in known]
        return {
            "synced": held and state.synced and not state.unread,
            "node": self.node,
            "source": self.source_name,
            "pods": {"local": state.local_pods, "cluster": state.cluster_pods},
            "attachments": state.attachments,
            "policies": state.policies,
            "rejected": [dataclasses.asdict(r) for r in (*self.source.rejections(), *extra)],
            "sources": [dataclasses.asdict(status) for status in self.source.status()],
            "settings": self.housekeeping.settings,
            "failure": state.failure,
            "stamps": dataclasses.asdict(state.stamps),
            "unready": self.unready(),
            "problems": self.housekeeping.problems,
            "kernel": {
                "release": self.kernel.release,
                "missing": list(map(str, self.kernel.missing)),
                "notes": list(map(str, self.kernel.notes)),
            },
            "table": str(Table.POLICY),
        }

    def _pods(self, _: Mapping[str, Any]) -> list[dict[str, Any]]:
        ports = {a.pod: a for a in self.reconciler.desired.attachments}
        rows = []
        for endpoint in sorted(self.reconciler.desired.cluster.endpoints.values(), key=lambda e: e.key):
            attachment = ports.get(endpoint.key.split(" ")[0])
            rows.append(
                {
                    "pod": endpoint.key,
                    "addresses": [format_address(address) for address in endpoint.addresses],
                    "local": endpoint.local,
                    "standing": endpoint.standing.value,
                    "port": attachment.host_interface if attachment and endpoint.local else "",
                    "labels": dict(endpoint.labels),
                    "known": endpoint.standing is Standing.POD,
                }
            )
        return rows

    def _policies(self, _: Mapping[str, Any]) -> dict[str, Any]:
        counters = self.tables.counters()
        packets = {name: counted for name, (counted, _) in counters.items()}
        totals = self.reconciler.denials.totals(counters)
        policies = [
            {
                "policy": policy.key,
                "pods": self.reconciler.desired.selected(policy.key),
                "rejected": policy.rejected,
                "packets": {
                    direction.value: packets.get(names.policy_counter(policy.key, direction), 0)
                    for direction in policy.rules
                },
                "denied": {direction.value: totals.get((policy.key, direction), 0) for direction in policy.rules},
            }
            for policy in sorted(self.reconciler.desired.cluster.policies.values(), key=lambda policy: policy.key)
        ]
        denied = {
            name.partition("/")[2]: counted
            for name, counted in packets.items()
            # What isolation groups are denied is told with their policies.
            if name.startswith("denied/") and name.count("/") == 1
        }
        return {"policies": policies, "denied": denied}

    def _explain(self, arguments: Mapping[str, Any]) -> Sequence[Any]:
        tables = self.tables
        evidence = Evidence(
            view=tables,
            counters=tables.counters(),
            node=self.gateways(),
            node_open=self.node_open,
            closed=self.reconciler.desired.own_networks if self.closes_own_networks else (),
        )
        try:
            return explain(self.reconciler.desired.cluster, Question(**arguments), evidence)
        except QuestionError as error:
            raise ControlError(str(error)) from error
