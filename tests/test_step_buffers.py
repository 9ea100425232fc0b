"""What a kernel finds in a step's buffers, which never move."""

from __future__ import annotations

import torch

from memlong_vllm.config import step_buffer_bytes
from memlong_vllm.plan import ReadSpan, SequencePlan
from memlong_vllm.worker.step_buffers import NUM_TOKENS
from memlong_vllm.worker.step_memory import StepMemory
from tests.buffer_watch import BUFFERS
from tests.test_working_set import begin, decoding, make_layers, make_memory

PREFILL = SequencePlan("p", 4, 10, (11,) * 4, (ReadSpan(5, 6, (1, 8), 2, 9), ReadSpan(6, 9, (2,), 4, 10)))


def addresses(memory: StepMemory) -> list[int]:
    return [getattr(memory.buffers, name).data_ptr() for name in BUFFERS]


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


def test_what_must_be_adapted_is_read_group_by_group() -> None:
    memory = make_memory(num_rows=4, layers=make_layers())
    begin(memory, decoding("a", 9, (3, 7), 1), PREFILL)
    read = [(spans.table.tolist(), stored.keys.clone(), stored.slots) for spans, stored in memory.stored(1)]
    assert [table for table, _, _ in read] == [[[4, 1, 2, 3, 0]], [[0, 1, 2, 0, 0]], [[1, 3, 1, 2, 0]]]
    assert memory.metadata is not None
    for group, (_, keys, slots) in zip(memory.metadata.groups, read[1:], strict=False):
        assert slots is None
        assert torch.equal(keys, memory.read(group.source, 1)[0])


def test_bytes_are_those_of_the_limits() -> None:
    assert make_memory(top_k=3).buffers.num_bytes == step_buffer_bytes(256, 3)
