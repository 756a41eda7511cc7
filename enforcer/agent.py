"""The composition root: puts source, loop, kernel, CNI server, control door and health together, and runs them."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from cni import install
from cni.ipam import Store
from cni.netlink import NetlinkError
from cni.node import Node, bridged_past_policy
from cni.operations import EnforcerUnavailable, Operations
from cni.routes import NodeRoutes
from cni.server import CniServer
from enforcer.config import Config
from enforcer.control import ControlError, ControlServer
from enforcer.explain import Evidence, Question, QuestionError, explain
from enforcer.kernel.netlink import TableWatch
from enforcer.kernel.nftables import Tables
from enforcer.lock import Lock
from enforcer.model.addresses import Network, format_address
from enforcer.model.changes import Rejection
from enforcer.model.objects import Attachment
from enforcer.model.objects import Node as NodeObject
from enforcer.observe.health import HealthServer
from enforcer.observe.metrics import KernelCollector, Metrics
from enforcer.policy.endpoints import Standing
from enforcer.reconcile.reconciler import NotReadyError, Reconciler, Settings
from enforcer.ruleset.objects import Table
from enforcer.sources import Heard
from enforcer.sources.directory import DirectorySource
from enforcer.translate import names
from enforcer.translate.rules import BaseSettings

if TYPE_CHECKING:
    from enforcer.observe.events import EventWriter

log = structlog.get_logger()

_ENDS = {signal.SIGTERM, signal.SIGINT}
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of ``drawbridge agent``.

    Without ``source`` it is the API, without ``kubeconfig`` in-cluster; without ``cni_conf_dir`` no configuration is
    written for the runtime, whose plugins are in ``cni_bin_dir``.
    """

    source: Path | None
    kubeconfig: Path | None
    node: str
    run_dir: Path
    pod_cidrs: tuple[Network, ...]
    config: Config
    cni_conf_dir: Path | None = None
    cni_bin_dir: Path = install.BIN_DIR


class Source(Protocol):
    """What hands objects to the loop."""

    def start(self) -> None:
        """Begin."""

    def alive(self) -> bool:
        """Whether it runs."""

    def stop(self) -> None:
        """End; nothing is handed on after that."""

    def catch_up(self, seconds: float) -> bool:
        """Return when all that is there now has been handed on; False if that takes longer."""

    def rejections(self) -> tuple[Rejection, ...]:
        """What cannot be used, and why."""

    def heard(self) -> tuple[Heard, ...]:
        """How old what has been handed on is, by kind, where that is not simply now."""


class _Enforcer:
    """The loop as the CNI server sees it."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    def attach(self, attachment: Attachment) -> None:
        try:
            self._reconciler.attach(attachment)
        except NotReadyError as error:
            raise EnforcerUnavailable(str(error)) from error

    def detach(self, key: str) -> None:
        try:
            self._reconciler.detach(key)
        except NotReadyError as error:
            raise EnforcerUnavailable(str(error)) from error

    def ready(self) -> str | None:
        try:
            state = self._reconciler.call(self._reconciler.state)
        except TimeoutError:
            return "the loop does not answer"
        return state.failure or (None if state.synced else "the source has not been read yet")

    def live(self) -> str | None:
        try:
            self._reconciler.call(lambda: None)
        except TimeoutError:
            return "the loop does not answer"
        return None if self._reconciler.alive() else "the loop has ended"


class Agent:
    """One node's agent. ``run`` returns the process's exit status."""

    def __init__(self, options: Options) -> None:
        self._options = options
        config = options.config
        self._network = config.network == "bridge"
        # Where pod networks are given by hand, it is not known which are the cluster's, nor who has them.
        follows_nodes = self._network and not options.pod_cidrs
        tunnels = follows_nodes and config.routing != "direct"
        options.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = Lock(options.run_dir)
        self._metrics = Metrics()
        settings = Settings(
            node=options.node,
            unknown_pods_allowed=config.unknown_pods == "allow",
            unknown_pod_wait=config.unknown_pod_wait_seconds,
            base=BaseSettings(
                pod_to_own_node=config.pod_to_own_node == "allow",
                revoked_mark=config.revoked_connection_mark,
                masquerade=config.masquerade == "enable" and follows_nodes,
                not_masqueraded=config.networks_not_masqueraded,
                tunnel=config.tunnel if tunnels else None,
                close_own_networks=config.unknown_pods == "deny" and config.network == "none",
            ),
        )
        self._reconciler = Reconciler(Tables(), settings, self._metrics)
        self._events: EventWriter | None = None
        self._source, self._source_name = self._open_source()
        self._store = Store(options.run_dir / "state.db")
        self._node = Node(bridge_netfilter=config.bridge_netfilter, tunnels=tunnels)
        self._operations = Operations(
            store=self._store,
            node=self._node,
            enforcer=_Enforcer(self._reconciler),
        )
        self._wrong_settings: list[str] = []
        self._routes = NodeRoutes(own=options.node, setup=self._node, routing=config.routing, tunnel=config.tunnel)
        self._announced = not self._network or options.cni_conf_dir is None
        self._amiss: list[str] = []
        if follows_nodes:
            self._reconciler.follow_nodes(self._follow_nodes)

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until the loop fails."""
        # Every thread to come has them blocked, too: only the wait below takes them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        try:
            health = self._health()
        except OSError as error:
            log.error("metricsAddress cannot be used", address=self._options.config.metrics_address, error=str(error))
            return 1
        watch = TableWatch()
        watcher = threading.Thread(target=self._watch, args=(watch,), name="nftables", daemon=True)
        watcher.start()
        if self._network:
            self._routes.start()
        self._reconciler.start()
        if self._network:
            self._reconciler.restore(self._operations.start(self._options.pod_cidrs))
        self._source.start()
        if self._events is not None:
            self._events.start()
        cni = CniServer(self._options.run_dir / "cni.sock", self._operations) if self._network else None
        control = ControlServer(self._options.run_dir, self._doors())
        if cni is not None:
            cni.start()
        control.start()
        log.info("agent started", node=self._options.node, source=self._source_name, pid=os.getpid())
        while signal.sigtimedwait(_ENDS, _LOOK_SECONDS if self._announced else _FIRST_LOOK_SECONDS) is None:
            now = self._node.set_back() if self._network else bridged_past_policy()
            if now != self._wrong_settings:
                self._wrong_settings = now
                log.warning("settings of the node are not as the agent needs them", settings=now or "right again")
            if (amiss := self._announce()) != self._amiss:
                self._amiss = amiss
                log.warning("what is amiss on the node has changed", amiss=amiss or "nothing any more")
            if not (self._reconciler.alive() and self._source.alive() and watcher.is_alive() and self._routes.alive()):
                log.error("a thread of the agent has ended; the kernel's rules stand, restart the agent")
                # The CNI server's threads may wait for the loop for ever.
                os._exit(1)
        if cni is not None:
            cni.stop()
        control.stop()
        if health is not None:
            health.stop()
        self._source.stop()
        if self._events is not None:
            self._events.stop()
        self._reconciler.stop()
        self._store.close()
        log.info("agent stopped; rules and links stay")
        return 0

    def _open_source(self) -> tuple[Source, str]:
        """The source, and its name for people."""
        changes, synced = self._reconciler.changes, self._reconciler.synced
        if self._options.source is not None:
            return DirectorySource(self._options.source, changes=changes, synced=synced), str(self._options.source)
        # Here, because the Kubernetes client takes 17 MB, which a directory of manifests does without.
        from enforcer.observe.events import EventWriter  # noqa: PLC0415
        from enforcer.sources import api, transport  # noqa: PLC0415

        client = transport.client(self._options.kubeconfig)
        self._events = EventWriter(client)
        self._reconciler.follow_rejections(self._events.rejected)
        return api.ApiSource(client, changes=changes, synced=synced), str(client.configuration.host)

    def _follow_nodes(self, nodes: Mapping[str, NodeObject | None]) -> None:
        own = nodes.get(self._options.node)
        if own is not None:
            self._follow_own_node(own)
        self._routes.set_nodes(nodes)

    def _follow_own_node(self, node: NodeObject) -> None:
        try:
            self._operations.set_pod_cidrs(node.pod_cidrs)
        except (NetlinkError, OSError, ValueError) as error:
            log.error(
                "the node's pod CIDRs cannot be used", cidrs=[str(cidr) for cidr in node.pod_cidrs], error=str(error)
            )

    def _announce(self) -> list[str]:
        """Give the runtime its network configuration, if pods can be attached; what is amiss with it, in words."""
        folder = self._options.cni_conf_dir
        if not self._network or folder is None or self._operations.unready() is not None:
            return []
        try:
            if install.install_configuration(folder, self._options.cni_bin_dir):
                log.info("network configuration written; the node becomes ready", folder=str(folder))
            self._announced = True
            return [
                f"{folder / name}: the runtime takes it before ours; remove it" for name in install.preceding(folder)
            ]
        except OSError as error:
            return [f"the network configuration cannot be written, no pod starts here: {error}"]

    def _watch(self, watch: TableWatch) -> None:
        while True:
            self._reconciler.touched(watch.wait())

    def _health(self) -> HealthServer | None:
        address = self._options.config.metrics_address
        if not address:
            return None
        tables = self._reconciler.tables
        self._metrics.registry.register(
            KernelCollector(
                lambda: self._reconciler.call(self._reconciler.state),
                lambda: self._reconciler.call(tables.counters),
                self._source.heard,
            )
        )
        server = HealthServer(
            address,
            self._metrics.registry,
            live=_Enforcer(self._reconciler).live,
            ready=self._operations.unready if self._network else _Enforcer(self._reconciler).ready,
            remarks=lambda: [*self._wrong_settings, *map(str, self._source.heard())],
        )
        server.start()
        return server

    # What the command line asks, by name

    def _doors(self) -> Mapping[str, Any]:
        return {
            "status": self._status,
            "pods": self._on_loop(self._pods),
            "policies": self._on_loop(self._policies),
            "explain": self._on_loop(self._explain),
        }

    def _on_loop(self, function: Any) -> Any:
        return lambda arguments: self._reconciler.call(lambda: function(arguments))

    def _status(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + float(arguments.get("wait", 0))
        fresh = self._source.catch_up(deadline - time.monotonic())
        held = self._reconciler.barrier(max(0.0, deadline - time.monotonic())) and fresh
        state = self._reconciler.call(self._reconciler.state)
        known = {(r.kind, r.namespace, r.name) for r in self._source.rejections()}
        extra = [r for r in state.rejections if (r.kind, r.namespace, r.name) not in known]
        return {
            "synced": held and state.synced,
            "node": self._options.node,
            "source": self._source_name,
            "pods": {"local": state.local_pods, "cluster": state.cluster_pods},
            "attachments": state.attachments,
            "policies": state.policies,
            "rejected": [dataclasses.asdict(r) for r in (*self._source.rejections(), *extra)],
            "heard": [dataclasses.asdict(heard) for heard in self._source.heard()],
            "settings": self._wrong_settings,
            "failure": state.failure,
            "unready": self._operations.unready() if self._network else None,
            "amiss": self._amiss,
            "table": str(Table.POLICY),
        }

    def _pods(self, _: Mapping[str, Any]) -> list[dict[str, Any]]:
        ports = {a.pod: a for a in self._reconciler.attachments}
        rows = []
        for endpoint in sorted(self._reconciler.cluster.endpoints.values(), key=lambda e: e.key):
            attachment = ports.get(endpoint.key.split(" ")[0])
            rows.append(
                {
                    "pod": endpoint.key,
                    "addresses": [format_address(address) for address in endpoint.addresses],
                    "local": endpoint.local,
                    "standing": endpoint.standing.value,
                    "port": attachment.port if attachment and endpoint.local else "",
                    "labels": dict(endpoint.labels),
                    "known": endpoint.standing is Standing.POD,
                }
            )
        return rows

    def _policies(self, _: Mapping[str, Any]) -> dict[str, Any]:
        packets = {name: counted for name, (counted, _) in self._reconciler.tables.counters().items()}
        policies = [
            {
                "policy": policy.key,
                "pods": self._reconciler.selected(policy.key),
                "rejected": policy.rejected,
                "packets": {
                    direction.value: packets.get(names.policy_chain(policy.key, direction), 0)
                    for direction in policy.rules
                },
            }
            for policy in sorted(self._reconciler.cluster.policies.values(), key=lambda policy: policy.key)
        ]
        denied = {name.partition("/")[2]: counted for name, counted in packets.items() if name.startswith("denied/")}
        return {"policies": policies, "denied": denied}

    def _explain(self, arguments: Mapping[str, Any]) -> Sequence[Any]:
        tables = self._reconciler.tables
        evidence = Evidence(
            view=tables,
            counters=tables.counters(),
            node=self._operations.gateways(),
            node_open=self._options.config.pod_to_own_node == "allow",
            closed=self._reconciler.closed_networks,
        )
        try:
            return explain(self._reconciler.cluster, Question(**arguments), evidence)
        except QuestionError as error:
            raise ControlError(str(error)) from error
