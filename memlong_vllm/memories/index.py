"""Search among all chunks of a named memory, exact or approximate, with FAISS."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np

# FAISS sums inner products in float32. For vectors of length 1 it is off by less than this, so
# everything this close to the k-th score is compared again, in float64.
_SCORE_TOLERANCE = 1e-4
_OVERFETCH = 4
_LEAST_FETCHED = 32
_BLOCK_ROWS = 8192
_SEED = 0
# FAISS wants at least 39 vectors for each centroid that it trains; more than 64 change little.
_LEAST_A_CENTROID = 39
_TRAINED_A_CENTROID = 64
_LEAST_TRAINED = 65536
EXACT = "Flat"


class IndexFactoryError(ValueError):
    """A FAISS factory string or one of its parameters cannot be used."""


class IndexFileError(ValueError):
    """A file is not the index of these embeddings."""


class CorpusIndex:
    """The chunks of one corpus by their embeddings. Row ``i`` is chunk ``i``.

    Scores are inner products, computed in float64 from the embeddings themselves and rounded to
    float32, whatever FAISS kept of them; equal scores go to the lower id. With the factory
    ``"Flat"`` the result is exactly the best ``k``. With any other, FAISS proposes candidates
    (four times ``k``, at least 32), and the best of those are returned.

    An exact index keeps nothing beside the embeddings, which may be a memory map.

    Args:
        embeddings: [num_chunks, dimension] float32, rows of length 1, or 0 for empty texts, which
            are never returned. Not copied unless some are 0, and not to be changed.
        factory: a FAISS factory string such as ``"IVF4096,Flat"`` or ``"HNSW32"``. Where there are
            too few embeddings to train what it names (:func:`least_to_train`), the index is exact.
        parameters: of FAISS's ParameterSpace, for example ``{"nprobe": 64}``.

    Raises:
        IndexFactoryError: see :func:`validate_factory`.
        ValueError: if ``embeddings`` has another dtype or shape.
    """

    def __init__(
        self, embeddings: np.ndarray, factory: str = EXACT, parameters: Mapping[str, int] | None = None
    ) -> None:
        self._set_embeddings(embeddings)
        self._index = build(self._vectors, factory, parameters or {})

    def _set_embeddings(self, embeddings: np.ndarray) -> None:
        if embeddings.ndim != 2 or embeddings.dtype != np.float32:
            raise ValueError(f"embeddings must be [n, dim] float32, not {embeddings.shape} {embeddings.dtype}")
        filled = _rows_with_text(embeddings)
        # Searched are only rows with text; the ids of those are their places in _ids, if not the same.
        self._ids = None if filled.all() else np.flatnonzero(filled)
        self._vectors = np.ascontiguousarray(embeddings if self._ids is None else embeddings[self._ids])
        self._num_rows = embeddings.shape[0]

    def __len__(self) -> int:
        """Chunks, those with empty texts included."""
        return self._num_rows

    @property
    def dimension(self) -> int:
        return int(self._vectors.shape[1])

    @property
    def is_exact(self) -> bool:
        """Whether searches consider every chunk."""
        return self._index is None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` chunks of each query, from best to worst.

        Args:
            queries: [num_queries, dimension] float32, rows of length 1 or 0.

        Returns:
            Ids, [num_queries, k] int64, and scores, [num_queries, k] float32. Where there are
            fewer than ``k`` (or an approximate index found fewer), ids end in -1, scores in -inf.

        Raises:
            ValueError: if ``queries`` has another shape or ``k`` is not positive.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension or k < 1:
            wanted = f"[n, {self.dimension}] queries and a positive k"
            raise ValueError(f"search needs {wanted}, not queries of shape {queries.shape} and k = {k}")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        if len(queries) == 0 or len(self._vectors) == 0:
            return ids, scores
        for i, rows in enumerate(self._candidates(queries, k)):
            exact = self._exact_scores(queries[i], rows)
            order = np.lexsort((rows, -exact))[:k]
            ids[i, : len(order)] = rows[order] if self._ids is None else self._ids[rows[order]]
            scores[i, : len(order)] = exact[order]
        return ids, scores

    def _candidates(self, queries: np.ndarray, k: int) -> Iterator[np.ndarray]:
        """For each query, rows of ``_vectors`` among which the result is, in any order."""
        num_fetched = min(len(self._vectors), max(_OVERFETCH * k, _LEAST_FETCHED))
        if self._index is not None:
            _, found = self._index.search(queries, num_fetched)
            yield from (rows[rows >= 0] for rows in found)
            return
        scores, found = faiss.knn(queries, self._vectors, num_fetched, metric=faiss.METRIC_INNER_PRODUCT)
        for i, rows in enumerate(found):
            threshold = scores[i, min(k, num_fetched) - 1] - _SCORE_TOLERANCE
            if num_fetched == len(self._vectors) or scores[i, -1] < threshold:
                yield rows[scores[i] >= threshold]
            else:  # More are as good as the k-th than were fetched.
                yield self._rows_above(queries[i], float(threshold))

    def _rows_above(self, query: np.ndarray, threshold: float) -> np.ndarray:
        parts = []
        for first in range(0, len(self._vectors), _BLOCK_ROWS):
            scores = self._vectors[first : first + _BLOCK_ROWS] @ query
            parts.append(np.flatnonzero(scores >= threshold) + first)
        return np.concatenate(parts)

    def _exact_scores(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[len(rows)] float32. Summed row by row, so that equal vectors have equal scores."""
        scores = np.empty(len(rows), dtype=np.float32)
        for first in range(0, len(rows), _BLOCK_ROWS):
            part = slice(first, first + _BLOCK_ROWS)
            scores[part] = (self._vectors[rows[part]].astype(np.float64) * query).sum(axis=1)
        return scores

    def write(self, path: Path) -> None:
        """Save what was built, without the embeddings, in FAISS's format; ``path`` is replaced at once.

        The file is readable by its owner only, as most indexes hold the vectors in some form. An
        exact index is an empty flat one there, so its file is small.
        """
        index = faiss.IndexFlatIP(self.dimension) if self._index is None else self._index
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            faiss.write_index(index, name)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def read(cls, path: Path, embeddings: np.ndarray, parameters: Mapping[str, int] | None = None) -> CorpusIndex:
        """The index that :meth:`write` saved.

        Args:
            embeddings: those it was built from.
            parameters: in place of those it was written with; without effect on an exact index.

        Raises:
            IndexFileError: if the file cannot be read or belongs to other embeddings. Told by
                their number and dimension only: other values of the same shape go unnoticed.
            IndexFactoryError: if a parameter does not exist.
        """
        try:
            stored = faiss.read_index(str(path))
        except RuntimeError as error:
            raise IndexFileError(f"{path} is no index that FAISS can read: {error}") from error
        index = cls.__new__(cls)
        index._set_embeddings(embeddings)
        index._index = None if isinstance(stored, faiss.IndexFlatIP) and stored.ntotal == 0 else stored
        held = len(index._vectors) if index._index is None else stored.ntotal
        if (stored.d, held) != (index.dimension, len(index._vectors)):
            mine = f"{len(index._vectors)} embeddings with text of {index.dimension} dimensions"
            raise IndexFileError(f"{path} holds {held} vectors of {stored.d} dimensions, but there are {mine}")
        if index._index is not None:
            _apply_parameters(stored, "the stored index", parameters or {})
        return index


def validate_factory(factory: str, parameters: Mapping[str, int], dimension: int) -> None:
    """Check a factory string and parameters before there is anything to index.

    Raises:
        IndexFactoryError: if FAISS does not parse ``factory`` for inner products of this dimension,
            or the index it names has no such parameter.
    """
    if not isinstance(factory, str) or not factory:
        raise IndexFactoryError(f"index factory {factory!r} must be a FAISS factory string such as {EXACT!r}")
    if factory == EXACT:
        if parameters:
            raise IndexFactoryError(f"an exact index ({EXACT!r}) has no parameters, but got {dict(parameters)}")
        return
    _apply_parameters(_empty_index(factory, dimension), factory, parameters)


def least_to_train(factory: str, dimension: int) -> int:
    """Vectors below which :func:`build` makes an exact index: 39, FAISS's own minimum, for each
    centroid of the largest set that the factory's index trains.

    Raises:
        IndexFactoryError: if FAISS does not parse ``factory``.
    """
    return _LEAST_A_CENTROID * _num_centroids(factory, dimension)


def build(vectors: np.ndarray, factory: str, parameters: Mapping[str, int]) -> faiss.Index | None:
    """Train and fill an index for inner products; the same vectors give the same index.

    Training sees a fixed sample. Graphs are built on one thread, because their links depend on
    the order of insertions.

    Args:
        vectors: [n, dimension] float32, C-contiguous.

    Returns:
        The index, its parameters set; None for an exact search: ``factory`` is ``"Flat"`` or ``n``
        is less than :func:`least_to_train`.

    Raises:
        IndexFactoryError: see :func:`validate_factory`; or if FAISS cannot train with so few vectors.
    """
    dimension = vectors.shape[1]
    validate_factory(factory, parameters, dimension)
    if factory == EXACT or len(vectors) < max(1, least_to_train(factory, dimension)):
        return None
    index = _empty_index(factory, dimension)
    sample = _training_sample(vectors, _num_centroids(factory, dimension))
    try:
        with _threads(1 if "HNSW" in factory or "NSG" in factory else None):
            index.train(sample)
            index.add(vectors)
    except RuntimeError as error:
        have = f"have {len(vectors)} vectors, of which {len(sample)} train it"
        raise IndexFactoryError(f"index factory {factory!r} cannot be built: {have}: {error}") from error
    _apply_parameters(index, factory, parameters)
    return index


def _empty_index(factory: str, dimension: int) -> faiss.Index:
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise IndexFactoryError(f"index factory {factory!r} is not one of FAISS's for {dimension}: {error}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise IndexFactoryError(f"index factory {factory!r} does not search by inner product")
    return index


def _apply_parameters(index: faiss.Index, factory: str, parameters: Mapping[str, int]) -> None:
    space = faiss.ParameterSpace()
    for name, value in parameters.items():
        if type(value) is not int or value < 1:
            raise IndexFactoryError(f"parameter {name} = {value!r} of index factory {factory!r} must be a positive int")
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError as error:
            raise IndexFactoryError(f"index factory {factory!r} has no parameter {name!r}: {error}") from error


def _num_centroids(factory: str, dimension: int) -> int:
    """Of the largest set that training makes: lists of an IVF, codes of a product quantizer."""
    ivf = faiss.try_extract_index_ivf(_empty_index(factory, dimension))
    lists = 0 if ivf is None else int(ivf.nlist)
    codes = [1 << int(bits or 8) for bits in re.findall(r"PQ\d+(?:_\d+)?(?:x(\d+))?", factory)]
    return max([lists, *codes])


def _training_sample(vectors: np.ndarray, num_centroids: int) -> np.ndarray:
    size = max(_LEAST_TRAINED, _TRAINED_A_CENTROID * num_centroids)
    if len(vectors) <= size:
        return vectors
    rows = np.random.default_rng(_SEED).choice(len(vectors), size, replace=False)
    return vectors[np.sort(rows)]


def _rows_with_text(embeddings: np.ndarray) -> np.ndarray:
    """[len(embeddings)] bool."""
    parts = [embeddings[i : i + _BLOCK_ROWS].any(axis=1) for i in range(0, len(embeddings), _BLOCK_ROWS)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """FAISS's threads for what this thread calls, None to leave them."""
    before = faiss.omp_get_max_threads()
    if number is not None:
        faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
