"""docs/install.md and docs/troubleshooting.md: each command is run, in their order, and prints what the page shows.

A block ``console`` has commands and what they print, on a cluster that is broken in the way its section says, and which
the section's own way out must mend. A block ``sh`` has what cannot run here, and is in a list.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.processes import ProgramError, run, wait_until
from tests.cluster.cluster import Cluster
from tests.cluster.installation import IMAGE, MANIFEST, ROOT, wait_for_agents
from tests.tools.build import binary

INSTALL, TROUBLESHOOTING = ROOT / "docs" / "install.md", ROOT / "docs" / "troubleshooting.md"
NAME = "localhost/drawbridge:0.1.0"
CANNOT_RUN_HERE = [
    "kubeadm init --pod-network-cidr=10.244.0.0/16",
    "kubeadm init --config cluster.yaml",
    "kind create cluster --config kind.yaml",
    "kind load image-archive build/image/drawbridge.tar",
    "k3s server --flannel-backend=none --disable-network-policy",
    "k3s ctr images import drawbridge.tar",
    "mkdir -p /opt/cni/bin",
    "ln -s /var/lib/rancher/k3s/data/cni/{loopback,portmap,bandwidth} /opt/cni/bin/",
    "make image",
    "skopeo copy oci-archive:build/image/drawbridge.tar docker://registry.example/drawbridge:0.1.0",
    "kubectl apply -k overlay",
    "helm install drawbridge deploy/chart --namespace kube-system",
]
_PROMPT = re.compile(r"(?:(?P<node>node-\d)#|\$) (?P<command>.*)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What only tells may be asked again, until it tells what the page does; what changes something is run once.
_ASKS = re.compile(r"kubectl (-n \S+ )?(get|logs|diff)\b|drawbridge |reach |nft list|ip route show|sysctl net|curl ")
_SECONDS = 45.0
# What differs from one cluster to the next.
_VARIES = [
    (r"\bdrawbridge-[a-z0-9]{5}\b", "drawbridge-POD"),
    (r"\bdrawbridge-config-[a-z0-9]{10}\b", "drawbridge-config-HASH"),
    (r"\bdbr[0-9a-f]{11}\b", "PORT"),
    (r"\b10\.244\.(\d)\.[1-9]\d*\b", r"10.244.\1.N"),
    (r"\bfd00:10:244:(1?):?:[0-9a-f]+\b", r"fd00:\1:N"),
    (r"\b\d+ (counted so far|milliseconds|s ago|s(?=:))", r"N \1"),
    (r"\b(?:\d+[dhms])+\b", "AGE"),
    (r"(?<=  )\d+( \(AGE ago\))?(?=  +AGE$)", "RESTARTS"),
    (r"\b(ingress|egress|no-flow|unknown-source|forged|tunnel) \d+", r"\1 N"),
    (r"(nf_conntrack_\w+) = \d+", r"\1 = N"),
    (r"[ \t]+", " "),
]


@dataclass(frozen=True)
class Step:
    """A command of a page: on a node, or beside the cluster, and what it prints."""

    node: str
    command: str
    output: str


def sections(page: Path) -> dict[str, list[Step]]:
    """The commands of a page by the headings that they stand under, in their order."""
    found = {}
    for part in re.split(r"^##+ ", page.read_text(), flags=re.MULTILINE)[1:]:
        blocks = [content for language, content in _BLOCK.findall(part) if language == "console"]
        if steps := [step for block in blocks for step in _steps(block)]:
            found[part.partition("\n")[0]] = steps
    return found


def _steps(block: str) -> list[Step]:
    steps: list[Step] = []
    for line in block.replace("\\\n", "").splitlines():
        if prompt := _PROMPT.fullmatch(line):
            steps.append(Step(prompt["node"] or "", prompt["command"], ""))
        else:
            last = steps.pop()
            steps.append(Step(last.node, last.command, f"{last.output}{line}\n"))
    return steps


def shown(output: str) -> str:
    """What is left of an output when all that varies is put aside."""
    for pattern, word in _VARIES:
        output = re.sub(pattern, word, output, flags=re.MULTILINE)
    return "\n".join(line.strip() for line in output.strip().splitlines())


def agrees(page: str, printed: str) -> bool:
    """Whether a command printed what the page shows; ``…`` stands for any text, alone in a line for any lines."""
    lines = (re.escape(line).replace("…", ".*") for line in shown(page).split("\n"))
    pattern = "".join(r"(?:.*\n)*" if line == ".*" else rf"{line}\n" for line in lines)
    return re.fullmatch(pattern, f"{shown(printed)}\n") is not None


class Reader:
    """Does on a cluster what a page says."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._functions: list[str] = []

    def follow(self, steps: list[Step]) -> None:
        """Run commands; fails where one prints something else than the page shows."""
        wrong = []
        for step in steps:
            if re.match(r"\w+\(\) \{", step.command):
                self._functions.append(step.command)
            else:
                wrong += self._try(step)
        assert not wrong, "\n".join(wrong)

    def _try(self, step: Step) -> list[str]:
        printed: list[str] = []

        def right() -> bool:
            printed[:] = [self.run(step)]
            return agrees(step.output, printed[0])

        try:
            wait_until(right, step.command, seconds=_SECONDS if _ASKS.match(step.command) else 0)
        except ProgramError:
            return [f"{step.command}\nprinted\n{printed[0]}and the page has\n{step.output}"]
        return []

    def run(self, step: Step) -> str:
        """What a command prints, on either output; a failure it says itself."""
        if step.node:
            words = ("bash", "-c", f"cd {IMAGE.parent}; exec 2>&1; {step.command}; true")
            return self.cluster.run_on(step.node, *words, seconds=120)
        environment = (f"PATH={binary('kubectl').parent}:{os.environ['PATH']}", f"HOME={self.cluster.folder}",
                       f"KUBECONFIG={self.cluster.control_plane.kubeconfig}")  # fmt: skip
        script = "\n".join((f"cd {ROOT}; exec 2>&1", *self._functions, step.command, "true"))
        return self.cluster.run_outside("env", *environment, "bash", "-c", script, seconds=180)


@pytest.fixture(scope="module")
def reader(cluster: Cluster) -> Reader:
    for node in cluster.nodes:
        # Where a runtime has its configuration; that of the tests is told by an option.
        cluster.run_on(node, "cp", cluster.folder / node / "containerd.toml", "/etc/containerd/config.toml")
    return Reader(cluster)


# Ways to break a cluster, by the section that helps


def nothing(_: Cluster) -> None:
    """The cluster is well."""


def apply(cluster: Cluster, manifest: str) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=manifest)


def another_pod(cluster: Cluster) -> None:
    cluster.kubectl("-n", "shop", "scale", "statefulset", "web", "--replicas=2")


def left_out(cluster: Cluster) -> None:
    """As a node that never had an agent."""
    system = "kubernetes.io/os: linux"
    apply(cluster, MANIFEST.read_text().replace(system, f"{system}\n        kubernetes.io/hostname: node-1"))
    agent = ("-l", "app.kubernetes.io/name=drawbridge", "--field-selector=spec.nodeName=node-2")
    cluster.kubectl("-n", "kube-system", "wait", "pod", *agent, "--for=delete", "--timeout=60s", seconds=70)
    cluster.run_on("node-2", "sh", "-c", "rm /etc/cni/net.d/*drawbridge*")


def no_image(cluster: Cluster) -> None:
    apply(cluster, MANIFEST.read_text().replace(NAME, "localhost/drawbridge:0.2.0"))


def mistakes(cluster: Cluster) -> None:
    settings = "metricsAddress: 127.0.0.1:9469\n    networking: none\n    masquerade: 7"
    changed = MANIFEST.read_text().replace("metricsAddress: 127.0.0.1:9469", settings)
    apply(cluster, re.sub(r"drawbridge-config-\w+", "drawbridge-config-t2h8kf6m5c", changed))


def no_pod_network(cluster: Cluster) -> None:
    node = cluster.get("node", "node-2")
    pid = int(run("pgrep", "-f", f"kube-controller-manager --kubeconfig={cluster.control_plane.folder}"))
    os.kill(pid, signal.SIGSTOP)
    cluster.kubectl("delete", "node", "node-2")
    metadata = {"name": "node-2", "labels": node["metadata"]["labels"]}
    apply(cluster, json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": metadata}))


def no_bridge(cluster: Cluster) -> None:
    cluster.run_on("node-1", "ip", "link", "del", "drawbridge0")
    another_pod(cluster)


def no_agent(cluster: Cluster) -> None:
    cluster.kubectl("-n", "kube-system", "delete", "daemonset", "drawbridge")
    another_pod(cluster)


def no_loopback(cluster: Cluster) -> None:
    cluster.run_on("node-1", "rm", "/opt/cni/bin/loopback")
    another_pod(cluster)


def firewall(cluster: Cluster) -> None:
    chain = "chain forward { type filter hook forward priority filter; policy drop; };"
    cluster.run_on("node-2", "nft", f"table inet firewall {{ {chain} }}")


def firewall_before_the_api(cluster: Cluster) -> None:
    port = cluster.control_plane.url.rpartition(":")[2]
    chain = f"chain output {{ type filter hook output priority 0; tcp dport {port} drop; }};"
    cluster.run_on("node-2", "nft", f"table inet firewall {{ {chain} }}")
    # Else the agent waits for the silence of its watches.
    cluster.run_on("node-2", "ss", "--kill", "dst", "10.96.0.1")


def slip(cluster: Cluster) -> None:
    patch = '{"spec": {"podSelector": {"matchLabels": {"app": "bd"}}}}'
    cluster.kubectl("-n", "shop", "patch", "networkpolicy", "db", "-p", patch)


def another_configuration(cluster: Cluster) -> None:
    plugin = {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.9.0.0/24"}}
    content = json.dumps({"cniVersion": "1.0.0", "name": "old", "plugins": [plugin]})
    cluster.run_on("node-1", "tee", "/etc/cni/net.d/05-old.conflist", stdin=content)
    another_pod(cluster)


def previous_version(cluster: Cluster) -> None:
    previous = NAME.replace("0.1.0", "previous")
    for node in cluster.nodes:
        cluster.run_on(node, "ctr", "--namespace=k8s.io", "images", "tag", NAME, previous)
    apply(cluster, MANIFEST.read_text().replace(NAME, previous))
    wait_for_agents(cluster)


BREAKS: dict[str, Callable[[Cluster], None]] = {
    "Ask the agent first": nothing,
    "A node is NotReady": left_out,
    "Init:ErrImagePull: the node has no image": no_image,
    "Error or CrashLoopBackOff: the configuration has mistakes": mistakes,
    "Running, but not ready: the node has no pod network": no_pod_network,
    "A pod is stuck in ContainerCreating": no_bridge,
    "The agent does not answer": no_agent,
    'failed to find plugin "loopback"': no_loopback,
    "No traffic between nodes": nothing,
    "A firewall of the node": firewall,
    "It selects no pod": slip,
    "The pod is on another pod network": another_configuration,
    "Somebody changed the rules": nothing,
    "The API server cannot be reached": firewall_before_the_api,
    "Connections fail at random under load": nothing,
}


def mended(reader: Reader) -> None:
    """Return when the cluster is as the page on the installation leaves it; the page's way out must have done that."""
    cluster = reader.cluster
    wait_for_agents(cluster)
    cluster.kubectl("-n", "shop", "wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s", seconds=70)
    reader.follow([Step("", "reach web-0 db-0", "reached\n")])
    for node in cluster.nodes:
        said = reader.run(Step("", f"drawbridge {node} status --wait 20", ""))
        assert (
            said.startswith("in sync")
            and "problems" not in said
            and "wrong" not in said
            and "no pod can start" not in said
        ), said


def tidy(cluster: Cluster) -> None:
    """What the test itself brought, and no way out takes away."""
    cluster.run_on("node-2", "nft", "table inet firewall; delete table inet firewall")
    cluster.kubectl("-n", "shop", "delete", "events", "--all")
    cluster.kubectl("-n", "shop", "scale", "statefulset", "web", "--replicas=1")
    cluster.kubectl("-n", "shop", "wait", "pod", "web-1", "--for=delete", "--timeout=60s", seconds=70)
    for pid in run("pgrep", "-f", f"kube-controller-manager --kubeconfig={cluster.control_plane.folder}").split():
        os.kill(int(pid), signal.SIGCONT)


def test_what_cannot_run_here_is_in_the_list() -> None:
    blocks = [block for page in (INSTALL, TROUBLESHOOTING) for block in _BLOCK.findall(page.read_text())]
    assert {language for language, _ in blocks} == {"console", "sh", "yaml"}
    assert [line for language, block in blocks if language == "sh" for line in block.splitlines()] == CANNOT_RUN_HERE


def test_overlays_of_the_page_render(tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    overlays = []
    for language, block in _BLOCK.findall(INSTALL.read_text()):
        if language != "yaml":
            continue
        assert all(document["kind"] for document in yaml.safe_load_all(block))
        if block.startswith("# overlay/kustomization.yaml"):
            (tmp_path / "overlay").mkdir(exist_ok=True)
            (tmp_path / "overlay" / "kustomization.yaml").write_text(block)
            words = ("kustomize", "--load-restrictor=LoadRestrictionsNone", tmp_path / "overlay")
            overlays.append(run(binary("kubectl"), *words))
    manifest = MANIFEST.read_text()
    wanted = [
        manifest.replace(NAME, "registry.example/drawbridge:0.1.0"),
        manifest.replace(" path: /opt/cni/bin", " path: /usr/lib/cni"),
    ]
    assert list(map(objects, overlays)) == list(map(objects, wanted))


def objects(manifest: str) -> list[dict[str, Any]]:
    """The objects of a manifest, with volumes by name: a patch changes their order."""
    found = list(yaml.safe_load_all(manifest))
    for item in found:
        if item["kind"] == "DaemonSet":
            item["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
    return found


def test_each_section_is_met_on_a_cluster_that_is_broken_so() -> None:
    assert list(BREAKS) == list(sections(TROUBLESHOOTING))


INSTALLING = ("What a node needs", "The image", "Apply", "See that it works")
LATER = ("Restart and reboot", "Upgrade", "Uninstall")


def test_each_section_of_the_installation_is_run() -> None:
    assert set(INSTALLING) | set(LATER) == set(sections(INSTALL))


@pytest.mark.parametrize("title", INSTALLING)
def test_installation(reader: Reader, title: str) -> None:
    reader.follow(sections(INSTALL)[title])


@pytest.mark.parametrize("title", BREAKS)
def test_troubleshooting(reader: Reader, title: str) -> None:
    BREAKS[title](reader.cluster)
    try:
        reader.follow(sections(TROUBLESHOOTING)[title])
        mended(reader)
    finally:
        tidy(reader.cluster)


@pytest.mark.parametrize("title", LATER)
def test_what_comes_later(reader: Reader, title: str) -> None:
    if title == "Upgrade":
        previous_version(reader.cluster)
    reader.follow(sections(INSTALL)[title])


def test_nothing_is_left_of_it(reader: Reader) -> None:
    for node in reader.cluster.nodes:
        assert "drawbridge" not in reader.cluster.run_on(node, "nft", "list", "tables")
        assert "drawbridge" not in reader.cluster.run_on(node, "ls", "/opt/cni/bin", "/etc/cni/net.d")
