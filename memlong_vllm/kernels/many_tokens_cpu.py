"""Local attention of many query tokens on a CPU with AVX-512, over a cache in blocks, with its log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.numba_threads import njit, prange
from memlong_vllm.kernels.online_softmax_cpu import begin
from memlong_vllm.kernels.query_tiles_cpu import attend_runs, padded_rows, tile_of
from memlong_vllm.kernels.vectors_cpu import get, shape_of
from memlong_vllm.kernels.windows_cpu import first_seen, place_of, window_arguments, write_heads


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
    size = query.shape[2]
    arguments = window_arguments(query, output, kv_cache, block_table, window, scale)
    _attend(*arguments, tiles, lse.numpy(), shape_of(size), *tile_of(size))


def compile_windows(heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`attend_windows` calls compiled now, or read from Numba's cache of earlier runs."""
    query = torch.zeros(1, heads, head_size, dtype=dtype)
    cache = torch.zeros(1, num_kv_heads, 1, 2 * head_size, dtype=dtype)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    table, lse = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, heads, dtype=torch.float32)
    attend_windows(query, cache, table, QueryTiles(zero, one, zero, zero), 1, 1.0, query.clone(), lse)


@njit(parallel=True, fastmath=True)
def _attend(query, output, kv_cache, block_table, sizes, tiles, lse, shape, tile, columns):
    queries, query_strides = query
    outputs, output_strides = output
    cached, cache_strides = kv_cache
    blocks, table_strides = block_table
    group, num_kv_heads, size, block_size, window, scale = sizes
    first_tokens, counts, sequence_of, positions = tiles
    stored = cached, cache_strides[2], cached, cache_strides[2]
    for item in prange(len(counts) * num_kv_heads):
        part, kv_head = item // num_kv_heads, item % num_kv_heads
        num_rows, first_head = counts[part] * group, kv_head * group
        rows = np.zeros((padded_rows(num_rows, tile), size), np.float32)
        for row in range(num_rows):
            token, head = first_tokens[part] + row // group, first_head + row % group
            at = token * query_strides[0] + head * query_strides[1]
            for e in range(size):
                rows[row, e] = get(queries, at + e)
        first, stop = first_seen(positions[part], window), positions[part] + counts[part]
        runs = _runs(first, stop, blocks, table_strides, sequence_of[part], cache_strides, kv_head, block_size, size)
        offset, seen = positions[part] - first, window if window > 0 else stop
        state, scales = begin(len(rows), size), np.full(group, scale)
        attend_runs(rows, num_rows, group, stored, runs, offset, seen, scales, state, shape, tile, columns)
        peaks, totals, sums = state
        for row in range(num_rows):
            token, head = first_tokens[part] + row // group, first_head + row % group
            lse[token, head] = peaks[row] * scale + np.log(totals[row])
            write_heads(outputs, output_strides, token, head, sums[row : row + 1] / totals[row])


@njit(fastmath=True)
def _runs(first, stop, blocks, table_strides, sequence, cache_strides, kv_head, block_size, size):
    """Of keys [first, stop) of a sequence, those that lie together; see :func:`attend_runs`."""
    number, length = 0, stop - first
    runs = np.empty((length // min(PART, block_size) + length // block_size + 3, 3), np.int64)
    while first < stop:
        block_at, offset = place_of(blocks, table_strides, sequence, first, cache_strides, kv_head, block_size)
        count = min(PART, block_size - offset, stop - first)
        at = block_at + offset * cache_strides[2]
        runs[number] = at, at + size, count
        first, number = first + count, number + 1
    return runs[:number]
