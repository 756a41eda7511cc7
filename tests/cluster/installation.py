"""Drawbridge on a test cluster, as its users put it there: the image, and one manifest."""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tests.api.processes import wait_until
from tests.cluster.cluster import Cluster

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "drawbridge.yaml"
IMAGE = ROOT / "build" / "image" / "drawbridge.tar"
NAMESPACE = "kube-system"
_UNINSTALL = ROOT / "deploy" / "uninstall"
_SECONDS = 90.0


def configured(**settings: object) -> str:
    """The manifest with other keys in the agent's configuration, whose name is another, too."""
    objects = list(yaml.safe_load_all(MANIFEST.read_text()))
    (config,) = (found for found in objects if found["kind"] == "ConfigMap")
    name, content = config["metadata"]["name"], config["data"]["config.yaml"]
    config["data"]["config.yaml"] = changed = yaml.safe_dump(yaml.safe_load(content) | settings)
    digest = hashlib.sha256(changed.encode()).hexdigest()[:10]
    return yaml.safe_dump_all(objects).replace(name, f"drawbridge-config-{digest}")


def install(cluster: Cluster, manifest: str | None = None) -> None:
    """Give the machines the image, apply the manifest (or a changed one), and return when every agent is ready."""
    cluster.load_image(IMAGE)
    apply(cluster, manifest or MANIFEST.read_text())


def apply(cluster: Cluster, manifest: str) -> None:
    """Apply a manifest of the DaemonSet, and return when all of its pods are as it says, and ready."""
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    wait_for_agents(cluster)


def wait_for_agents(cluster: Cluster) -> None:
    """Return when each node has an agent that is ready."""
    words = ("rollout", "status", "daemonset/drawbridge", f"--namespace={NAMESPACE}", f"--timeout={_SECONDS:.0f}s")
    cluster.kubectl(*words, seconds=_SECONDS + 10)


def uninstall(cluster: Cluster) -> None:
    """Delete the DaemonSet and all that came with it, then have each node rid of what it put there."""
    cluster.kubectl("delete", "--ignore-not-found", "--wait", "-f", MANIFEST, seconds=_SECONDS)
    selector = ("-l", "app.kubernetes.io/name=drawbridge")
    cluster.kubectl("wait", "--for=delete", "pod", *selector, f"--namespace={NAMESPACE}", "--timeout=60s", seconds=70)
    cluster.kubectl("delete", "configmap", f"--namespace={NAMESPACE}", *selector)
    cluster.kubectl("apply", "-k", _UNINSTALL)
    words = ("rollout", "status", "daemonset/drawbridge-uninstall", f"--namespace={NAMESPACE}", "--timeout=60s")
    cluster.kubectl(*words, seconds=70)
    cluster.kubectl("delete", "--wait", "-k", _UNINSTALL)


def settle(cluster: Cluster) -> None:
    """Return when the kernels of all nodes hold what the API server holds."""
    # The agents' sockets are on the nodes; to enter their pods would take longer.
    command = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "enforcer", "status", "--wait", "20", "-o", "json")
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda node: cluster.run_on(node, *command), cluster.nodes))


def agent_pod(cluster: Cluster, node: str) -> dict[str, Any]:
    """The pod of a node's agent, once there is just one."""
    found: list[dict[str, Any]] = []

    def one() -> bool:
        selectors = ("-l", "app.kubernetes.io/name=drawbridge", f"--field-selector=spec.nodeName={node}")
        found[:] = cluster.get("pods", f"--namespace={NAMESPACE}", *selectors)["items"]
        return len(found) == 1

    wait_until(one, f"{node} has one agent", seconds=_SECONDS)
    return found[0]


def drawbridge(cluster: Cluster, node: str, *words: str) -> str:
    """What the command ``drawbridge`` prints in the pod of a node's agent."""
    name = agent_pod(cluster, node)["metadata"]["name"]
    return cluster.kubectl("exec", f"--namespace={NAMESPACE}", name, "--", "drawbridge", *words)


def status(cluster: Cluster, node: str) -> Any:
    """What ``drawbridge status`` says of a node's agent."""
    return json.loads(drawbridge(cluster, node, "status", "-o", "json"))
