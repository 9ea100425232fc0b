"""What the CPU's kernels of local attention have in common: what they are told, and where things are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from memlong_vllm.kernels.numba_threads import flat, njit, use_threads
from memlong_vllm.kernels.vectors_cpu import put


class WindowSizes(NamedTuple):
    """Attributes:
    group: query heads that share a key-value head, of which there are ``num_kv_heads`` with ``head_size`` elements.
    block_size: tokens of a block of the cache.
    window: tokens that a token sees, itself included; below 1: all.
    scale: float32, what products of queries and keys are multiplied by; positive.
    """

    group: int
    num_kv_heads: int
    head_size: int
    block_size: int
    window: int
    scale: np.float32


def window_arguments(
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[Any, ...]:
    """The first arguments of such a kernel, which is called next: these tensors with their strides, and their sizes.

    The kernel unpacks them before its parallel loop, which takes no tuples in tuples.

    Args:
        query, output: [T, H, d].
        kv_cache: [num_blocks, R, block_size, 2·d], in whatever order a block has it.
        block_table: [sequences, blocks] int32.
    """
    use_threads()
    _, num_kv_heads, block_size, _ = kv_cache.shape
    heads, size = query.shape[1:]
    sizes = WindowSizes(heads // num_kv_heads, num_kv_heads, size, block_size, window, np.float32(scale))
    return flat(query), flat(output), flat(kv_cache), flat(block_table), sizes


@njit()
def first_seen(position, window):
    """The first token that a token sees."""
    return max(0, position - window + 1) if window > 0 else 0


@njit()
def place_of(blocks, table_strides, sequence, position, cache_strides, kv_head, block_size):
    """Of a token of a sequence: the element at which its block's part of a key-value head begins, and the
    token's number in the block."""
    block = np.int64(blocks[sequence * table_strides[0] + position // block_size])
    return block * cache_strides[0] + kv_head * cache_strides[1], position % block_size


@njit(fastmath=True)
def write_heads(elements, strides, token, first_head, attended):
    """Args: attended: [heads, d] float32, of adjacent heads of a token."""
    for j in range(attended.shape[0]):
        at = token * strides[0] + (first_head + j) * strides[1]
        for e in range(attended.shape[1]):
            put(elements, at + e, attended[j, e])
