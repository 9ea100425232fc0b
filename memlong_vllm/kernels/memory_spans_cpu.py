"""Attention of spans to their retrieved chunks on a CPU with AVX-512, read where they lie."""

from __future__ import annotations

import numpy as np

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.fusing_cpu import fuse, rotate, weights_of_scores
from memlong_vllm.kernels.numba_threads import njit, prange
from memlong_vllm.kernels.online_softmax_cpu import begin
from memlong_vllm.kernels.query_tiles_cpu import TILE_TOKENS, attend_runs, padded_rows
from memlong_vllm.worker.step_buffers import FIRST_ENTRY, FIRST_SLOT, NUM_CHUNKS, NUM_TOKENS, ROW


@njit(parallel=True, fastmath=True)
def attend_spans(
    query,
    output,
    cos_sin,
    gate,
    bias,
    stored_keys,
    stored_values,
    local_lse,
    tokens,
    sizes,
    shape,
    slots,
    has_slots,
    max_tokens,
    tile,
    columns,
):
    """See :meth:`memlong_vllm.kernels.retrieval_cpu.CPURetrievalKernel.attend`."""
    queries, query_strides = query
    outputs, output_strides = output
    angles, angle_strides = cos_sin
    keys, key_strides = stored_keys
    values, value_strides = stored_values
    table, token_idx, positions = tokens
    group, num_kv_heads, padded, size, rotary_dim, chunk_size, fusion, scale = sizes
    num_parts = (max_tokens + TILE_TOKENS - 1) // TILE_TOKENS
    stored = keys, key_strides[2], values, value_strides[2]
    for item in prange(len(table) * num_parts * num_kv_heads):
        span, kv_head = table[item // (num_parts * num_kv_heads)], item % num_kv_heads
        skipped = item // num_kv_heads % num_parts * TILE_TOKENS
        count = min(TILE_TOKENS, span[NUM_TOKENS] - skipped)
        if count > 0:
            entry, first_head = span[FIRST_ENTRY] + skipped, kv_head * group
            rows = np.zeros((padded_rows(count * group, tile), size), np.float32)
            for i in range(count):
                at, angles_at = token_idx[entry + i] * query_strides[0], positions[entry + i] * angle_strides[0]
                rotated = rows[i * group : (i + 1) * group]
                rotate(queries, at + first_head * padded, padded, angles, angles_at, rotary_dim, rotated)
            weights = weights_of_scores(gate, first_head, group, fusion)
            scales, state = scale * weights, begin(len(rows), size)
            runs = _runs(span, slots, has_slots, chunk_size, key_strides, value_strides, kv_head)
            attend_runs(rows, count * group, group, stored, runs, 0, 0, scales, state, shape, tile, columns)
            peaks, totals, sums = state
            for row in range(count * group):
                token, head = token_idx[entry + row // group], first_head + row % group
                at, lse = token * output_strides[0] + head * padded, peaks[row] * scales[row % group]
                fuse(
                    outputs, at, sums[row], totals[row], lse + np.log(totals[row]), local_lse, token, head,
                    weights[row % group], bias, gate, fusion,
                )  # fmt: skip


@njit(fastmath=True)
def _runs(span, slots, has_slots, chunk_size, key_strides, value_strides, kv_head):
    """Where a span's chunks lie, in runs; see :func:`memlong_vllm.kernels.query_tiles_cpu.attend_runs`."""
    length, number = span[NUM_CHUNKS] * chunk_size, 0
    together = chunk_size if has_slots else length
    runs = np.empty((length // min(PART, together) + span[NUM_CHUNKS], 3), np.int64)
    for first in range(0, length, together):
        if has_slots:
            slot = slots[span[FIRST_SLOT] + first // chunk_size]
            key_at, value_at = (
                kv_head * key_strides[0] + slot * key_strides[1],
                kv_head * value_strides[0] + slot * value_strides[1],
            )
        else:
            key_at, value_at = (
                span[ROW] * key_strides[0] + kv_head * key_strides[1],
                span[ROW] * value_strides[0] + kv_head * value_strides[1],
            )
        for start in range(0, together, PART):
            at = key_at + start * key_strides[2], value_at + start * value_strides[2]
            runs[number] = at[0], at[1], min(PART, together - start)
            number += 1
    return runs[:number]
