"""Attention of decoding sequences to their rows of the working set on a CPU, in one pass over each.

The rotation of the query and the fusion with the output of local attention are small beside reading keys
and values once, if they are not operations of their own: each of those takes as long as reading several chunks.
"""

from __future__ import annotations

import numpy as np

from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.fusing_cpu import fuse, rotate, weights_of_scores
from memlong_vllm.kernels.numba_threads import njit, prange
from memlong_vllm.kernels.online_softmax_cpu import absorb, begin, end
from memlong_vllm.kernels.vectors_cpu import dot
from memlong_vllm.worker.step_buffers import FIRST_ENTRY, NUM_CHUNKS, NUM_TOKENS, ROW


@njit(parallel=True, fastmath=True)
def attend_rows(
    query, output, cos_sin, gate, bias, stored_keys, stored_values, local_lse, tokens, sizes, shape, together
):
    """See :meth:`memlong_vllm.kernels.retrieval_cpu.CPURetrievalKernel.attend`."""
    queries, query_strides = query
    outputs, output_strides = output
    angles, angle_strides = cos_sin
    keys, key_strides = stored_keys
    values, value_strides = stored_values
    table, token_idx, positions = tokens
    group, num_kv_heads, padded, size, rotary_dim, chunk_size, fusion, scale = sizes
    for item in prange(len(table) * num_kv_heads):
        span, kv_head = table[item // num_kv_heads], item % num_kv_heads
        if span[NUM_TOKENS] > 0:
            entry, first = span[FIRST_ENTRY], kv_head * group
            token = token_idx[entry]
            rotated, memory = np.empty((group, size), np.float32), np.empty((group, size), np.float32)
            lse = np.empty(group, np.float32)
            at = token * query_strides[0] + first * padded
            rotate(queries, at, padded, angles, positions[entry] * angle_strides[0], rotary_dim, rotated)
            weights = weights_of_scores(gate, first, group, fusion)
            key_at = span[ROW] * key_strides[0] + kv_head * key_strides[1]
            value_at = span[ROW] * value_strides[0] + kv_head * value_strides[1]
            stored = keys, key_at, key_strides[2], values, value_at, value_strides[2]
            _read(rotated, stored, span[NUM_CHUNKS] * chunk_size, scale * weights, memory, lse, shape, together)
            for j in range(group):
                at = token * output_strides[0] + (first + j) * padded
                fuse(
                    outputs, at, memory[j], np.float32(1), lse[j], local_lse, token, first + j,
                    weights[j], bias, gate, fusion,
                )  # fmt: skip


@njit(fastmath=True)
def _read(rotated, stored, length, scales, memory, lse, shape, together):
    """Attention of the query heads of a key-value head to all that is stored of it."""
    keys, key_at, key_stride, values, value_at, value_stride = stored
    group, size = rotated.shape
    state, scores = begin(group, size), np.empty((group, PART), np.float32)
    for start in range(0, length, PART):
        count = min(PART, length - start)
        for p in range(count):
            for j in range(group):
                scores[j, p] = dot(rotated, j * size, keys, key_at + (start + p) * key_stride, shape)
        at = value_at + start * value_stride
        absorb(values, at, value_stride, scores, 0, count, scales, state, shape, together)
    end(state, scales, memory, lse)
