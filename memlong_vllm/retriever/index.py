"""Exact search among the chunks of one sequence, with FAISS."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

# FAISS sums inner products in an order that depends on where a vector lies, so equal vectors may
# score an ulp or so apart. Everything this close to the k-th score is compared again, exactly.
_SCORE_TOLERANCE = 1e-4


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
        allowed = [chunk_id for chunk_id in chunk_ids if chunk_id not in self._empty]
        if not allowed:
            return []
        k = min(k, len(allowed))
        rows = query.reshape(1, -1)
        if allowed[-1] - allowed[0] + 1 == len(allowed):  # Nothing forgotten in between.
            selector: faiss.IDSelector = faiss.IDSelectorRange(allowed[0], allowed[-1] + 1)
        else:
            selector = faiss.IDSelectorBatch(np.asarray(allowed, dtype=np.int64))
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        scores, _ = self._index.search(rows, k, params=parameters)
        threshold = float(scores[0, -1]) - _SCORE_TOLERANCE
        _, _, candidates = self._index.range_search(rows, threshold, params=parameters)
        vectors = np.stack([self._index.reconstruct(int(chunk_id)) for chunk_id in candidates])
        exact = (vectors.astype(np.float64) * query).sum(axis=1).astype(np.float32)
        order = np.lexsort((candidates, -exact))[:k]
        return [(int(candidates[i]), float(exact[i])) for i in order]
