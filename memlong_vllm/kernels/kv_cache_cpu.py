"""Writing a step's keys and values into the paged cache of a CPU."""

from __future__ import annotations

import torch

from memlong_vllm.kernels.numba_threads import flat, njit
from memlong_vllm.kernels.vectors_cpu import copy, shape_of


def store(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write tokens to their slots.

    Args:
        key, value: [N, R, d] or more tokens, in the cache's dtype: float32 or one of 16 bits.
        kv_cache: [num_blocks, R, block_size, 2·d], key then value in each row.
        slots: [N] int64, counted through all blocks; below 0: not written.
    """
    _, num_heads, block_size, _ = kv_cache.shape
    head_size = key.shape[2]
    arrays = *flat(key), *flat(value), *flat(kv_cache), slots[: key.shape[0]].numpy()
    _store(*arrays, num_heads, block_size, head_size, shape_of(head_size))


def compile_store(head_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`store` calls compiled now, or read from Numba's cache of earlier runs."""
    row = torch.zeros(1, 1, head_size, dtype=dtype)
    store(row, row, torch.zeros(1, 1, 1, 2 * head_size, dtype=dtype), torch.zeros(1, dtype=torch.int64))


# Not in parallel: to wake another thread takes longer than to store what decoding sequences add.
@njit()
def _store(key, key_strides, value, value_strides, kv_cache, cache_strides, slots, num_heads, block_size, size, shape):
    for token in range(len(slots)):
        slot = slots[token]
        if slot >= 0:
            row_at = slot // block_size * cache_strides[0] + slot % block_size * cache_strides[2]
            for head in range(num_heads):
                at = row_at + head * cache_strides[1]
                copy(key, token * key_strides[0] + head * key_strides[1], kv_cache, at, shape)
                value_at = token * value_strides[0] + head * value_strides[1]
                copy(value, value_at, kv_cache, at + size, shape)
