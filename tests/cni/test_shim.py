"""The executable's own bounds, met by servers that misbehave."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import EXECUTABLE


def run(path: Path, *, config: bytes = b"{}", **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status and printed object of an ADD."""
    words = os.environ | {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"}
    words |= {"CNI_NETNS": "/proc/self/ns/net", "DRAWBRIDGE_CNI_SOCKET": str(path)} | environment
    done = subprocess.run([EXECUTABLE], input=config, env=words, capture_output=True, check=False, timeout=60)
    return done.returncode, json.loads(done.stdout)


@contextmanager
def server(path: Path, answer: Callable[[socket.socket], None] | None) -> Iterator[None]:
    """A socket that takes one connection and answers so; of None, one that never takes any."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                _, environment, config = struct.unpack("!III", connection.recv(12, socket.MSG_WAITALL))
                connection.recv(environment + config, socket.MSG_WAITALL)
                if answer is not None:
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        if answer is not None:
            thread.start()
        yield
        if answer is not None:
            thread.join()


def test_an_agent_that_takes_no_connection_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with server(tmp_path / "s", None):
        status, printed = run(tmp_path / "s")
    assert (status, printed["code"]) == (1, 11)
    assert printed["msg"] == f"the drawbridge agent does not answer at {tmp_path / 's'}: {os.strerror(errno.ETIMEDOUT)}"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "does not answer at"),
        (b"\0", "ended before it replied"),
        (b"\0" + struct.pack("!II", 0, 100) + b"{}", "cut short"),
        (b"\0" + struct.pack("!II", 0, 0xFFFFFFFF), "cut short"),
    ],
)
def test_a_reply_that_is_cut_short_is_an_error_to_try_again_after(tmp_path: Path, reply: bytes, words: str) -> None:
    with server(tmp_path / "s", lambda connection: connection.sendall(reply)):
        status, printed = run(tmp_path / "s")
    assert (status, printed["code"]) == (1, 11)
    assert words in printed["msg"]


@pytest.mark.parametrize(
    ("config", "environment", "code"),
    [
        (b"x" * ((1 << 20) + 1), {}, 7),
        (b"{}", {"CNI_ARGS": "x" * 40_000}, 4),
        (b"{}", {"DRAWBRIDGE_CNI_SOCKET": "/" + "x" * 200}, 4),
    ],
)
def test_what_is_too_long_is_refused_before_the_agent_is_asked(
    tmp_path: Path, config: bytes, environment: dict[str, str], code: int
) -> None:
    status, printed = run(tmp_path / "s", config=config, **environment)
    assert (status, printed["code"]) == (1, code)


def test_version_needs_no_agent_and_errors_speak_the_version_of_the_configuration(tmp_path: Path) -> None:
    status, printed = run(tmp_path / "s", config=b'{"cniVersion": "1.1.0"}', CNI_COMMAND="VERSION")
    assert (status, printed["cniVersion"]) == (0, "1.1.0")
    assert printed["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    _, printed = run(tmp_path / "s", config=b'{"cniVersion": "0.4.0"}')
    assert printed["cniVersion"] == "0.4.0"


def test_an_open_standard_input_is_not_waited_for_without_end(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        done = subprocess.run([EXECUTABLE], stdin=reader, env={"CNI_COMMAND": "ADD"}, capture_output=True, check=False,
                              timeout=15)  # fmt: skip
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 5)
