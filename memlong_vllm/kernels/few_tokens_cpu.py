"""Attention of a few query tokens on a CPU, where it is bound by reading keys and values once.

Matrix products want many rows and contiguous operands; a decoding token has as many rows a
key-value head as heads share it, and its window lies in blocks. These kernels, compiled by Numba,
read every key and value where it is, once, in float32 or bfloat16, with arithmetic in float32.
"""

from __future__ import annotations

import numpy as np
import torch

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.numba_threads import njit, prange
from memlong_vllm.kernels.online_softmax_cpu import absorb, begin, end
from memlong_vllm.kernels.vectors_cpu import dot, heads_at_once, num_vectors, shape_of
from memlong_vllm.kernels.windows_cpu import first_seen, place_of, window_arguments, write_heads

MAX_TOKENS = 4
"""Query tokens of a sequence up to which these kernels are the faster way."""

_DTYPES = (torch.float32, torch.bfloat16)


def suits(num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether ``num_tokens`` of a sequence with keys of this type are best attended here."""
    return num_tokens <= MAX_TOKENS and dtype in _DTYPES


def attend_windows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    token_idx: np.ndarray,
    sequence_of: np.ndarray,
    positions: np.ndarray,
    window: int,
    scale: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Causal attention of some tokens of a batch over a sliding window in blocks.

    Args:
        query: [T, H, d], rotated, in float32 or the dtype of ``kv_cache``.
        kv_cache: [num_blocks, R, block_size, 2·d], key then value in each row.
        block_table: [sequences, blocks] int32.
        token_idx: [N] int64, which tokens of the batch.
        sequence_of, positions: [N] int64, whose token it is and where it stands in its sequence.
        window: tokens that a token sees, itself included; below 1: all.
        output: [T, H, d], float32 or bfloat16; rows ``token_idx`` are written.
        lse: [T, H] float32, likewise.
    """
    heads, size = query.shape[1:]
    together = heads_at_once(heads // kv_cache.shape[1], num_vectors(size))
    arguments = window_arguments(query, output, kv_cache, block_table, window, scale)
    _attend_windows(*arguments, token_idx, sequence_of, positions, lse.numpy(), shape_of(size), together)


def compile_windows(heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`attend_windows` calls compiled now, or read from Numba's cache of earlier runs."""
    if not suits(1, dtype):
        return
    query = torch.zeros(1, heads, head_size, dtype=dtype)
    cache = torch.zeros(1, num_kv_heads, 1, 2 * head_size, dtype=dtype)
    first, table = np.zeros(1, np.int64), torch.zeros(1, 1, dtype=torch.int32)
    lse = torch.zeros(1, heads, dtype=torch.float32)
    attend_windows(query, cache, table, first, first, first, 1, 1.0, torch.empty_like(query), lse)


@njit(parallel=True, fastmath=True)
def _attend_windows(
    query, output, kv_cache, block_table, sizes, token_idx, sequence_of, positions, lse, shape, together
):
    queries, query_strides = query
    outputs, output_strides = output
    cached, cache_strides = kv_cache
    blocks, table_strides = block_table
    group, num_kv_heads, size, block_size, window, scale = sizes
    scales = np.full(group, scale)
    for item in prange(len(token_idx) * num_kv_heads):
        row, kv_head = item // num_kv_heads, item % num_kv_heads
        token, first_head = token_idx[row], kv_head * group
        query_at = token * query_strides[0] + first_head * query_strides[1]
        state, scores = begin(group, size), np.empty((group, PART), np.float32)
        first, stop = first_seen(positions[row], window), positions[row] + 1
        while first < stop:
            block_at, offset = place_of(
                blocks, table_strides, sequence_of[row], first, cache_strides, kv_head, block_size
            )
            key_at = block_at + offset * cache_strides[2]
            count = min(PART, block_size - offset, stop - first)
            for p in range(count):
                for j in range(group):
                    query_of_head = query_at + j * query_strides[1]
                    scores[j, p] = dot(queries, query_of_head, cached, key_at + p * cache_strides[2], shape)
            absorb(cached, key_at + size, cache_strides[2], scores, 0, count, scales, state, shape, together)
            first += count
        attended = np.empty((group, size), np.float32)
        end(state, scales, attended, lse[token, first_head : first_head + group])
        write_heads(outputs, output_strides, token, first_head, attended)
