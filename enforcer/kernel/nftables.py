"""Our two tables in the kernel: whole renders, transactions, and what is there.

The one module that speaks to libnftables. Not thread-safe: it belongs to the owner of the ruleset.
"""

from __future__ import annotations

import errno
import json
from collections import deque
from typing import Any

import nftables

from enforcer.kernel.netlink import BatchError, ElementSocket
from enforcer.ruleset import text
from enforcer.ruleset.objects import Table
from enforcer.ruleset.ruleset import Ruleset, Transaction

_OWN_GENERATIONS = 4096


class NftError(Exception):
    """The kernel, or libnftables, refused a transaction; nothing of it stands. The text is nft's own."""


class Tables:
    """Commits to the tables of this network namespace, and knows its own commits from those of others."""

    def __init__(self) -> None:
        self._nft = nftables.Nftables()
        self._elements = ElementSocket()
        self._own: deque[int] = deque(maxlen=_OWN_GENERATIONS)

    def close(self) -> None:
        """Let go of the sockets; the tables stay."""
        self._elements.close()

    def is_own(self, generation: int) -> bool:
        """Whether a generation was made by this object alone."""
        return generation in self._own

    def all_own_since(self, generation: int) -> bool:
        """Whether every generation after ``generation`` was made by this object alone."""
        return all(later in self._own for later in range(generation + 1, self.generation() + 1))

    def generation(self) -> int:
        """The present generation of the ruleset, whoever made it."""
        return self._elements.generation()

    def commit(self, transaction: Transaction) -> None:
        """Carry the tables over a transaction.

        Raises:
            NftError: nothing was changed; the tables may differ from what they are believed to be.
        """
        if transaction.structural:
            self._run(text.transaction(transaction))
            return
        while True:
            generation = self.generation()
            try:
                self._elements.commit(transaction.elements, generation)
            except BatchError as error:
                # Another process has committed since; its notification tells whether it touched our tables.
                if error.errno == errno.ERESTART:
                    continue
                raise NftError(f"element batch: {error}") from error
            self._own.append(generation + 1)
            return

    def replace(self, ruleset: Ruleset) -> None:
        """Put a whole ruleset in the place of whatever our tables hold, in one transaction.

        Raises:
            NftError: nothing was changed.
        """
        self._run(text.replacement(ruleset, self.present()))

    def remove(self) -> None:
        """Delete both tables."""
        self._run("".join(f"add table {table}\ndelete table {table}\n" for table in Table))

    def present(self) -> text.Present:
        """What our tables hold, by name, without elements and rules."""
        present = text.Present()
        for table in Table:
            for entry in self._list(f"list table {table}", terse=True):
                for kind, value in entry.items():
                    identity = (table, value.get("name", ""))
                    match kind:
                        case "chain":
                            present.chains[identity] = (value["hook"], value["prio"]) if "hook" in value else None
                        case "set" | "map":
                            key = value["type"] if isinstance(value["type"], list) else [value["type"]]
                            words = " . ".join(key) + (f" : {value['map']}" if kind == "map" else "")
                            present.sets[identity] = (words, "interval" in value.get("flags", []))
                        case "counter":
                            present.counters.add(identity)
        return present

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

    def _run(self, commands: str) -> None:
        before = self.generation()
        self._command(commands)
        after = self.generation()
        # If others have committed meanwhile, it cannot be told which generation is ours: none is claimed.
        if after == before + 1:
            self._own.append(after)

    def _command(self, commands: str) -> str:
        code, output, error = self._nft.cmd(commands)
        if code != 0:
            raise NftError(error.strip() or f"libnftables returned {code}")
        return str(output)

    def _list(self, command: str, *, terse: bool = False) -> list[dict[str, dict[str, Any]]]:
        """Run a listing in JSON, if ``terse`` without elements; what is not there lists nothing."""
        self._nft.set_json_output(True)
        self._nft.set_terse_output(terse)
        try:
            output = self._command(command)
        except NftError as error:
            if "No such file or directory" in str(error):
                return []
            raise
        finally:
            self._nft.set_json_output(False)
            self._nft.set_terse_output(False)
        entries: list[dict[str, dict[str, Any]]] = json.loads(output)["nftables"]
        return [entry for entry in entries if "metainfo" not in entry]
