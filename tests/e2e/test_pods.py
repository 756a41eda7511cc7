"""Real packets between real namespaces, attached by the real executable to the real agent."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from enforcer.control.messages import PodRow, PodsQuestion
from enforcer.demo.lab import Lab, LabError, Pod
from tests.api.processes import wait_until
from tests.e2e.conftest import EXECUTABLE, PODS, WEB_TO_DB, put

pytestmark = pytest.mark.netns
PG, OTHER = 5432, 80


@pytest.fixture
def pair(lab: Lab) -> tuple[Pod, Pod]:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    lab.listen(db, PG)
    lab.listen(db, OTHER)
    return db, web


def test_pods_without_policies_reach_each_other_over_both_families(lab: Lab, pair: tuple[Pod, Pod]) -> None:
    db, web = pair
    assert len(db.addresses) == 2
    assert all(lab.connects(web, address, PG) for address in db.addresses)


def test_a_policy_file_closes_what_it_does_not_allow_and_its_removal_opens_it(
    lab: Lab, pair: tuple[Pod, Pod], source: Path
) -> None:
    db, web = pair
    put(source / "policy.yaml", WEB_TO_DB)
    assert lab.status()["synced"]
    for address in db.addresses:
        assert lab.connects(web, address, PG)
        assert not lab.connects(web, address, OTHER)
    (source / "policy.yaml").unlink()
    assert lab.status()["synced"]
    assert all(lab.connects(web, address, OTHER) for address in db.addresses)


def test_a_rejected_policy_closes_its_pods_and_no_others(lab: Lab, pair: tuple[Pod, Pod], source: Path) -> None:
    db, web = pair
    lab.listen(web, OTHER)
    put(source / "policy.yaml", WEB_TO_DB.replace("{port: pg}", "{port: 0}"))
    status = lab.status()
    assert [r["name"] for r in status["rejected"]] == ["db"]
    assert "spec.ingress[0].ports[0].port" in status["rejected"][0]["reason"]
    assert not lab.connects(web, db.addresses[0], PG)
    assert lab.connects(db, web.addresses[0], OTHER)


def test_a_pod_whose_object_is_not_known_is_closed_until_it_is(lab: Lab, pair: tuple[Pod, Pod], source: Path) -> None:
    db, web = pair
    stranger = lab.add_pod("x/stranger")
    lab.listen(stranger, OTHER)
    assert not lab.connects(stranger, db.addresses[0], PG)
    assert not lab.connects(web, stranger.addresses[0], OTHER)
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: stranger, namespace: x}\nspec: {containers: [{name: c}]}\n"
    put(source / "stranger.yaml", pod)
    lab.status()
    assert lab.connects(stranger, db.addresses[0], PG)
    assert lab.connects(web, stranger.addresses[0], OTHER)


def test_an_attached_address_is_its_pods_whatever_a_status_claims(
    lab: Lab, pair: tuple[Pod, Pod], source: Path
) -> None:
    db, web = pair
    evil = lab.add_pod("x/evil")

    def claiming(name: str, app: str, *addresses: str, node: str = lab.name) -> dict[str, Any]:
        container = {"name": "c", "ports": [{"name": "pg", "containerPort": PG}]}
        return {"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "x", "labels": {"app": app}},
                "spec": {"nodeName": node, "containers": [container]},
                "status": {"podIPs": [{"ip": address} for address in addresses]}}  # fmt: skip

    items = [claiming("db", "db", "192.0.2.1"), claiming("web", "web", *evil.addresses), claiming("evil", "evil"),
             claiming("far", "web", "192.0.2.9", *evil.addresses, node="other")]  # fmt: skip
    (source / "pods.yaml").unlink()
    put(source / "pods.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    put(source / "policy.yaml", WEB_TO_DB)

    def holds() -> bool:
        return all(lab.connects(web, address, PG) for address in db.addresses) and not any(
            lab.connects(pod, address, port, seconds=0.3)
            for address in db.addresses
            for pod, port in ((web, OTHER), (evil, PG))
        )

    assert lab.status()["synced"]
    assert holds()
    rules = lab.nft("list", "table", "inet", "drawbridge")
    assert "192.0.2.1" not in rules
    assert "192.0.2.9" in rules
    # While no pod has the address, the claim is all that is known of it; it ends with the attachment.
    lab.cni("DEL", "x/evil")
    assert evil.addresses[0] in lab.nft("list", "table", "inet", "drawbridge")
    wanted = {"runtimeConfig": {"ips": [f"{evil.addresses[0]}/24", f"{evil.addresses[1]}/64"]}}
    assert lab.cni("ADD", "x/evil", config=wanted).returncode == 0
    assert holds()


def test_an_attachment_without_kubernetes_arguments_is_matched_by_ip_blocks_only(
    lab: Lab, pair: tuple[Pod, Pod], source: Path
) -> None:
    db, _ = pair
    guest = lab.add_pod("guest", kubernetes=False)
    put(source / "policy.yaml", WEB_TO_DB.replace("podSelector: {matchLabels: {app: web}}", "podSelector: {}"))
    lab.status()
    assert not lab.connects(guest, db.addresses[0], PG)
    block = f"ipBlock: {{cidr: {guest.addresses[0]}/32}}"
    put(source / "policy.yaml", WEB_TO_DB.replace("podSelector: {matchLabels: {app: web}}", block))
    lab.status()
    assert lab.connects(guest, db.addresses[0], PG)


def test_rules_and_pods_outlive_a_killed_agent_and_the_next_one_finds_them(
    lab: Lab, pair: tuple[Pod, Pod], source: Path
) -> None:
    db, web = pair
    put(source / "policy.yaml", WEB_TO_DB)
    lab.status()
    lab.stop_agent(kill=True)
    assert lab.connects(web, db.addresses[0], PG)
    assert not lab.connects(web, db.addresses[0], OTHER)
    lab.start_agent()
    assert lab.status()["attachments"] == 2
    assert lab.connects(web, db.addresses[0], PG)
    assert not lab.connects(web, db.addresses[0], OTHER)
    assert lab.cni("DEL", "x/web").returncode == 0


@pytest.mark.parametrize(
    "damage", ["flush ruleset", "delete table inet drawbridge", "flush map inet drawbridge ingress-v4"]
)
def test_what_another_process_does_to_our_tables_is_put_back(
    lab: Lab, pair: tuple[Pod, Pod], source: Path, damage: str
) -> None:
    db, web = pair
    put(source / "policy.yaml", WEB_TO_DB)
    lab.status()
    lab.nft(*damage.split())
    wait_until(lambda: not lab.connects(web, db.addresses[0], OTHER, seconds=0.05), "the table is back", seconds=20)
    assert lab.connects(web, db.addresses[0], PG)
    assert "jump ingress/x/db/" in lab.nft("list", "table", "inet", "drawbridge")


def test_the_listing_of_the_kernel_has_the_rules_that_render_prints(
    lab: Lab, pair: tuple[Pod, Pod], source: Path, tmp_path: Path
) -> None:
    put(source / "policy.yaml", WEB_TO_DB)
    lab.status()
    listed = lab.nft("list", "table", "inet", "drawbridge")
    addresses = iter(pair)
    status = re.compile("(?<=kind: Pod\n)")
    known = status.sub(
        lambda _: f"status: {{podIPs: {json.dumps([{'ip': a} for a in next(addresses).addresses])}}}\n", PODS
    )
    (tmp_path / "all.yaml").write_text(f"{known}---{WEB_TO_DB}")
    command = [sys.executable, "-m", "enforcer", "render", str(tmp_path / "all.yaml")]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def chains(text: str) -> dict[str, list[str]]:
        found = re.findall(r"\tchain (\S+) {\n(.*?)\n\t}", text.partition("table bridge")[0], re.DOTALL)
        # The epoch is the agent's.
        return {name: body.split("\n") for name, body in found if name != "stamp"}

    assert {"from-pod", "to-pod", "to-node", "no-flow"} <= chains(listed).keys()
    assert chains(listed) == {name: body for name, body in chains(rendered).items() if name in chains(listed)}
    assert len(chains(rendered)) - len(chains(listed)) in range(3)


def test_thirty_adds_at_once_give_thirty_addresses(lab: Lab) -> None:
    keys = [f"x/many-{n}" for n in range(30)]
    with ThreadPoolExecutor(30) as pool:
        pods = list(pool.map(lab.add_pod, keys))
    addresses = [address for pod in pods for address in pod.addresses]
    assert len(set(addresses)) == 60
    with ThreadPoolExecutor(30) as pool:
        assert {done.returncode for done in pool.map(lambda key: lab.cni("DEL", key), keys)} == {0}
    assert lab.status()["attachments"] == 0


def test_a_del_is_idempotent_and_its_address_is_not_given_again_at_once(lab: Lab) -> None:
    first = lab.add_pod("x/web")
    for _ in range(2):
        done = lab.cni("DEL", "x/web")
        assert (done.returncode, done.stdout) == (0, "")
    assert lab.cni("DEL", "x/web", CNI_NETNS="/nowhere").returncode == 0
    again = lab.cni("ADD", "x/web")
    assert json.loads(again.stdout)["ips"][0]["address"].partition("/")[0] != first.addresses[0]


def test_each_version_has_its_own_result_format(lab: Lab) -> None:
    lab.add_pod("x/web")
    for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0"):
        lab.cni("DEL", "x/web", config={"cniVersion": version})
        result = json.loads(lab.cni("ADD", "x/web", config={"cniVersion": version}).stdout)
        assert result["cniVersion"] == version
        assert ("version" in result["ips"][0]) is (version < "1.0.0")
        assert ("mtu" in result["interfaces"][0]) is (version == "1.1.0")
    config = {"cniVersion": "1.1.0", "prevResult": result}
    assert lab.cni("CHECK", "x/web", config=config).returncode == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("route del default", "default route by 10.99.0.1"),
        ("-6 route del default", "default route by fd99::1"),
        ("neigh del 10.99.0.1 dev eth0", "neighbour 10.99.0.1"),
        ("addr flush dev eth0", "address 10.99.0."),
        ("link del eth0", "is gone"),
    ],
)
def test_check_says_what_a_pod_has_lost(lab: Lab, damage: str, words: str) -> None:
    pod = lab.add_pod("x/web")
    lab.cni("DEL", "x/web")
    result = json.loads(lab.cni("ADD", "x/web").stdout)
    assert lab.cni("CHECK", "x/web", config={"prevResult": result}).returncode == 0
    subprocess.run(["ip", "-n", pod.namespace, *damage.split()], check=True)
    done = lab.cni("CHECK", "x/web", config={"prevResult": result})
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 102)
    assert words in json.loads(done.stdout)["msg"]


@pytest.mark.parametrize(
    ("config", "environment", "code"),
    [
        ({"cniVersion": "0.2.0"}, {}, 1),
        ({"name": ""}, {}, 7),
        ({}, {"CNI_IFNAME": "a/b"}, 4),
        ({}, {"CNI_NETNS": "/nowhere"}, 4),
        ({}, {"CNI_CONTAINERID": "../x"}, 4),
        ({"runtimeConfig": {"ips": ["10.99.0.1/24"]}}, {"CNI_CONTAINERID": "new"}, 100),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_codes_of_the_specification(
    lab: Lab, config: dict[str, Any], environment: dict[str, str], code: int
) -> None:
    lab.add_pod("x/web")
    done = lab.cni("ADD", "x/web", config=config, kubernetes=True, **environment)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == code
    assert lab.status()["attachments"] == 1


def test_requested_addresses_and_hardware_address_are_honoured(lab: Lab) -> None:
    lab.add_pod("x/web")
    lab.cni("DEL", "x/web")
    config = {"runtimeConfig": {"ips": ["10.99.0.77/24"], "mac": "02:00:00:00:00:77"}}
    result = json.loads(lab.cni("ADD", "x/web", config=config).stdout)
    assert result["ips"][0]["address"] == "10.99.0.77/32"
    assert result["interfaces"][1]["mac"] == "02:00:00:00:00:77"


def test_an_ipam_section_is_delegated_to_its_plugin(lab: Lab, pair: tuple[Pod, Pod], tmp_path: Path) -> None:
    _, web = pair
    assert lab.cni("DEL", "x/web").returncode == 0
    ranges = [[{"subnet": "10.98.0.0/24"}]]
    config = {"ipam": {"type": "host-local", "ranges": ranges, "dataDir": str(tmp_path / "leases")}}
    result = json.loads(lab.cni("ADD", "x/web", config=config).stdout)
    assert result["ips"][0]["address"].startswith("10.98.0.")
    assert lab.connects(web, lab.pods["x/db"].addresses[0], PG)
    assert lab.cni("DEL", "x/web", config=config).returncode == 0
    leases = [entry.name for entry in (tmp_path / "leases" / "drawbridge").iterdir()]
    assert not [name for name in leases if name.startswith("10.98.")]


def test_a_forged_source_address_is_dropped_by_the_guard(lab: Lab, pair: tuple[Pod, Pod]) -> None:
    db, web = pair
    with lab.inside(web.descriptor):
        subprocess.run(["ip", "addr", "add", "10.99.0.200/32", "dev", "eth0"], check=True)
        code = f"import socket; s = socket.create_connection(('{db.addresses[0]}', {PG}), 1, ('10.99.0.200', 0))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
    listed = lab.nft("list", "counter", "bridge", "drawbridge", "denied/forged")
    counted = re.search(r"packets (\d+)", listed)
    assert counted is not None
    assert int(counted[1]) > 0


def test_an_agent_that_is_away_is_reported_with_code_11(tmp_path: Path) -> None:
    environment = os.environ | {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "/x",
                                "DRAWBRIDGE_CNI_SOCKET": str(tmp_path / "none.sock")}  # fmt: skip
    done = subprocess.run([EXECUTABLE], input=b"{}", env=environment, capture_output=True, check=False, timeout=60)
    printed = json.loads(done.stdout)
    assert (done.returncode, printed["code"]) == (1, 11)
    assert printed["msg"].endswith("none.sock: No such file or directory")


def test_the_link_is_down_until_the_enforcer_has_answered(lab: Lab) -> None:
    """An unknown pod is waited for; all that while its port must not be up."""
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            listing = subprocess.run(
                ["ip", "netns", "exec", lab.name, "ip", "-br", "link"], capture_output=True, text=True, check=True
            ).stdout
            seen.extend(line.split()[1] for line in listing.splitlines() if line.startswith("dbr"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        lab.add_pod("x/nobody")
    finally:
        done.set()
        watcher.join()
    assert "DOWN" in seen or "LOWERLAYERDOWN" in seen
    assert sorted(seen, key="UP".__eq__) == seen


def test_uninstall_removes_tables_bridge_links_and_routes(lab: Lab, pair: tuple[Pod, Pod]) -> None:
    lab.stop_agent()
    inside = ["ip", "netns", "exec", lab.name]
    subprocess.run([*inside, sys.executable, "-m", "enforcer", "uninstall"], capture_output=True, check=True)
    assert lab.nft("list", "ruleset") == ""
    links = subprocess.run([*inside, "ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in links.splitlines()] == ["lo"]
    for family in ("-4", "-6"):
        listing = [*inside, "ip", family, "route", "show", "proto", "84"]
        assert subprocess.run(listing, capture_output=True, text=True, check=True).stdout == ""


def test_without_a_pod_cidr_option_the_node_object_gives_it_even_when_it_comes_late(
    tmp_path: Path, source: Path
) -> None:
    name = f"dbtest-{os.getpid()}-node"
    with Lab(
        name=name, source=("--source", source), run_dir=tmp_path / "run", executable=EXECUTABLE, pod_cidrs=()
    ) as lab:
        with pytest.raises(LabError, match="the node has no pod CIDR yet"):
            lab.add_pod("x/web")
        node = f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.96.0.0/24]}}\n"
        put(source / "node.yaml", node)
        lab.status()
        assert lab.add_pod("x/db").addresses == ["10.96.0.2"]


def test_metrics_and_probes_are_served_where_the_configuration_says(tmp_path: Path, source: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("metricsAddress: '[::]:9841'\n")
    put(source / "policy.yaml", WEB_TO_DB)
    with Lab(name=f"dbtest-{os.getpid()}-metrics", source=("--source", source), run_dir=tmp_path / "run",
             executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24",), config=config) as lab:  # fmt: skip
        db = lab.add_pod("x/db")

        def page(path: str) -> str:
            with lab.inside(db.descriptor):
                asked = socket.create_connection(("10.99.0.1", 9841), 2)
            with asked, asked.makefile("rb") as reply:
                asked.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                return reply.read().decode()

        assert " 200 OK" in page("/livez")
        assert " 200 OK" in page("/readyz")
        assert " 404 " in page("/other")
        metrics = page("/metrics")
        assert "drawbridge_synced 1.0" in metrics
        assert 'drawbridge_rule_packets_total{counter="denied/ingress"} 0.0' in metrics


def test_a_configuration_that_is_not_understood_ends_the_agent_with_the_key(tmp_path: Path, source: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("unknownPods: maybe\n")
    command = [sys.executable, "-m", "enforcer", "agent", "--source", str(source), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode != 0
    assert str(config) in done.stderr
    assert "unknownPods" in done.stderr


def test_status_and_gc_serve_runtimes_of_version_1_1(lab: Lab) -> None:
    kept, lost = lab.add_pod("x/web"), lab.add_pod("x/db")
    assert lab.cni("STATUS", "x/web", config={"cniVersion": "1.1.0"}).returncode == 0
    valid = [{"containerID": kept.namespace, "ifname": "eth0"}]
    config = {"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}
    assert lab.cni("GC", "x/web", config=config | {"name": "another"}).returncode == 0
    assert lab.status()["attachments"] == 2
    assert lab.cni("GC", "x/web", config=config).returncode == 0
    assert lab.status()["attachments"] == 1
    assert [row.pod for row in lab.ask(PodsQuestion(), list[PodRow])] == ["x/web"]
    assert lost.addresses[0] not in lab.nft("list", "ruleset")
    assert lab.cni("GC", "x/web", config={"cniVersion": "1.0.0"}).returncode == 1
