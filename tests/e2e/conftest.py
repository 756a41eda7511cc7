"""A node with its agent and the real CNI executable, in namespaces that go away with the test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer.demo.lab import Lab

EXECUTABLE = Path(__file__).parents[2] / "build" / "cni" / "drawbridge"
_numbers = itertools.count()

PODS = """
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: x, labels: {app: db}}
spec: {containers: [{name: c, ports: [{name: pg, containerPort: 5432}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: x, labels: {app: web}}
spec: {containers: [{name: c}]}
"""

WEB_TO_DB = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: x}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: pg}]}]
"""


def put(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.rename(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "pods.yaml").write_text(PODS)
    return folder


@pytest.fixture
def lab(tmp_path: Path, source: Path) -> Iterator[Lab]:
    name = f"dbtest-{os.getpid()}-{next(_numbers)}"
    with Lab(
        name=name,
        source=("--source", source),
        run_dir=tmp_path / "run",
        executable=EXECUTABLE,
        pod_cidrs=("10.99.0.0/24", "fd99::/64"),
    ) as made:
        yield made
