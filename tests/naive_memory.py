"""The memory of a sequence, stated token by token: what the ledger is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from memlong_vllm.config import MemoryConfig
from memlong_vllm.plan import SequencePlan
from memlong_vllm.scheduler.events import Event as LedgerEvent
from memlong_vllm.scheduler.events import Forgotten
from memlong_vllm.scheduler.ledger import Ledger, Search
from memlong_vllm.scheduler.segments import Retrieval

Span = tuple[int, int]
Score = Callable[[Span, int], int]
Event = tuple[object, ...]
Attended = tuple[tuple[int, ...], int | None]
"""Chunks a token attends to, ascending, and its local position (None: no memory)."""


@dataclass
class Run:
    """What became of a sequence: per token what it attended to, events, and counters at the end."""

    attended: list[Attended] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    counters: dict[int, int] = field(default_factory=dict)


@st.composite
def configs(draw: st.DrawFn) -> MemoryConfig:
    chunk, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return MemoryConfig(
        memory_layer=0,
        retrieval_layers=(0,),
        chunk_size=chunk,
        top_k=draw(st.integers(1, 4)),
        memory_size=chunk * draw(st.one_of(st.integers(1, 6), st.integers(10, 21))),
        local_window=chunk * draw(st.integers(stride, stride + 2)),
        retrieval_stride=chunk * stride,
        query_tokens=draw(st.integers(1, 7)),
        prompt_query_tokens=draw(st.none() | st.integers(1, 7)),
        query_scope=draw(st.sampled_from(["preceding", "current"])),
    )


def scorer(seed: int) -> Score:
    """Scores 0 to 3, so that ties are common; some or most chunks have an empty text: -1."""
    share_empty = random.Random(seed).choice((0.0, 0.15, 0.7))

    def score(query: Span, chunk_id: int) -> int:
        if random.Random(f"{seed} {chunk_id}").random() < share_empty:
            return -1
        return random.Random(f"{seed} {query} {chunk_id}").randrange(4)

    return score


def best(score: Score, query: Span, chunk_ids: list[int], top_k: int) -> list[int]:
    ranked = sorted((-score(query, c), c) for c in chunk_ids if score(query, c) >= 0)
    return [chunk_id for _, chunk_id in ranked[:top_k]]


@dataclass
class Text:
    """A sequence and all that must happen to it, computed one token at a time.

    Attributes:
        attended: per token, the chunks it attends to and its local position.
        events: ("retrieve", position, query, number eligible, chunk ids) of every retrieval that
            found some, and ("forget", position, chunk ids).
        counters: per number of tokens computed, the counter of every chunk held then.
    """

    config: MemoryConfig
    prompt_len: int
    length: int
    score: Score
    seed: int = 0
    attended: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    counters: list[dict[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        held: dict[int, int] = {}
        current: tuple[int, ...] = ()
        self.counters.append({})
        for token in range(self.length):
            for query in self._queries(token):
                current = self._retrieve(token, query, held)
            window_start = self._segment(token) + self.config.retrieval_stride - self.config.local_window
            self.attended.append((current, token - max(0, window_start) + 1))
            if (token + 1) % self.config.chunk_size == 0:
                self._store((token + 1) // self.config.chunk_size - 1, held)
            self.counters.append(dict(held))

    def _segment(self, token: int) -> int:
        return token - token % self.config.retrieval_stride

    def _queries(self, token: int) -> list[Span]:
        size, stride = self.config.query_tokens, self.config.retrieval_stride
        queries = []
        if token % stride == 0:
            is_own = self.config.query_scope == "current" and token + stride <= self.prompt_len
            queries.append((token, token + stride) if is_own else (max(0, token - size), token))
        if token == self.prompt_len - 1:
            asked = self.config.prompt_query_tokens or size
            queries.append((max(0, self.prompt_len - asked), self.prompt_len))
        return queries

    def _retrieve(self, token: int, query: Span, held: dict[int, int]) -> tuple[int, ...]:
        config, segment = self.config, self._segment(token)
        bound = segment + config.retrieval_stride - config.local_window
        eligible = [c for c in held if (c + 1) * config.chunk_size <= bound]
        found = best(self.score, query, eligible, config.top_k)
        for chunk_id in found:
            held[chunk_id] += 1
        if found:
            self.events.append(("retrieve", token, query, len(eligible), tuple(sorted(found))))
        return tuple(sorted(found))

    def _store(self, chunk_id: int, held: dict[int, int]) -> None:
        capacity = self.config.memory_size // self.config.chunk_size
        if len(held) + 1 > capacity:
            ids = sorted(held)
            tenth = len(ids) // 10
            gone = ids[:tenth]
            middle = sorted(ids[tenth : len(ids) - tenth], key=lambda c: (held[c], c))
            while len(ids) - len(gone) > capacity // 2:
                gone.append(middle.pop(0))
            for forgotten in gone:
                del held[forgotten]
            if gone:
                self.events.append(("forget", (chunk_id + 1) * self.config.chunk_size, tuple(sorted(gone))))
        held[chunk_id] = 0


class Bank:
    """What each slot holds: the text (by its seed) and the token of every place."""

    def __init__(self, num_slots: int, chunk_size: int) -> None:
        self.places: list[list[tuple[int, int]]] = [[(-1, 0)] * chunk_size for _ in range(num_slots)]
        self.chunk_size = chunk_size

    def write(self, plan: SequencePlan, seed: int) -> None:
        for token in range(plan.start, plan.end):
            slot = plan.write_slots[token // self.chunk_size - plan.start // self.chunk_size]
            self.places[slot][token % self.chunk_size] = seed, token

    def chunk_in(self, slot: int, seed: int) -> int:
        """The chunk of the text that fills the slot; fails unless it is all there."""
        first = self.places[slot][0][1]
        assert self.places[slot] == [(seed, first + offset) for offset in range(self.chunk_size)]
        assert first % self.chunk_size == 0
        return first // self.chunk_size

    def attended(self, plan: SequencePlan, seed: int) -> list[Attended]:
        """What each token of the plan attends to."""
        result: list[Attended] = [((), None)] * (plan.end - plan.start)
        cursor = plan.start
        for span in plan.reads:
            assert cursor <= span.start < span.end <= plan.end
            cursor = span.end
            chunk_ids = tuple(self.chunk_in(slot, seed) for slot in span.slots)
            for token in range(span.start, span.end):
                result[token - plan.start] = chunk_ids, token - span.origin
        return result


def searcher(text: Text) -> Search:
    def search(retrieval: Retrieval, chunk_ids: list[int]) -> list[tuple[int, float]]:
        found = best(text.score, retrieval.query, chunk_ids, text.config.top_k)
        return [(chunk_id, float(text.score(retrieval.query, chunk_id))) for chunk_id in found]

    return search


def as_plain(events: Sequence[LedgerEvent]) -> list[Event]:
    plain: list[Event] = []
    for event in events:
        if isinstance(event, Forgotten):
            plain.append(("forget", event.position, event.chunk_ids))
        elif event.chunk_ids:
            retrieval = event.retrieval
            plain.append(("retrieve", retrieval.position, retrieval.query, event.num_eligible, event.chunk_ids))
    return plain


def expected_attended(text: Text, start: int, end: int) -> list[Attended]:
    return [(ids, place if ids else None) for ids, place in text.attended[start:end]]


def counters_of(ledger: Ledger, request_id: str) -> dict[int, int]:
    return ledger._handles[request_id].counters.counts
