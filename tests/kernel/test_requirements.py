"""What is asked of the kernel at start: it finds what is there, says what is not, and changes nothing."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from enforcer.kernel import grace, nfnetlink, requirements
from enforcer.kernel.requirements import repeats_lookups

MASK = 0xFF000000

LOOK = """
from enforcer.kernel import requirements

found = requirements.inspect(0xFF000000)
for entry in found.missing:
    print("missing", entry)
for entry in found.notes:
    print("note", entry)
"""
GENERATION = """
from enforcer.kernel import nfnetlink, requirements

with nfnetlink.open_socket() as opened:
    opened.send(nfnetlink.message(requirements._GETGEN, 0, 0, b""))
    print("generation", opened.recv(4096)[24:28].hex())
"""
TRACKED = "nft 'add table ip t; add chain ip t c; add rule ip t c ct state new'"
Look = Callable[..., str]


@pytest.fixture
def look() -> Look:
    """Run a shell's commands in a network namespace of its own: $0 -c "$1" looks, "$2" prints the generation."""

    def found(script: str) -> str:
        command = ["unshare", "--net", "sh", "-ec", script, sys.executable, LOOK, GENERATION]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return found


def answering(*messages: bytes) -> socket.socket:
    """A socket at whose other end the answer is there already."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.send(b"".join(messages))
    far.detach()
    return near


def error(number: int) -> bytes:
    return nfnetlink.message(nfnetlink.ERROR, 0, 0, b"")[:16] + struct.pack("=i", -number) + bytes(16)


@pytest.mark.netns
def test_this_kernel_has_all_and_nothing_is_committed(look: Look) -> None:
    found = look('$0 -c "$2"; $0 -c "$1"; $0 -c "$2"').splitlines()
    assert not [line for line in found if line.startswith("missing")]
    assert found[0] == found[-1]


@pytest.mark.netns
def test_without_the_right_to_ask_that_is_what_is_missing(look: Look) -> None:
    found = look('setpriv --bounding-set=-net_admin --inh-caps=-net_admin $0 -c "$1"')
    (missing,) = (line for line in found.splitlines() if line.startswith("missing"))
    assert "the right to change the ruleset (Operation not permitted)" in missing


@pytest.mark.netns
def test_each_ruleset_that_is_tried_is_refused_by_name_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = [
        requirements._Probe(probe.what, probe.ruleset + "add rule inet nobody nothing accept\n", probe.hint)
        for probe in requirements._PROBES
    ]
    monkeypatch.setattr(requirements, "_PROBES", spoilt)
    assert [missing.what for missing in requirements._missing_of_nftables()] == [probe.what for probe in spoilt]


@pytest.mark.netns
@pytest.mark.parametrize(("loose", "noted"), [(1, True), (0, False)])
def test_picking_up_connections_in_their_middle_is_noted_while_it_is_on(look: Look, loose: int, noted: bool) -> None:
    found = look(f'{TRACKED}; sysctl -qw net.netfilter.nf_conntrack_tcp_loose={loose}; $0 -c "$1"')
    assert ("note net.netfilter.nf_conntrack_tcp_loose" in found) is noted


@pytest.mark.netns
def test_it_is_noted_where_the_kernel_cannot_say_when_packets_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def notes() -> list[str]:
        return [note.what for note in requirements.inspect(MASK).notes if "membarrier" in note.what]

    assert not notes()
    # What the kernel answers with nohz_full: every command but the one that waits for all processors.
    monkeypatch.setattr(grace, "_membarrier", lambda _: 0x3FE)
    assert notes()
    monkeypatch.setattr(grace, "_membarrier", lambda _: None)
    assert notes()


def test_a_kernel_that_takes_a_stale_generation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, missing in ((errno.ERESTART, 0), (0, 1), (errno.EINVAL, 1), (errno.EPERM, 1)):
        monkeypatch.setattr(requirements, "_asked", lambda _, answer=answer: answer)
        assert len(list(requirements._missing_of_transactions())) == missing


def test_connections_that_were_not_asked_for_are_counted() -> None:
    wanted, other = (
        nfnetlink.message(requirements._CT_NEW, 0, socket.AF_INET, nfnetlink.attr(8, struct.pack(">I", mark)))
        for mark in (0x01000007, 0x42000007)
    )
    done = nfnetlink.message(nfnetlink.DONE, 0, 0, b"")
    with answering(wanted, other, other, done) as opened:
        assert requirements._not_matching(opened, MASK) == 2
    with answering(wanted, done) as opened:
        assert requirements._not_matching(opened, MASK) == 0


def test_a_kernel_that_cannot_list_connections_by_mark_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(requirements, "_asked", refused)
    (missing,) = requirements._missing_of_ctnetlink(MASK)
    assert "Operation not supported" in str(missing)
    assert "slow, not open" in str(missing)


def test_flowtables_are_named_and_a_kernel_without_any_kind_of_them_has_none() -> None:
    flowtable = nfnetlink.message(
        requirements._NEWFLOWTABLE, 0, 2, nfnetlink.text(1, "shop") + nfnetlink.text(2, "fast")
    )
    with answering(flowtable, nfnetlink.message(nfnetlink.DONE, 0, 0, b"")) as opened:
        assert requirements._flowtables(opened) == ["shop/fast"]
    with answering(error(errno.EINVAL)) as opened:
        assert requirements._flowtables(opened) == []


@pytest.mark.parametrize(
    ("release", "repeats"),
    [
        ("5.15.0-119-generic", False),
        ("6.1.192", False),
        ("6.6.107", False),
        ("6.12.47", False),
        ("6.12.48+deb13-amd64", True),
        ("6.16.7", False),
        ("6.16.8-arch1-1", True),
        ("6.17", True),
        ("6.18.44", True),
        ("7.3.4", True),
        ("unknown", None),
    ],
)
def test_the_release_says_whether_lookups_are_repeated(release: str, repeats: bool | None) -> None:
    assert repeats_lookups(release) is repeats


@pytest.mark.netns
def test_the_commands_of_the_page_find_all_that_is_needed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    block = page.partition("## To check by hand")[2].partition("```console\n")[2].partition("```")[0]
    commands = block.replace("node-1# ", "\n# command\n").split("# command\n")[1:]
    assert len(commands) == 5
    script = "\n".join(command for command in commands if "/boot/" not in command)
    # The setting is there once connections are tracked.
    words = ["unshare", "--net", "bash", "-euc", f"{TRACKED}\n{script}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "all there" in done.stdout
    assert "nf_conntrack_tcp_loose" in done.stdout
