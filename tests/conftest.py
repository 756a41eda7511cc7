"""Fixtures of all tests."""

from __future__ import annotations

import pytest

from enforcer.translate import rules


@pytest.fixture(params=["one chain a group", "parts"])
def group_chains(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolation groups in one chain each, and in parts from the second policy on."""
    if request.param == "parts":
        monkeypatch.setattr(rules, "FEW_POLICIES", 1)
