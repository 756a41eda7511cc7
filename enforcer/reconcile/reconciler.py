"""The owner of the state: takes events off a queue, and keeps the kernel's tables equal to what they add up to.

Other threads only ever put events; everything behind the queue is touched by the owner's thread alone. The first event
is worked off at once, and what arrives while a transaction runs goes into the next one together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from enforcer.kernel.nftables import NftError, Tables
from enforcer.model.addresses import Network
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Attachment, Namespace, NetworkPolicy, Node, Object, Pod
from enforcer.nodes.ownership import settle
from enforcer.policy.budget import Budget, Limits
from enforcer.policy.endpoints import Standing
from enforcer.policy.index import PolicyIndex
from enforcer.policy.resolve import Cluster
from enforcer.reconcile.commits import Commits, Committed
from enforcer.reconcile.denials import Denials
from enforcer.reconcile.endpoints import Endpoints
from enforcer.reconcile.stamps import STAMP_KERNEL, Cleared, GracePeriods, StampCleaner, StampKernel
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.base import BaseSettings
from enforcer.translate.translator import Translator

T = TypeVar("T")

_COMMIT_SECONDS = 10.0
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 10.0

log = structlog.get_logger()


class NotReadyError(Exception):
    """The kernel could not be brought to hold something in time; the text says what to look at."""


class Observer(Protocol):
    """What hears of each transaction; ``observe.metrics`` is the one that matters."""

    def committed(self, *, whole: bool, seconds: float, elements: int) -> None:
        """A transaction stands."""

    def failed(self) -> None:
        """A transaction was refused."""

    def repaired(self) -> None:
        """Another process had changed our tables."""

    def cleared(self, connections: int) -> None:
        """Connections were found that carried the stamp of an old epoch, and cleared of it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node's operator decides.

    ``unknown_pod_wait`` is in seconds; ``state_folder`` keeps counts over a restart, None keeps none.
    """

    node: str
    unknown_pods_allowed: bool = False
    unknown_pod_wait: float = 0.5
    base: BaseSettings = field(default_factory=BaseSettings)
    limits: Limits = field(default_factory=Limits)
    state_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Stamps:
    """What is known of the stamps that connections carry.

    Attributes:
        epoch: the one that judged connections are stamped with; None: nothing is stamped, every packet is judged.
        cleared: how many connections were cleared of an old epoch's stamp.
        failure: why old stamps could not be cleared at the last try.
    """

    epoch: int | None
    cleared: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class State:
    """The state of the loop, for status and health."""

    synced: bool
    failure: str | None
    local_pods: int
    cluster_pods: int
    policies: int
    attachments: int
    rejections: tuple[Rejection, ...]
    stamps: Stamps


class Reconciler:
    """The loop and its thread-safe doors.

    ``start`` runs it in a thread of its own. Nothing is committed before ``synced`` has been called once; the first
    commit replaces whatever an earlier agent left.
    """

    def __init__(
        self, tables: Tables, settings: Settings, observer: Observer, *, stamps: StampKernel = STAMP_KERNEL
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._observer = observer
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        # Everything below belongs to that thread.
        self._ruleset = Ruleset()
        self._translator = Translator(self._ruleset, settings.base)
        self._denials = Denials(settings.state_folder)
        self._commits = Commits(tables, self._ruleset, self._translator, self._denials)
        self._index = PolicyIndex(self._translator)
        unknown = Standing.GUEST if settings.unknown_pods_allowed else Standing.UNKNOWN
        self._endpoints = Endpoints(settings.node, self._index.set_endpoint, unknown=unknown)
        self._hear_nodes: Callable[[Mapping[str, Node | None]], None] | None = None
        self._nodes: dict[str, Node] = {}
        self._own_networks: tuple[Network, ...] = ()
        self._budget = Budget(settings.limits)
        self._policies: dict[str, NetworkPolicy] = {}
        self._hear_rejections: Callable[[Sequence[Rejection]], None] | None = None
        self._read_again: Callable[[Collection[str]], None] | None = None
        self._rejected: dict[str, Rejection] = {}
        self._rejected_before: dict[str, Rejection] = {}
        self._changed_policies: set[str] = set()
        self._synced = False
        self._whole = True
        self._failure: str | None = None
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._accounted = 0
        self._after_commit: list[Callable[[], None]] = []
        self._awaited: dict[str, tuple[Attachment, Future[None]]] = {}
        self._clearing: set[int] = set()
        self._knowledge = 0
        self._grace_asked: int | None = None
        self._grace_over: int | None = None
        self._cleared = 0
        self._clear_failure: str | None = None
        self._cleaner = StampCleaner(settings.base.mark, self._hear_cleared, stamps.clear)
        self._grace = GracePeriods(self._hear_grace_over, stamps.wait_for_packets)

    # Doors: any thread

    def follow_nodes(self, hear: Callable[[Mapping[str, Node | None]], None]) -> None:
        """Have ``hear`` called on the loop's thread with the new state of Node objects by name; before ``start``.

        Its first call has all that the source holds.
        """
        self._hear_nodes = hear

    def follow_rejections(self, hear: Callable[[Sequence[Rejection]], None]) -> None:
        """Have ``hear`` called on the loop's thread with all policies rejected, when others are; before ``start``."""
        self._hear_rejections = hear

    def read_policies_by(self, read_again: Callable[[Collection[str]], None]) -> None:
        """Have ``read_again`` called on the loop's thread with keys of policies to be put again; before ``start``."""
        self._read_again = read_again

    def start(self) -> None:
        """Start the loop."""
        self._cleaner.start()
        self._grace.start()
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the events that were put before; the kernel's tables stay."""
        self._cleaner.stop()
        self._grace.stop()
        self._events.put(None)
        self._thread.join()

    def alive(self) -> bool:
        """Whether the loop runs, and what clears stamps."""
        return self._thread.is_alive() and self._cleaner.alive() and self._grace.alive()

    def changes(self, changes: Sequence[Change]) -> None:
        """Take in the present state of objects."""
        self._events.put(lambda: self._take(changes))

    def synced(self) -> None:
        """Say that all the source holds has been handed to ``changes`` once."""
        self._events.put(self._begin)

    def attach(self, attachment: Attachment) -> None:
        """Return when the kernel holds the policy of a new attachment.

        If its pod is not known it is closed, and is waited for a bounded time.

        Raises:
            NotReadyError: the kernel does not hold it.
        """
        known: Future[None] = Future()
        committed = self._submit(lambda: self._attach(attachment, known))
        self._wait(committed, f"attach {attachment.pod or attachment.key}")
        try:
            known.result(self._settings.unknown_pod_wait)
        except FutureTimeout:
            log.warning(
                "pod unknown",
                pod=attachment.pod,
                standing="allowed" if self._settings.unknown_pods_allowed else "closed until its object is known",
            )
            self._events.put(lambda: self._forget(attachment.key))

    def restore(self, attachments: Sequence[Attachment]) -> None:
        """Take in attachments that an earlier agent made, before the first commit."""
        for attachment in attachments:
            self._events.put(functools.partial(self._put_attachment, attachment))

    def detach(self, key: str) -> None:
        """Return when the kernel holds nothing of an attachment.

        Raises:
            NotReadyError: the kernel may still hold some of it.
        """
        if self.call(lambda: self._synced):
            self._wait(self._submit(lambda: self._detach(key)), f"detach {key}")
        else:
            # The first commit will hold nothing of it.
            self._events.put(lambda: self._detach(key))

    def touched(self, generation: int | None) -> None:
        """Take in that a commit touched our tables (None: that one may have)."""
        self._events.put(lambda: self._judge(generation))

    def barrier(self, seconds: float) -> bool:
        """Wait until the kernel holds all that was put before.

        Returns:
            False if that takes longer than ``seconds``.
        """
        try:
            self._submit(lambda: None).result(seconds)
        except (FutureTimeout, NotReadyError):
            return False
        return True

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the owner's thread, between transactions, and return its result."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 - it belongs to the caller
                answer.set_exception(error)

        self._events.put(run)
        return answer.result(_COMMIT_SECONDS)

    # To be called on the owner's thread, through ``call``

    @property
    def cluster(self) -> Cluster:
        """The policy model."""
        return self._index.cluster

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The Node objects by name."""
        return self._nodes

    @property
    def tables(self) -> Tables:
        """The kernel's tables."""
        return self._tables

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of this node."""
        return self._endpoints.attachments

    @property
    def closed_networks(self) -> tuple[Network, ...]:
        """The networks whose addresses are closed where no pod of this node has them."""
        return self._own_networks if self._settings.base.close_own_networks else ()

    @property
    def denials(self) -> Denials:
        """What each policy has denied."""
        return self._denials

    def selected(self, policy: str) -> int:
        """How many of this node's pods a policy selects."""
        return self._index.selected(policy)

    def state(self) -> State:
        """The state of the loop."""
        return State(
            synced=self._synced and not self._whole,
            failure=self._failure,
            local_pods=sum(e.local and e.standing is Standing.POD for e in self.cluster.endpoints.values()),
            cluster_pods=self._endpoints.pods,
            policies=len(self._policies),
            attachments=len(self._endpoints.attachments),
            rejections=tuple(self._rejected.values()),
            stamps=Stamps(self._commits.epoch, self._cleared, self._clear_failure),
        )

    # The loop

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=self._retry_seconds if self._failure else None)
            except queue.Empty:
                self._commit()
                continue
            while event is not None:
                event()
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    break
            self._commit()
            if event is None:
                return

    def _take(self, changes: Sequence[Change]) -> None:
        nodes: dict[str, Node | None] = {}
        for change in changes:
            if change.kind is Node:
                nodes[change.key] = _as(Node, change.object)
            else:
                self._take_object(change.kind, change.key, change.object)
        self._take_nodes(nodes)

    def _take_nodes(self, nodes: Mapping[str, Node | None]) -> None:
        # This node's own that is gone leaves its pods behind: it counts as it was last known.
        changed = {
            name: node
            for name, node in nodes.items()
            if node != self._nodes.get(name) and (node is not None or name != self._settings.node)
        }
        if not changed:
            return
        for name, node in changed.items():
            _put(self._nodes, name, node)
        self._translator.nodes_changed(settle(self._nodes, own=self._settings.node))
        if (own := changed.get(self._settings.node)) is not None:
            self._own_networks = own.pod_cidrs
            self._translator.own_networks_changed(own.pod_cidrs)
        if self._hear_nodes is not None and self._synced:
            self._hear_nodes(changed)

    def _take_object(self, kind: type[Object], key: str, value: Object | None) -> None:
        if kind is Pod:
            self._endpoints.set_pod(key, _as(Pod, value))
        elif kind is NetworkPolicy:
            policy = _as(NetworkPolicy, value)
            for other, judged in self._budget.put(key, policy):
                self._changed_policies.add(other)
                self._put_policy(other, judged)
                _put(self._policies, other, judged)
            if (unread := self._budget.take_unread()) and self._read_again is not None:
                self._read_again(unread)
        else:
            namespace = _as(Namespace, value)
            self._index.set_namespace(key, namespace.labels if namespace else None)

    def _put_policy(self, key: str, policy: NetworkPolicy | None) -> None:
        self._index.set_policy(key, policy)
        if policy is None or policy.rejected is None:
            self._rejected.pop(key, None)
        else:
            self._rejected[key] = Rejection("NetworkPolicy", policy.namespace, policy.name, policy.rejected, policy.uid)

    def _begin(self) -> None:
        if self._hear_nodes is not None and self._nodes and not self._synced:
            self._hear_nodes(self._nodes)
        self._synced = True

    def _attach(self, attachment: Attachment, known: Future[None]) -> None:
        self._put_attachment(attachment)
        self._awaited[attachment.key] = (attachment, known)

    def _put_attachment(self, attachment: Attachment) -> None:
        self._detach(attachment.key)
        self._endpoints.attach(attachment)
        self._translator.attached(attachment)

    def _detach(self, key: str) -> None:
        self._forget(key)
        attachment = self._endpoints.detach(key)
        if attachment is not None:
            self._translator.detached(attachment)

    def _forget(self, key: str) -> None:
        self._awaited.pop(key, None)

    def _judge(self, generation: int | None) -> None:
        if generation is not None and self._tables.is_own(generation):
            return
        with contextlib.suppress(NftError):
            if generation is None and self._tables.all_own_since(self._accounted):
                return
        log.warning("another process changed our nftables tables; they are put back", generation=generation)
        self._observer.repaired()
        self._whole = True

    def _hear_cleared(self, cleared: Cleared) -> None:
        self._events.put(lambda: self._take_cleared(cleared))

    def _take_cleared(self, cleared: Cleared) -> None:
        """Take in that old stamps were cleared, or could not be: an epoch may begin that had to wait for it."""
        self._clear_failure = cleared.failure
        if cleared.failure is not None or cleared.knowledge != self._commits.knowledge:
            return
        self._clearing.discard(cleared.group)
        self._cleared += cleared.connections
        self._observer.cleared(cleared.connections)
        self._commits.epochs.cleared(cleared.group)
        self._grace_asked = None

    def _hear_grace_over(self, ended: int) -> None:
        self._events.put(lambda: self._take_grace_over(ended))

    def _take_grace_over(self, ended: int) -> None:
        self._grace_over = ended

    def _renew_epoch(self) -> None:
        """Begin an epoch if its time has come; ask for what the next one has to wait for."""
        commits = self._commits
        if self._knowledge != commits.knowledge:
            self._knowledge = commits.knowledge
            self._clearing = set()
        if self._grace_over is not None and commits.begin_epoch(self._grace_over):
            log.debug("epoch began", epoch=commits.epoch)
        self._grace_over = None
        for group in commits.epochs.stale:
            if group not in self._clearing:
                self._clearing.add(group)
                self._cleaner.clear(group, self._knowledge)
        if commits.epoch is None and self._grace_asked != commits.ended:
            self._grace_asked = commits.ended
            self._grace.ask(commits.ended)

    def _submit(self, event: Callable[[], None]) -> Future[None]:
        """Put an event; the future has its result when the kernel holds what the event changed."""
        committed: Future[None] = Future()

        def run() -> None:
            event()
            self._after_commit.append(lambda: committed.set_result(None))

        self._events.put(run)
        return committed

    def _wait(self, committed: Future[None], what: str) -> None:
        try:
            committed.result(_COMMIT_SECONDS)
        except FutureTimeout:
            waits = "it is busy with other changes" if self._synced else "the source has not been read yet"
            reason = self._failure or waits
            raise NotReadyError(f"{what}: the kernel did not take it up in {_COMMIT_SECONDS:.0f} s: {reason}") from None

    def _commit(self) -> None:
        if not self._synced:
            return
        try:
            self._transact()
        except NftError as error:
            self._recover(error)
        if self._failure is not None:
            return
        if self._changed_policies:
            self._denials.keep(self._policies)
            self._changed_policies.clear()
        if self._hear_rejections is not None and self._rejected != self._rejected_before:
            self._rejected_before = dict(self._rejected)
            self._hear_rejections(tuple(self._rejected.values()))
        for done in self._after_commit:
            done()
        self._after_commit.clear()
        for key, (attachment, known) in list(self._awaited.items()):
            if attachment.pod is None or self._endpoints.known(attachment):
                known.set_result(None)
                del self._awaited[key]

    def _transact(self) -> None:
        started = time.perf_counter()
        self._index.dispatch()
        self._translator.complete()
        whole = self._whole
        before = self._tables.generation() if whole else self._accounted
        committed = self._commits.synchronize() if whole else self._commits.change()
        if committed is not None:
            self._after_commit_of(committed, before, whole=whole, seconds=time.perf_counter() - started)
        self._renew_epoch()

    def _after_commit_of(self, committed: Committed, before: int, *, whole: bool, seconds: float) -> None:
        self._whole = False
        self._failure = None
        self._retry_seconds = _FIRST_RETRY_SECONDS
        # A commit of another whose notification was lost is not to be taken for accounted for.
        if self._tables.all_own_since(before):
            self._accounted = self._tables.generation()
        counts = committed.counts
        self._observer.committed(whole=whole, seconds=seconds, elements=counts["added"] + counts["removed"])
        log.info(
            "transactions committed",
            steps=committed.purposes,
            whole=whole,
            **counts,
            ms=round(seconds * 1e3, 3),
        )

    def _recover(self, error: NftError) -> None:
        """A refused transaction: render everything; if that is refused too, close what the last changes select."""
        self._observer.failed()
        self._whole = True
        log.error("transaction refused; rendering everything", error=str(error))
        try:
            self._transact()
            return
        except NftError as again:
            error = again
        blamed = self._changed_policies & self._policies.keys()
        for key in blamed:
            policy = dataclasses.replace(self._policies[key], rejected=f"the kernel refused it: {error}")
            self._put_policy(key, policy)
        try:
            self._transact()
        except NftError as last:
            # It was not they.
            for key in blamed:
                self._put_policy(key, self._policies[key])
            self._observer.failed()
            self._failure = str(last)
            self._retry_seconds = min(self._retry_seconds * 2, _LAST_RETRY_SECONDS)
            log.error("whole render refused; the last state stands", error=str(last), retry=self._retry_seconds)


def _as(kind: type[T], value: object) -> T | None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _put(objects: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        objects.pop(key, None)
    else:
        objects[key] = value
