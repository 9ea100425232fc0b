"""All that a retrieval layer does for decoding sequences on a CPU, in one pass over their rows.

The rotation of the query, attention to the row and its fusion with the output of local attention are
small beside reading keys and values once, if they are not operations of their own: each of those takes
as long as reading several chunks.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels.exponentials_cpu import PART
from memlong_vllm.kernels.head_shape import FUSIONS, HeadShape
from memlong_vllm.kernels.numba_threads import flat, njit, prange, use_threads
from memlong_vllm.kernels.online_softmax_cpu import absorb, begin, end
from memlong_vllm.kernels.vectors_cpu import dot, get, heads_at_once, put, shape_of
from memlong_vllm.worker.step_buffers import FIRST_ENTRY, NUM_CHUNKS, NUM_COLUMNS, NUM_TOKENS, ROW, Spans, Stored

_GATED, _SCALED_LOGITS = FUSIONS.index("gated"), FUSIONS.index("scaled_logits")
# Numba compiles them as constants.
_COLUMNS = FIRST_ENTRY, NUM_TOKENS, NUM_CHUNKS, ROW


class RowsKernel:
    """Attention of spans of one token to rows of the working set; the CPU's counterpart of
    :class:`memlong_vllm.kernels.launcher.RetrievalKernel`.

    Args:
        dtype: of queries, outputs, keys and values: float32 or bfloat16.
    """

    def __init__(self, heads: HeadShape, memory: MemoryConfig, dtype: torch.dtype) -> None:
        self._heads, self._chunk_size = heads, memory.chunk_size
        self._fusion = FUSIONS.index(memory.fusion)
        self._no_bias = torch.zeros(heads.num_heads, dtype=dtype)
        self._no_lse = torch.zeros(1, heads.num_heads, dtype=torch.float32)
        self._compile(dtype)

    @staticmethod
    def suits(memory: MemoryConfig, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for a configuration."""
        is_per_chunk = memory.fusion == "gated" and memory.memory_softmax == "chunk"
        return dtype in (torch.float32, torch.bfloat16) and not is_per_chunk

    def _compile(self, dtype: torch.dtype) -> None:
        """Now, or from Numba's cache of earlier runs, and not when the first token is decoded."""
        heads = self._heads
        rows = torch.zeros(1, heads.num_heads * heads.padded_dim, dtype=dtype)
        keys = torch.zeros(1, heads.num_kv_heads, self._chunk_size, heads.head_dim, dtype=dtype)
        entry, table = torch.zeros(1, dtype=torch.int64), torch.zeros(1, NUM_COLUMNS, dtype=torch.int32)
        cos_sin = torch.zeros(1, heads.rotary_dim, dtype=dtype)
        self.attend(rows, rows, Spans(table, entry, entry, 1), Stored(keys, keys, None), cos_sin, self._no_bias)

    def attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        spans: Spans,
        stored: Stored,
        cos_sin: torch.Tensor,
        gate: torch.Tensor,
        bias: torch.Tensor | None = None,
        local_lse: torch.Tensor | None = None,
    ) -> None:
        """As :meth:`memlong_vllm.kernels.launcher.RetrievalKernel.attend`, of chunks that lie in rows."""
        use_threads()
        heads = self._heads
        bias = self._no_bias if bias is None else bias
        lse = (self._no_lse if local_lse is None else local_lse).numpy()
        arrays = [part for t in (query, output, cos_sin, gate, bias, stored.keys, stored.values) for part in flat(t)]
        tokens = spans.table.numpy(), spans.token_idx.numpy(), spans.positions.numpy()
        sizes = heads.group, heads.num_kv_heads, heads.padded_dim, heads.head_dim, heads.rotary_dim, self._chunk_size
        shape, together = shape_of(heads.head_dim), heads_at_once(heads.group, -(-heads.head_dim // 16))
        _attend(*arrays, lse, *tokens, *sizes, self._fusion, np.float32(heads.head_dim**-0.5), shape, together)


@njit(parallel=True, fastmath=True)
def _attend(
    query,
    query_strides,
    output,
    output_strides,
    cos_sin,
    cos_sin_strides,
    gate,
    gate_strides,
    bias,
    bias_strides,
    keys,
    key_strides,
    values,
    value_strides,
    local_lse,
    table,
    token_idx,
    positions,
    group,
    num_kv_heads,
    padded,
    size,
    rotary_dim,
    chunk_size,
    fusion,
    scale,
    shape,
    together,
):
    first_entry, num_tokens, num_chunks, row_of = _COLUMNS
    for item in prange(len(table) * num_kv_heads):
        span, kv_head = table[item // num_kv_heads], item % num_kv_heads
        if span[num_tokens] > 0:
            entry, first = span[first_entry], kv_head * group
            token = token_idx[entry]
            rotated, scales = np.empty((group, size), np.float32), np.full(group, scale)
            at = token * query_strides[0] + first * padded
            _rotate(query, at, padded, cos_sin, positions[entry] * cos_sin_strides[0], rotary_dim, rotated)
            if fusion == _SCALED_LOGITS:
                for j in range(group):
                    scales[j] *= _sigmoid(get(gate, first + j))
            key_at = span[row_of] * key_strides[0] + kv_head * key_strides[1]
            value_at = span[row_of] * value_strides[0] + kv_head * value_strides[1]
            stored = keys, key_at, key_strides[2], values, value_at, value_strides[2]
            memory, lse = np.empty((group, size), np.float32), np.empty(group, np.float32)
            _read(rotated, stored, span[num_chunks] * chunk_size, scales, memory, lse, shape, together)
            for j in range(group):
                target, head = token * output_strides[0] + (first + j) * padded, first + j
                if fusion == _GATED:
                    _add(output, target, math.tanh(get(gate, head)), memory[j])
                else:
                    bias_of_head = get(bias, head) * (scales[j] / scale)
                    _merge(output, target, _sigmoid(lse[j] + bias_of_head - local_lse[token, head]), memory[j])


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


@njit(fastmath=True)
def _rotate(query, at, padded, cos_sin, cos_sin_at, rotary_dim, rotated):
    """RoPE on the first elements of each head."""
    half = rotary_dim // 2
    for j in range(rotated.shape[0]):
        for e in range(half):
            low, high = get(query, at + j * padded + e), get(query, at + j * padded + half + e)
            cos, sin = get(cos_sin, cos_sin_at + e), get(cos_sin, cos_sin_at + half + e)
            rotated[j, e], rotated[j, half + e] = low * cos - high * sin, high * cos + low * sin
        for e in range(rotary_dim, rotated.shape[1]):
            rotated[j, e] = get(query, at + j * padded + e)


@njit(fastmath=True)
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + np.float32(math.exp(-x)))


@njit(fastmath=True)
def _add(output, at, weight, memory):
    for e in range(len(memory)):
        put(output, at + e, get(output, at + e) + weight * memory[e])


@njit(fastmath=True)
def _merge(output, at, weight, memory):
    for e in range(len(memory)):
        local = get(output, at + e)
        put(output, at + e, local + weight * (memory[e] - local))
