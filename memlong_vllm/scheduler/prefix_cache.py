"""Where vLLM's prefix cache and the bank agree that a sequence's beginning is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlong_vllm.config import MemoryConfig
from memlong_vllm.scheduler.ledger import Ledger
from memlong_vllm.scheduler.prefix_tree import SharedPrefix


@dataclass(frozen=True)
class PrefixHit:
    """Tokens of a request that need not be computed again.

    Attributes:
        num_tokens: a whole number of segments and of vLLM's blocks.
        blocks: vLLM's, one list a KV cache group.
        prefix: the memory after these tokens; None: nothing is shared.
    """

    num_tokens: int
    blocks: Any
    prefix: SharedPrefix | None


def num_shareable_segments(config: MemoryConfig, prompt_len: int) -> int:
    """Segments before the one with the prompt's end: what is computed up to there depends on the
    tokens alone. From there on the set depends on where the prompt stopped."""
    return (prompt_len - 1) // config.retrieval_stride


class PrefixCache:
    """Finds beginnings that both caches hold, and keeps vLLM's from holding more than is true.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``.

    Attributes:
        nothing: the hit of a request that takes nothing over.
    """

    def __init__(self, kv_cache_manager: Any, ledger: Ledger) -> None:
        self._manager = kv_cache_manager
        self._ledger = ledger
        self.nothing = PrefixHit(0, kv_cache_manager.empty_kv_cache_blocks, None)
        self._limit_blocks()

    def _limit_blocks(self) -> None:
        """Cache no block that holds a token of the prompt-end segment or a later one.

        Wraps ``KVCacheCoordinator.cache_blocks`` of this engine's coordinator, which has no other
        place for such a limit.
        """
        coordinator, stride = self._manager.coordinator, self._ledger.config.retrieval_stride
        cache_blocks = coordinator.cache_blocks

        def cache_pure_blocks(request: Any, num_computed_tokens: int) -> None:
            cache_blocks(request, min(num_computed_tokens, (request.num_prompt_tokens - 1) // stride * stride))

        coordinator.cache_blocks = cache_pure_blocks

    def find(self, request: Any, config: MemoryConfig, keys: Sequence[bytes], every_chunk: bool) -> PrefixHit:
        """The longest beginning of a request that is in vLLM's cache and, with all its memory, here.

        Args:
            keys: addresses of the segments that may be shared.
            every_chunk: forgotten chunks must still be resident.
        """
        if not self._manager.prefix_cache_lookup_enabled(request):
            return self.nothing
        lengths = self._ledger.find_prefix(config, keys, every_chunk)
        stride = config.retrieval_stride
        while lengths:
            blocks, num_tokens, _ = self._manager.coordinator.find_longest_cache_hit(
                request.block_hashes, lengths[-1] * stride
            )
            if num_tokens == lengths[-1] * stride:
                prefix = self._ledger.prefix(config, keys[: lengths[-1]], every_chunk)
                return PrefixHit(num_tokens, self._manager.create_kv_cache_blocks(blocks), prefix)
            lengths = [length for length in lengths if length * stride <= num_tokens]
        return self.nothing
