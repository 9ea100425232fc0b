"""What a kernel finds in a step's buffers, which never move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memlong_vllm.config import step_buffer_bytes
from memlong_vllm.plan import ReadSpan, SequencePlan
from memlong_vllm.worker.step_buffers import NUM_TOKENS, Spans, Stored
from memlong_vllm.worker.step_memory import StepMemory
from tests.buffer_watch import BUFFERS
from tests.test_working_set import adapted, begin, decoding, in_bank, make_layers, make_memory

PREFILL = SequencePlan("p", 4, 10, (11,) * 4, (ReadSpan(5, 6, (1, 8), 2, 9), ReadSpan(6, 9, (2,), 4, 10)))
OTHER = SequencePlan("q", 0, 5, (10,) * 3, (ReadSpan(0, 2, (5, 6), 2, 11), ReadSpan(2, 5, (9,), 4, 12)))
# By the row of a span's first token in a batch of one token, p and q.
SLOTS_OF = {2: (1, 8), 3: (2,), 7: (5, 6), 9: (9,)}


def addresses(memory: StepMemory) -> list[int]:
    return [getattr(memory.buffers, name).data_ptr() for name in BUFFERS]


def stored_copies(memory: StepMemory, layer: int) -> Iterator[tuple[Spans, Stored]]:
    """What a layer is given, each valid only before the next is asked for."""
    for spans, stored in memory.stored(layer):
        yield spans, Stored(stored.keys.clone(), stored.values.clone(), stored.slots)


def test_steps_of_any_shape_use_the_same_memory() -> None:
    memory = make_memory(num_rows=4)
    before = addresses(memory)
    for sequences in ([decoding("a", 9, (3, 7), 1), PREFILL], [decoding("b", 3, (4,), 2)], [PREFILL]):
        begin(memory, *sequences)
        assert memory.metadata is not None
        assert addresses(memory) == before
        assert memory.metadata.token_places.data_ptr() == memory.buffers.token_places.data_ptr()
        memory.end_step()


def test_the_table_tells_a_kernel_all_it_needs() -> None:
    """First entry, tokens, chunks, first slot and row; those in the bank come first."""
    memory = make_memory(num_rows=4)
    begin(memory, decoding("a", 9, (3, 7), 1), PREFILL)
    buffers = memory.buffers
    assert buffers.spans[:4].tolist() == [[0, 1, 2, 0, 0], [1, 3, 1, 2, 0], [4, 1, 2, 3, 0], [0] * 5]
    assert buffers.slots[:3].tolist() == [1, 8, 2]
    # The batch is a's token, then six of p from position 4 on.
    assert buffers.token_idx[:5].tolist() == [2, 3, 4, 5, 0]
    assert buffers.positions[:5].tolist() == [3, 2, 3, 4, 9]
    (in_rows, _), (in_bank, stored) = memory.stored(0)
    assert (in_rows.table.tolist(), in_rows.max_tokens) == ([[4, 1, 2, 3, 0]], 1)
    assert (in_bank.table.tolist(), in_bank.max_tokens) == ([[0, 1, 2, 0, 0], [1, 3, 1, 2, 0]], 3)
    assert stored.keys is memory.bank.keys


def test_spans_of_an_earlier_step_do_not_stay() -> None:
    memory = make_memory(num_rows=4)
    begin(memory, decoding("a", 9, (3, 7), 1), PREFILL)
    memory.end_step()
    begin(memory, decoding("a", 10, (3, 7), 1))
    assert memory.buffers.spans[:, NUM_TOKENS].tolist() == [1] + [0] * (len(memory.buffers.spans) - 1)


@pytest.mark.parametrize("num_adapted_chunks", [12, 4])
def test_what_is_adapted_is_read_where_it_is_kept(num_adapted_chunks: int) -> None:
    """All at once; if a step reads more than is kept, group by group, some of it copied out."""
    layers = make_layers()
    memory = make_memory(num_rows=4, layers=layers, num_adapted_chunks=num_adapted_chunks)
    begin(memory, decoding("a", 9, (3, 7), 1), PREFILL, OTHER)
    (in_rows, rows), *in_slots = stored_copies(memory, 1)
    assert (in_rows.table.tolist(), rows.slots) == ([[9, 1, 2, 6, 0]], None)
    if num_adapted_chunks == 12:
        assert [stored.slots is not None for _, stored in in_slots] == [True]
    else:
        assert {stored.slots is not None for _, stored in in_slots} == {True, False}
    read: dict[int, torch.Tensor] = {}
    for spans, stored in in_slots:
        for first_entry, _, num_chunks, first_slot, row in spans.table.tolist():
            token = int(spans.token_idx[first_entry])
            if stored.slots is None:
                read[token] = stored.keys[row]
            else:
                read[token] = stored.keys[:, stored.slots[first_slot:][:num_chunks]].flatten(1, 2)
    assert read.keys() == SLOTS_OF.keys()
    for token, keys in read.items():
        assert torch.equal(keys, adapted(layers[1], *in_bank(memory.bank, SLOTS_OF[token]))[0])


def test_bytes_are_those_of_the_limits() -> None:
    assert make_memory(top_k=3).buffers.num_bytes == step_buffer_bytes(256, 3)
