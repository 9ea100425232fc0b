"""The retrieval state of one request: what it has embedded, and what it still waits for.

It outlives preemption: embeddings depend on text alone, so a replay finds them ready.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from memlong_vllm.config import MemoryConfig
from memlong_vllm.retriever.index import ChunkIndex
from memlong_vllm.retriever.service import RetrieverService
from memlong_vllm.scheduler.events import NamedChunk
from memlong_vllm.scheduler.ledger import Found
from memlong_vllm.scheduler.named_memories import NamedIndex
from memlong_vllm.scheduler.segments import Retrieval, SegmentClock, Span


class SequenceRetriever:
    """Embeds a growing token sequence ahead of its retrievals and answers them.

    Args:
        prompt_len: tokens of the prompt.
        max_tokens: the longest the sequence can become, prompt included.
        namespace: embeddings are shared with requests of the same namespace only.
        reads_named: the request reads named memories.
        every_chunk: embed each complete chunk, also those that no retrieval needs yet.

    Attributes:
        named: the indexes of the named memories it reads, once they are open.
    """

    def __init__(
        self,
        request_id: str,
        prompt_len: int,
        max_tokens: int,
        config: MemoryConfig,
        service: RetrieverService,
        namespace: str = "",
        reads_named: bool = False,
        every_chunk: bool = False,
    ) -> None:
        self._request_id = request_id
        self._prompt_len = prompt_len
        self._max_tokens = max_tokens
        self._config = config
        self._service = service
        self._namespace = namespace
        self._every_chunk = every_chunk
        self._clock = SegmentClock(config, prompt_len, reads_named)
        self._index = ChunkIndex(service.dimension)
        self._vectors: dict[Span, np.ndarray] = {}
        self._submitted: set[Span] = set()
        self._num_seen = 0
        self._num_chunks = 0
        self.named: list[NamedIndex] = []

    def observe(self, token_ids: Sequence[int]) -> None:
        """Submit every span whose text is complete now and that a retrieval needs soon.

        Called again with the grown sequence. A retrieval's query ends before the first token that
        needs it is computed, so it is submitted a step ahead and embedded while the model runs;
        the chunks it can reach are submitted up to a segment ahead.
        """
        num_tokens, chunk_size = len(token_ids), self._config.chunk_size
        horizon = min(num_tokens + 1 + self._config.retrieval_stride, self._max_tokens)
        spans: set[Span] = set()
        num_chunks = num_tokens // chunk_size if self._every_chunk else 0
        for retrieval in self._clock.retrievals(self._num_seen, horizon):
            if retrieval.query[1] <= num_tokens:
                spans.add(retrieval.query)
            num_chunks = max(num_chunks, min(retrieval.num_reachable, num_tokens // chunk_size))
        spans |= {(c * chunk_size, (c + 1) * chunk_size) for c in range(self._num_chunks, num_chunks)}
        self._num_chunks = max(self._num_chunks, num_chunks)
        self._num_seen = num_tokens
        new = sorted(spans - self._submitted, key=lambda span: (span[1], span[0]))
        if new:
            self._submitted.update(new)
            jobs = {span: tuple(token_ids[span[0] : span[1]]) for span in new}
            self._service.submit(
                self._request_id, jobs, urgent=num_tokens > self._prompt_len, namespace=self._namespace
            )

    def is_ready(self, start: int, end: int) -> bool:
        """Whether every retrieval at positions in [start, end) can be answered now."""
        for retrieval in self._clock.retrievals(start, end):
            if not self._has(retrieval):
                self._collect()
                if not self._has(retrieval):
                    return False
        return True

    def search(self, retrieval: Retrieval, chunk_ids: list[int]) -> Found:
        """The ``top_k`` best of ``chunk_ids`` and all chunks of the named memories.

        Ties go to the earlier memory, then to the lower chunk; the own chunks come last.
        """
        query, top_k = self._vectors[retrieval.query], self._config.top_k
        found: Found = []
        for memory, index in enumerate(self.named):
            rows, scores = index.search(query[None], top_k)
            pairs = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
            found += [(NamedChunk(memory, row), score) for row, score in pairs if row >= 0]
        found += self._index.search(query, chunk_ids, top_k)
        if self.named:
            # Python's sort is stable and every part is in order of its ties already.
            found = sorted(found, key=lambda pair: -pair[1])[:top_k]
        return found

    @property
    def num_index_bytes(self) -> int:
        """Bytes of the embeddings that are searched, those of named memories included."""
        own = 4 * len(self._index) * self._service.dimension
        return own + sum(index.num_bytes for index in self.named)

    def wait_for_embeddings(self, num_chunks: int, timeout: float = 600.0) -> np.ndarray:
        """Embeddings of the first chunks of a sequence that has ended. Blocks; on any thread.

        Returns:
            [num_chunks, dimension] float32.

        Raises:
            RuntimeError: if they do not come within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        self._collect()
        while len(self._index) < num_chunks:
            if time.monotonic() > deadline or not self._service.is_serving(self._request_id):
                raise RuntimeError("the retriever did not embed all chunks")
            self._service.wait(0.1)
            self._collect()
        return self._index.vectors(num_chunks)

    def _has(self, retrieval: Retrieval) -> bool:
        return retrieval.query in self._vectors and len(self._index) >= retrieval.num_reachable

    def _collect(self) -> None:
        self._vectors.update(self._service.take_results(self._request_id))
        chunk_size = self._config.chunk_size
        while (span := (len(self._index) * chunk_size, (len(self._index) + 1) * chunk_size)) in self._vectors:
            self._index.append(self._vectors[span])
