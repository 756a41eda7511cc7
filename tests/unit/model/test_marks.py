"""Epochs of the connection mark: no value comes again before the stamps of its group have been cleared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.model.marks import GROUPS, ConnectionMark, Epochs

MARKS = st.sampled_from(
    [ConnectionMark(), ConnectionMark(0x1F000000), ConnectionMark(0x0000FF00), ConnectionMark(0x3F)]
)


@settings(deadline=None)
@given(MARKS, st.lists(st.sampled_from(["advance", *GROUPS]), max_size=400))
def test_a_value_comes_again_only_after_its_group_was_cleared_since(
    mark: ConnectionMark, happenings: list[str | int]
) -> None:
    epochs = Epochs(mark)
    used: set[int] = set()
    for happening in happenings:
        before = epochs.current
        if happening == "advance":
            epochs.advance()
        elif happening in epochs.stale:
            used = {value for value in used if value // mark.epochs_in_group != happening}
            epochs.cleared(happening)
        if epochs.current not in {None, before}:
            assert epochs.current not in used
            used.add(epochs.current)


@settings(deadline=None)
@given(MARKS, st.integers(0, 500))
def test_stamps_lie_in_the_mask_and_tell_epoch_group_and_direction_apart(mark: ConnectionMark, number: int) -> None:
    epochs = Epochs(mark, clean=frozenset(GROUPS))
    for _ in range(1 + number % (3 * mark.epochs_in_group)):
        epochs.advance()
        for group in epochs.stale:
            epochs.cleared(group)
    assert epochs.current is not None
    egress, both = mark.egress_judged(epochs.current), mark.judged(epochs.current)
    assert egress | both | mark.mask == mark.mask
    assert egress & mark.epoch_mask == both & mark.epoch_mask == both != egress
    (group,) = (g for g in GROUPS if both & mark.group_mask == mark.group(g))
    assert egress & mark.group_mask == mark.group(group) != 0


def test_without_a_clean_group_there_is_no_epoch() -> None:
    epochs = Epochs(ConnectionMark())
    assert epochs.advance() is None
    assert (epochs.current, epochs.stale) == (None, GROUPS)
    epochs.cleared(2)
    assert epochs.advance() == 64
    assert set(epochs.stale) == {1, 3}
    for value in range(65, 96):
        assert epochs.advance() == value
    assert epochs.advance() is None
    assert epochs.stale == GROUPS


def test_epochs_go_on_group_after_group_as_long_as_each_is_cleared_in_time() -> None:
    epochs = Epochs(ConnectionMark(), clean=frozenset(GROUPS))
    seen = []
    for _ in range(300):
        seen.append(epochs.advance())
        for group in epochs.stale:
            epochs.cleared(group)
    assert seen[:2] == [32, 33]
    assert seen[95:98] == [127, 32, 33]
    assert None not in seen


@pytest.mark.parametrize("mask", [0, 1, 0x0F000000, 0xF0F00000, 1 << 32])
def test_a_mask_that_is_not_one_run_of_five_bits_is_refused(mask: int) -> None:
    with pytest.raises(ValueError, match="run of at least 5 bits"):
        ConnectionMark(mask)
