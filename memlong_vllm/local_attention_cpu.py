"""Local attention on a CPU that keeps its log-sum-exp. Imported on CPUs only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from memlong_vllm.kernels import few_tokens_cpu, flash_cpu

# Query tokens attended at a time. Each reads the window of all: many at once waste scores.
_QUERY_BLOCK = 256


class CPULseImpl(CPUAttentionBackendImpl):
    """Windowed attention over the paged cache.

    vLLM's CPU kernel packs cached keys in an order of its own, so this class also writes the
    cache: [num_blocks, num_kv_heads, block_size, 2·head_size], key then value in each row.

    Attributes:
        lse: [num_tokens, num_heads] float32, of the last forward pass.
    """

    lse: torch.Tensor

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        num_tokens = slot_mapping.shape[0]
        slots = slot_mapping.long()
        kept = (slots >= 0).nonzero().flatten()
        slots = slots[kept]
        block_size = kv_cache.shape[2]
        rows = torch.cat([key[:num_tokens][kept], value[:num_tokens][kept]], dim=-1)
        kv_cache[slots // block_size, :, slots % block_size] = rows

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
        self.lse = torch.empty(query.shape[:2], dtype=torch.float32)
        starts = attn_metadata.query_start_loc.tolist()
        seq_lens = attn_metadata.seq_lens.tolist()
        self._attend_few(query, kv_cache, attn_metadata.block_table, starts, seq_lens, output)
        for i, seq_len in enumerate(seq_lens[: len(starts) - 1]):
            if few_tokens_cpu.suits(starts[i + 1] - starts[i], kv_cache):
                continue
            blocks = attn_metadata.block_table[i]
            for row in range(starts[i], starts[i + 1], _QUERY_BLOCK):
                end_row = min(row + _QUERY_BLOCK, starts[i + 1])
                position = seq_len - (starts[i + 1] - row)
                rows = slice(row, end_row)
                output[rows], self.lse[rows] = self._attend(query[rows], kv_cache, blocks, position)
        return output

    def _attend_few(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        starts: list[int],
        seq_lens: list[int],
        output: torch.Tensor,
    ) -> None:
        """All sequences with few query tokens, decoding ones above all, at once."""
        counts = np.diff(starts)
        few = [i for i, count in enumerate(counts) if few_tokens_cpu.suits(int(count), kv_cache)]
        if not few:
            return
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in few])
        positions = np.concatenate([np.arange(seq_lens[i] - counts[i], seq_lens[i]) for i in few])
        sequence_of, token_idx = np.repeat(few, counts[few]), torch.from_numpy(rows)
        attended, self.lse[token_idx] = few_tokens_cpu.attend_windows(
            query[token_idx], kv_cache, block_table, sequence_of, positions, self.sliding_window, self.scale
        )
        output[token_idx] = attended.to(output.dtype)

    def _attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, blocks: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query tokens [n, heads, size] from ``position`` on, over their windows."""
        num_tokens = query.shape[0]
        first = max(0, position - self.sliding_window + 1) if self.sliding_window > 0 else 0
        key_positions = torch.arange(first, position + num_tokens)
        block_size = kv_cache.shape[2]
        cached = kv_cache[blocks[key_positions // block_size].long(), :, key_positions % block_size]
        keys, values = cached.transpose(0, 1)[None].split(self.head_size, dim=-1)
        distance = torch.arange(position, position + num_tokens)[:, None] - key_positions
        hidden = distance < 0
        if self.sliding_window > 0:
            hidden |= distance >= self.sliding_window
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
        attended, lse = flash_cpu.attend(query[None], keys, values, self.scale, mask)
        return attended[0], lse[0]


class CPULseBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPULseImpl]:
        return CPULseImpl
