"""The Helm chart on a real cluster: installed, upgraded by another configuration, and uninstalled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.installation import IMAGE, NAMESPACE, ROOT, agent_pod
from tests.tools.build import binary

_SECONDS = 90.0


def helm(cluster: Cluster, *words: str | Path) -> str:
    """Run helm as an administrator, have it wait for what it did, and return what it prints."""
    where = (f"--kubeconfig={cluster.control_plane.kubeconfig}", f"--namespace={NAMESPACE}")
    waits = ("--wait", f"--timeout={_SECONDS:.0f}s")
    # helm caches what it discovers in the home of its user.
    home = ("env", f"HOME={cluster.folder}")
    return cluster.run_outside(*home, binary("helm"), *words, *where, *waits, seconds=_SECONDS + 10)


def objects(cluster: Cluster) -> list[str]:
    """Kinds and names of what the cluster has of Drawbridge."""
    kinds = "clusterroles,clusterrolebindings,serviceaccounts,configmaps,daemonsets,controllerrevisions,pods,secrets"
    items = cluster.get(kinds, "--all-namespaces")["items"]
    names = [f"{item['kind']} {item['metadata']['name']}" for item in items]
    return sorted(name for name in names if "drawbridge" in name)


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Cluster:
    cluster.load_image(IMAGE)
    helm(cluster, "install", "drawbridge", ROOT / "deploy" / "chart")
    return cluster


def test_an_installation_makes_nodes_ready(installed: Cluster) -> None:
    installed.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s", seconds=70)


def test_an_upgrade_with_another_configuration_gives_it_to_every_agent(installed: Cluster) -> None:
    before = {node: agent_pod(installed, node)["metadata"]["uid"] for node in installed.nodes}
    helm(installed, "upgrade", "drawbridge", ROOT / "deploy" / "chart", "--set=config.logLevel=debug")
    for node, uid in before.items():
        pod = agent_pod(installed, node)["metadata"]
        assert pod["uid"] != uid
        cat = ("exec", f"--namespace={NAMESPACE}", pod["name"], "--", "cat", "/etc/drawbridge/config.yaml")
        assert "logLevel: debug" in installed.kubectl(*cat)
    assert len([name for name in objects(installed) if name.startswith("ConfigMap")]) == 1


def test_uninstall_leaves_no_object(installed: Cluster) -> None:
    assert objects(installed)
    helm(installed, "uninstall", "drawbridge")
    # Pods go after the DaemonSet that they belong to, and take their time to stop.
    pods = ("--namespace", NAMESPACE, "pod", "-l", "app.kubernetes.io/name=drawbridge")
    installed.kubectl("wait", "--for=delete", *pods, "--timeout=60s", seconds=70)
    deadline = time.monotonic() + _SECONDS
    while left := objects(installed):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
