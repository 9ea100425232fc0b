"""Attention of a few query tokens over blocks of vLLM's own CPU cache, where keys are columns.

vLLM's kernel for vectors ("vec") keeps of each block and key-value head first the keys, element by
element ([d, block_size]), and then the values, token by token ([block_size, d]).
"""

from __future__ import annotations

import numpy as np
import torch

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.numba_threads import njit, prange
from memlong_vllm.kernels.online_softmax_cpu import absorb, begin, end
from memlong_vllm.kernels.vectors_cpu import VECTOR, heads_at_once, num_vectors, score_columns, shape_of
from memlong_vllm.kernels.windows_cpu import first_seen, place_of, window_arguments, write_heads


def attend_vllm_blocks(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    token_idx: np.ndarray,
    sequence_of: np.ndarray,
    positions: np.ndarray,
    window: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Causal attention of some tokens of a batch over a sliding window in vLLM's blocks.

    Args:
        query: [T, H, d], rotated, in float32 or the dtype of ``kv_cache``.
        kv_cache: [num_blocks, R, block_size, 2·d] as vLLM allocates it.
        block_table, token_idx, sequence_of, positions, window: as in
            :func:`memlong_vllm.kernels.few_tokens_cpu.attend_windows`.
        output: [T, H, d], float32 or bfloat16; rows ``token_idx`` are written.
    """
    heads, size = query.shape[1:]
    _, num_kv_heads, block_size, _ = kv_cache.shape
    columns = _columns(block_size)
    together = heads_at_once(heads // num_kv_heads, max(columns, num_vectors(size)))
    arguments = window_arguments(query, output, kv_cache, block_table, window, scale)
    _attend(*arguments, token_idx, sequence_of, positions, shape_of(size), together, (0.0,) * columns)


def compile_vllm_blocks(heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`attend_vllm_blocks` calls compiled now, or read from Numba's cache of earlier runs."""
    query = torch.zeros(1, heads, head_size, dtype=dtype)
    cache = torch.zeros(1, num_kv_heads, block_size, 2 * head_size, dtype=dtype)
    first, table = np.zeros(1, np.int64), torch.zeros(1, 1, dtype=torch.int32)
    attend_vllm_blocks(query, cache, table, first, first, first, 1, 1.0, torch.empty_like(query))


def _columns(block_size: int) -> int:
    """Vectors of keys that are scored at once: whole rows of columns, so that what is read lies together."""
    return next(number for number in (8, 4, 2) if block_size % (number * VECTOR) == 0)


@njit(parallel=True, fastmath=True)
def _attend(query, output, kv_cache, block_table, sizes, token_idx, sequence_of, positions, shape, together, columns):
    queries, query_strides = query
    outputs, output_strides = output
    cached, cache_strides = kv_cache
    blocks, table_strides = block_table
    group, num_kv_heads, size, block_size, window, scale = sizes
    at_once, scales = VECTOR * len(columns), np.full(group, scale)
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
            # Scored are all columns that are together with those in the window; the others do not count.
            aligned = offset // at_once * at_once
            skipped = offset - aligned
            count = min(PART, block_size - aligned, stop - first + skipped)
            for column in range(0, count, at_once):
                for head in range(0, group, len(together)):
                    score_columns(
                        queries, query_at + head * query_strides[1], query_strides[1], size,
                        cached, block_at + aligned + column, block_size,
                        scores, head * PART + column, PART, together, columns,
                    )  # fmt: skip
            value_at = block_at + (block_size + aligned) * size
            absorb(cached, value_at, size, scores, skipped, count, scales, state, shape, together)
            first += count - skipped
        attended = np.empty((group, size), np.float32)
        end(state, scales, attended, np.empty(group, np.float32))
        write_heads(outputs, output_strides, token, first_head, attended)
