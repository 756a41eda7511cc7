"""Our two tables in the kernel: the transactions of a change, and what is there.

Every transaction goes through this module. Not thread-safe: it belongs to the owner of the ruleset.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import nftables

from enforcer.kernel.netlink import BatchError, BatchSocket, messages
from enforcer.ruleset import text
from enforcer.ruleset.listing import read
from enforcer.ruleset.objects import Counter, Table
from enforcer.ruleset.plan import Purpose, Step
from enforcer.ruleset.ruleset import Elements, Ruleset

_OWN_GENERATIONS = 4096
_COMMIT_TRIES = 100
# What libnftables is given at once, and what is added to a set at once, while nothing refers to either.
_COMMANDS, _ELEMENTS = 1000, 10_000


class NftError(Exception):
    """The kernel, or libnftables, refused a transaction; nothing of it stands. The text is nft's own."""


class Tables:
    """Commits to the tables of this network namespace, and knows its own commits from those of others."""

    def __init__(self) -> None:
        self._nft = nftables.Nftables()
        self._socket = BatchSocket()
        self._own: deque[int] = deque(maxlen=_OWN_GENERATIONS)

    def close(self) -> None:
        """Let go of the sockets; the tables stay."""
        self._socket.close()

    def is_own(self, generation: int) -> bool:
        """Whether a generation was made by this object alone."""
        return generation in self._own

    def all_own_since(self, generation: int) -> bool:
        """Whether every generation after ``generation`` was made by this object alone."""
        return all(later in self._own for later in range(generation + 1, self.generation() + 1))

    def generation(self) -> int:
        """The present generation of the ruleset, whoever made it.

        Raises:
            NftError: the kernel did not say.
        """
        try:
            return self._socket.generation()
        except BatchError as error:
            raise NftError(f"generation: {error}") from error

    def commit(self, step: Step) -> None:
        """Carry the tables over one step of a change, in one transaction.

        A preparation that is large is cut, since nothing refers to what it makes; no other step is.

        Raises:
            NftError: it was refused, and nothing was changed, unless it prepares.
        """
        if step.purpose is Purpose.PREPARATION:
            self._prepare(step)
        elif any(not chain.epoch for chain in step.refilled) or any(entry.set.interval for entry in step.elements):
            # Few and small: rules to be put right, and the networks of nodes.
            self._run(text.commands(step, elements=True))
        else:
            self._batch(list(messages(step)))

    def rebuild(self, ruleset: Ruleset, present: Ruleset) -> None:
        """Put a whole ruleset in the place of what the tables hold, in one transaction: where no steps lead there.

        Raises:
            NftError: nothing was changed.
        """
        self._run(text.rebuild(ruleset, present))

    def remove(self) -> None:
        """Delete both tables."""
        self._run([line for table in Table for line in (f"add table {table}", f"delete table {table}")])

    def make(self) -> None:
        """Make both tables where they are not there, and have them work."""
        self._run(text.tables())

    def present(self, desired: Ruleset) -> Ruleset:
        """What our tables hold; objects that are as desired are the desired objects themselves.

        Raises:
            NftError: the tables cannot be listed.
        """
        present = Ruleset()
        self._nft.set_stateless_output(True)
        try:
            for table in Table:
                try:
                    listed = self._command(f"list table {table}")
                except NftError as error:
                    if "No such file or directory" not in str(error):
                        raise
                else:
                    read(listed, table, desired, present)
        finally:
            self._nft.set_stateless_output(False)
        present.take()
        return present

    def counter(self, counter: Counter) -> tuple[int, int]:
        """Packets and bytes of one counter; none if it is not there."""
        try:
            return self._socket.counter(counter)
        except BatchError:
            return 0, 0

    def counters(self) -> dict[str, tuple[int, int]]:
        """Packets and bytes of each of our counters, by name."""
        return {
            counter["name"]: (counter["packets"], counter["bytes"])
            for table in Table
            for entry in self._list(f"list counters table {table}")
            if (counter := entry.get("counter"))
        }

    def rules(self, chain: str) -> list[str]:
        """The rules of a chain of the policy table as nft prints them; empty if there is no such chain."""
        try:
            lines = self._command(f"list chain {Table.POLICY} {chain}").splitlines()
        except NftError:
            return []
        return [line.strip() for line in lines if line.startswith("\t\t")]

    def element(self, name: str, key: str) -> str | None:
        """The element of a set or map of the policy table that holds a key, as nft prints it; None if none does.

        ``key`` is worded as nft prints it, too.
        """
        try:
            # nft prints this as text even where JSON is asked for.
            listing = self._command(f"get element {Table.POLICY} {name} {{ {key} }}")
        except NftError:
            return None
        return listing.partition("elements = {")[2].partition("}")[0].strip()

    def _prepare(self, step: Step) -> None:
        commands = text.commands(step, elements=False)
        for lines in _cut(commands):
            self._run(lines)
        # As text, libnftables would fetch the elements of every interval set first, for each part again.
        for entry in step.elements:
            for part in _parts(entry):
                self._batch(list(messages(part)))

    def _batch(self, batch: list[bytes]) -> None:
        if not batch:
            # Before 6.10 the kernel would not answer.
            return
        for _ in range(_COMMIT_TRIES):
            generation = self.generation()
            try:
                self._socket.commit(batch, generation)
            except BatchError as error:
                # Another process has committed since; its notification tells whether it touched our tables.
                if error.errno == errno.ERESTART:
                    continue
                raise NftError(f"batch: {error}") from error
            self._own.append(generation + 1)
            return
        raise NftError(f"batch: other programs committed {_COMMIT_TRIES} times in between")

    def _run(self, commands: Iterable[str]) -> None:
        before = self.generation()
        self._command("\n".join(commands) + "\n")
        after = self.generation()
        # If others have committed meanwhile, it cannot be told which generation is ours: none is claimed.
        if after == before + 1:
            self._own.append(after)

    def _command(self, commands: str) -> str:
        code, output, error = self._nft.cmd(commands)
        if code != 0:
            raise NftError(error.strip() or f"libnftables returned {code}")
        return str(output)

    def _list(self, command: str) -> list[dict[str, dict[str, Any]]]:
        """Run a listing in JSON; what is not there lists nothing."""
        self._nft.set_json_output(True)
        try:
            output = self._command(command)
        except NftError as error:
            if "No such file or directory" in str(error):
                return []
            raise
        finally:
            self._nft.set_json_output(False)
        entries: list[dict[str, dict[str, Any]]] = json.loads(output)["nftables"]
        return [entry for entry in entries if "metainfo" not in entry]


def _cut(lines: list[str]) -> Iterator[list[str]]:
    remaining = iter(lines)
    while part := list(islice(remaining, _COMMANDS)):
        yield part


def _parts(entry: Elements) -> Iterator[Step]:
    remaining = iter(entry.added.items())
    while part := dict(islice(remaining, _ELEMENTS)):
        yield Step(purpose=Purpose.PREPARATION, elements=(dataclasses.replace(entry, added=part),))
