"""Manifests without an agent: what ``render``, ``check`` and ``explain --file`` work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from enforcer.manifests.files import SUFFIXES, load
from enforcer.manifests.precedence import Claims
from enforcer.model.changes import Rejection
from enforcer.model.objects import Namespace, NetworkPolicy, Pod
from enforcer.policy.index import PolicyIndex
from enforcer.policy.resolve import Cluster
from enforcer.reconcile.endpoints import Endpoints
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.translator import Translator

# As an agent shows it a moment after it has started.
_SHOWN_EPOCH = 32


@dataclass(frozen=True, slots=True)
class Manifests:
    """What files say: the policy model, the ruleset of it, and what is wrong with them."""

    cluster: Cluster
    ruleset: Ruleset
    policies: int
    rejections: tuple[Rejection, ...]


def read(paths: Sequence[Path], *, node: str | None = None) -> Manifests:
    """Read files, and the manifests in directories.

    Args:
        paths: files and directories.
        node: the node to see with the eyes of; None counts every pod as of this node.

    Raises:
        FileNotFoundError: a path leads nowhere.
    """
    claims = Claims()
    rejections: list[Rejection] = []
    for root, path in _files(paths):
        file = load(root, path, None)
        if file is None:
            raise FileNotFoundError(f"{root / path}: there is no such file")
        claims.replace(str(root / path), old=(), new=file.objects)
        rejections += file.rejections()
    ruleset = Ruleset()
    translator = Translator(ruleset, epoch=_SHOWN_EPOCH)
    index = PolicyIndex()
    endpoints = Endpoints(node or "")
    policies = 0
    for change in claims.take():
        match change.object:
            case Pod() as pod:
                placed = pod if node else dataclasses.replace(pod, node=None)
                for key, endpoint in endpoints.set_pod(change.key, placed).items():
                    index.set_endpoint(key, endpoint)
            case NetworkPolicy() as policy:
                policies += 1
                index.set_policy(change.key, policy)
            case Namespace() as namespace:
                index.set_namespace(change.key, namespace.labels)
    translator.apply(index.take())
    return Manifests(index.cluster, ruleset, policies, (*rejections, *claims.duplicates()))


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for path in paths:
        if path.is_dir():
            for found in sorted(path.rglob("*")):
                inner = found.relative_to(path)
                hidden = any(part.startswith(".") for part in inner.parts)
                if found.suffix in SUFFIXES and not hidden and found.is_file():
                    yield path, str(inner)
        else:
            yield path.parent, path.name
