"""The ledger against a plain token-by-token model of the same rules, under random operations.

The bank is imitated: every step's writes land in slots before its reads happen, as on a worker, so
a slot that is reused too early shows up as a read of the wrong chunk.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memlong_vllm.config import MemoryConfig
from memlong_vllm.plan import ReadSpan
from memlong_vllm.reference.retrieval import SequenceMemory
from memlong_vllm.retriever.index import ChunkIndex
from memlong_vllm.scheduler.ledger import Ledger, LedgerError, Search
from memlong_vllm.scheduler.segments import Retrieval
from tests.naive_memory import (
    Bank,
    Event,
    Run,
    Text,
    as_plain,
    configs,
    counters_of,
    expected_attended,
    scorer,
    searcher,
)


class LedgerMachine(RuleBasedStateMachine):
    """Sequences come, advance by arbitrary cuts, are preempted and replayed, and finish."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, Text] = {}
        self.events: dict[str, list[Event]] = {}
        self.positions: dict[str, int] = {}
        self.preempted: list[str] = []

    @initialize(config=configs(), max_step=st.integers(1, 12), num_slots=st.integers(8, 40))
    def make_ledger(self, config: MemoryConfig, max_step: int, num_slots: int) -> None:
        self.ledger = Ledger(config, num_slots, max_step)
        self.bank = Bank(num_slots, config.chunk_size)
        self.max_step = max_step

    @rule(prompt_len=st.integers(1, 60), answer_len=st.integers(0, 60), seed=st.integers(0, 1000))
    def arrive(self, prompt_len: int, answer_len: int, seed: int) -> None:
        request_id = f"r{len(self.texts)}"
        text = Text(self.ledger.config, prompt_len, prompt_len + answer_len, scorer(seed))
        self.texts[request_id] = text
        self._open(request_id)

    @precondition(lambda self: self.preempted)
    @rule()
    def resume(self) -> None:
        self._open(self.preempted.pop(0))

    def _open(self, request_id: str) -> None:
        text = self.texts[request_id]
        if not self.ledger.can_open(text.length):
            with pytest.raises(LedgerError):
                self.ledger.open(request_id, text.prompt_len, text.length)
            return
        self.ledger.open(request_id, text.prompt_len, text.length)
        self.bank.lives[request_id] += 1
        self.positions[request_id] = 0
        self.events[request_id] = []

    @precondition(lambda self: self.positions)
    @rule(data=st.data(), num_steps=st.integers(1, 6))
    def step(self, data: st.DataObject, num_steps: int) -> None:
        lengths = st.one_of(st.just(0), st.just(1), st.just(self.max_step), st.integers(0, self.max_step))
        for _ in range(num_steps):
            self._step({request_id: data.draw(lengths) for request_id in sorted(self.positions)})

    def _step(self, lengths: dict[str, int]) -> None:
        self.ledger.free_retired()
        plans = []
        for request_id, length in lengths.items():
            start = self.positions[request_id]
            end = min(self.texts[request_id].length, start + length)
            if end > start:
                plan, events = self.ledger.advance(request_id, start, end, searcher(self.texts[request_id]))
                plans.append(plan)
                self.events[request_id] += as_plain(events)
                self.positions[request_id] = end
        for plan in plans:
            self.bank.write(plan)
        for plan in plans:
            text = self.texts[plan.request_id]
            assert self.bank.attended(plan) == expected_attended(text, plan.start, plan.end)
            assert counters_of(self.ledger, plan.request_id) == text.counters[plan.end]

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.positions)))
        self._check_events(request_id)
        self._close(request_id)
        self.preempted.append(request_id)

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.positions)))
        self._check_events(request_id)
        self._close(request_id)

    def _check_events(self, request_id: str) -> None:
        """What happened up to here is what the text says, whatever the cuts and replays were."""
        position, expected = self.positions[request_id], self.texts[request_id].events
        # A forgetting happens when the token before its position has been computed.
        reached = [e for e in expected if e[1] < position or (e[0] == "forget" and e[1] == position)]
        assert self.events[request_id] == reached

    def _close(self, request_id: str) -> None:
        self.ledger.close(request_id)
        del self.positions[request_id]

    @precondition(lambda self: self.positions)
    @rule(data=st.data(), shift=st.integers(1, 5))
    def misuse(self, data: st.DataObject, shift: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.positions)))
        text, position = self.texts[request_id], self.positions[request_id]
        for start, end in ((position + shift, position + shift + 1), (position - shift, position + 1), (position,) * 2):
            with pytest.raises(LedgerError):
                self.ledger.advance(request_id, start, end, searcher(text))
        with pytest.raises(LedgerError):
            self.ledger.open(request_id, text.prompt_len, text.length)

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check()
            assert all(self.ledger.is_open(request_id) for request_id in self.positions)

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for request_id in sorted(self.positions):
            self._check_events(request_id)
            self._close(request_id)
        self.ledger.check()
        assert self.ledger.num_free_slots == self.ledger.num_slots


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


def make_config(**fields: object) -> MemoryConfig:
    base = {"memory_layer": 0, "retrieval_layers": (0,), "chunk_size": 2, "top_k": 2, "memory_size": 8}
    base |= {"local_window": 2, "retrieval_stride": 2, "query_tokens": 2}
    return MemoryConfig(**{**base, **fields})  # type: ignore[arg-type]


def run(config: MemoryConfig, prompt_len: int, borders: list[int], search: Search) -> Run:
    """A sequence alone in a bank that is just large enough, cut at ``borders``."""
    longest = max(end - start for start, end in pairwise(borders))
    needed = Ledger(config, 0, longest).num_slots_needed(borders[-1])
    ledger, bank = Ledger(config, needed, longest), Bank(needed, config.chunk_size)
    ledger.open("r", prompt_len, borders[-1])
    result = Run()
    for start, end in pairwise(borders):
        ledger.free_retired()
        plan, events = ledger.advance("r", start, end, search)
        bank.write(plan)
        result.attended += bank.attended(plan)
        result.events += as_plain(events)
        ledger.check()
    result.counters = counters_of(ledger, "r")
    return result


def run_text(text: Text, borders: list[int]) -> Run:
    return run(text.config, text.prompt_len, borders, searcher(text))


def expected_run(text: Text) -> Run:
    return Run(expected_attended(text, 0, text.length), text.events, text.counters[-1])


@st.composite
def cuts_of(draw: st.DrawFn, length: int) -> list[int]:
    """Borders of the steps of a sequence: anywhere, or equal steps from some token on."""
    if draw(st.booleans()):
        inner = draw(st.sets(st.integers(1, length), max_size=12))
    else:
        size = draw(st.integers(1, 7))
        inner = set(range(draw(st.integers(1, size)), length, size))
    return [0, *sorted({*inner, length})]


@settings(max_examples=200, deadline=None)
@given(st.data(), configs(), st.integers(1, 90), st.integers(1, 60), st.integers(0, 99))
def test_a_whole_run_is_independent_of_its_cuts(
    data: st.DataObject, config: MemoryConfig, length: int, prompt_len: int, seed: int
) -> None:
    text = Text(config, min(prompt_len, length), length, scorer(seed))
    borders = data.draw(cuts_of(length))
    for cut in (borders, [0, length], [*range(length + 1)]):
        assert run_text(text, cut) == expected_run(text)


def test_the_plain_model_forgets_and_retrieves() -> None:
    """The random tests above are worth something: their model does meet the interesting cases."""
    text = Text(make_config(), 30, 60, scorer(0))
    kinds = Counter(event[0] for event in text.events)
    assert kinds["forget"] > 5
    assert kinds["retrieve"] > 20
    assert max(max(held.values(), default=0) for held in text.counters) > 1


def first_always(retrieval: Retrieval, chunk_ids: list[int]) -> list[tuple[int, float]]:
    return [(chunk_id, 1.0) for chunk_id in chunk_ids[:2]]


def test_a_chunk_is_written_and_read_in_one_step() -> None:
    ledger = Ledger(make_config(), 8, 8)
    ledger.open("r", 100, 8)
    plan, _ = ledger.advance("r", 0, 6, first_always)
    first, second = ReadSpan(2, 4, plan.write_slots[:1], 1, 0), ReadSpan(4, 6, plan.write_slots[:2], 3, 1)
    assert plan.reads == (first, second)


def test_a_forgotten_slot_is_not_reused_while_the_set_in_use_reads_it() -> None:
    """One segment of three chunks: memory overflows while its set, retrieved before, lives on."""
    config = make_config(memory_size=4, local_window=6, retrieval_stride=6)
    text = Text(config, 100, 40, lambda query, chunk_id: 1)
    assert run_text(text, [*range(41)]) == expected_run(text)
    assert any(set(text.attended[t][0]) - set(text.counters[t]) for t in range(40)), "a set outlives its chunks"


def test_forgotten_slots_that_are_still_read_are_part_of_the_reservation() -> None:
    """Two chunks begun in a step, one held, and one forgotten that the long segment still reads."""
    config = make_config(memory_size=2, top_k=1, local_window=6, retrieval_stride=6)
    text = Text(config, 100, 40, lambda query, chunk_id: 1)
    assert run_text(text, [0, *range(1, 40, 2), 40]) == expected_run(text)


def test_open_refuses_what_does_not_fit() -> None:
    ledger = Ledger(make_config(), 8, 2)
    assert ledger.num_slots_needed(10) == 5
    ledger.open("a", 1, 10)
    assert not ledger.can_open(10)
    assert ledger.can_open(6)
    with pytest.raises(LedgerError, match="too few slots"):
        ledger.open("b", 1, 10)
    ledger.open("b", 1, 6)
    ledger.close("a")
    assert ledger.can_open(10)


def test_closing_twice_or_unknown_changes_nothing() -> None:
    ledger = Ledger(make_config(), 8, 4)
    ledger.open("r", 10, 8)
    ledger.advance("r", 0, 3, first_always)
    assert ledger.num_free_slots == 6
    ledger.close("r")
    ledger.close("r")
    ledger.close("unknown")
    assert ledger.num_free_slots == 8
    assert ledger.can_open(16)
    ledger.check()


def test_check_notices_a_lost_slot() -> None:
    ledger = Ledger(make_config(), 8, 4)
    ledger._free.pop()
    with pytest.raises(LedgerError, match="lost or are owned twice"):
        ledger.check()


# The reference's own memory, written independently, must agree with the ledger.


def embed(token_ids: list[int]) -> torch.Tensor:
    """Unit vectors of multiples of one half: products are exact, ties frequent. One text in eight
    is "empty"."""
    generator = random.Random(str(tuple(token_ids)))
    if generator.random() < 0.125:
        return torch.zeros(4)
    return torch.tensor([generator.choice((-0.5, 0.5)) for _ in range(4)])


def index_searcher(config: MemoryConfig, token_ids: list[int]) -> Search:
    index, size = ChunkIndex(4), config.chunk_size
    for first in range(0, len(token_ids) - size + 1, size):
        index.append(embed(token_ids[first : first + size]).numpy())

    def search(retrieval: Retrieval, chunk_ids: list[int]) -> list[tuple[int, float]]:
        query: np.ndarray = embed(token_ids[slice(*retrieval.query)]).numpy()
        return index.search(query, chunk_ids, config.top_k)

    return search


def reference_run(config: MemoryConfig, token_ids: list[int], prompt_len: int, borders: list[int]) -> Run:
    memory = SequenceMemory(config, embed, prompt_len)
    result = Run([((), None)] * len(token_ids))
    for start, end in pairwise(borders):
        for span in memory.extend(token_ids[start:end]):
            for token in range(span.start, span.end):
                result.attended[token] = span.chunk_ids, token - span.origin
    if len(token_ids) % config.chunk_size == 0:
        # The reference stores a chunk when the next token comes, the ledger when its last is planned.
        memory._store(len(token_ids) // config.chunk_size - 1)
    result.counters = memory.counts
    return result


@settings(max_examples=120, deadline=None)
@given(st.data(), configs(), st.integers(1, 70), st.integers(1, 60), st.integers(0, 999))
def test_reference_memory_agrees_with_the_ledger(
    data: st.DataObject, config: MemoryConfig, length: int, prompt_len: int, seed: int
) -> None:
    token_ids = [random.Random(f"{seed} {i}").randrange(3) for i in range(length)]
    prompt_len = min(prompt_len, length)
    ours = data.draw(st.sets(st.integers(1, length), max_size=6)) | {length}
    # The reference takes the prompt in one piece.
    theirs = data.draw(st.sets(st.integers(prompt_len, length), max_size=6)) | {prompt_len, length}
    expected = reference_run(config, token_ids, prompt_len, [0, *sorted(theirs)])
    actual = run(config, prompt_len, [0, *sorted(ours)], index_searcher(config, token_ids))
    assert (actual.attended, actual.counters) == (expected.attended, expected.counters)


def test_reference_memory_and_ledger_meet_forgetting_and_ties() -> None:
    config = make_config(memory_size=10, top_k=3)
    token_ids = [random.Random(i).randrange(3) for i in range(80)]
    expected = reference_run(config, token_ids, 41, [0, 41, 80])
    assert len(expected.counters) <= 5
    assert len({chunk_ids for chunk_ids, _ in expected.attended}) > 10
    actual = run(config, 41, [*range(81)], index_searcher(config, token_ids))
    assert (actual.attended, actual.counters) == (expected.attended, expected.counters)
