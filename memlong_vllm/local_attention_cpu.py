"""Local attention on a CPU. Keeps its log-sum-exp. Imported on CPUs only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from memlong_vllm.kernels import few_tokens_cpu, flash_cpu, kv_cache_cpu, many_tokens_cpu, query_tiles_cpu
from memlong_vllm.kernels.many_tokens_cpu import QueryTiles

# Query tokens attended at a time. Each reads the window of all: many at once waste scores.
_QUERY_BLOCK = 256


class FewTokens(NamedTuple):
    """The tokens of all sequences with few of them in a step, decoding ones above all.

    Attributes:
        token_idx: [n] int64, their places in the batch.
        sequence_of, positions: [n] int64.
    """

    token_idx: np.ndarray
    sequence_of: np.ndarray
    positions: np.ndarray


def few_tokens(sequences: Sequence[int], starts: Sequence[int], seq_lens: Sequence[int]) -> FewTokens | None:
    """The tokens of some sequences of a batch; None if they are none. See :class:`WindowStep`."""
    if not sequences:
        return None
    counts = np.diff(starts)
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in sequences])
    positions = np.concatenate([np.arange(seq_lens[i] - counts[i], seq_lens[i]) for i in sequences])
    return FewTokens(rows, np.repeat(sequences, counts[list(sequences)]), positions)


def query_tiles(sequences: Sequence[int], starts: Sequence[int], seq_lens: Sequence[int]) -> QueryTiles:
    """The tokens of some sequences of a batch, cut. See :class:`WindowStep`."""
    parts = []
    for i in sequences:
        first = np.arange(starts[i], starts[i + 1], query_tiles_cpu.TILE_TOKENS)
        counts = np.minimum(query_tiles_cpu.TILE_TOKENS, starts[i + 1] - first)
        parts.append((first, counts, np.full(len(first), i), first + (seq_lens[i] - starts[i + 1])))
    return QueryTiles(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class QueryBlock(NamedTuple):
    """Tokens of one sequence that are attended at once.

    Attributes:
        rows: their places in the batch.
        keys: which of the sequence's gathered keys they see.
        mask: [n, M] in the query's dtype, added to the scores.
    """

    rows: slice
    keys: slice
    mask: torch.Tensor


class ManyTokens(NamedTuple):
    """The tokens of one sequence with many of them in a step.

    Attributes:
        blocks: of the cache, which hold the keys that any of them sees: gathered once.
        queries: the tokens, in parts.
    """

    blocks: list[int]
    queries: list[QueryBlock]


class WindowStep:
    """How the tokens of one step are attended to their windows: the same in every layer.

    Args:
        starts: [sequences + 1], first token of each sequence in the batch.
        seq_lens: [sequences], tokens of each, those of this step included.
        block_table: [sequences, blocks] int32.
        window: tokens that a token sees, itself included; below 1: all.
        dtype: of queries and of the cache.

    Attributes:
        few: the tokens of sequences with few of them, if there are any.
        tiles: all others, if there is a kernel for them; else ``many``: these by sequence.
        window, block_table: as given.
    """

    def __init__(
        self,
        starts: list[int],
        seq_lens: list[int],
        block_table: torch.Tensor,
        block_size: int,
        window: int,
        dtype: torch.dtype,
    ) -> None:
        self.window, self.block_table = window, block_table
        self._block_size, self._dtype = block_size, dtype
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        counts = np.diff(starts)
        is_few = [few_tokens_cpu.suits(int(count), dtype) for count in counts]
        self.few = few_tokens([i for i, few in enumerate(is_few) if few], starts, seq_lens)
        many = [i for i, few in enumerate(is_few) if not few]
        self.tiles: QueryTiles | None = None
        self.many: list[ManyTokens] = []
        if many and query_tiles_cpu.suits(dtype):
            self.tiles = query_tiles(many, starts, seq_lens)
        else:
            self.many = [self._many(starts[i], starts[i + 1], seq_lens[i], block_table[i]) for i in many]

    def _many(self, start: int, end: int, seq_len: int, blocks: torch.Tensor) -> ManyTokens:
        position = seq_len - (end - start)  # Of the token in row ``start``.
        first_block = self._first_seen(position) // self._block_size
        gathered = first_block * self._block_size  # Position of the first gathered key.
        queries = []
        for row in range(start, end, _QUERY_BLOCK):
            rows = slice(row, min(row + _QUERY_BLOCK, end))
            first, last = position + row - start, position + rows.stop - start
            seen = self._first_seen(first)
            mask = self._mask(last - first, first - seen)
            queries.append(QueryBlock(rows, slice(seen - gathered, last - gathered), mask))
        return ManyTokens(blocks[first_block : -(-seq_len // self._block_size)].tolist(), queries)

    def _first_seen(self, position: int) -> int:
        return max(0, position - self.window + 1) if self.window > 0 else 0

    def _mask(self, num_tokens: int, num_before: int) -> torch.Tensor:
        """Of tokens that together see ``num_before`` tokens before the first of them."""
        if (num_tokens, num_before) not in self._masks:
            distance = num_before + torch.arange(num_tokens)[:, None] - torch.arange(num_before + num_tokens)
            hidden = distance < 0
            if self.window > 0:
                hidden |= distance >= self.window
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
            self._masks[num_tokens, num_before] = mask
        return self._masks[num_tokens, num_before]


@dataclass
class CPUWindowMetadata(CPUAttentionMetadata):
    step: WindowStep | None = None


class CPUWindowMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(self, *args: Any, **kwargs: Any) -> CPUWindowMetadata:
        metadata = super().build(*args, **kwargs)
        starts = metadata.query_start_loc.tolist()
        lengths = metadata.seq_lens.tolist()[: len(starts) - 1]
        step = WindowStep(starts, lengths, metadata.block_table, self.block_size, self.window_size, self.dtype)
        return CPUWindowMetadata(**vars(metadata), step=step)


class CPUWindowImpl(CPUAttentionBackendImpl):
    """Windowed attention over the paged cache.

    vLLM's CPU kernel packs cached keys in an order of its own, so this class also writes the
    cache: [num_blocks, num_kv_heads, block_size, 2·head_size], key then value in each row.

    Attributes:
        lse: [num_tokens, num_heads] float32, of the last forward pass.
    """

    lse: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kv_cache_cpu.compile_store(self.head_size, torch.get_default_dtype())
        heads = self.num_heads, self.num_kv_heads, self.head_size, torch.get_default_dtype()
        few_tokens_cpu.compile_windows(*heads)
        if query_tiles_cpu.suits(torch.get_default_dtype()):
            many_tokens_cpu.compile_windows(*heads)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        kv_cache_cpu.store(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output
        step: WindowStep = attn_metadata.step
        self.lse = torch.empty(query.shape[:2], dtype=torch.float32)
        if step.few is not None:
            token_idx, sequence_of, positions = step.few
            places = step.block_table, token_idx, sequence_of, positions, step.window
            few_tokens_cpu.attend_windows(query, kv_cache, *places, self.scale, output, self.lse)
        if step.tiles is not None:
            cache = kv_cache, step.block_table
            many_tokens_cpu.attend_windows(query, *cache, step.tiles, step.window, self.scale, output, self.lse)
        for many in step.many:
            cached = torch.cat([kv_cache[idx] for idx in many.blocks], dim=1)[None]
            for rows, seen, mask in many.queries:
                keys, values = cached[:, :, seen].split(self.head_size, dim=-1)
                attended, lse = flash_cpu.attend(query[rows][None], keys, values, self.scale, mask)
                output[rows], self.lse[rows] = attended[0], lse[0]
        return output


class CPUWindowBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUWindowImpl]:
        return CPUWindowImpl

    @staticmethod
    def get_builder_cls() -> type[CPUWindowMetadataBuilder]:
        return CPUWindowMetadataBuilder
