"""A secret of the node: what tenants must not be able to foresee is made with it."""

from __future__ import annotations

import os
from pathlib import Path

_FILE, _BYTES = "secret", 16


def secret(folder: Path) -> bytes:
    """The node's 16 random bytes, which are made at the first call and kept, readable for their owner alone.

    Raises:
        OSError: the folder cannot be read or written.
    """
    path = folder / _FILE
    if path.exists() and len(kept := path.read_bytes()) == _BYTES:
        return kept
    made = os.urandom(_BYTES)
    scratch = path.with_suffix(".tmp")
    scratch.unlink(missing_ok=True)
    scratch.touch(mode=0o600)
    scratch.write_bytes(made)
    scratch.replace(path)
    return made
