"""When a sequence retrieves and what it may reach, against a token-by-token statement of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.config import MemoryConfig
from memlong_vllm.scheduler.segments import Retrieval, SegmentClock

fast = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Case:
    config: MemoryConfig
    prompt_len: int
    num_tokens: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunk, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    config = MemoryConfig(
        memory_layer=0,
        retrieval_layers=(0,),
        chunk_size=chunk,
        memory_size=chunk * 4,
        local_window=chunk * draw(st.integers(stride, stride + 4)),
        retrieval_stride=chunk * stride,
        query_tokens=draw(st.integers(1, 9)),
        prompt_query_tokens=draw(st.none() | st.integers(1, 9)),
        query_scope=draw(st.sampled_from(["preceding", "current"])),
    )
    return Case(config, draw(st.integers(1, 50)), draw(st.integers(1, 60)))


def eligible_ids(config: MemoryConfig, segment: int) -> list[int]:
    """Chunks complete at ``segment`` and wholly outside the window of the segment's last token."""
    size, last_token = config.chunk_size, segment + config.retrieval_stride - 1
    first_in_window = last_token - config.local_window + 1
    tokens = range(segment)  # computed before the segment
    complete = [c for c in range(segment + 1) if all(t in tokens for t in range(c * size, (c + 1) * size))]
    return [c for c in complete if all(t < first_in_window for t in range(c * size, (c + 1) * size))]


def segment_query(case: Case, segment: int) -> tuple[int, int]:
    config, end = case.config, segment + case.config.retrieval_stride
    if config.query_scope == "current" and end <= case.prompt_len:
        return segment, end
    return max(segment - config.query_tokens, 0), segment


def expected_at(case: Case, token: int) -> list[Retrieval]:
    config = case.config
    segment = max(b for b in range(0, token + 1, config.retrieval_stride))
    num_eligible = len(eligible_ids(config, segment))
    if num_eligible == 0:
        return []
    origin = max(0, segment + config.retrieval_stride - config.local_window) - 1
    found = []
    if token == segment:
        found.append(Retrieval(token, "segment", segment_query(case, segment), num_eligible, origin))
    if token == case.prompt_len - 1:
        query = (max(0, case.prompt_len - (config.prompt_query_tokens or config.query_tokens)), case.prompt_len)
        found.append(Retrieval(token, "prompt_end", query, num_eligible, origin))
    return found


def all_retrievals(case: Case) -> list[Retrieval]:
    return list(SegmentClock(case.config, case.prompt_len).retrievals(0, case.num_tokens))


@fast
@given(cases())
def test_retrievals_are_those_of_a_statement_token_by_token(case: Case) -> None:
    expected = [retrieval for token in range(case.num_tokens) for retrieval in expected_at(case, token)]
    assert all_retrievals(case) == expected


@fast
@given(cases())
def test_reachable_chunks_are_the_first_ones(case: Case) -> None:
    for segment in range(0, case.num_tokens, case.config.retrieval_stride):
        eligible = eligible_ids(case.config, segment)
        assert eligible == list(range(len(eligible)))


@fast
@given(cases(), st.data())
def test_cuts_change_nothing(case: Case, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, case.num_tokens - 1)) if case.num_tokens > 1 else st.just(set()))
    borders = [0, *sorted(cuts), case.num_tokens]
    clock = SegmentClock(case.config, case.prompt_len)
    pieces = [r for start, end in pairwise(borders) for r in clock.retrievals(start, end)]
    assert pieces == all_retrievals(case)


@fast
@given(cases())
def test_retrieved_memory_lies_before_every_window_that_reads_it(case: Case) -> None:
    """No token has a chunk both in its window and in memory, and none sees its own future."""
    config = case.config
    for retrieval in all_retrievals(case):
        segment_end = (retrieval.position // config.retrieval_stride + 1) * config.retrieval_stride
        memory_end = retrieval.num_reachable * config.chunk_size
        assert memory_end <= max(0, segment_end - config.local_window)
        assert memory_end <= retrieval.position
        assert retrieval.position - retrieval.origin >= 1


@fast
@given(cases())
def test_preceding_queries_end_before_the_token_that_asks(case: Case) -> None:
    for retrieval in all_retrievals(case):
        is_peek = case.config.query_scope == "current" and retrieval.kind == "segment"
        if not is_peek:
            assert retrieval.query[1] <= retrieval.position + (retrieval.kind == "prompt_end")
        start, end = retrieval.query
        assert 0 <= start <= end
        asked = case.config.prompt_query_tokens or 0
        assert end - start <= max(case.config.query_tokens, asked, case.config.retrieval_stride)


def paper_like(**fields: object) -> MemoryConfig:
    base = {"memory_layer": 0, "retrieval_layers": (0,), "chunk_size": 4, "memory_size": 40, "local_window": 8}
    return MemoryConfig(**{**base, "retrieval_stride": 4, "query_tokens": 4, **fields})  # type: ignore[arg-type]


def test_with_stride_one_chunk_a_query_is_the_chunk_just_finished() -> None:
    found = list(SegmentClock(paper_like(), prompt_len=100).retrievals(0, 17))
    assert found == [
        Retrieval(8, "segment", (4, 8), num_reachable=1, origin=3),
        Retrieval(12, "segment", (8, 12), num_reachable=2, origin=7),
        Retrieval(16, "segment", (12, 16), num_reachable=3, origin=11),
    ]


def test_first_token_of_the_last_tokens_window_is_at_local_position_one() -> None:
    (found,) = SegmentClock(paper_like(), prompt_len=100).retrievals(12, 13)
    first_of_window = (12 + 4 - 1) - 8 + 1
    assert first_of_window - found.origin == 1


def test_prompt_end_asks_again_with_the_prompts_last_tokens() -> None:
    found = list(SegmentClock(paper_like(query_tokens=3), prompt_len=15).retrievals(12, 16))
    assert found == [
        Retrieval(12, "segment", (9, 12), num_reachable=2, origin=7),
        Retrieval(14, "prompt_end", (12, 15), num_reachable=2, origin=7),
    ]


def test_prompt_ending_on_a_segment_start_asks_twice_there() -> None:
    found = list(SegmentClock(paper_like(), prompt_len=13).retrievals(12, 16))
    assert [(r.position, r.kind, r.query) for r in found] == [(12, "segment", (8, 12)), (12, "prompt_end", (9, 13))]


@pytest.mark.parametrize(
    ("prompt_len", "query"),
    [(16, (12, 16)), (17, (12, 16)), (15, (8, 12))],
    ids=["segment ends the prompt", "segment within the prompt", "partial segment"],
)
def test_current_scope_needs_the_whole_segment_in_the_prompt(prompt_len: int, query: tuple[int, int]) -> None:
    clock = SegmentClock(paper_like(query_scope="current"), prompt_len)
    assert next(iter(clock.retrievals(12, 13))).query == query


def test_nothing_is_retrieved_while_everything_is_in_the_window() -> None:
    assert list(SegmentClock(paper_like(), prompt_len=8).retrievals(0, 8)) == []
