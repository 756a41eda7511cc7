"""A file that is being written or was just renamed is unsettled, and nothing stays so for ever."""

from __future__ import annotations

from enforcer.manifests.settling import HELD_SECONDS, Unsettled


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_file_that_is_written_is_unsettled_until_it_is_closed() -> None:
    unsettled = Unsettled(Clock())
    unsettled.written("a")
    assert "a" in unsettled
    assert unsettled.wait is None
    unsettled.settle("a")
    assert "a" not in unsettled


def test_a_renamed_file_is_awaited_for_its_time_and_no_longer() -> None:
    clock = Clock()
    unsettled = Unsettled(clock)
    unsettled.renamed("a", cookie=1)
    assert "a" in unsettled
    clock.now += HELD_SECONDS * 0.75
    unsettled.renamed("b", cookie=2)
    assert unsettled.expired() == set()
    assert unsettled.wait is not None
    assert 0 < unsettled.wait < HELD_SECONDS / 2
    clock.now += HELD_SECONDS / 2
    assert unsettled.wait == 0
    assert unsettled.expired() == {"a"}
    assert "a" not in unsettled
    assert "b" in unsettled


def test_a_file_that_took_another_manifests_name_is_awaited_no_longer() -> None:
    unsettled = Unsettled(Clock())
    unsettled.renamed("a", cookie=1)
    unsettled.renamed("b", cookie=2)
    assert unsettled.arrived(1) == {"a"}
    assert unsettled.arrived(3) == set()
    assert "b" in unsettled


def test_a_renamed_file_that_is_written_anew_waits_for_its_close_alone() -> None:
    clock = Clock()
    unsettled = Unsettled(clock)
    unsettled.renamed("a", cookie=1)
    unsettled.written("a")
    assert not unsettled.is_held("a")
    clock.now += 2 * HELD_SECONDS
    assert unsettled.expired() == set()
    assert "a" in unsettled


def test_a_later_rename_keeps_no_one_waiting_who_asked_before() -> None:
    clock = Clock()
    unsettled = Unsettled(clock)
    unsettled.renamed("a", cookie=1)
    asked = clock.now
    assert unsettled.any_renamed_by(asked)
    clock.now += HELD_SECONDS * 0.75
    unsettled.renamed("b", cookie=2)
    clock.now += HELD_SECONDS / 2
    unsettled.expired()
    assert not unsettled.any_renamed_by(asked)


def test_what_is_not_there_or_was_forgotten_is_settled() -> None:
    unsettled = Unsettled(Clock())
    unsettled.written("a")
    unsettled.written("b")
    unsettled.keep_written({"b"})
    assert "a" not in unsettled
    unsettled.renamed("c", cookie=1)
    unsettled.clear()
    assert not any(path in unsettled for path in "abc")
