"""The retrieval state of one request: what it has embedded, and what it still waits for.

It outlives preemption: embeddings depend on text alone, so a replay finds them ready.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memlong_vllm.config import MemoryConfig
from memlong_vllm.retriever.index import ChunkIndex
from memlong_vllm.retriever.service import RetrieverService
from memlong_vllm.scheduler.segments import Retrieval, SegmentClock, Span


class SequenceRetriever:
    """Embeds a growing token sequence ahead of its retrievals and answers them.

    Args:
        prompt_len: tokens of the prompt.
        max_tokens: the longest the sequence can become, prompt included.
    """

    def __init__(
        self, request_id: str, prompt_len: int, max_tokens: int, config: MemoryConfig, service: RetrieverService
    ) -> None:
        self._request_id = request_id
        self._prompt_len = prompt_len
        self._max_tokens = max_tokens
        self._config = config
        self._service = service
        self._clock = SegmentClock(config, prompt_len)
        self._index = ChunkIndex(service.dimension)
        self._vectors: dict[Span, np.ndarray] = {}
        self._submitted: set[Span] = set()
        self._num_seen = 0
        self._num_chunks = 0

    def observe(self, token_ids: Sequence[int]) -> None:
        """Submit every span whose text is complete now and that a retrieval needs soon.

        Called again with the grown sequence. A retrieval's query ends before the first token that
        needs it is computed, so it is submitted a step ahead and embedded while the model runs;
        the chunks it can reach are submitted up to a segment ahead.
        """
        num_tokens, chunk_size = len(token_ids), self._config.chunk_size
        horizon = min(num_tokens + 1 + self._config.retrieval_stride, self._max_tokens)
        spans: set[Span] = set()
        for retrieval in self._clock.retrievals(self._num_seen, horizon):
            if retrieval.query[1] <= num_tokens:
                spans.add(retrieval.query)
            reachable = min(retrieval.num_reachable, num_tokens // chunk_size)
            spans |= {(c * chunk_size, (c + 1) * chunk_size) for c in range(self._num_chunks, reachable)}
            self._num_chunks = max(self._num_chunks, reachable)
        self._num_seen = num_tokens
        new = sorted(spans - self._submitted, key=lambda span: (span[1], span[0]))
        if new:
            self._submitted.update(new)
            jobs = {span: tuple(token_ids[span[0] : span[1]]) for span in new}
            self._service.submit(self._request_id, jobs, urgent=num_tokens > self._prompt_len)

    def is_ready(self, start: int, end: int) -> bool:
        """Whether every retrieval at positions in [start, end) can be answered now."""
        for retrieval in self._clock.retrievals(start, end):
            if not self._has(retrieval):
                self._collect()
                if not self._has(retrieval):
                    return False
        return True

    def search(self, retrieval: Retrieval, chunk_ids: list[int]) -> list[tuple[int, float]]:
        """The ``top_k`` best of ``chunk_ids``; see :class:`ChunkIndex`."""
        return self._index.search(self._vectors[retrieval.query], chunk_ids, self._config.top_k)

    def _has(self, retrieval: Retrieval) -> bool:
        return retrieval.query in self._vectors and len(self._index) >= retrieval.num_reachable

    def _collect(self) -> None:
        self._vectors.update(self._service.take_results(self._request_id))
        chunk_size = self._config.chunk_size
        while (span := (len(self._index) * chunk_size, (len(self._index) + 1) * chunk_size)) in self._vectors:
            self._index.append(self._vectors[span])
