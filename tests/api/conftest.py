"""One API server for all tests here; each makes namespaces of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.controlplane import ControlPlane


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as started:
        yield started
