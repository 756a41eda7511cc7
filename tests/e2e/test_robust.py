"""What a hostile or unlucky neighbour does to an agent: it goes on, or ends so that a supervisor starts it anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer.control.socket import ControlError
from enforcer.demo.lab import Lab, Pod
from tests.api.processes import wait_until
from tests.e2e.conftest import EXECUTABLE, PODS, WEB_TO_DB, put

pytestmark = pytest.mark.netns
DENY = WEB_TO_DB.replace("app: web", "app: nobody")


@pytest.fixture
def pair(lab: Lab) -> tuple[Pod, Pod]:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    lab.listen(db, 5432)
    return db, web


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.json", b'{"kind": "Pod", "owner": "Jos\xe9"}'),
        ("digits.json", b'{"a": ' + b"9" * 5000 + b', "b": }'),
        ("latin.yaml", b'{"kind": "Pod", "owner": "Jos\xe9"}'),
    ],
)
def test_a_file_that_is_no_text_is_reported_and_policies_go_on(
    lab: Lab, pair: tuple[Pod, Pod], source: Path, name: str, content: bytes
) -> None:
    db, web = pair
    (source / name).write_bytes(content)
    put(source / "policy.yaml", DENY)
    status = lab.status()
    assert status["synced"]
    assert [r["kind"] for r in status["rejected"]] == ["File"]
    assert not lab.connects(web, db.addresses[0], 5432, seconds=0.3)
    lab.stop_agent()
    lab.start_agent()
    assert not lab.connects(web, db.addresses[0], 5432, seconds=0.3)


@pytest.mark.parametrize(
    "broken",
    [
        DENY.encode("utf-16"),
        DENY.replace("kind: NetworkPolicy", "kind: !!str NetworkPolicy").encode() + b"]",
        DENY.replace("kind: NetworkPolicy", "kind: networkpolicy").encode() + b"]",
    ],
)
def test_a_policy_that_was_broken_while_no_agent_ran_closes_its_namespace(
    lab: Lab, pair: tuple[Pod, Pod], source: Path, broken: bytes
) -> None:
    db, web = pair
    put(source / "policy.yaml", DENY)
    lab.status()
    lab.stop_agent()
    (source / "policy.yaml").write_bytes(broken)
    lab.start_agent()
    assert lab.status()["rejected"]
    assert not lab.connects(web, db.addresses[0], 5432, seconds=0.3)


def test_a_pod_with_one_address_twice_comes_and_goes(lab: Lab, source: Path) -> None:
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: twice, namespace: x}\nspec: {nodeName: other}\n"
    put(source / "twice.yaml", pod + "status: {podIPs: [{ip: 10.1.0.1}, {ip: 10.1.0.1}]}\n")
    lab.status()
    put(source / "twice.yaml", pod + "status: {podIPs: [{ip: 10.1.0.2}]}\n")
    lab.status()
    (source / "twice.yaml").unlink()
    assert lab.status()["synced"]


def test_foreign_objects_in_our_table_and_a_changed_chain_policy_are_put_right(
    lab: Lab, pair: tuple[Pod, Pod], source: Path
) -> None:
    db, web = pair
    lab.nft("add map inet drawbridge foreign { type ipv4_addr : mark; }")
    lab.nft("chain inet drawbridge to-pod { policy drop; }")
    put(source / "policy.yaml", DENY)
    assert lab.status()["synced"]
    assert not lab.connects(web, db.addresses[0], 5432, seconds=0.3)

    def put_right() -> bool:
        rules = lab.nft("list ruleset")
        return "foreign" not in rules and "policy drop" not in rules

    wait_until(put_right, "the table is as it was", seconds=20)
    (source / "policy.yaml").unlink()
    status = lab.status()
    assert (status["synced"], status["rejected"]) == (True, [])
    assert lab.connects(web, db.addresses[0], 5432)


def test_a_second_agent_is_refused_and_the_first_stays_reachable(
    lab: Lab, pair: tuple[Pod, Pod], source: Path, tmp_path: Path
) -> None:
    agent = [sys.executable, "-m", "enforcer", "agent", "--source", str(source)]
    for run_dir, inside in ((lab.run_dir, False), (tmp_path / "other", True)):
        enter = ["ip", "netns", "exec", lab.name] if inside else ["unshare", "--net"]
        command = [*enter, *agent, "--run-dir", str(run_dir)]
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert second.returncode == 1
        assert "a drawbridge agent" in second.stderr
    assert lab.status()["synced"]
    uninstall = ["ip", "netns", "exec", lab.name, sys.executable, "-m", "enforcer", "uninstall"]
    done = subprocess.run(uninstall, capture_output=True, text=True, check=False)
    assert (done.returncode, "stop it first" in done.stderr) == (1, True)


def test_an_agent_whose_log_cannot_be_written_goes_on(lab: Lab, source: Path) -> None:
    lab.stop_agent()
    command = [sys.executable, "-m", "enforcer", "agent", "--source", str(source), "--node-name", lab.name,
               "--run-dir", str(lab.run_dir), "--pod-cidr", "10.99.0.0/24"]  # fmt: skip
    with Path("/dev/full").open("w") as full:
        agent = subprocess.Popen(["ip", "netns", "exec", lab.name, *command], stderr=full)

    def synced() -> bool:
        try:
            return bool(lab.status()["synced"])
        except ControlError:
            return False

    try:
        wait_until(synced, "the agent is in sync", seconds=20)
        put(source / "policy.yaml", DENY)
        assert lab.status()["policies"] == 1
    finally:
        agent.terminate()
        assert agent.wait(10) == 0


def test_elements_of_any_length_go_into_the_kernel_in_one_change(lab: Lab, source: Path) -> None:
    namespace, policy = "n" * 60, "p" * 150
    head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
    put(source / "policy.yaml", f"{head}metadata: {{name: {policy}, namespace: {namespace}}}\n"
                                "spec: {podSelector: {matchLabels: {app: b}}}\n")  # fmt: skip

    def pods(app: str) -> str:
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{'x' * 55}-{n}", "namespace": namespace,
                                                             "labels": {"app": "b" if n == 0 else app}},
             "spec": {"containers": [{"name": "c"}]}, "status": {"podIPs": [{"ip": f"10.50.{n // 250}.{n % 250}"}]}}
            for n in range(400)]})  # fmt: skip

    put(source / "many.json", pods("a"))
    assert lab.status()["synced"]
    put(source / "many.json", pods("b"))
    assert lab.status()["synced"]
    assert lab.nft("list", "map", "inet", "drawbridge", "ingress-v4").count("jump") == 400


def test_a_hardware_address_that_is_anothers_is_refused(lab: Lab, pair: tuple[Pod, Pod]) -> None:
    db, web = pair
    lab.cni("DEL", "x/web")
    for mac in ("0a:58:24:00:00:01", mac_of(db.namespace)):
        done = lab.cni("ADD", "x/web", config={"runtimeConfig": {"mac": mac}})
        assert done.returncode == 1
        assert mac in json.loads(done.stdout)["msg"] + json.loads(done.stdout)["details"]
    assert lab.cni("ADD", "x/web").returncode == 0
    assert lab.connects(web, db.addresses[0], 5432)


def mac_of(namespace: str) -> str:
    listed = subprocess.run(["ip", "-n", namespace, "-j", "link", "show", "eth0"], capture_output=True, check=True)
    return str(json.loads(listed.stdout)[0]["address"])


def test_what_an_earlier_plugin_made_stays_in_the_result(lab: Lab) -> None:
    lab.add_pod("x/web")
    lab.cni("DEL", "x/web")
    earlier = {"cniVersion": "1.0.0", "interfaces": [{"name": "dummy0"}], "ips": [{"address": "192.0.2.1/32"}]}
    result = json.loads(lab.cni("ADD", "x/web", config={"prevResult": earlier}).stdout)
    assert [interface["name"] for interface in result["interfaces"]][::2] == ["dummy0", "eth0"]
    assert result["ips"][0] == {"address": "192.0.2.1/32"}
    assert result["ips"][1]["interface"] == 2
    assert lab.cni("CHECK", "x/web", config={"prevResult": result}).returncode == 0


def test_keys_that_are_null_are_keys_that_are_absent(lab: Lab) -> None:
    lab.add_pod("x/web")
    config = {"ipam": None, "dns": None, "runtimeConfig": None, "prevResult": None}
    assert lab.cni("DEL", "x/web", config=config).returncode == 0
    assert lab.cni("ADD", "x/web", config=config | {"runtimeConfig": {"ips": None, "mac": None}}).returncode == 0


def test_a_pod_that_comes_again_with_another_uid_is_closed_until_its_own_object_is_there(
    tmp_path: Path, source: Path
) -> None:
    put(source / "pods.yaml", PODS.replace("{name: web, ", "{uid: old, name: web, "))
    name = f"dbtest-{os.getpid()}-uid"
    with Lab(name=name, source=("--source", source), run_dir=tmp_path / "run", executable=EXECUTABLE,
             pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
        lab.listen(lab.add_pod("x/db"), 80)
        web = lab.add_pod("x/web")
        lab.cni("DEL", "x/web")
        args = "K8S_POD_NAMESPACE=x;K8S_POD_NAME=web;K8S_POD_UID=new"
        lab.cni("ADD", "x/web", CNI_ARGS=args)
        assert not lab.connects(web, lab.pods["x/db"].addresses[0], 80, seconds=0.3)
        put(source / "pods.yaml", PODS.replace("{name: web, ", "{uid: new, name: web, "))
        lab.status()
        assert lab.connects(web, lab.pods["x/db"].addresses[0], 80)


def test_an_uplink_below_the_least_mtu_of_ipv6_serves_ipv4_pods(tmp_path: Path, source: Path) -> None:
    name = f"dbtest-{os.getpid()}-mtu"
    with Lab(name=name, source=("--source", source), run_dir=tmp_path / "run", executable=EXECUTABLE,
             pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
        lab.stop_agent()
        for words in ("link del drawbridge0", "link add up0 mtu 1200 type veth", "link set up0 up",
                      "addr add 192.0.2.1/24 dev up0", "route add default via 192.0.2.2"):  # fmt: skip
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        lab.start_agent()
        db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
        lab.listen(db, 80)
        assert lab.connects(web, db.addresses[0], 80)
        assert "mtu 1200" in subprocess.run(["ip", "-n", db.namespace, "link", "show", "eth0"], capture_output=True,
                                            text=True, check=True).stdout  # fmt: skip


def ip(lab: Lab, *words: str) -> str:
    return subprocess.run(["ip", "-n", lab.name, *words], capture_output=True, text=True, check=True).stdout


def node(name: str, cidr: str, address: str) -> str:
    return (f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidr}]}}\n"
            f"status: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n---\n")  # fmt: skip


@pytest.fixture
def beside(tmp_path: Path, source: Path) -> Iterator[tuple[Lab, Path]]:
    """A node that another pod network serves, too: its routes to both nodes' pods are there."""
    name = f"dbtest-{os.getpid()}-beside"
    put(source / "nodes.yaml", node(name, "10.244.0.0/24", "192.0.2.1") + node("n2", "10.244.1.0/24", "192.0.2.9"))
    config = tmp_path / "config.yaml"
    config.write_text("network: bridge\nrouting: direct\n")
    with Lab(name=name, source=("--source", source), run_dir=tmp_path / "run", executable=EXECUTABLE, pod_cidrs=(),
             config=config) as lab:  # fmt: skip
        lab.stop_agent()
        subprocess.run(["ip", "netns", "exec", name, sys.executable, "-m", "enforcer", "uninstall"], check=True)
        for words in ("link add up0 type veth peer name up1", "link set up0 up", "link set up1 up",
                      "addr add 192.0.2.1/24 dev up0", "link add cni0 type bridge", "addr add 10.244.0.1/24 dev cni0",
                      "link set cni0 up", "route add 10.244.1.0/24 via 192.0.2.9"):  # fmt: skip
            ip(lab, *words.split())
        yield lab, config


def test_routes_of_another_pod_network_are_never_replaced(beside: tuple[Lab, Path]) -> None:
    lab, _ = beside
    before = {line.removesuffix("linkdown ") for line in ip(lab, "route").splitlines()}
    lab.start_agent()
    lab.status()
    assert before <= {line.removesuffix("linkdown ") for line in ip(lab, "route").splitlines()}


def test_without_a_network_of_its_own_the_agent_touches_no_link_and_no_route(beside: tuple[Lab, Path]) -> None:
    lab, config = beside
    config.write_text("network: none\n")
    before = ip(lab, "route"), ip(lab, "-br", "addr")
    lab.start_agent()
    assert lab.status()["synced"]
    assert (ip(lab, "route"), ip(lab, "-br", "addr")) == before
    assert not (lab.run_dir / "cni.sock").exists()
    assert "masquerade" not in lab.nft("list", "ruleset")


def test_routes_to_other_nodes_outlive_a_restart_a_link_and_an_address_that_comes_back(
    beside: tuple[Lab, Path], source: Path
) -> None:
    lab, _ = beside
    ip(lab, "route", "del", "10.244.1.0/24")
    lab.start_agent()
    lab.status()

    def ours() -> str:
        return ip(lab, "route", "show", "10.244.1.0/24", "proto", "84")

    assert "via 192.0.2.9" in ours()
    lab.stop_agent(kill=True)
    nodes = (source / "nodes.yaml").rename(source / "nodes.off")
    lab.start_agent()
    ip(lab, "link", "add", "w0", "type", "veth")
    lab.status()
    assert "via 192.0.2.9" in ours()
    nodes.rename(source / "nodes.yaml")
    lab.status()
    ip(lab, "addr", "del", "192.0.2.1/24", "dev", "up0")
    assert ours() == ""
    ip(lab, "addr", "add", "192.0.2.1/24", "dev", "up0")
    wait_until(lambda: "via 192.0.2.9" in ours(), "the route is back", seconds=20)
    evil = {"evil": "0.0.0.0/0", "evil2": "192.0.2.0/25", "evil3": "10.244.0.0/24"}
    put(source / "evil.yaml", "".join(node(name, cidr, "192.0.2.77") for name, cidr in evil.items()))
    lab.status()
    assert "192.0.2.77" not in ip(lab, "route")
    assert "proto 84" not in ip(lab, "route", "show", "default") + ip(lab, "route", "show", "192.0.2.0/25")


def test_a_changed_pod_network_takes_its_gateway_and_route_along(tmp_path: Path, source: Path) -> None:
    name = f"dbtest-{os.getpid()}-renumber"
    put(source / "nodes.yaml", node(name, "10.50.0.0/24", "192.0.2.1"))
    with Lab(name=name, source=("--source", source), run_dir=tmp_path / "other", executable=EXECUTABLE,
             pod_cidrs=()) as made:  # fmt: skip
        made.status()
        assert "10.50.0." in ip(made, "route") + ip(made, "addr")
        put(source / "nodes.yaml", node(name, "10.51.0.0/24", "192.0.2.1"))
        made.status()
        shown = ip(made, "route") + ip(made, "addr")
        assert "10.51.0.1" in shown
        assert "10.50.0." not in shown


def test_where_another_networks_route_goes_and_its_link_with_it_ours_takes_its_place(beside: tuple[Lab, Path]) -> None:
    lab, _ = beside
    ip(lab, "route", "del", "10.244.1.0/24")
    for words in ("link add flannel.1 type bridge", "addr add 10.244.0.0/32 dev flannel.1", "link set flannel.1 up",
                  "route add 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink"):  # fmt: skip
        ip(lab, *words.split())
    lab.start_agent()
    lab.status()
    assert "proto 84" not in ip(lab, "route", "show", "10.244.1.0/24")
    ip(lab, "link", "del", "flannel.1")

    def ours() -> bool:
        return "via 192.0.2.9" in ip(lab, "route", "show", "10.244.1.0/24", "proto", "84")

    wait_until(ours, "our route is there", seconds=20)


def test_a_pod_outlives_its_network_being_taken_from_the_node_and_another_one(tmp_path: Path, source: Path) -> None:
    name = f"dbtest-{os.getpid()}-taken"
    put(source / "nodes.yaml", node(name, "10.50.0.0/24", "192.0.2.1"))
    with Lab(name=name, source=("--source", source), run_dir=tmp_path / "other", executable=EXECUTABLE,
             pod_cidrs=()) as made:  # fmt: skip
        made.status()
        pod, other = made.add_pod("x/db"), made.add_pod("x/web")
        made.listen(pod, 80)
        assert made.connects(other, pod.addresses[0], 80)
        for networks in ("", "10.51.0.0/24"):
            put(source / "nodes.yaml", node(name, networks, "192.0.2.1"))
            made.status()
            assert made.connects(other, pod.addresses[0], 80), networks or "none"
        assert made.add_pod("x/late").addresses[0].startswith("10.51.0.")
