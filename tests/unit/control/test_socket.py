"""Questions and answers over the agent's control socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from enforcer.control.messages import AnyQuestion, PodRow, PodsQuestion, Policies, PoliciesQuestion, StatusQuestion
from enforcer.control.socket import SOCKET, ControlError, ControlServer, ask

ROW = PodRow(pod="x/a", addresses=["10.0.0.1"], local=True, standing="pod", port="dbr1", labels={"a": "b"}, known=True)


def answer(question: AnyQuestion) -> object:
    match question:
        case PodsQuestion():
            return [ROW]
        case PoliciesQuestion():
            return {"policies": []}
        case _:
            raise ControlError("no answer to that")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    server = ControlServer(tmp_path, answer)
    server.start()
    yield tmp_path
    server.stop()


def said(run_dir: Path, line: bytes) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(str(run_dir / SOCKET))
        asked.sendall(line)
        asked.shutdown(socket.SHUT_WR)
        with asked.makefile("rb") as reply:
            return msgspec.json.decode(reply.readline(), type=dict[str, str])


def test_an_answer_comes_back_as_it_was_given(run_dir: Path) -> None:
    assert ask(run_dir, PodsQuestion(), list[PodRow]) == [ROW]


def test_a_reason_why_there_is_no_answer_reaches_the_one_who_asked(run_dir: Path) -> None:
    with pytest.raises(ControlError, match="no answer to that"):
        ask(run_dir, StatusQuestion(), dict[str, object])


def test_an_answer_of_another_version_is_said_to_be_one(run_dir: Path) -> None:
    with pytest.raises(ControlError, match=r"another version.*denied"):
        ask(run_dir, PoliciesQuestion(), Policies)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"{",
        b"[1]\n",
        b'{"operation": "reboot"}\n',
        b'{"operation": "explain"}\n',
        b'{"operation": "status", "wait": "long"}\n',
        b'{"operation": "status", "wait": 1e300}\n',
        b"\xff\xfe\n",
        b"[" * 70_000,
    ],
    ids=[
        "nothing",
        "an empty line",
        "half",
        "a list",
        "unknown",
        "incomplete",
        "a wrong type",
        "too large a number",
        "no text",
        "too long",
    ],
)
def test_what_is_no_question_is_answered_with_an_error_and_the_next_question_with_an_answer(
    run_dir: Path, line: bytes
) -> None:
    assert "not a question that this agent knows" in said(run_dir, line)["error"]
    assert ask(run_dir, PodsQuestion(), list[PodRow]) == [ROW]


def test_without_an_agent_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="drawbridge agent"):
        ask(tmp_path, PodsQuestion(), list[PodRow])
