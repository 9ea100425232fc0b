"""Everything the scheduler keeps for one request beside vLLM's own state; outlives preemption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memlong_vllm.config import MemoryConfig
from memlong_vllm.request_settings import RequestSettings
from memlong_vllm.scheduler.named_memories import NamedUse
from memlong_vllm.scheduler.prefix_cache import num_shareable_segments
from memlong_vllm.scheduler.prefix_tree import segment_keys
from memlong_vllm.scheduler.sequence_retriever import SequenceRetriever


@dataclass
class RequestMemory:
    """Settings and retrieval state of a request.

    Attributes:
        config: the server's memory settings with the request's own.
        named: what it has to do with named memories, if anything.
        keys: addresses of the segments it may share with others.
        is_addressed: whether these are known. They depend on the memories it reads.
        held_since: when it began to wait for embeddings, or None.
        waits_at: while it waits to be admitted, the first token it would compute if it had been when
            last looked at, or None.
    """

    settings: RequestSettings
    config: MemoryConfig
    retriever: SequenceRetriever
    named: NamedUse | None = None
    keys: Sequence[bytes] = field(default=())
    is_addressed: bool = False
    held_since: float | None = None
    waits_at: int | None = None

    @property
    def reads_named(self) -> bool:
        return bool(self.settings.memory_read)

    @property
    def writes_named(self) -> bool:
        return self.settings.memory_write is not None

    def address(self, request: Any, secret: str) -> None:
        """Give the request's blocks and segments their addresses.

        What a request asked for changes what is computed above the memory layer, so it enters
        vLLM's block hashes as well, which are computed from ``cache_salt`` on.

        Args:
            request: vLLM's ``Request``.
            secret: the engine's; see :meth:`RequestSettings.salt`.
        """
        versions = self.named.versions if self.named is not None else ()
        salt = self.settings.salt(request.cache_salt, secret, versions)
        self.is_addressed = True
        if salt != request.cache_salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()
        num_segments = num_shareable_segments(self.config, request.num_prompt_tokens)
        seed = repr((salt, self.config.memory_size, self.config.top_k))
        self.keys = segment_keys(request.prompt_token_ids, self.config.retrieval_stride, num_segments, seed)
