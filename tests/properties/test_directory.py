"""Whatever is done to a directory, in whatever order, the source's view equals a fresh scan's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.directory import View, pod, policy, replace

PATHS = ["a.yaml", "b.yml", "s/a.yaml", "s/t/b.yaml", "link.yaml", "d/a.yaml"]
DIRECTORIES = ["s", "s/t", "d"]
CONTENTS = [
    "",
    pod("x", uid="1"),
    pod("x", uid="2") + "---\n" + pod("y"),
    pod("y", uid="3") + "---\n" + policy("p") + "---\n" + pod("z"),
    policy("p", port=0),
    '{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "uid": "json"}}',
]

Step = Callable[[Path], None]


def write(path: str, text: str) -> Step:
    def step(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    return step


def swap(path: str, text: str) -> Step:
    def step(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        replace(root / path, text)

    return step


def remove(path: str) -> Step:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def move(source: str, target: str) -> Step:
    def step(root: Path) -> None:
        (root / source).rename(root / target)

    return step


def link(path: str, target: str) -> Step:
    return lambda root: (root / path).symlink_to(root / target)


def steps() -> st.SearchStrategy[Step]:
    files, anything = st.sampled_from(PATHS), st.sampled_from([*PATHS, *DIRECTORIES])
    contents = st.sampled_from(CONTENTS)
    return st.one_of(
        st.builds(write, files, contents),
        st.builds(swap, files, contents),
        st.builds(remove, anything),
        st.builds(move, anything, anything),
        st.builds(link, anything, anything),
    )


def tidy(root: Path) -> None:
    """Remove the links that lead nowhere: behind one, the last state stands."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a loop
            path.unlink()


def fresh(root: Path) -> View:
    view = View(root).started()
    view.source.stop()
    return view


@given(st.lists(st.lists(steps(), min_size=1, max_size=5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_operations_leaves_what_a_fresh_scan_finds(batches: list[list[Step]]) -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made, "manifests")
        root.mkdir()
        view = View(root).started()
        try:
            for batch in batches:
                for step in batch:
                    try:
                        step(root)
                    except OSError:
                        continue
                tidy(root)
                expected = fresh(root)
                # The watch alone brings it about; the rescan after it finds nothing more.
                view.until(lambda expected=expected: view.objects == expected.objects)  # type: ignore[misc]
                handed = len(view.batches)
                view.source.rescan()
                assert len(view.batches) == handed
                assert view.objects == expected.objects
        finally:
            view.source.stop()
