"""A source, and what its changes add up to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from enforcer.manifests.directory import DirectorySource
from enforcer.model.changes import Change
from enforcer.model.objects import NetworkPolicy, Object, Pod

SECONDS = 20
"""How long the watch may take for anything."""


def pod(name: str, *, uid: str = "") -> str:
    return f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: '{uid}'}}\n"


def policy(name: str, *, port: int = 80) -> str:
    return (
        f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n"
        f"spec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
    )


class View:
    """A source, and what its changes add up to."""

    def __init__(self, directory: Path) -> None:
        self.objects: dict[str, Object] = {}
        self.batches: list[list[str]] = []
        self.is_synced = False
        self._changed = threading.Condition()
        self.source = DirectorySource(directory, changes=self._take, synced=self._sync)

    def _take(self, changes: Sequence[Change]) -> None:
        with self._changed:
            for change in changes:
                key = f"{change.kind.__name__} {change.key}"
                assert self.objects.get(key) != change.object, "only differences are handed on"
                self.objects.pop(key, None)
                if change.object is not None:
                    self.objects[key] = change.object
            self.batches.append(sorted(f"{change.kind.__name__} {change.key}" for change in changes))
            self._changed.notify_all()

    def _sync(self) -> None:
        with self._changed:
            self.is_synced = True
            self._changed.notify_all()

    def started(self) -> View:
        self.source.start()
        self.until(lambda: self.is_synced)
        return self

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the watch alone to bring something about."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout=SECONDS)

    def until_pods(self, *names: str) -> None:
        self.until(lambda: self.pods == set(names))

    @property
    def pods(self) -> set[str]:
        return {value.name for value in self.objects.values() if isinstance(value, Pod)}

    def uid(self, name: str) -> str:
        value = self.objects[f"Pod default/{name}"]
        assert isinstance(value, Pod)
        return value.uid

    def policy(self, key: str) -> NetworkPolicy:
        value = self.objects[f"NetworkPolicy {key}"]
        assert isinstance(value, NetworkPolicy)
        return value

    @property
    def reasons(self) -> list[str]:
        return [rejection.reason for rejection in self.source.rejections()]


def replace(path: Path, text: str) -> None:
    """Write a file as kubectl, editors and configuration management do: beside it, then over it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.rename(path)
