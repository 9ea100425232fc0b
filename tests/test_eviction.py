"""Which chunks a full memory forgets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.scheduler.eviction import choose_forgotten

fast = settings(max_examples=150, deadline=None)
Held = list[tuple[int, int]]


@st.composite
def full_memories(draw: st.DrawFn) -> Held:
    """As many chunks as the capacity, with ids that have gaps and counters that tie often."""
    count = draw(st.integers(1, 60))
    ids = sorted(draw(st.sets(st.integers(0, 200), min_size=count, max_size=count)))
    return [(chunk_id, draw(st.integers(0, 4))) for chunk_id in ids]


def test_ten_of_ten_lose_the_oldest_and_four_least_retrieved() -> None:
    counts = [9, 0, 5, 1, 5, 2, 5, 1, 5, 0]
    assert choose_forgotten(list(enumerate(counts)), 10) == [0, 1, 3, 5, 7]


def test_ties_go_to_the_older() -> None:
    assert choose_forgotten([(chunk_id, 3) for chunk_id in range(20)], 20) == [*range(10)]


def test_the_newest_tenth_stays_even_if_never_retrieved() -> None:
    counts = [1] * 18 + [0, 0]
    assert choose_forgotten(list(enumerate(counts)), 20) == [*range(10)]


def test_the_oldest_tenth_goes_even_if_retrieved_most() -> None:
    counts = [99, 99] + [1] * 8 + [0] * 8 + [0, 0]
    assert choose_forgotten(list(enumerate(counts)), 20) == [0, 1, *range(10, 18)]


def test_below_ten_chunks_nothing_is_oldest_or_protected() -> None:
    assert choose_forgotten([(0, 2), (1, 0), (2, 1)], 3) == [1, 2]


def test_odd_capacity_keeps_the_smaller_half() -> None:
    assert choose_forgotten([(chunk_id, 0) for chunk_id in range(5)], 5) == [0, 1, 2]


def test_capacity_one_keeps_nothing_of_the_old() -> None:
    assert choose_forgotten([(7, 100)], 1) == [7]
    assert choose_forgotten([], 1) == []


@pytest.mark.parametrize("count", [0, 1, 9])
def test_nothing_goes_while_there_is_room(count: int) -> None:
    assert choose_forgotten([(chunk_id, 0) for chunk_id in range(count)], 10) == []


@fast
@given(full_memories())
def test_exactly_half_the_capacity_is_left(held: Held) -> None:
    capacity = len(held)
    assert capacity - len(choose_forgotten(held, capacity)) == capacity // 2


@fast
@given(full_memories())
def test_oldest_tenth_goes_and_newest_tenth_stays(held: Held) -> None:
    ids = [chunk_id for chunk_id, _ in held]
    tenth = len(ids) // 10
    forgotten = choose_forgotten(held, len(ids))
    assert set(ids[:tenth]) <= set(forgotten)
    assert not set(ids[len(ids) - tenth :]) & set(forgotten)
    assert forgotten == sorted(set(forgotten))
    assert set(forgotten) <= set(ids)


@fast
@given(full_memories())
def test_whoever_goes_from_the_middle_ranks_below_whoever_stays(held: Held) -> None:
    tenth = len(held) // 10
    forgotten = set(choose_forgotten(held, len(held)))
    middle = [(count, chunk_id) for chunk_id, count in held[tenth : len(held) - tenth]]
    gone = [rank for rank in middle if rank[1] in forgotten]
    kept = [rank for rank in middle if rank[1] not in forgotten]
    assert gone
    assert not kept or max(gone) < min(kept)


@fast
@given(full_memories())
def test_the_choice_depends_on_the_order_of_ids_only(held: Held) -> None:
    shifted = [(3 * chunk_id + 5, count) for chunk_id, count in held]
    expected = [3 * chunk_id + 5 for chunk_id in choose_forgotten(held, len(held))]
    assert choose_forgotten(shifted, len(held)) == expected
