"""Buffers through which chunks pass that are needed only for a moment."""

from __future__ import annotations

import torch

from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.host_memory import allocate


class Staging:
    """Room for the keys and values of ``num_tokens`` tokens, allocated once.

    Everything that copies chunks for the length of an operation uses it, one after the other in
    the order of the device's stream, and cuts what is larger: so what the memory takes of the
    device is known from the start.
    """

    def __init__(self, bank: MemoryBank, num_tokens: int) -> None:
        num_heads, _, _, head_dim = bank.keys.shape
        self._bank = bank
        self.num_tokens = num_tokens
        shape = (num_tokens * num_heads * head_dim,)
        self._keys = allocate(shape, bank.keys.dtype, bank.device)
        self._values = allocate(shape, bank.keys.dtype, bank.device)

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def num_chunks(self) -> int:
        """How many chunks fit at once."""
        return self.num_tokens // self._bank.chunk_size

    def buffers(self, num_spans: int, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [num_spans, num_kv_heads, num_chunks * chunk_size, head_dim].

        Valid until the next call; contents are whatever was there.
        """
        num_heads, _, chunk_size, head_dim = self._bank.keys.shape
        shape = (num_spans, num_heads, num_chunks * chunk_size, head_dim)
        size = num_spans * num_heads * num_chunks * chunk_size * head_dim
        return self._keys[:size].view(shape), self._values[:size].view(shape)

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks of the bank, valid until the next call.

        Args:
            slots: [num_spans, num_chunks] int64, at most ``self.num_chunks`` in all.

        Returns:
            Keys and values, [num_spans, num_kv_heads, num_chunks * chunk_size, head_dim].
        """
        keys, values = self.buffers(*slots.shape)
        self._bank.gather(slots, keys, values)
        return keys, values
