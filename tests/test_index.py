"""The exact index of one sequence's chunks, against brute force in float64; and the retriever of a
sequence, which fills it ahead of time, against an index of everything."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.config import MemoryConfig
from memlong_vllm.retriever.index import ChunkIndex
from memlong_vllm.retriever.service import RetrieverService, Span
from memlong_vllm.scheduler.segments import SegmentClock
from memlong_vllm.scheduler.sequence_retriever import SequenceRetriever

Vectors = list[np.ndarray]


def random_units(seed: int, count: int, dimension: int) -> Vectors:
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return list((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def build(vectors: Vectors) -> ChunkIndex:
    index = ChunkIndex(len(vectors[0]))
    for vector in vectors:
        index.append(vector)
    return index


def brute_force(query: np.ndarray, vectors: Vectors, chunk_ids: list[int], k: int) -> list[int]:
    scores = {c: float(vectors[c].astype(np.float64) @ query.astype(np.float64)) for c in chunk_ids if vectors[c].any()}
    # Products of equal vectors are equal up to rounding in float64; different ones differ by more.
    return sorted(scores, key=lambda c: (-round(scores[c], 12), c))[:k]


def ids(found: list[tuple[int, float]]) -> list[int]:
    return [chunk_id for chunk_id, _ in found]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 9), st.sampled_from([3, 17, 64, 384]))
def test_the_best_of_any_eligible_subset(data: st.DataObject, seed: int, count: int, k: int, dimension: int) -> None:
    """A few distinct vectors in any order, so that most of them are repeated, and some zeros."""
    palette = [*random_units(seed, 4, dimension), np.zeros(dimension, np.float32)]
    vectors = [palette[i] for i in np.random.default_rng(seed + 1).integers(0, len(palette), count)]
    chunk_ids = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    (query,) = random_units(seed + 2, 1, dimension)
    assert ids(build(vectors).search(query, chunk_ids, k)) == brute_force(query, vectors, chunk_ids, k)


@pytest.mark.parametrize("dimension", [7, 64, 384, 1024])
@pytest.mark.parametrize("seed", range(5))
def test_distinct_vectors_in_the_order_of_their_exact_scores(seed: int, dimension: int) -> None:
    vectors = random_units(seed, 300, dimension)
    (query,) = random_units(seed + 100, 1, dimension)
    chunk_ids = list(range(0, 300, 3))
    exact = [float(vectors[c].astype(np.float64) @ query.astype(np.float64)) for c in chunk_ids]
    found = build(vectors).search(query, chunk_ids, 8)
    assert [score for _, score in found] == pytest.approx(sorted(exact, reverse=True)[:8], abs=1e-7)
    assert all(score == pytest.approx(exact[chunk_id // 3], abs=1e-7) for chunk_id, score in found)


@pytest.mark.parametrize("copies_at", [range(1, 200, 2), range(3, 200, 7), range(100, 200)])
def test_many_equal_vectors_go_by_id(copies_at: range) -> None:
    """FAISS adds up differently depending on a row's place; equal texts must tie all the same."""
    vectors = random_units(0, 200, 100)
    for chunk_id in copies_at:
        vectors[chunk_id] = vectors[copies_at[0]]
    query = vectors[copies_at[0]]
    assert ids(build(vectors).search(query, list(range(200)), 8)) == list(copies_at[:8])


@pytest.mark.parametrize("seed", range(4))
def test_more_near_ties_than_come_with_the_best(seed: int) -> None:
    """So near that FAISS, which adds up in float32, has them in another order than their exact scores."""
    generator = np.random.default_rng(seed)
    noise = (1e-8 * generator.standard_normal((60, 384))).astype(np.float32)
    noise[:, 0], noise[:, -1] = 0.6, -0.6
    (query,) = random_units(seed, 1, 384)
    query[0] = query[-1] = 0.6
    exact = (noise.astype(np.float64) * query).sum(axis=1)
    found = build(list(noise)).search(query, list(range(60)), 8)
    assert ids(found) == np.argsort(-exact)[:8].tolist()


@pytest.mark.parametrize(("k", "expected"), [(1, [4]), (2, [4, 1]), (3, [4, 1, 3]), (4, [4, 1, 3, 5])])
def test_ties_at_the_last_place_go_to_the_lower_id(k: int, expected: list[int]) -> None:
    best, tied = np.array([1, 0, 0], np.float32), np.array([0.6, 0.8, 0], np.float32)
    index = build([best, tied, best, tied, best, tied])
    assert ids(index.search(best, [1, 3, 4, 5], k)) == expected


def test_equal_vectors_have_equal_scores() -> None:
    (vector,), (query,) = random_units(3, 1, 384), random_units(4, 1, 384)
    found = build([vector] * 50).search(query, list(range(50)), 50)
    assert ids(found) == list(range(50))
    assert len({score for _, score in found}) == 1


@pytest.mark.parametrize("k", [1, 3, 100])
def test_empty_texts_are_never_returned(k: int) -> None:
    """Also where all others score below zero, as nothing does against a zero vector."""
    (vector,) = random_units(5, 1, 16)
    zero = np.zeros(16, np.float32)
    index = build([zero, vector, zero, -vector, zero])
    assert ids(index.search(-vector, [0, 1, 2, 4], k)) == [1]
    assert ids(index.search(vector, [0, 2, 3], k)) == [3]
    assert index.search(vector, [0, 2, 4], k) == []


def test_an_empty_query_takes_the_lowest_ids() -> None:
    vectors = random_units(6, 10, 8)
    found = build(vectors).search(np.zeros(8, np.float32), [2, 5, 7, 9], 2)
    assert found == [(2, 0.0), (5, 0.0)]


def test_k_larger_than_what_there_is() -> None:
    vectors = random_units(7, 5, 8)
    found = build(vectors).search(vectors[2], [0, 2, 4], 64)
    assert sorted(ids(found)) == [0, 2, 4]
    assert found[0] == (2, pytest.approx(1.0, abs=1e-6))


def test_nothing_eligible() -> None:
    assert build(random_units(8, 3, 8)).search(np.ones(8, np.float32), [], 4) == []


def test_length_counts_every_chunk() -> None:
    index = ChunkIndex(4)
    assert len(index) == 0
    index.append(np.zeros(4, np.float32))
    index.append(np.array([1, 0, 0, 0], np.float32))
    assert len(index) == 2
    assert index.search(np.array([1, 0, 0, 0], np.float32), [1], 1) == [(1, 1.0)]


# The retriever of a sequence: embeds what its retrievals will need while the sequence grows.

DEADLINE_S = 20.0


class RandomVectors:
    """A vector of its own for each text."""

    dimension = 8

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed(self, texts: list[str]) -> np.ndarray:
        self.texts += texts
        return np.stack([self.vector(text) for text in texts])

    @staticmethod
    def vector(text: str) -> np.ndarray:
        generator = random.Random(text)
        vector = np.array([generator.gauss() for _ in range(8)], np.float32)
        return vector / np.linalg.norm(vector) if text else vector * 0


def decode(token_ids: Sequence[int]) -> str:
    """Token 0 is special: it has no text."""
    return " ".join(str(token_id) for token_id in token_ids if token_id)


@pytest.fixture
def embedder() -> RandomVectors:
    return RandomVectors()


@pytest.fixture
def service(embedder: RandomVectors) -> Iterator[RetrieverService]:
    running = RetrieverService(embedder, decode, None, 4, 10_000)
    yield running
    running.shutdown()


def make_config(**fields: object) -> MemoryConfig:
    base = {"memory_layer": 0, "retrieval_layers": (0,), "chunk_size": 3, "top_k": 3, "memory_size": 30}
    base |= {"local_window": 6, "retrieval_stride": 3, "query_tokens": 4}
    return MemoryConfig(**{**base, **fields})  # type: ignore[arg-type]


CONFIGS = {
    "short segments": {},
    "long segments": {"retrieval_stride": 6, "query_tokens": 7},
    "own text": {"query_scope": "current", "retrieval_stride": 6, "local_window": 9},
    "wide window": {"local_window": 15},
}


def wait_until_ready(retriever: SequenceRetriever, service: RetrieverService, start: int, end: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not retriever.is_ready(start, end):
        assert time.monotonic() < deadline, "what a step needs was never submitted"
        # Returns when something finishes; the bound covers what finished just before the call.
        service.wait(0.05)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("prompt_len", [1, 8, 30, 59])
@pytest.mark.parametrize("step", [1, 4, 60])
def test_every_retrieval_is_answered_in_time(
    service: RetrieverService, fields: dict[str, object], prompt_len: int, step: int
) -> None:
    """The prompt in steps, then token by token: a step's tokens are known, later ones are not."""
    config, length = make_config(**fields), 60
    token_ids = [random.Random(f"{prompt_len} {i}").randrange(4) for i in range(length)]
    retriever = SequenceRetriever("r", prompt_len, length, config, service)
    everything = build([RandomVectors.vector(decode(token_ids[i : i + 3])) for i in range(0, length, 3)])
    clock, start = SegmentClock(config, prompt_len), 0
    while start < length:
        known = max(prompt_len, start + 1)
        end = min(known, start + step)
        retriever.observe(token_ids[:known])
        wait_until_ready(retriever, service, start, end)
        for retrieval in clock.retrievals(start, end):
            eligible = list(range(retrieval.num_reachable))
            query = RandomVectors.vector(decode(token_ids[slice(*retrieval.query)]))
            assert retriever.search(retrieval, eligible) == everything.search(query, eligible, config.top_k)
        start = end


def test_what_no_retrieval_reaches_is_not_embedded(service: RetrieverService, embedder: RandomVectors) -> None:
    config, token_ids = make_config(local_window=15), list(range(1, 31))
    # At most 15 tokens, all of them in the window of the last.
    short = SequenceRetriever("short", 10, 15, config, service)
    short.observe(token_ids[:15])
    assert short.is_ready(0, 15)
    long = SequenceRetriever("long", 30, 31, config, service)
    long.observe(token_ids)
    wait_until_ready(long, service, 0, 30)
    chunks = {decode(token_ids[i : i + 3]) for i in range(0, 30, 3)}
    # The segment that begins at 30 ends at 33: tokens before 18 are out of its window.
    assert chunks & set(embedder.texts) == {decode(token_ids[i : i + 3]) for i in range(0, 18, 3)}


class Handover:
    """In place of a service: hands over vectors when told to."""

    dimension = 8

    def __init__(self) -> None:
        self.submitted: list[Span] = []
        self.done: dict[Span, np.ndarray] = {}

    def submit(self, request_id: str, spans: dict[Span, tuple[int, ...]], urgent: bool, namespace: str) -> None:
        self.submitted += spans

    def take_results(self, request_id: str) -> dict[Span, np.ndarray]:
        done, self.done = self.done, {}
        return done

    def finish(self, span: Span) -> None:
        self.done[span] = RandomVectors.vector(str(span))


def test_it_is_ready_when_query_and_chunks_are() -> None:
    """In whatever order they come: an urgent query may be embedded before older chunks."""
    handover = Handover()
    retriever = SequenceRetriever("r", 100, 200, make_config(), handover)  # type: ignore[arg-type]
    retriever.observe(list(range(9)))
    assert handover.submitted == [(0, 3), (2, 6), (3, 6), (5, 9), (6, 9)]
    assert retriever.is_ready(0, 6)
    for span in ((5, 9), (3, 6)):
        handover.finish(span)
        assert not retriever.is_ready(9, 10)
    handover.finish((0, 3))
    assert not retriever.is_ready(6, 7)
    assert retriever.is_ready(9, 10)
    handover.finish((2, 6))
    assert retriever.is_ready(0, 12)
