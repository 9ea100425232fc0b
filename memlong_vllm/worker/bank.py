"""The memory bank of one rank: un-rotated keys and values of the memory layer, in slots."""

from __future__ import annotations

import torch


class MemoryBank:
    """Keys and values of ``num_slots`` chunks.

    Args:
        num_kv_heads: this rank's key-value heads.
        head_dim: the model's, without any padding of the attention backend.

    Attributes:
        keys, values: [num_kv_heads, num_slots, chunk_size, head_dim]. Heads come first, so that
            gathered slots are one long row of tokens per head without another copy.
    """

    def __init__(
        self,
        num_slots: int,
        chunk_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_kv_heads, num_slots, chunk_size, head_dim)
        self.chunk_size = chunk_size
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, token_places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store tokens.

        Args:
            token_places: [num_tokens] int64, ``slot * chunk_size + offset``.
            keys, values: [num_tokens, num_kv_heads, head_dim].
        """
        self.keys.flatten(1, 2).index_copy_(1, token_places, keys.transpose(0, 1))
        self.values.flatten(1, 2).index_copy_(1, token_places, values.transpose(0, 1))

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy chunks out.

        Args:
            slots: [num_spans, num_chunks] int64.

        Returns:
            Keys and values, [num_spans, num_kv_heads, num_chunks * chunk_size, head_dim].
        """
        return self._gather(self.keys, slots), self._gather(self.values, slots)

    @staticmethod
    def _gather(bank: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        num_heads, _, chunk_size, head_dim = bank.shape
        num_spans, num_chunks = slots.shape
        rows = bank.index_select(1, slots.flatten())
        return rows.view(num_heads, num_spans, num_chunks * chunk_size, head_dim).transpose(0, 1)
