"""One manifest file: read when it changed, its last good state kept while it does not parse."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from enforcer.manifests import documents
from enforcer.model.changes import Rejection
from enforcer.model.objects import NetworkPolicy, Object

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 64 << 20

_SIGNATURE = struct.Struct("=QQqqq").pack


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """What stands for a file.

    ``signature`` tells whether the file is another than the one that was read (see ``signature``; empty: always).
    ``good`` is whether ``documents`` are of a content that parsed as a whole. ``errors`` are reasons against the
    content that the file has now, which begin with its path.
    """

    path: str
    signature: bytes
    documents: tuple[documents.Document, ...] = ()
    good: bool = False
    errors: tuple[str, ...] = ()

    @property
    def objects(self) -> list[Object]:
        """The objects in their order."""
        return [item for document in self.documents for item in document.decoded if not isinstance(item, Rejection)]

    def rejections(self) -> list[Rejection]:
        """What is not enforced as written: of the file, and of the objects in it."""
        found = [Rejection("File", "", self.path, error) for error in self.errors]
        for document in self.documents:
            for item in document.decoded:
                if isinstance(item, NetworkPolicy) and item.rejected is not None:
                    found.append(Rejection("NetworkPolicy", item.namespace, item.name, item.rejected))
                elif isinstance(item, Rejection) and item.kind:
                    found.append(item)
                elif isinstance(item, Rejection):
                    found.append(Rejection("File", "", self.path, f"{self.path}:{document.line}: {item.reason}"))
        return found


def signature(status: os.stat_result) -> bytes:
    """Device, inode, size, and both times in nanoseconds, packed.

    The change time is there for a file that is replaced with its modification time kept (``cp -p``), and for one that
    becomes readable.
    """
    return _SIGNATURE(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def load(root: Path, path: str, last: ManifestFile | None) -> ManifestFile | None:
    """Read ``root/path``.

    Args:
        root: the directory of the source.
        path: relative to ``root``, with slashes.
        last: what stood for the file before; documents that have not changed are taken from it.

    Returns:
        What stands for the file now: the last good state with an error, if it cannot be read or does not parse;
        None if there is no such file. A link that leads nowhere is a file that cannot be read.
    """
    last = last or ManifestFile(path, b"")
    try:
        mark, data = _read(root / path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not (root / path).is_symlink():
            return None
        return replace(last, signature=b"", errors=(f"{path}: cannot be read: {error.strerror or error}",))
    if data is None:
        return replace(
            last, signature=mark, errors=(f"{path}: is larger than {MAX_BYTES >> 20} MiB, or no regular file",)
        )
    parsed = documents.parse(
        data,
        path=path,
        is_json=path.endswith(".json"),
        known={document.digest: document.decoded for document in last.documents if document.error is None},
    )
    errors = tuple(f"{path}:{document.error[0]}: {document.error[1]}" for document in parsed if document.error)
    if errors and last.good:
        return replace(last, signature=mark, errors=errors)
    return ManifestFile(path, mark, tuple(parsed), not errors, errors)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    """The signature and the content of a file; no content if it is too large or no regular file."""
    # Without O_NONBLOCK, opening a FIFO waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - Path.open takes no descriptor
        status = os.fstat(descriptor)
        mark = signature(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return mark, None
        return mark, file.readall()
