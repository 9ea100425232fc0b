"""Indexes of named memories as the scheduler uses them: shared by readers, and not to be broken by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memlong_vllm.memories.index import CorpusIndex
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.request_settings import RequestSettings
from memlong_vllm.scheduler.named_memories import NamedIndex, NamedMemories, NamedUse
from memlong_vllm.scheduler.slots import SlotPool
from tests.memory_files import FORMAT, PLENTY, TAU, WAIT_S, Chunks, append


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        append(opened, "a", 1, 2, 3)
        yield opened


def wait_until_ready(memories: NamedMemories, use: NamedUse) -> None:
    deadline = time.monotonic() + WAIT_S
    while not memories.is_ready(use):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def no_embeddings() -> np.ndarray:
    raise AssertionError("nothing is written")


def test_a_reader_that_ends_does_not_take_the_index_from_another(library: MemoryLibrary) -> None:
    memories, settings = NamedMemories(lambda: library, SlotPool(8), TAU, 1), RequestSettings(memory_read=("a",))
    go = threading.Event()
    memories._builder.submit(go.wait, WAIT_S)  # The builder is busy with another memory's index.
    first, second = (memories.begin(settings, "default", 0) for _ in range(2))
    assert first is not None
    assert second is not None
    for use in (first, second):
        assert not memories.is_ready(use)
    library.flush(WAIT_S)  # Both memories are read.
    for use in (first, second):
        assert not memories.is_ready(use)
        assert use.indexes
    memories.end(first, None, no_embeddings)
    go.set()
    wait_until_ready(memories, second)
    (index,) = memories.indexes(second)
    query = Chunks((2,)).embeddings
    assert index.search(query / np.linalg.norm(query), 1)[0].shape == (1, 1)
    assert index.num_bytes == Chunks((1, 2, 3)).embeddings.nbytes
    memories.end(second, None, no_embeddings)


def test_a_trained_index_outlives_its_readers(library: MemoryLibrary) -> None:
    seeds = tuple(range(1, 101))
    append(library, "many", *seeds)
    library.set_index("default", "many", "HNSW4", {})
    memories, settings = NamedMemories(lambda: library, SlotPool(8), TAU, 1), RequestSettings(memory_read=("many",))
    first = memories.begin(settings, "default", 0)
    assert first is not None
    wait_until_ready(memories, first)
    (index,) = memories.indexes(first)
    assert not index.index.is_exact
    memories.end(first, None, no_embeddings)
    go = threading.Event()
    memories._builder.submit(go.wait, WAIT_S)  # Nothing can be built now.
    second = memories.begin(settings, "default", 0)
    assert second is not None
    wait_until_ready(memories, second)
    assert memories.indexes(second)[0].index is index.index
    memories.end(second, None, no_embeddings)
    # What was appended is another state, with an index of its own.
    append(library, "many", 101)
    third = memories.begin(settings, "default", 0)
    assert third is not None
    memories.is_ready(third)
    library.flush(WAIT_S)
    assert not memories.is_ready(third)
    go.set()
    wait_until_ready(memories, third)
    assert len(memories.indexes(third)[0].index) == 101
    memories.end(third, None, no_embeddings)


def test_a_search_that_fails_is_told_and_finds_nothing() -> None:
    """Polysemous search is for distances only; FAISS says so when it is asked."""
    vectors = np.random.default_rng(0).standard_normal((700, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    errors: list[Exception] = []
    index = NamedIndex(CorpusIndex(vectors, "PQ1x4", {"ht": 1}), errors.append)
    ids, scores = index.search(vectors[:2], 3)
    assert (ids == -1).all()
    assert np.isneginf(scores).all()
    assert len(errors) == 1
    assert NamedIndex(CorpusIndex(vectors, "PQ1x4"), errors.append).search(vectors[:2], 3)[0].min() >= 0
    assert len(errors) == 1
