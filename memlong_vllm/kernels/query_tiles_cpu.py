"""Attention of many query rows on a CPU with AVX-512, some rows at a time, over runs of keys and values.

Keys are made columns once a run, for all rows: then nothing is added up across a vector, and products
of rows and keys are sums in registers.
"""

from __future__ import annotations

import numpy as np
import torch

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.numba_threads import njit
from memlong_vllm.kernels.online_softmax_cpu import weigh
from memlong_vllm.kernels.vectors_cpu import MAX_SUMS, VECTOR, add_weighted, get, num_vectors, score_columns

TILE_TOKENS = 128
"""Query tokens of a work item: what is prepared of keys serves them all."""

_MAX_ROWS = 6


def suits(dtype: torch.dtype) -> bool:
    """Whether this is the faster way: its sums need AVX-512's registers."""
    return dtype in (torch.float32, torch.bfloat16) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def tile_of(head_size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rows that are taken at once, and vectors of keys that they are scored with, as arguments that kernels are
    compiled for."""
    rows = min(_MAX_ROWS, max(1, MAX_SUMS // num_vectors(head_size)))
    columns = next(number for number in (8, 4, 2) if number * rows <= MAX_SUMS)
    return (0.0,) * rows, (0.0,) * columns


@njit(fastmath=True)
def padded_rows(number, tile):
    """So many rows that all are taken in whole tiles."""
    return (number + len(tile) - 1) // len(tile) * len(tile)


@njit(fastmath=True)
def attend_runs(rows, num_rows, group, stored, runs, offset, window, scales, state, shape, tile, columns):
    """Let rows attend to runs of keys and values, one after the other.

    Args:
        rows: [padded_rows, d] float32, of each token the query heads that share a key-value head.
        num_rows: those that are not padding; ``group`` of them a token.
        stored: keys, the elements from key to key, values, the elements from value to value.
        runs: [n, 3] int64, element of the first key, of the first value, and how many, ``PART`` at most.
        offset, window: token i sees of all runs' keys those from ``i + offset - window + 1`` to ``i + offset``;
            with ``window`` 0 all of them.
        scales: [group] float32, positive.
        state: of :func:`memlong_vllm.kernels.online_softmax_cpu.begin`, a row each.
        shape, tile, columns: of :func:`memlong_vllm.kernels.vectors_cpu.shape_of` and :func:`tile_of`.
    """
    keys, key_stride, values, value_stride = stored
    size, sums = rows.shape[1], state[2]
    turned, scores = np.zeros((size, PART), np.float32), np.empty((len(tile), PART), np.float32)
    before = 0
    for run in range(len(runs)):
        key_at, value_at, count = runs[run]
        for p in range(count):
            for e in range(size):
                turned[e, p] = get(keys, key_at + p * key_stride + e)
        for row in range(0, num_rows, len(tile)):
            last = min(row + len(tile), num_rows) - 1
            if window > 0:
                is_seen = row // group + offset - window + 1 < before + count and last // group + offset >= before
            else:
                is_seen = True
            if is_seen:
                for column in range(0, count, VECTOR * len(columns)):
                    score_columns(
                        rows, row * size, size, size, turned, column, PART, scores, column, PART, tile, columns
                    )
                for j in range(len(tile)):
                    first, end = 0, count
                    if window > 0:
                        newest = (row + j) // group + offset - before
                        first = min(count, max(0, newest - window + 1))
                        end = max(first, min(count, newest + 1))
                    weigh(scores, j, first, end, scales[(row + j) % group], state, row + j)
                at = row * size
                add_weighted(scores, 0, PART, values, value_at, value_stride, count, sums, at, size, shape, tile)
        before += count
