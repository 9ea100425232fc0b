"""What each retrieval layer makes of the stored keys and values, and how often it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memlong_vllm.plan import ReadSpan, SequencePlan
from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.step_metadata import RowSource, SlotSource
from memlong_vllm.worker.transfer import RankHeads
from tests.test_working_set import (
    HEADS,
    NUM_LAYERS,
    SIZE,
    adapted,
    begin,
    counters,
    decoding,
    expect,
    identity,
    in_bank,
    make_layers,
    make_memory,
)

# Of NUM_LAYERS one is the identity, which has nothing to compute.
CHANGING = NUM_LAYERS - 1


def num_adapted(memory: object) -> int:
    return memory.adaptation.num_adapted  # type: ignore[attr-defined]


def test_a_chunk_is_adapted_once_a_layer_whoever_retrieves_it() -> None:
    layers = make_layers()
    memory = make_memory(layers=layers)
    for position in range(5):
        (group,) = begin(memory, decoding("a", position, (3, 7), 1))
        assert isinstance(group.source, RowSource)
        expect(memory, group, (3, 7), layers=layers)
        memory.end_step()
    assert (counters(memory), num_adapted(memory)) == ((1, 4), 2 * CHANGING)
    (group,) = begin(memory, decoding("a", 5, (0, 7), 2))
    expect(memory, group, (0, 7), layers=layers)
    assert (counters(memory), num_adapted(memory)) == ((2, 4), 3 * CHANGING)
    memory.end_step()
    prefill = SequencePlan("p", 4, 6, (1,), (ReadSpan(4, 5, (0, 3), 0, 3), ReadSpan(5, 6, (7, 9), 0, 4)))
    for group in begin(memory, prefill, decoding("b", 8, (3, 9), 5)):
        slots = [(0, 3), (7, 9)] if isinstance(group.source, SlotSource) else [(3, 9)]
        expect(memory, group, *slots, layers=layers)
    assert num_adapted(memory) == 4 * CHANGING


def test_a_slot_that_is_written_again_is_adapted_again() -> None:
    layers = make_layers()
    memory = make_memory(layers=layers)
    begin(memory, decoding("a", 9, (3, 7), 1))
    memory.end_step()
    # A step that writes slot 3 and reads it, as one that computes several segments may.
    reads = (ReadSpan(6, 8, (3, 5), 0, 2),)
    (group,) = begin(memory, SequencePlan("p", 6, 8, (3,), reads))
    assert memory.metadata is not None
    new = -torch.ones(2, HEADS, SIZE)
    memory.bank.write(memory.metadata.token_places, new, new)
    expect(memory, group, (3, 5), layers=layers)
    memory.end_step()
    (group,) = begin(memory, decoding("b", 9, (3, 7), 3))
    expect(memory, group, (3, 7), layers=layers)
    assert num_adapted(memory) == 4 * CHANGING


def test_what_an_abandoned_step_did_not_adapt_is_adapted_later() -> None:
    layers = make_layers()
    memory = make_memory(layers=layers)
    prefill = SequencePlan("p", 4, 6, (1,), (ReadSpan(4, 6, (0, 3), 0, 1),))
    begin(memory, prefill)
    memory.abandon_step()
    (group,) = begin(memory, prefill)
    expect(memory, group, (0, 3), layers=layers)
    assert num_adapted(memory) == 2 * CHANGING


def test_what_was_asked_for_longest_ago_makes_room() -> None:
    layers = make_layers()
    memory = make_memory(layers=layers, staging_tokens=4, num_adapted_chunks=3)
    for step, (slots, made) in enumerate([((1, 2), 2), ((2, 3), 3), ((4, 2), 4), ((1, 2), 5), ((4, 1), 5)]):
        (group,) = begin(memory, decoding("a", step, slots, step))
        expect(memory, group, slots, layers=layers)
        memory.end_step()
        assert num_adapted(memory) == made * CHANGING


def test_fewer_chunks_than_staging_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="3 chunks are fewer than staging holds"):
        make_memory(layers=make_layers(), staging_tokens=8, num_adapted_chunks=3)


@pytest.mark.parametrize("staging_tokens", [4, 7, 8, 100])
@pytest.mark.parametrize("width", [1, 2])
def test_rows_are_filled_in_parts_that_staging_holds(staging_tokens: int, width: int) -> None:
    """Of sets of different sizes; chunks of 2 tokens, up to 2 a set, so 4 tokens hold one row."""
    layers = make_layers(width=width)
    memory = make_memory(num_rows=5, staging_tokens=staging_tokens, layers=layers)
    sets = {"a": (1, 2), "b": (3,), "c": (4, 5), "d": (6, 7), "e": (8,)}
    groups = begin(memory, *(decoding(name, 9, slots, i) for i, (name, slots) in enumerate(sets.items())))
    for group in groups:
        expect(memory, group, *(list(sets.values())[i] for i in group.token_idx.flatten()), layers=layers)
    assert num_adapted(memory) == 8 * CHANGING


@pytest.mark.parametrize(("num_adapted_chunks", "num_kept"), [(12, 2), (2, 1)])
def test_sequences_without_a_row_read_what_is_kept(num_adapted_chunks: int, num_kept: int) -> None:
    layers = make_layers()
    memory = make_memory(num_rows=1, staging_tokens=4, layers=layers, num_adapted_chunks=num_adapted_chunks)
    for position in (9, 10):
        groups = begin(memory, *(decoding(name, position, (i, i + 4), i) for i, name in enumerate("abc")))
        assert [isinstance(group.source, RowSource) for group in groups] == [False, False, True]
        assert sum(group.source.is_kept for group in groups if isinstance(group.source, SlotSource)) == num_kept
        for group in groups:
            span = int(group.token_idx.item())
            expect(memory, group, (span, span + 4), layers=layers)
        memory.end_step()
    assert counters(memory) == (1, 1)
    # A span that is adapted as it is read counts as one, each time.
    assert num_adapted(memory) == CHANGING * (6 if num_kept == 2 else 2 + 2 + 2 * 1)


def test_spans_of_prefill_are_gathered_as_adapted() -> None:
    layers = make_layers()
    memory = make_memory(staging_tokens=8, layers=layers)
    reads = (ReadSpan(4, 5, (0, 3), 0, 1), ReadSpan(5, 6, (2, 9), 0, 2))
    (group,) = begin(memory, SequencePlan("p", 4, 6, (1,), reads))
    expect(memory, group, (0, 3), (2, 9), layers=layers)
    keys, _ = memory.read(group.source, 1)
    assert keys.data_ptr() == memory.staging.buffers(2, 2)[0].data_ptr()


@pytest.mark.parametrize("staging_tokens", [6, 9, 100])
@pytest.mark.parametrize("width", [2, 3])
def test_tokens_adapted_in_place_see_those_before_them_as_stored(staging_tokens: int, width: int) -> None:
    """Chunks of 3 tokens: parts of 2 and more tokens begin within chunks."""
    layers = make_layers(width=width)
    memory = make_memory(chunk_size=3, staging_tokens=staging_tokens, layers=layers)
    (group,) = begin(memory, SequencePlan("p", 4, 6, (1,), (ReadSpan(4, 6, (0, 5), 0, 1),)))
    keys, values = memory.read(group.source, 1)
    assert keys.data_ptr() == memory.staging.buffers(1, 2)[0].data_ptr()
    expected = adapted(layers[1], *in_bank(memory.bank, (0, 5)), chunk_size=3)
    torch.testing.assert_close((keys[0], values[0]), expected, rtol=0, atol=1e-4)


def test_new_weights_make_the_rows_anew() -> None:
    layers = make_layers()
    before = make_layers()
    memory = make_memory(layers=layers)
    (group,) = begin(memory, decoding("a", 9, (3, 7), 1))
    memory.end_step()
    layers[:] = [*make_layers(seed=1)[1:], identity()]
    (group,) = begin(memory, decoding("a", 10, (3, 7), 1))
    expect(memory, group, (3, 7), layers=before)
    memory.end_step()
    memory.weights_changed()
    (group,) = begin(memory, decoding("a", 11, (3, 7), 1))
    expect(memory, group, (3, 7), layers=layers)
    assert (counters(memory), num_adapted(memory)) == ((2, 1), 4 * CHANGING)


def test_only_what_is_exactly_the_identity_is_skipped() -> None:
    layers = [identity() for _ in range(4)]
    layers[1].memory_k_adapter[0, 1] = 1e-30
    layers[2].memory_v_adapter[2, 2 + HEADS * SIZE] += 1e-6
    layers[3].memory_v_adapter[0] = float("nan")
    memory = make_memory(layers=layers)
    begin(memory, decoding("a", 9, (3, 7), 1))
    assert num_adapted(memory) == 3 * 2


def joining(num_ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """An all-gather of so many threads, each named by its rank."""
    barrier = threading.Barrier(num_ranks, timeout=60)
    given: dict[int, torch.Tensor] = {}

    def all_gather(mine: torch.Tensor) -> torch.Tensor:
        given[int(threading.current_thread().name)] = mine
        barrier.wait()
        joined = torch.cat([given[rank] for rank in range(num_ranks)], dim=-1)
        barrier.wait()
        return joined

    return all_gather


@pytest.mark.parametrize("max_tokens", [1, 6, 100])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_ranks_make_their_heads_of_all_ranks_heads(max_tokens: int, width: int) -> None:
    layers = make_layers(width=width)
    all_gather, heads_a_rank = joining(HEADS), 1
    stored = torch.arange(2.0 * 3 * HEADS * 4 * SIZE).view(2, 3, HEADS, 4, SIZE)
    made = torch.empty(NUM_LAYERS, *stored.shape)

    def run(rank: int) -> int:
        threading.current_thread().name = str(rank)
        mine = slice(rank, rank + heads_a_rank)
        adaptation = Adaptation(layers, RankHeads(rank, HEADS, rank), max_tokens, all_gather, 2)
        adaptation.prepare()
        for layer in range(NUM_LAYERS):
            keys, values = stored[:, :, mine].clone()
            adaptation.adapt(keys, values, layer)
            made[layer, :, :, mine] = torch.stack((keys, values))
        return adaptation.num_adapted

    with ThreadPoolExecutor(HEADS) as ranks:
        assert list(ranks.map(run, range(HEADS))) == [3 * CHANGING] * HEADS
    for layer, weights in enumerate(layers):
        for span in range(3):
            expected = adapted(weights, *stored[:, span])
            assert torch.equal(made[layer, :, span], torch.stack(expected))
