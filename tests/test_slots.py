"""Slots that are counted, kept after their last holder, and evicted when short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.scheduler.slots import Chunk, SlotError, SlotPool

OPERATIONS = ["new", "kept", "hold", "release", "clear"]


def kept(pool: SlotPool, lost: list[int], name: int) -> Chunk:
    chunk = pool.new()
    chunk.on_evict = lambda: lost.append(name)
    return chunk


def test_contents_without_a_use_leave_a_free_slot() -> None:
    pool = SlotPool(1)
    chunk = pool.new()
    pool.release(chunk)
    assert not chunk.is_resident
    assert (pool.num_available, pool.num_kept) == (1, 0)
    assert pool.new().slot == 0


def test_the_least_recently_used_is_evicted_first() -> None:
    pool, lost = SlotPool(3), list[int]()
    chunks = [kept(pool, lost, name) for name in range(3)]
    for chunk in chunks:
        pool.release(chunk)
    pool.hold(chunks[0])
    pool.release(chunks[0])
    new = pool.new()
    assert lost == [1]
    assert new.slot not in {chunks[0].slot, chunks[2].slot}
    pool.new()
    assert lost == [1, 2]
    assert chunks[0].is_resident


def test_what_is_held_is_never_evicted() -> None:
    pool, lost = SlotPool(2), list[int]()
    first, second = kept(pool, lost, 0), kept(pool, lost, 1)
    pool.hold(first)
    pool.release(first)
    pool.release(second)
    pool.new()
    assert lost == [1]
    with pytest.raises(SlotError, match="every slot"):
        pool.new()
    pool.clear()
    assert first.is_resident


def test_misuse_is_noticed() -> None:
    pool = SlotPool(1)
    chunk = kept(pool, [], 0)
    pool.release(chunk)
    with pytest.raises(SlotError, match="nobody"):
        pool.release(chunk)
    pool.clear()
    with pytest.raises(SlotError, match="evicted"):
        pool.hold(chunk)
    other = pool.new()
    with pytest.raises(SlotError, match="other holders"):
        pool.check([other, other])
    with pytest.raises(SlotError, match="lost"):
        pool.check([])
    pool.check([other])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 50)), max_size=60))
def test_a_plain_model_of_the_pool(operations: list[tuple[str, int]]) -> None:
    """Held slots never change hands; what is kept goes in the order of last use."""
    pool, size = SlotPool(4), 4
    held: list[Chunk] = []
    order: list[Chunk] = []  # Kept and not held, least recently used first.
    for operation, choice in operations:
        if operation in ("new", "kept"):
            if len(set(held)) == size:
                with pytest.raises(SlotError):
                    pool.new()
                continue
            num_free = size - len(set(held)) - len(order)
            expected_victim = order.pop(0) if num_free == 0 else None
            chunk = pool.new()
            assert expected_victim is None or not expected_victim.is_resident
            if operation == "kept":
                chunk.on_evict = lambda: None
            held.append(chunk)
        elif operation == "hold" and held + order:
            chunk = (held + order)[choice % len(held + order)]
            pool.hold(chunk)
            held.append(chunk)
            order = [other for other in order if other is not chunk]
        elif operation == "release" and held:
            chunk = held.pop(choice % len(held))
            pool.release(chunk)
            if chunk not in held and chunk.on_evict is not None:
                order.append(chunk)
        elif operation == "clear":
            pool.clear()
            order = []
        assert pool.num_kept == len(order)
        assert pool.num_available == size - len(set(held))
        pool.check(held)
