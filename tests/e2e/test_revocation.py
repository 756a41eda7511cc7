"""Established flows end when policy tightens, whichever side sends, and go on when it allows them again."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from enforcer.demo.lab import Lab, Pod
from tests.e2e.conftest import WEB_TO_DB, put

pytestmark = pytest.mark.netns
PG = 5432
DENY = WEB_TO_DB.replace("app: web", "app: nobody")


def open_flow(lab: Lab, kind: socket.SocketKind, client: Pod, server: Pod, family: int):
    """An established flow's two sockets, the client's and the server's."""
    address = server.addresses[family]
    net = (socket.AF_INET, socket.AF_INET6)[family]
    with lab.inside(server.descriptor):
        waiting = socket.socket(net, kind)
    with lab.inside(client.descriptor):
        near = socket.socket(net, kind)
    for made in (waiting, near):
        made.settimeout(5)
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    waiting.bind((address, PG))
    if kind is socket.SOCK_STREAM:
        waiting.listen()
        near.connect((address, PG))
        far, _ = waiting.accept()
        waiting.close()
    else:
        near.connect((address, PG))
        near.send(b"hello")
        _, who = waiting.recvfrom(64)
        far = waiting
        far.connect(who)
        far.send(b"hello")
        near.recv(64)
    far.settimeout(5)
    return near, far


def passes(sender: socket.socket, receiver: socket.socket, seconds: float) -> bool:
    receiver.settimeout(seconds)
    try:
        sender.send(b"x")
        return bool(receiver.recv(4096))
    except OSError:
        return False


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_flow_ends_when_policy_denies_it_and_goes_on_when_it_allows_it_again(
    lab: Lab, source: Path, kind, family, sender
) -> None:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    put(source / "policy.yaml", WEB_TO_DB)
    if kind is socket.SOCK_DGRAM:
        put(source / "policy.yaml", WEB_TO_DB.replace("{port: pg}", "{port: 5432, protocol: UDP}"))
    lab.status()
    near, far = open_flow(lab, kind, web, db, family)
    from_, to = (near, far) if sender == "client" else (far, near)
    with near, far:
        assert passes(from_, to, 2)
        put(source / "policy.yaml", DENY)
        assert lab.status()["synced"]
        assert not passes(from_, to, 0.3)
        assert int(lab.nft("list", "counter", "inet", "drawbridge", "denied/revoked").split("packets ")[1].split()[0])
        (source / "policy.yaml").unlink()
        assert lab.status()["synced"]
        # TCP sends the lost byte again after a pause that doubles; a datagram that was dropped is lost.
        assert passes(from_, to, 4)


def test_a_restarted_agent_cuts_what_its_first_render_denies(lab: Lab, source: Path) -> None:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    near, far = open_flow(lab, socket.SOCK_STREAM, web, db, 0)
    with near, far:
        assert passes(near, far, 2)
        lab.stop_agent(kill=True)
        put(source / "policy.yaml", DENY)
        lab.start_agent()
        lab.status()
        assert not passes(near, far, 0.3)
        assert not passes(far, near, 0.3)


def test_what_the_node_itself_has_begun_is_not_cut(lab: Lab, source: Path) -> None:
    db = lab.add_pod("x/db")
    node = Pod("node", lab.name, lab.descriptor, ["10.99.0.1", "fd99::1"])
    near, far = open_flow(lab, socket.SOCK_STREAM, node, db, 0)
    with near, far:
        put(source / "policy.yaml", DENY.replace("  ingress:", "  policyTypes: [Ingress, Egress]\n  ingress:"))
        lab.status()
        assert passes(near, far, 2)
        assert passes(far, near, 2)


def test_a_flow_that_stays_allowed_is_not_touched_while_others_are_cut(lab: Lab, source: Path) -> None:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    near, far = open_flow(lab, socket.SOCK_STREAM, web, db, 0)
    with near, far:
        for text in (WEB_TO_DB, WEB_TO_DB.replace("name: db,", "name: other,")):
            put(source / "policy.yaml", text)
            lab.status()
            assert passes(near, far, 0.15)
            assert passes(far, near, 0.15)
