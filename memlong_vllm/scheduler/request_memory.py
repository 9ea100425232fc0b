"""Everything the scheduler keeps for one request beside vLLM's own state; outlives preemption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memlong_vllm.config import MemoryConfig
from memlong_vllm.request_settings import RequestSettings
from memlong_vllm.scheduler.prefix_cache import num_shareable_segments
from memlong_vllm.scheduler.prefix_tree import segment_keys
from memlong_vllm.scheduler.sequence_retriever import SequenceRetriever


@dataclass
class RequestMemory:
    """Settings and retrieval state of a request.

    Attributes:
        config: the server's memory settings with the request's own.
        keys: addresses of the segments it may share with others.
        held_since: when it began to wait for embeddings, or None.
    """

    settings: RequestSettings
    config: MemoryConfig
    retriever: SequenceRetriever
    keys: Sequence[bytes] = field(default=())
    held_since: float | None = None

    def address(self, request: Any, versions: tuple[str, ...] = ()) -> None:
        """Give the request's blocks and segments their addresses.

        What a request asked for changes what is computed above the memory layer, so it enters
        vLLM's block hashes as well, which are computed from ``cache_salt`` on.

        Args:
            request: vLLM's ``Request``.
            versions: of the named memories it reads.
        """
        salt = self.settings.salt(request.cache_salt, versions)
        if salt != request.cache_salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()
        num_segments = num_shareable_segments(self.config, request.num_prompt_tokens)
        self.keys = segment_keys(request.prompt_token_ids, self.config.retrieval_stride, num_segments, seed=repr(salt))
