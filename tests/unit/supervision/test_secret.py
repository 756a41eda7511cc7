"""The secret of a node."""

from __future__ import annotations

from pathlib import Path

from enforcer.supervision.secret import secret


def test_a_secret_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    made = secret(tmp_path)
    assert len(made) == 16
    assert secret(tmp_path) == made
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    (other := tmp_path / "other").mkdir()
    assert secret(other) != made


def test_a_secret_that_was_cut_is_made_anew(tmp_path: Path) -> None:
    made = secret(tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(made[:3])
    assert len(secret(tmp_path)) == 16
