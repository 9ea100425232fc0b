"""Local attention of many query tokens on a CPU with AVX-512, over a cache in blocks, with its log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.numba_threads import flat, njit, prange, use_threads
from memlong_vllm.kernels.online_softmax_cpu import begin
from memlong_vllm.kernels.query_tiles_cpu import attend_runs, padded_rows, tile_of
from memlong_vllm.kernels.vectors_cpu import get, put, shape_of


class QueryTiles(NamedTuple):
    """Parts of sequences that are attended at once, of at most :data:`TILE_TOKENS` tokens.

    Attributes:
        token_idx, counts: [n] int64, their first tokens in the batch, and how many they are.
        sequence_of, positions: [n] int64, whose tokens they are, and where the first of them stands.
    """

    token_idx: np.ndarray
    counts: np.ndarray
    sequence_of: np.ndarray
    positions: np.ndarray


def attend_windows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: QueryTiles,
    window: int,
    scale: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As :func:`memlong_vllm.kernels.few_tokens_cpu.attend_windows`, of all tokens of ``tiles``.

    Args:
        output: [T, H, d], float32 or bfloat16.
    """
    use_threads()
    _, num_kv_heads, block_size, _ = kv_cache.shape
    heads, size = query.shape[1:]
    arrays = [part for tensor in (query, output, kv_cache, block_table) for part in flat(tensor)]
    sizes = heads // num_kv_heads, num_kv_heads, block_size, size, window, np.float32(scale)
    _attend(*arrays, lse.numpy(), *tiles, *sizes, shape_of(size), *tile_of(size))


def compile_windows(heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`attend_windows` calls compiled now, or read from Numba's cache of earlier runs."""
    query = torch.zeros(1, heads, head_size, dtype=dtype)
    cache = torch.zeros(1, num_kv_heads, 1, 2 * head_size, dtype=dtype)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    table, lse = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, heads, dtype=torch.float32)
    attend_windows(query, cache, table, QueryTiles(zero, one, zero, zero), 1, 1.0, query.clone(), lse)


@njit(parallel=True, fastmath=True)
def _attend(
    query,
    query_strides,
    output,
    output_strides,
    kv_cache,
    cache_strides,
    block_table,
    table_strides,
    lse,
    token_idx,
    counts,
    sequence_of,
    positions,
    group,
    num_kv_heads,
    block_size,
    size,
    window,
    scale,
    shape,
    tile,
    columns,
):
    stored = kv_cache, cache_strides[2], kv_cache, cache_strides[2]
    for item in prange(len(token_idx) * num_kv_heads):
        part, kv_head = item // num_kv_heads, item % num_kv_heads
        num_rows, first_head = counts[part] * group, kv_head * group
        rows = np.zeros((padded_rows(num_rows, tile), size), np.float32)
        for row in range(num_rows):
            token, head = token_idx[part] + row // group, first_head + row % group
            at = token * query_strides[0] + head * query_strides[1]
            for e in range(size):
                rows[row, e] = get(query, at + e)
        end = positions[part] + counts[part]
        first = max(0, positions[part] - window + 1) if window > 0 else 0
        table_at = sequence_of[part] * table_strides[0]
        runs = _runs(first, end, block_table, table_at, block_size, cache_strides, kv_head, size)
        seen = window if window > 0 else end
        state, scales = begin(len(rows), size), np.full(group, scale)
        attend_runs(
            rows, num_rows, group, stored, runs, positions[part] - first, seen, scales, state, shape, tile, columns
        )
        peaks, totals, sums = state
        for row in range(num_rows):
            token, head = token_idx[part] + row // group, first_head + row % group
            lse[token, head] = peaks[row] * scale + np.log(totals[row])
            at = token * output_strides[0] + head * output_strides[1]
            for e in range(size):
                put(output, at + e, sums[row, e] / totals[row])


@njit(fastmath=True)
def _runs(first, end, block_table, table_at, block_size, cache_strides, kv_head, size):
    """Of keys [first, end) of a sequence, those that lie together; see :func:`attend_runs`."""
    runs, number = np.empty(((end - first) // min(PART, block_size) + (end - first) // block_size + 3, 3), np.int64), 0
    while first < end:
        block, offset = np.int64(block_table[table_at + first // block_size]), first % block_size
        count = min(PART, block_size - offset, end - first)
        at = block * cache_strides[0] + kv_head * cache_strides[1] + offset * cache_strides[2]
        runs[number] = at, at + size, count
        first, number = first + count, number + 1
    return runs[:number]
