"""Exact search among the chunks of one sequence, with FAISS."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

# FAISS sums inner products in an order that depends on where a vector lies, so equal vectors may
# score an ulp or so apart. Everything this close to the k-th score is compared again, exactly.
_SCORE_TOLERANCE = 1e-4
# So many more than are asked for come with them, and hardly ever leave out one that close.
_SPARE = 8


class ChunkIndex:
    """Chunk embeddings of one sequence. Row ``i`` is chunk ``i``; rows are never removed.

    Forgetting only narrows what :meth:`search` is asked to consider, so ids stay stable.

    Args:
        dimension: components of an embedding.
    """

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexFlatIP(dimension)
        self._empty: set[int] = set()

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def append(self, embedding: np.ndarray) -> None:
        """Add the next chunk's embedding, [dimension] float32, of length 1 or 0 (empty text)."""
        if not embedding.any():
            self._empty.add(len(self))
        self._index.add(embedding.reshape(1, -1))

    def vectors(self, count: int) -> np.ndarray:
        """The first ``count`` embeddings, [count, dimension] float32."""
        return self._index.reconstruct_n(0, count)

    def search(self, query: np.ndarray, chunk_ids: Sequence[int], k: int) -> list[tuple[int, float]]:
        """The ``k`` best of ``chunk_ids`` by inner product, ties to the lower id.

        Args:
            query: [dimension] float32.
            chunk_ids: eligible chunks, ascending; those with empty texts are never returned.

        Returns:
            (chunk id, score) from best to worst, at most ``k``.
        """
        empty = self._empty
        allowed = [chunk_id for chunk_id in chunk_ids if chunk_id not in empty] if empty else chunk_ids
        if not allowed:
            return []
        k = min(k, len(allowed))
        candidates = self._candidates(query.reshape(1, -1), allowed, k)
        vectors = self._index.reconstruct_batch(candidates)
        exact = (vectors.astype(np.float64) * query).sum(axis=1).astype(np.float32)
        best = sorted(zip((-exact).tolist(), candidates.tolist(), strict=True))[:k]
        return [(chunk_id, -score) for score, chunk_id in best]

    def _candidates(self, rows: np.ndarray, allowed: Sequence[int], k: int) -> np.ndarray:
        """Every chunk that may be among the ``k`` best, and some more. In the middle of a model's step nothing of
        this is in the processor's caches, so calls count more than what they compute.

        Args:
            rows: [1, dimension] float32.
        """
        parameters = self._restriction(allowed)
        scores, found = self._index.search(rows, min(k + _SPARE, len(allowed)), params=parameters)
        threshold = float(scores[0, k - 1]) - _SCORE_TOLERANCE
        if found.shape[1] == len(allowed) or scores[0, -1] < threshold:
            return found[0]
        _, _, within = self._index.range_search(rows, threshold, params=parameters)
        return within

    def _restriction(self, allowed: Sequence[int]) -> faiss.SearchParameters | None:
        """To some of the chunks, if not to all."""
        if len(allowed) == len(self):
            return None
        if allowed[-1] - allowed[0] + 1 == len(allowed):  # Nothing forgotten in between.
            selector: faiss.IDSelector = faiss.IDSelectorRange(allowed[0], allowed[-1] + 1)
        else:
            selector = faiss.IDSelectorBatch(np.asarray(allowed, dtype=np.int64))
        return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
