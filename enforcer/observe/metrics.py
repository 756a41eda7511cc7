"""Prometheus metrics: what the loop does, and the kernel's own counters, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from enforcer.model.sources import SourceStatus
from enforcer.reconcile.state import State

_SECONDS = (0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class Metrics:
    """The loop's metrics in a registry of their own; a ``reconciler.Observer``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._transactions = Histogram(
            "drawbridge_transaction_seconds",
            "Time to word a transaction and have the kernel commit it.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._elements = Counter(
            "drawbridge_elements", "Set elements added or removed by transactions.", registry=self.registry
        )
        self._failures = Counter(
            "drawbridge_transaction_failures", "Transactions that the kernel refused.", registry=self.registry
        )
        self._repairs = Counter(
            "drawbridge_repairs", "Times that another process had changed our tables.", registry=self.registry
        )
        self._cleared = Counter(
            "drawbridge_stamps_cleared",
            "Connections that were cleared of the stamp of an old epoch.",
            registry=self.registry,
        )

    def committed(self, *, whole: bool, seconds: float, elements: int) -> None:
        """A transaction stands."""
        self._transactions.labels("whole" if whole else "change").observe(seconds)
        self._elements.inc(elements)

    def failed(self) -> None:
        """A transaction was refused."""
        self._failures.inc()

    def repaired(self) -> None:
        """Another process had changed our tables."""
        self._repairs.inc()

    def cleared(self, connections: int) -> None:
        """Connections were cleared of the stamp of an old epoch."""
        self._cleared.inc(connections)


class KernelCollector(Collector):
    """Counters of the tables, the sizes of the state and its age, read from the loop and the source at each scrape."""

    def __init__(
        self,
        state: Callable[[], State],
        counters: Callable[[], Mapping[str, tuple[int, int]]],
        status: Callable[[], Iterable[SourceStatus]],
    ) -> None:
        self._state = state
        self._counters = counters
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: the kernel is not to be asked before a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the kernel and the loop."""
        state = self._state()
        for name, value, text in (
            ("synced", state.synced, "Whether the kernel holds all that the source held."),
            ("local_pods", state.local_pods, "Pods of this node that policies apply to."),
            ("cluster_pods", state.cluster_pods, "Pods that are known, of every node."),
            ("policies", state.policies, "NetworkPolicies."),
            ("rejected", len(state.rejections), "Objects that are not enforced as written."),
            ("attachments", state.attachments, "Interfaces that a CNI ADD made."),
            ("epoch", state.stamps.epoch or 0, "Epoch of the connection mark; 0: none, every packet is judged."),
        ):
            yield GaugeMetricFamily(f"drawbridge_{name}", text, value=value)
        age = GaugeMetricFamily(
            "drawbridge_source_age_seconds", "Time since the API was last status of a kind.", labels=["kind"]
        )
        for status in self._status():
            age.add_metric([status.kind], status.seconds)
        yield age
        packets = CounterMetricFamily(
            "drawbridge_rule_packets", "Packets counted by a named nftables counter.", labels=["counter"]
        )
        octets = CounterMetricFamily(
            "drawbridge_rule_bytes", "Bytes counted by a named nftables counter.", labels=["counter"]
        )
        for name, (packet_count, byte_count) in self._counters().items():
            packets.add_metric([name], packet_count)
            octets.add_metric([name], byte_count)
        yield packets
        yield octets
