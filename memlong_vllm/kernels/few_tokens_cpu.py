"""Attention of a few query tokens on a CPU, where it is bound by reading keys and values once.

Matrix products want many rows and contiguous operands; a decoding token has as many rows a
key-value head as heads share it, and its window lies in blocks. These kernels, compiled by Numba,
read every key and value where it is, once, in float32 or bfloat16, with arithmetic in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from memlong_vllm.kernels.numba_threads import flat, njit, prange, use_threads
from memlong_vllm.kernels.vectors_cpu import add_weighted, dot, power_of_two, shape_of

MAX_TOKENS = 4
"""Query tokens of a sequence or span up to which these kernels are the faster way."""

# Tokens attended at a time: their keys and values stay in the cache of a core.
_PART = 128
_DTYPES = (torch.float32, torch.bfloat16)


def suits(num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether spans of ``num_tokens`` that read keys of this type are best attended here."""
    return num_tokens <= MAX_TOKENS and dtype in _DTYPES


def attend_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`memlong_vllm.memory_attention.attend_with_lse`.

    Args:
        query: [G, n, H, d], in float32 or the dtype of ``keys``.
        keys, values: [G, R, M, d].
        scale, bias: [H] float32.

    Returns:
        [G, n, H, d] in the dtype of ``values``, and [G, n, H] float32.
    """
    use_threads()
    spans, tokens, heads, size = query.shape
    rows = query.reshape(-1, heads, size)
    output, lse = _float32(rows.shape), _float32(rows.shape[:2])
    span_of = np.repeat(np.arange(spans), tokens)
    arrays = *flat(rows), *flat(keys), *flat(values), span_of, scale.numpy()
    _attend_rows(*arrays, keys.shape[1], keys.shape[2], output.numpy(), lse.numpy(), shape_of(size))
    lse += bias
    return output.view(spans, tokens, heads, size).to(values.dtype), lse.view(spans, tokens, heads)


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
        output: [T, H, d], rows ``token_idx`` are written.
        lse: [T, H] float32, likewise.
    """
    use_threads()
    is_target = output.dtype == torch.float32 and output.is_contiguous()
    target = output if is_target else _float32(output.shape)
    _, num_kv_heads, block_size, _ = kv_cache.shape
    arrays = *flat(query), *flat(kv_cache), *flat(block_table), token_idx, sequence_of, positions
    sizes = num_kv_heads, block_size, window
    _attend_windows(*arrays, *sizes, np.float32(scale), target.numpy(), lse.numpy(), shape_of(query.shape[2]))
    if not is_target:
        output[token_idx] = target[token_idx].to(output.dtype)


def compile_rows(head_size: int, dtype: torch.dtype) -> None:
    """Have what :func:`attend_rows` calls compiled now, or read from Numba's cache of earlier runs."""
    if not suits(1, dtype):
        return
    rows = torch.zeros(1, 1, 1, head_size, dtype=dtype)
    attend_rows(rows, rows, rows, _float32((1,)), _float32((1,)))


def compile_windows(head_size: int, dtype: torch.dtype) -> None:
    """The same for :func:`attend_windows`."""
    if not suits(1, dtype):
        return
    query, cache = torch.zeros(1, 1, head_size, dtype=dtype), torch.zeros(1, 1, 1, 2 * head_size, dtype=dtype)
    first, table = np.zeros(1, np.int64), torch.zeros(1, 1, dtype=torch.int32)
    attend_windows(query, cache, table, first, first, first, 1, 1.0, torch.empty_like(query), _float32((1, 1)))


def _float32(shape: Sequence[int]) -> torch.Tensor:
    """Zeros, whatever PyTorch's default type is: while models are made it is theirs."""
    return torch.zeros(shape, dtype=torch.float32)


@njit(parallel=True, fastmath=True)
def _attend_rows(
    query,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    span_of,
    scale,
    num_kv_heads,
    length,
    output,
    lse,
    shape,
):
    group = len(scale) // num_kv_heads
    strides = query_strides[1], key_strides[2], value_strides[2]
    for item in prange(len(span_of) * num_kv_heads):
        row, kv_head = item // num_kv_heads, item % num_kv_heads
        span, heads = span_of[row], slice(kv_head * group, (kv_head + 1) * group)
        query_at = row * query_strides[0] + heads.start * query_strides[1]
        key_at = span * key_strides[0] + kv_head * key_strides[1]
        value_at = span * value_strides[0] + kv_head * value_strides[1]
        state = _begin(group, output.shape[2])
        for first in range(0, length, _PART):
            starts = query_at, key_at + first * key_strides[2], value_at + first * value_strides[2]
            _attend(query, keys, values, starts, strides, min(_PART, length - first), scale[heads], state, shape)
        _end(state, output[row, heads], lse[row, heads])


@njit(parallel=True, fastmath=True)
def _attend_windows(
    query,
    query_strides,
    kv_cache,
    cache_strides,
    block_table,
    table_strides,
    token_idx,
    sequence_of,
    positions,
    num_kv_heads,
    block_size,
    window,
    scale,
    output,
    lse,
    shape,
):
    group = output.shape[1] // num_kv_heads
    strides = query_strides[1], cache_strides[2], cache_strides[2]
    scales = np.full(group, scale)
    for item in prange(len(token_idx) * num_kv_heads):
        row, kv_head = item // num_kv_heads, item % num_kv_heads
        token, heads = token_idx[row], slice(kv_head * group, (kv_head + 1) * group)
        query_at = token * query_strides[0] + heads.start * query_strides[1]
        state = _begin(group, output.shape[2])
        stop = positions[row] + 1
        first = max(0, stop - window) if window > 0 else 0
        while first < stop:
            offset = first % block_size
            block = np.int64(block_table[sequence_of[row] * table_strides[0] + first // block_size])
            key_at = block * cache_strides[0] + kv_head * cache_strides[1] + offset * cache_strides[2]
            count = min(_PART, block_size - offset, stop - first)
            starts = query_at, key_at, key_at + output.shape[2]
            _attend(query, kv_cache, kv_cache, starts, strides, count, scales, state, shape)
            first += count
        _end(state, output[token, heads], lse[token, heads])


@njit(fastmath=True)
def _begin(group, size):
    """Of query heads that have attended to nothing: room for scores, the largest score so far, the
    sum of powers relative to it, and the weighted sum of values."""
    scores = np.empty((group, _PART), np.float32)
    peaks = np.full(group, np.float32(-1e30))
    return scores, peaks, np.zeros(group, np.float32), np.zeros((group, size), np.float32)


@njit(fastmath=True)
def _attend(query, keys, values, starts, strides, count, scale, state, shape):
    """Let query heads attend to ``count`` more tokens, all in the cache at once.

    Args:
        starts, strides: first element of query heads, keys and values, and elements between them.
    """
    scores, peaks, totals, sums = state
    for p in range(count):
        for j in range(len(peaks)):
            product = dot(query, starts[0] + j * strides[0], keys, starts[1] + p * strides[1], shape)
            scores[j, p] = product * scale[j]
    for j in range(len(peaks)):
        peak = peaks[j]
        for p in range(count):
            peak = max(peak, scores[j, p])
        kept = _exp(peaks[j] - peak)
        total = totals[j] * kept
        for p in range(count):
            power = _exp(scores[j, p] - peak)
            scores[j, p] = power
            total += power
        peaks[j], totals[j] = peak, total
        for e in range(sums.shape[1]):
            sums[j, e] *= kept
        add_weighted(scores, j * _PART, values, starts[2], strides[2], count, sums, j * sums.shape[1], shape)


@njit(fastmath=True)
def _end(state, output, lse):
    _, peaks, totals, sums = state
    for j in range(len(peaks)):
        lse[j] = peaks[j] + math.log(totals[j])
        for e in range(sums.shape[1]):
            output[j, e] = sums[j, e] / totals[j]


@njit(fastmath=True)
def _exp(x):
    """Of numbers up to 0, to float32's precision; what is below its range becomes 2**-126."""
    exponent = max(x * np.float32(1.4426950408889634), np.float32(-126))
    whole = np.floor(exponent + np.float32(0.5))
    part = exponent - whole
    # 2**part from -0.5 to 0.5: Taylor's series, whose next term is below 2e-8.
    power = np.float32(1.5252733804059840e-05)
    power = power * part + np.float32(1.5403530393381609e-04)
    power = power * part + np.float32(1.3333558146428443e-03)
    power = power * part + np.float32(9.6181291076284772e-03)
    power = power * part + np.float32(5.5504108664821580e-02)
    power = power * part + np.float32(2.4022650695910071e-01)
    power = power * part + np.float32(6.9314718055994531e-01)
    power = power * part + np.float32(1)
    return power * power_of_two(np.int32(whole))
