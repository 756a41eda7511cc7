"""The composition root: puts source, loop, kernel, CNI server, control door and health together, and runs them."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cni.netlink.rtnetlink import NetlinkError
from cni.node.bridge import Bridge, bridged_past_policy
from cni.node.routes import NodeRoutes
from cni.plugin.install import BIN_DIR
from cni.plugin.operations import EnforcerUnavailable, Operations
from cni.plugin.server import CniServer
from cni.plugin.store import Store
from enforcer.config import Config
from enforcer.control.handlers import ControlHandlers
from enforcer.control.socket import ControlServer
from enforcer.kernel.netlink import TableWatch
from enforcer.kernel.nftables import Tables
from enforcer.kernel.requirements import Findings, inspect
from enforcer.manifests.directory import DirectorySource
from enforcer.model.addresses import Network
from enforcer.model.marks import ConnectionMark
from enforcer.model.objects import Attachment
from enforcer.model.sources import Source
from enforcer.observe.health import HealthServer
from enforcer.observe.metrics import KernelCollector, Metrics
from enforcer.reconcile.reconciler import NotReadyError, Reconciler
from enforcer.reconcile.settings import Settings
from enforcer.reconcile.state import Followers
from enforcer.supervision.housekeeping import Housekeeping
from enforcer.supervision.lock import Lock
from enforcer.supervision.secret import secret
from enforcer.translate.base import BaseSettings

if TYPE_CHECKING:
    from enforcer.kubernetes.events import EventWriter

log = structlog.get_logger()

_ENDS = {signal.SIGTERM, signal.SIGINT}


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
    cni_bin_dir: Path = BIN_DIR


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
            limits=config.limits,
            state_folder=options.run_dir,
            base=BaseSettings(
                pod_to_own_node=config.pod_to_own_node == "allow",
                mark=ConnectionMark(config.connection_mark_mask),
                masquerade=config.masquerade == "enable" and follows_nodes,
                not_masqueraded=config.networks_not_masqueraded,
                tunnel=config.tunnel if tunnels else None,
                close_own_networks=config.unknown_pods == "deny" and config.network == "none",
                secret=secret(options.run_dir),
            ),
        )
        self._settings, self._tables = settings, Tables()
        self._reconciler = Reconciler(self._tables, settings, self._metrics)
        self._enforcer = _Enforcer(self._reconciler)
        self._events: EventWriter | None = None
        self._kernel = Findings("", (), ())
        self._source, self._source_name = self._open_source()
        self._store = Store(options.run_dir / "state.db")
        self._bridge = Bridge(bridge_netfilter=config.bridge_netfilter, tunnels=tunnels)
        self._operations = Operations(
            store=self._store,
            bridge=self._bridge,
            enforcer=self._enforcer,
        )
        self._routes = self._node_routes() if self._network else None
        self._housekeeping = Housekeeping(
            self._bridge.put_back if self._network else bridged_past_policy,
            self._unready,
            conf_dir=options.cni_conf_dir if self._network else None,
            bin_dir=options.cni_bin_dir,
        )
        followers = Followers(read_again=self._source.read_again)
        if self._routes is not None and follows_nodes:
            followers = dataclasses.replace(followers, ownership=self._routes.set_ownership)
        if self._events is not None:
            followers = dataclasses.replace(followers, rejections=self._events.rejected)
        self._reconciler.follow(followers)

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until the loop fails."""
        # Every thread to come has them blocked, too: only the wait below takes them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        try:
            health = self._health()
        except OSError as error:
            log.error("metrics address unusable", address=self._options.config.metrics_address, error=str(error))
            return 1
        self._inspect_kernel()
        watch = TableWatch()
        watcher = threading.Thread(target=self._watch, args=(watch,), name="nftables", daemon=True)
        watcher.start()
        if self._routes is not None:
            self._routes.start()
        self._reconciler.start()
        if self._network:
            self._reconciler.restore(self._operations.start(self._options.pod_cidrs))
        self._source.start()
        if self._events is not None:
            self._events.start()
        cni = CniServer(self._options.run_dir / "cni.sock", self._operations) if self._network else None
        control = ControlServer(self._options.run_dir, self._control_handlers().answer)
        if cni is not None:
            cni.start()
        control.start()
        log.info("agent started", node=self._options.node, source=self._source_name, pid=os.getpid())
        threads = [self._reconciler.alive, self._source.alive, watcher.is_alive]
        if self._routes is not None:
            threads.append(self._routes.alive)
        # After SIGSTOP and SIGCONT, sigtimedwait may return a result that is no signal's.
        while (ended := signal.sigtimedwait(_ENDS, self._housekeeping.pause)) is None or ended.si_signo not in _ENDS:
            self._housekeeping.look()
            if not all(alive() for alive in threads):
                log.error("agent thread ended", consequence="the kernel's rules stand", hint="restart the agent")
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
        log.info("agent stopped")
        return 0

    def _inspect_kernel(self) -> None:
        findings = inspect(self._options.config.connection_mark_mask)
        for missing in findings.missing:
            log.error("kernel feature missing", what=missing.what, consequence=missing.consequence, hint=missing.hint,
                      detail=missing.detail)  # fmt: skip
        for note in findings.notes:
            log.info("kernel note", what=note.what, consequence=note.consequence, hint=note.hint)
        self._kernel = findings

    def _open_source(self) -> tuple[Source, str]:
        """The source, and its name for people."""
        changes, synced = self._reconciler.changes, self._reconciler.synced
        if self._options.source is not None:
            return DirectorySource(self._options.source, changes=changes, synced=synced), str(self._options.source)
        # Here, because the Kubernetes client takes 17 MB, which a directory of manifests does without.
        from enforcer.kubernetes.client import connect  # noqa: PLC0415
        from enforcer.kubernetes.events import EventWriter  # noqa: PLC0415
        from enforcer.kubernetes.reflector import ApiSource  # noqa: PLC0415

        client = connect(self._options.kubeconfig)
        self._events = EventWriter(client, node=self._options.node, nodes=self._node_names)
        return ApiSource(client, changes=changes, synced=synced), str(client.configuration.host)

    def _node_names(self) -> Collection[str]:
        return self._reconciler.call(lambda: frozenset(self._reconciler.desired.nodes))

    def _node_routes(self) -> NodeRoutes:
        return NodeRoutes(
            own=self._options.node,
            bridge=self._bridge,
            routing=self._options.config.routing,
            tunnel=self._options.config.tunnel,
            set_pod_cidrs=self._set_pod_cidrs,
            report=self._reconciler.machine_changed,
        )

    def _set_pod_cidrs(self, networks: tuple[Network, ...]) -> None:
        try:
            self._operations.set_pod_cidrs(networks)
        except (NetlinkError, OSError, ValueError) as error:
            cidrs = list(map(str, networks))
            log.error("pod CIDRs rejected", cidrs=cidrs, error=str(error))

    def _unready(self) -> str | None:
        """Why no pod can be attached or, where another network attaches them, no policy enforced; None if it can."""
        return self._operations.unready() if self._network else self._enforcer.ready()

    def _control_handlers(self) -> ControlHandlers:
        return ControlHandlers(
            reconciler=self._reconciler,
            tables=self._tables,
            routes_made=self._routes.barrier if self._routes is not None else lambda _: True,
            source=self._source,
            source_name=self._source_name,
            node=self._options.node,
            unready=self._operations.unready if self._network else lambda: None,
            gateways=self._operations.gateways,
            closes_own_networks=self._settings.base.close_own_networks,
            node_open=self._options.config.pod_to_own_node == "allow",
            housekeeping=self._housekeeping,
            kernel=self._kernel,
        )

    def _watch(self, watch: TableWatch) -> None:
        while True:
            self._reconciler.ruleset_changed(watch.wait())

    def _health(self) -> HealthServer | None:
        address = self._options.config.metrics_address
        if not address:
            return None
        tables = self._tables
        self._metrics.registry.register(
            KernelCollector(
                lambda: self._reconciler.call(self._reconciler.state),
                lambda: self._reconciler.call(tables.counters),
                self._source.status,
            )
        )
        server = HealthServer(
            address,
            self._metrics.registry,
            live=self._enforcer.live,
            ready=self._unready,
            remarks=lambda: [*self._housekeeping.settings, *map(str, self._source.status())],
        )
        server.start()
        return server
