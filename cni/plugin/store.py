"""Addresses and attachments of this node, in one database under the run directory.

Every change is one transaction, so an agent that is killed leaves either the state before or the state after. A
*pending* attachment is one whose ADD was never answered; the next start undoes it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni.node.topology import gateway
from cni.plugin.protocol import ADDRESS_FAILURE, CniError
from enforcer.model.addresses import Address, Family, Network, family_of, format_address
from enforcer.model.objects import Attachment

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attachment (
    container_id TEXT NOT NULL, ifname TEXT NOT NULL, network TEXT NOT NULL, pod TEXT, uid TEXT NOT NULL,
    mac BLOB NOT NULL, port TEXT NOT NULL, config BLOB NOT NULL, environment TEXT NOT NULL,
    ready INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (container_id, ifname));
CREATE TABLE IF NOT EXISTS allocation (
    address BLOB PRIMARY KEY, container_id TEXT NOT NULL, ifname TEXT NOT NULL, place INTEGER NOT NULL,
    FOREIGN KEY (container_id, ifname) REFERENCES attachment ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS allocation_of ON allocation (container_id, ifname);
CREATE TABLE IF NOT EXISTS cursor (family INTEGER PRIMARY KEY, last BLOB NOT NULL);
"""

_ALL = "SELECT container_id, ifname, network, pod, uid, mac, port, config, environment, ready FROM attachment"
_ONE = _ALL + " WHERE container_id = ? AND ifname = ?"


@dataclass(frozen=True, slots=True)
class Record:
    """An attachment as it is kept: ``config`` and ``environment`` are what a delegated IPAM plugin is undone with."""

    attachment: Attachment
    network: str
    config: bytes
    environment: dict[str, str]
    ready: bool


class Store:
    """The database. Thread-safe; one process at a time.

    The journal is not synced to disk: the run directory is of one boot, as pods are, and a killed process loses no
    write that the kernel has taken.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA foreign_keys=ON;" + _SCHEMA)
        self._used = {bytes(row[0]) for row in self._db.execute("SELECT address FROM allocation")}
        self._last = {family: bytes(last) for family, last in self._db.execute("SELECT family, last FROM cursor")}

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def records(self) -> list[Record]:
        """All attachments, pending ones too."""
        with self._lock:
            return [self._read(row) for row in self._db.execute(_ALL).fetchall()]

    def record(self, container_id: str, ifname: str) -> Record | None:
        """One attachment."""
        with self._lock:
            row = self._db.execute(_ONE, (container_id, ifname)).fetchone()
            return self._read(row) if row else None

    def _read(self, row: tuple[Any, ...]) -> Record:
        container_id, ifname, network, pod, uid, mac, port, config, environment, ready = row
        query = "SELECT address FROM allocation WHERE container_id = ? AND ifname = ? ORDER BY place"
        addresses = tuple(bytes(found[0]) for found in self._db.execute(query, (container_id, ifname)))
        attachment = Attachment(container_id, ifname, pod, uid, addresses, bytes(mac), port)
        return Record(attachment, network, bytes(config), json.loads(environment), bool(ready))

    def reserve(self, record: Record, *, requested: Sequence[Address]) -> None:
        """Keep a pending attachment together with its addresses.

        The search for the next free address goes on after these, but for those that were ``requested``.

        Raises:
            CniError: one of the addresses belongs to another attachment.
        """
        attachment = record.attachment
        chosen = [address for address in attachment.addresses if address not in requested]
        with self._lock:
            row = self._db.execute("SELECT container_id FROM attachment WHERE mac = ?", (attachment.mac,)).fetchone()
            if row is not None:
                raise CniError(ADDRESS_FAILURE, f"{attachment.mac.hex(':')} is the hardware address of {row[0]}")
            taken = [address for address in attachment.addresses if address in self._used]
            if taken:
                raise CniError(ADDRESS_FAILURE, f"{format_address(taken[0])} is in use by another attachment")
            self._db.execute("BEGIN")
            try:
                self._db.execute(
                    "INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                    (
                        attachment.container_id,
                        attachment.ifname,
                        record.network,
                        attachment.pod,
                        attachment.uid,
                        attachment.mac,
                        attachment.host_interface,
                        record.config,
                        json.dumps(record.environment),
                    ),
                )
                for place, address in enumerate(attachment.addresses):
                    self._db.execute(
                        "INSERT INTO allocation VALUES (?, ?, ?, ?)",
                        (address, attachment.container_id, attachment.ifname, place),
                    )
                for address in chosen:
                    self._db.execute("INSERT OR REPLACE INTO cursor VALUES (?, ?)", (family_of(address).bits, address))
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._db.execute("ROLLBACK")
                raise CniError(ADDRESS_FAILURE, "the attachment cannot be kept", str(error)) from error
            self._used.update(attachment.addresses)
            self._last.update({family_of(address).bits: address for address in chosen})

    def confirm(self, attachment: Attachment) -> None:
        """Mark an attachment as ready: its ADD is about to be answered."""
        with self._lock:
            self._db.execute(
                "UPDATE attachment SET ready = 1 WHERE container_id = ? AND ifname = ?",
                (attachment.container_id, attachment.ifname),
            )

    def release(self, attachment: Attachment) -> None:
        """Forget an attachment and free its addresses."""
        with self._lock:
            self._db.execute(
                "DELETE FROM attachment WHERE container_id = ? AND ifname = ?",
                (attachment.container_id, attachment.ifname),
            )
            self._used.difference_update(attachment.addresses)

    def choose(self, networks: Sequence[Network], requested: Sequence[Address]) -> tuple[Address, ...]:
        """Choose free addresses: the requested ones, or one of each family of the node's pod networks.

        Next-fit: the search goes on after the address that was given last, so a freed one rests for as long as can be.

        Raises:
            CniError: a requested address cannot be given, or a network is full.
        """
        with self._lock:
            for address in requested:
                if not any(address in network and not _reserved(address, network) for network in networks):
                    known = ", ".join(map(str, networks)) or "none yet"
                    raise CniError(
                        ADDRESS_FAILURE,
                        f"{format_address(address)} cannot be given",
                        f"pod networks of this node: {known}",
                    )
                if address in self._used:
                    raise CniError(ADDRESS_FAILURE, f"{format_address(address)} is in use by another attachment")
            families = {family_of(address) for address in requested}
            chosen = list(requested)
            for family in Family:
                of_family = [network for network in networks if network.family is family]
                if of_family and family not in families:
                    chosen.append(self._next(of_family, family))
            return tuple(chosen)

    def _next(self, networks: Sequence[Network], family: Family) -> Address:
        # Every network once, from the address after the last one given round to that address again.
        spans = [(*network.interval, network) for network in networks]
        last = self._last.get(family.bits)
        for index, (first, end, network) in enumerate(spans):
            if last is not None and last in network:
                after = int.from_bytes(last, "big") + 1
                spans = [(after, end, network), *spans[index + 1 :], *spans[:index], (first, after - 1, network)]
                break
        for first, end, network in spans:
            # At most as many steps as addresses are in use, and the reserved ones.
            for value in range(first, end + 1):
                address = value.to_bytes(family.bits // 8, "big")
                if address not in self._used and not _reserved(address, network):
                    return address
        used = sum(1 for address in self._used if any(address in network for network in networks))
        raise CniError(
            ADDRESS_FAILURE,
            f"no free address in {', '.join(map(str, networks))}",
            f"{used} are in use; delete pods, or give the node a larger pod CIDR",
        )


def _reserved(address: Address, network: Network) -> bool:
    """Whether an address is the network's own, its gateway, or (IPv4) its broadcast address."""
    value = int.from_bytes(address, "big")
    first, last = network.interval
    if last - first <= 1:
        # One address is the gateway's; of two, the second is.
        return address == gateway(network)
    return value in {first, first + 1} or (network.family is Family.V4 and value == last)
