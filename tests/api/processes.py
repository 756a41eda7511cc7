"""Programs that run beside the tests: started with a log, waited for with a deadline, ended by their own process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_POLL_SECONDS = 0.05
_TAIL = 2000


class ProgramError(Exception):
    """A program cannot do what a test needs; the text says which, and what it said."""


class Process:
    """A program with its log. The kernel ends it where the tests end without a word.

    It sees no variable of the environment but ``PATH``, so that no proxy or configuration of the user reaches it.
    """

    def __init__(self, *words: str | Path, log: Path) -> None:
        self.name = log.stem
        self._log = log
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"]},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def check(self) -> None:
        """Raises ProgramError, with the log's end, if the program has ended."""
        if self._popen.poll() is not None:
            tail = self._log.read_text(errors="replace")[-_TAIL:]
            raise ProgramError(f"{self.name} ended with {self._popen.returncode}:\n{tail}")

    def stop(self) -> None:
        """Kill the program, which has nothing to keep; return when it has gone."""
        self._popen.kill()
        self._popen.wait()


def run(
    *words: str | Path, stdin: str | Path | None = None, env: dict[str, str] | None = None, seconds: float = 60.0
) -> str:
    """Run a program to its end and return what it prints.

    Args:
        words: the program and its arguments.
        stdin: text, or a file, that it reads.
        env: its environment, where it is not this process's.
        seconds: that it may take; it is killed after them.

    Raises:
        ProgramError: it ends with another code than 0, or not within the time.
    """
    title = " ".join(map(str, words))
    text = stdin if isinstance(stdin, str) else None
    with (stdin if isinstance(stdin, Path) else Path(os.devnull)).open("rb") as file:
        try:
            done = subprocess.run(
                words,
                input=text,
                stdin=file if text is None else None,
                capture_output=True,
                text=True,
                errors="replace",
                env=env,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"{title}: not done after {seconds:.0f} s") from error
    if done.returncode != 0:
        raise ProgramError(f"{title}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float, processes: Sequence[Process] = ()) -> None:
    """Poll until a condition holds; one that raises ProgramError does not hold yet.

    Raises:
        ProgramError: the time is over, or one of ``processes``, which must run meanwhile, has ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        last = ""
        try:
            if condition():
                return
        except ProgramError as error:
            last = f": {error}"
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise ProgramError(f"{what} not after {seconds:.0f} s{last}")
        time.sleep(_POLL_SECONDS)
