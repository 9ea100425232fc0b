"""What is read of a step's chunks, from the working set or gathered, against the bank itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.config import MemoryConfig
from memlong_vllm.plan import ReadSpan, SequencePlan, StepPlan
from memlong_vllm.scheduler.ledger import Found, Ledger
from memlong_vllm.scheduler.segments import Retrieval
from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.step_metadata import ReadGroup, RowSource
from memlong_vllm.worker.transfer import RankHeads
from memlong_vllm.worker.working_set import KEPT_STEPS, DecodeRead, WorkingSet, decode_reads, runs
from tests.naive_memory import configs

HEADS, SIZE = 2, 3
ALL = HEADS * SIZE
NUM_LAYERS = 3
CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@dataclass
class Weights:
    """A layer's adapters, [ALL, width * 2 * ALL]."""

    memory_k_adapter: torch.Tensor
    memory_v_adapter: torch.Tensor


def identity() -> Weights:
    both = torch.eye(2 * ALL)
    return Weights(both[:ALL], both[ALL:])


def make_layers(seed: int = 0, device: torch.device = CPU, width: int = 1) -> list[Weights]:
    """The first is the identity. Whole numbers: what they make of the bank below is exact."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-3, 4, (NUM_LAYERS, 2, ALL, width * 2 * ALL), generator=generator).float()
    drawn[0] = torch.eye(2 * ALL, width * 2 * ALL).view(2, ALL, -1)
    return [Weights(*both) for both in drawn.to(device)]


def make_memory(
    num_slots: int = 12,
    chunk_size: int = 2,
    num_rows: int = 2,
    top_k: int = 2,
    staging_tokens: int = 8,
    device: torch.device = CPU,
    layers: Sequence[Weights] | None = None,
    num_adapted_chunks: int = 12,
) -> StepMemory:
    """Every number in its bank is another. ``layers``: with adapters."""
    bank = MemoryBank(num_slots, chunk_size, HEADS, SIZE, torch.float32, device)
    numbers = torch.arange(2 * bank.keys.numel(), dtype=torch.float32, device=device)
    bank.keys.copy_(numbers[: bank.keys.numel()].view_as(bank.keys))
    bank.values.copy_(numbers[bank.keys.numel() :].view_as(bank.keys))
    heads = RankHeads(0, 1, 0)
    adaptation = None if layers is None else Adaptation(layers, heads, staging_tokens, lambda mine: mine, chunk_size)
    return StepMemory(bank, num_rows, top_k, 256, staging_tokens, heads, adaptation, num_adapted_chunks)


def in_bank(bank: MemoryBank, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of the bank, [HEADS, tokens, SIZE], chunk by chunk."""
    keys, values = (torch.cat([kept[:, slot] for slot in slots], dim=1) for kept in (bank.keys, bank.values))
    return keys, values


def decoding(request_id: str, position: int, slots: tuple[int, ...], retrieval_id: int) -> SequencePlan:
    """One token, written to a slot that no test reads."""
    return SequencePlan(
        request_id, position, position + 1, (11,), (ReadSpan(position, position + 1, slots, 0, retrieval_id),)
    )


def begin(memory: StepMemory, *sequences: SequencePlan) -> tuple[ReadGroup, ...]:
    memory.stage(StepPlan(sequences))
    lengths = [sequence.end - sequence.start for sequence in sequences]
    memory.begin_step([sequence.request_id for sequence in sequences], np.cumsum([0, *lengths]))
    assert memory.metadata is not None
    return memory.metadata.groups


def adapted(
    weights: Weights, keys: torch.Tensor, values: torch.Tensor, chunk_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of [HEADS, tokens, SIZE]."""
    tokens = torch.cat((*keys, *values), dim=1)
    width = weights.memory_k_adapter.shape[1] // tokens.shape[1]
    rows = []
    for idx in range(len(tokens)):
        seen = [idx - back if back <= idx % chunk_size else None for back in range(width)]
        rows.append(torch.cat([torch.zeros(2 * ALL) if token is None else tokens[token].cpu() for token in seen]))
    stored = torch.stack(rows).to(tokens.device)
    both = stored @ weights.memory_k_adapter.T, stored @ weights.memory_v_adapter.T
    made = [torch.stack(tokens.split(SIZE, dim=1)) for tokens in both]
    return made[0], made[1]


def expect(
    memory: StepMemory, group: ReadGroup, *slots: tuple[int, ...], layers: Sequence[Weights | None] = (None,)
) -> None:
    """A group's spans read these slots, as each layer wants them."""
    for layer, weights in enumerate(layers):
        keys, values = memory.read(group.source, layer)
        assert keys.shape[0] == len(slots)
        for row, chunks in enumerate(slots):
            expected = in_bank(memory.bank, chunks)
            expected = expected if weights is None else adapted(weights, *expected)
            # Sums of fractions depend on their order.
            torch.testing.assert_close((keys[row], values[row]), expected, rtol=0, atol=0 if weights is None else 1e-4)


def counters(memory: StepMemory) -> tuple[int, int]:
    return memory.working_set.num_gathers, memory.working_set.num_reuses


def test_a_retrieval_is_gathered_once() -> None:
    memory = make_memory()
    for position in range(5):
        (group,) = begin(memory, decoding("a", position, (3, 7), 1))
        expect(memory, group, (3, 7))
        memory.end_step()
    (group,) = begin(memory, decoding("a", 5, (0, 4), 2))
    expect(memory, group, (0, 4))
    assert counters(memory) == (2, 4)


def test_equal_request_ids_do_not_make_equal_contents() -> None:
    """A request that was preempted, or another of the same name."""
    memory = make_memory()
    begin(memory, decoding("a", 9, (3, 7), 1))
    memory.end_step()
    (group,) = begin(memory, decoding("a", 9, (5, 6), 8))
    expect(memory, group, (5, 6))


def test_adjacent_rows_are_read_in_place_and_together() -> None:
    memory = make_memory(num_rows=4)
    groups = begin(memory, *(decoding(name, 9, (i, i + 4), i) for i, name in enumerate("abc")))
    assert [group.source for group in groups] == [RowSource(range(3), 2)]
    keys, _ = memory.read(groups[0].source, 0)
    assert keys.data_ptr() == memory.working_set.keys.data_ptr()
    expect(memory, groups[0], (0, 4), (1, 5), (2, 6))
    memory.end_step()
    without_b = begin(memory, decoding("c", 10, (2, 6), 2), decoding("a", 10, (0, 4), 0))
    assert [group.source for group in without_b] == [RowSource(range(1), 2), RowSource(range(2, 3), 2)]
    assert [group.token_idx.tolist() for group in without_b] == [[[1]], [[0]]]


def test_sets_of_fewer_chunks_are_read_apart() -> None:
    memory = make_memory(num_rows=3)
    groups = begin(memory, decoding("a", 9, (1, 2), 0), decoding("b", 9, (3,), 1), decoding("c", 9, (4, 5), 2))
    assert sorted(group.token_idx.flatten().tolist() for group in groups) == [[0], [1], [2]]
    for group in groups:
        expect(memory, group, {0: (1, 2), 1: (3,), 2: (4, 5)}[group.token_idx.item()])


def test_a_slot_written_in_the_step_is_not_read_before() -> None:
    memory = make_memory()
    writing = SequencePlan("b", 0, 2, (7,), ())
    (group,) = begin(memory, decoding("a", 9, (3, 7), 1), writing)
    assert counters(memory) == (0, 0)
    assert memory.metadata is not None
    new = -torch.ones(3, HEADS, SIZE)
    memory.bank.write(memory.metadata.token_places, new, new)
    expect(memory, group, (3, 7))


def test_sequences_without_a_row_are_gathered() -> None:
    memory = make_memory(num_rows=1, staging_tokens=4)
    groups = begin(memory, *(decoding(name, 9, (i, i + 4), i) for i, name in enumerate("abc")))
    assert [isinstance(group.source, RowSource) for group in groups] == [False, False, True]
    for group in groups:
        span = int(group.token_idx.item())
        expect(memory, group, (span, span + 4))


def reads(names: str, first_id: int = 0) -> list[DecodeRead]:
    return [DecodeRead(name, ReadSpan(0, 1, (0,), 0, first_id + i)) for i, name in enumerate(names)]


def working_set(num_rows: int) -> WorkingSet:
    return make_memory(num_rows=num_rows).working_set


def test_rows_go_to_the_step_first_then_by_last_use() -> None:
    rows = working_set(3)
    assert rows.prepare_rows(reads("abc")) == {"a": 0, "b": 1, "c": 2}
    assert rows.prepare_rows(reads("c", 2)) == {"c": 2}
    assert rows.prepare_rows(reads("b", 1)) == {"b": 1}
    assert rows.prepare_rows(reads("dabe", 10)) == {"d": 2, "a": 0, "b": 1}


def test_rows_of_requests_that_left_are_used_first() -> None:
    rows = working_set(4)
    rows.prepare_rows(reads("abc"))
    for _ in range(KEPT_STEPS + 1):
        rows.prepare_rows(reads("c", 2))
    assert rows.prepare_rows(reads("dc", 1)) == {"d": 0, "c": 2}


def test_decode_reads_are_of_one_token_that_is_all() -> None:
    prefill = SequencePlan("p", 4, 6, (1,), (ReadSpan(4, 5, (0,), 0, 1), ReadSpan(5, 6, (0,), 0, 2)))
    local = SequencePlan("l", 4, 5, (2,), ())
    plan = StepPlan((prefill, local, decoding("d", 9, (3,), 3)))
    assert [read.request_id for read in decode_reads(plan)] == ["d"]


@given(st.sets(st.integers(0, 20)), st.one_of(st.none(), st.integers(1, 4)))
def test_runs_are_the_numbers_cut_where_they_must_be(numbers: set[int], longest: int | None) -> None:
    found = runs(sorted(numbers), longest)
    assert [number for run in found for number in run] == sorted(numbers)
    for before, after in pairwise(found):
        assert before.stop < after.start or len(before) == longest
    assert all(longest is None or len(run) <= longest for run in found)


class Steps:
    """Sequences under a ledger; their K and V are random, the bank is the truth."""

    def __init__(
        self, config: MemoryConfig, memory: StepMemory, layers: Sequence[Weights | None], max_step: int, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.memory = memory
        self.layers = layers
        self.max_step = max_step
        self.ledger = Ledger(config, memory.bank.keys.shape[1], max_step)
        self.positions: dict[str, int] = {}
        self.retrievals: set[int] = set()
        self.num_reads = 0

    def arrive(self, request_id: str) -> None:
        """Also again, under an id that was used before."""
        if request_id not in self.positions:
            self.ledger.open(request_id, self.random.randint(1, 40))
            self.positions[request_id] = 0

    def leave(self, request_id: str) -> None:
        self.ledger.close(request_id)
        self.positions.pop(request_id, None)

    def search(self, retrieval: Retrieval, eligible: list[int]) -> Found:
        found = self.random.sample(eligible, min(len(eligible), self.ledger.config.top_k))
        return [(chunk_id, 1.0) for chunk_id in found]

    def step(self) -> None:
        self.ledger.free_retired()
        sequences = []
        for request_id in self.random.sample(sorted(self.positions), len(self.positions)):
            start = self.positions[request_id]
            end = min(80, start + self.random.choice([0, 1, 1, 1, self.random.randint(1, self.max_step)]))
            if self.ledger.slots_to_advance(request_id, end - start) > self.ledger.pool.num_available:
                continue  # The bank is full: it has to wait until another leaves.
            if end > start:
                sequences.append(self.ledger.advance(request_id, start, end, self.search).plan)
                self.positions[request_id] = end
        for read in decode_reads(StepPlan(tuple(sequences))):
            self.retrievals.add(read.span.retrieval_id)
            self.num_reads += 1
        groups = begin(self.memory, *sequences)
        assert self.memory.metadata is not None
        places = self.memory.metadata.token_places
        new = torch.rand(2, len(places), HEADS, SIZE).to(places.device)
        self.memory.bank.write(places, new[0], new[1])
        self._check(groups, sequences)
        self.memory.end_step()

    def _check(self, groups: tuple[ReadGroup, ...], sequences: list[SequencePlan]) -> None:
        """Every token that has memory is in one group, at its place, with its chunks as they are now."""
        tokens = [(sequence, token) for sequence in sequences for token in range(sequence.start, sequence.end)]
        seen = []
        for group in groups:
            slots = []
            for token_idx, positions in zip(group.token_idx, group.positions, strict=True):
                sequence, first = tokens[int(token_idx[0])]
                (span,) = (span for span in sequence.reads if span.start == first)
                assert [tokens[int(i)] for i in token_idx] == [(sequence, t) for t in range(span.start, span.end)]
                assert positions.tolist() == [token - span.origin for token in range(span.start, span.end)]
                slots.append(span.slots)
                seen += token_idx.tolist()
            expect(self.memory, group, *slots, layers=self.layers)
        with_memory = [
            i for i, (sequence, token) in enumerate(tokens) if any(s.start <= token < s.end for s in sequence.reads)
        ]
        assert sorted(seen) == with_memory


@pytest.mark.parametrize("device", DEVICES, ids=str)
@given(
    config=configs(),
    num_rows=st.integers(1, 8),
    spare_staging=st.integers(0, 20),
    with_adapters=st.booleans(),
    spare_chunks=st.integers(0, 20),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_random_steps_read_what_is_in_the_bank(
    device: torch.device,
    config: MemoryConfig,
    num_rows: int,
    spare_staging: int,
    with_adapters: bool,
    spare_chunks: int,
    seed: int,
) -> None:
    """Sequences come, stall, are preempted, finish, and their ids come again; rows may be too few,
    and steps read more chunks than are kept as adapters made them."""
    staging = config.top_k * config.chunk_size + spare_staging
    layers = make_layers(seed, device) if with_adapters else None
    kept = staging // config.chunk_size + spare_chunks
    memory = make_memory(60, config.chunk_size, num_rows, config.top_k, staging, device, layers, kept)
    steps = Steps(config, memory, layers or [None], max_step=9, seed=seed)
    for _ in range(50):
        if steps.random.random() < 0.6:
            steps.arrive(steps.random.choice("abcdef"))
        if steps.random.random() < 0.1:
            steps.leave(steps.random.choice("abcdef"))
        steps.step()
    num_gathers, num_reuses = counters(memory)
    assert num_gathers + num_reuses <= steps.num_reads
    if num_rows >= 6:
        assert num_gathers == len(steps.retrievals)
        assert num_gathers + num_reuses == steps.num_reads
