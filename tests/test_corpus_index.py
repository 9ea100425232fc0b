"""The index of a corpus: exact against brute force in float64, approximate by its recall."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.memories.index import (
    CorpusIndex,
    IndexFactoryError,
    IndexFileError,
    build,
    least_to_train,
    validate_factory,
)

APPROXIMATE = [
    ("IVF64,Flat", {"nprobe": 16}),
    ("HNSW16", {"efSearch": 64}),
    ("IVF64,SQ8", {"nprobe": 16}),
    ("PCA24,IVF64,SQ8", {"nprobe": 32}),
]


def units(seed: int, count: int, dimension: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(seed: int, count: int, dimension: int = 32) -> np.ndarray:
    """Points around 100 centres, as texts gather around topics."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((100, dimension))
    rows = centres[generator.integers(0, 100, count)] + 0.35 * generator.standard_normal((count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute_force(query: np.ndarray, embeddings: np.ndarray, k: int) -> list[int]:
    scores = embeddings.astype(np.float64) @ query.astype(np.float64)
    with_text = np.flatnonzero(embeddings.any(axis=1))
    # Products of equal vectors are equal up to rounding in float64; different ones differ by more.
    return sorted(with_text.tolist(), key=lambda i: (-round(float(scores[i]), 12), i))[:k]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 150), st.integers(1, 40), st.sampled_from([3, 17, 64, 384]))
def test_exact_is_the_brute_force_with_repeats_and_empty_texts(seed: int, count: int, k: int, dimension: int) -> None:
    palette = np.concatenate([units(seed, 5, dimension), np.zeros((1, dimension), np.float32)])
    embeddings = palette[np.random.default_rng(seed + 1).integers(0, len(palette), count)]
    queries = np.concatenate([units(seed + 2, 3, dimension), palette[:1], -palette[:1]])
    ids, scores = CorpusIndex(embeddings).search(queries, k)
    assert ids.shape == scores.shape == (5, k)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    for query, row, row_scores in zip(queries, ids, scores, strict=True):
        expected = brute_force(query, embeddings, k)
        assert row.tolist() == expected + [-1] * (k - len(expected))
        products = embeddings[expected].astype(np.float64) @ query.astype(np.float64)
        assert row_scores[: len(expected)] == pytest.approx(products, abs=1e-7)
        assert np.isneginf(row_scores[len(expected) :]).all()


@pytest.mark.parametrize("count", [33, 3000, 20_000])
def test_exact_order_among_many(count: int) -> None:
    embeddings, queries = units(1, count, 48), units(2, 10, 48)
    ids, _ = CorpusIndex(embeddings).search(queries, 8)
    assert ids.tolist() == [brute_force(query, embeddings, 8) for query in queries]


@pytest.mark.parametrize("k", [1, 8, 40])
def test_more_ties_than_are_fetched_go_to_the_lowest_ids(k: int) -> None:
    """A boilerplate text that is everywhere in the corpus, in blocks and alone."""
    embeddings = units(3, 30_000, 16)
    copies = np.concatenate([np.arange(100, 12_000, 7), np.arange(17_000, 17_900)])
    embeddings[copies] = embeddings[100]
    ids, scores = CorpusIndex(embeddings).search(embeddings[100:101], k)
    assert ids[0].tolist() == copies[:k].tolist()
    assert len(set(scores[0].tolist())) == 1


def test_an_empty_query_takes_the_lowest_ids_with_text() -> None:
    embeddings = units(4, 20_000, 8)
    embeddings[[0, 2]] = 0
    ids, scores = CorpusIndex(embeddings).search(np.zeros((1, 8), np.float32), 3)
    assert ids.tolist() == [[1, 3, 4]]
    assert scores.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("embeddings", [np.zeros((0, 8), np.float32), np.zeros((5, 8), np.float32)])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW16"])
def test_nothing_to_find(embeddings: np.ndarray, factory: str) -> None:
    index = CorpusIndex(embeddings, factory)
    assert len(index) == len(embeddings)
    ids, scores = index.search(units(5, 2, 8), 3)
    assert ids.tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores).all()
    ids, _ = index.search(np.zeros((0, 8), np.float32), 3)
    assert ids.shape == (0, 3)


def test_a_memory_map_is_searched_in_place(tmp_path: Path) -> None:
    embeddings = units(6, 500, 16)
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    index = CorpusIndex(mapped)
    assert np.shares_memory(index._vectors, mapped)
    assert index.search(embeddings[:4], 1)[0].tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("factory", "parameters"), APPROXIMATE, ids=[factory for factory, _ in APPROXIMATE])
def test_approximate_recall_scores_and_order(factory: str, parameters: dict[str, int]) -> None:
    embeddings, queries = clustered(7, 12_000), clustered(8, 100)
    embeddings[::10] = 0
    index = CorpusIndex(embeddings, factory, parameters)
    assert not index.is_exact
    ids, scores = index.search(queries, 8)
    exact, _ = CorpusIndex(embeddings).search(queries, 8)
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids.tolist(), exact.tolist(), strict=True)])
    # Principal components leave something out, and how much depends on the linear algebra used.
    assert recall >= (0.6 if factory.startswith("PCA") else 0.9)
    assert (ids % 10 != 0).all(), "empty texts were returned"
    products = np.einsum("qkd,qd->qk", embeddings[ids].astype(np.float64), queries.astype(np.float64))
    assert scores == pytest.approx(products, abs=1e-7)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize(("factory", "parameters"), APPROXIMATE, ids=[factory for factory, _ in APPROXIMATE])
def test_building_again_gives_the_same_index(factory: str, parameters: dict[str, int], tmp_path: Path) -> None:
    embeddings = clustered(9, 12_000)
    for name in ("first", "second"):
        CorpusIndex(embeddings, factory, parameters).write(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize(("factory", "parameters"), [("Flat", {}), *APPROXIMATE])
def test_a_saved_index_finds_the_same(factory: str, parameters: dict[str, int], tmp_path: Path) -> None:
    embeddings, queries, path = clustered(10, 12_000), clustered(11, 50), tmp_path / "chunks.faiss"
    embeddings[5] = 0
    index = CorpusIndex(embeddings, factory, parameters)
    path.write_text("what was there before")
    index.write(path)
    assert list(tmp_path.iterdir()) == [path]
    again = CorpusIndex.read(path, embeddings)
    assert again.is_exact == index.is_exact
    for mine, theirs in zip(index.search(queries, 8), again.search(queries, 8), strict=True):
        assert (mine == theirs).all()


def test_a_saved_index_takes_other_parameters(tmp_path: Path) -> None:
    embeddings, queries, path = clustered(12, 12_000), clustered(13, 100), tmp_path / "chunks.faiss"
    CorpusIndex(embeddings, "IVF64,Flat", {"nprobe": 1}).write(path)
    exact = CorpusIndex(embeddings).search(queries, 8)[0]
    assert (CorpusIndex.read(path, embeddings).search(queries, 8)[0] != exact).any()
    assert (CorpusIndex.read(path, embeddings, {"nprobe": 64}).search(queries, 8)[0] == exact).all()
    with pytest.raises(IndexFactoryError, match="efSearch"):
        CorpusIndex.read(path, embeddings, {"efSearch": 64})


def test_a_file_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chunks.faiss"
    CorpusIndex(clustered(14, 3000), "IVF64,Flat").write(path)
    with pytest.raises(IndexFileError, match="holds 3000 vectors of 32 dimensions, but there are 2999"):
        CorpusIndex.read(path, clustered(14, 2999))
    CorpusIndex(units(15, 10, 8)).write(path)
    with pytest.raises(IndexFileError, match="8 dimensions"):
        CorpusIndex.read(path, units(15, 10, 16))
    path.write_bytes(b"no index")
    with pytest.raises(IndexFileError, match="FAISS"):
        CorpusIndex.read(path, units(15, 10, 8))
    with pytest.raises(IndexFileError, match="FAISS"):
        CorpusIndex.read(tmp_path / "missing", units(15, 10, 8))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"):
        CorpusIndex(units(16, 10, 8)).write(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("factory", "least"), [("Flat", 0), ("HNSW32", 0), ("IVF64,Flat", 2496), ("OPQ4_8,IVF64,PQ4", 9984), ("PQ4x4", 624)]
)
def test_too_few_vectors_are_searched_exactly(factory: str, least: int) -> None:
    assert least_to_train(factory, 32) == least
    if least:
        assert CorpusIndex(clustered(17, least - 1), factory).is_exact


@pytest.mark.parametrize(("factory", "least"), [("IVF64,Flat", 2496), ("PQ2x4", 624)])
def test_enough_vectors_are_not(factory: str, least: int) -> None:
    assert not CorpusIndex(clustered(17, least), factory).is_exact


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("IVF,Nonsense", {}, "'IVF,Nonsense' is not one of FAISS's"),
        ("", {}, "must be a FAISS factory string"),
        (None, {}, "must be a FAISS factory string"),
        ("IVF64,PQ7", {}, "'IVF64,PQ7'"),
        ("Flat", {"nprobe": 4}, "has no parameters"),
        ("IVF64,Flat", {"efSearch": 4}, "has no parameter 'efSearch'"),
        ("IVF64,Flat", {"nprobe": "many"}, "nprobe = 'many'"),
        ("IVF64,Flat", {"nprobe": 0}, "nprobe = 0"),
        ("IVF64,Flat", {"nprobe": True}, "nprobe = True"),
    ],
)
def test_what_faiss_does_not_take_is_refused_early(factory: str, parameters: dict[str, int], message: str) -> None:
    for use in (lambda: validate_factory(factory, parameters, 32), lambda: build(units(0, 5, 32), factory, parameters)):
        with pytest.raises(IndexFactoryError, match=message):
            use()


@pytest.mark.parametrize(
    ("queries", "k"),
    [(np.zeros(8, np.float32), 1), (np.zeros((1, 9), np.float32), 1), (np.zeros((1, 8), np.float32), 0)],
)
def test_searches_that_make_no_sense(queries: np.ndarray, k: int) -> None:
    with pytest.raises(ValueError, match="search needs"):
        CorpusIndex(units(18, 4, 8)).search(queries, k)


@pytest.mark.parametrize("embeddings", [np.zeros(8, np.float32), np.zeros((2, 8), np.float64)])
def test_embeddings_of_another_kind(embeddings: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float32"):
        CorpusIndex(embeddings)
