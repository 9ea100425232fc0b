"""The memory bank of one rank: un-rotated keys and values of the memory layer, in slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from memlong_vllm.worker.host_memory import allocate as allocate_on

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""(shape, dtype) -> a tensor of whatever contents that the rank's device reads and writes."""


class MemoryBank:
    """Keys and values of ``num_slots`` chunks, in the device's memory or in the host's.

    Args:
        num_kv_heads: this rank's key-value heads.
        head_dim: the model's, without any padding of the attention backend.
        device: where the tokens are computed and all indices are.
        allocate: of storage elsewhere, such as :func:`memlong_vllm.worker.host_memory.allocate_host`.

    Attributes:
        keys, values: [num_kv_heads, num_slots, chunk_size, head_dim], tensors of ``device``.
        is_on_device: whether they are in its own memory.
    """

    def __init__(
        self,
        num_slots: int,
        chunk_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        allocate: Allocate | None = None,
    ) -> None:
        shape = (num_kv_heads, num_slots, chunk_size, head_dim)
        self.is_on_device = allocate is None
        allocate = allocate or partial(allocate_on, device=device)
        self.chunk_size = chunk_size
        self.keys = allocate(shape, dtype)
        self.values = allocate(shape, dtype)
        # Of each head, the row its slots begin at among all heads' slots.
        self._first_rows = torch.arange(num_kv_heads, device=device).view(1, -1, 1) * num_slots

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def device(self) -> torch.device:
        """Of all indices and results."""
        return self._first_rows.device

    def write(self, token_places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store tokens.

        Args:
            token_places: [num_tokens] int64, ``slot * chunk_size + offset``.
            keys, values: [num_tokens, num_kv_heads, head_dim].
        """
        self.keys.flatten(1, 2).index_copy_(1, token_places, keys.transpose(0, 1))
        self.values.flatten(1, 2).index_copy_(1, token_places, values.transpose(0, 1))

    def write_chunks(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store whole chunks.

        Args:
            slots: [num_chunks] int64.
            keys, values: [num_chunks, num_kv_heads, chunk_size, head_dim].
        """
        self.keys.index_copy_(1, slots, keys.transpose(0, 1))
        self.values.index_copy_(1, slots, values.transpose(0, 1))

    def gather(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy chunks out, in one operation each and without temporary copies.

        Args:
            slots: [num_spans, num_chunks] int64.
            keys, values: contiguous, [num_spans, num_kv_heads, num_chunks * chunk_size, head_dim];
                overwritten.
        """
        rows = (slots.unsqueeze(1) + self._first_rows).flatten()
        for bank, out in ((self.keys, keys), (self.values, values)):
            chunks = bank.flatten(0, 1).flatten(1)
            torch.index_select(chunks, 0, rows, out=out.view(-1, chunks.shape[1]))
