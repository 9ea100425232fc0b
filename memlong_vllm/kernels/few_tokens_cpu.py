"""Attention of a few query tokens on a CPU, where it is bound by reading keys and values once.

Matrix products want many rows and contiguous operands; a decoding token has as many rows a
key-value head as heads share it, and its window lies in blocks. These kernels, compiled by Numba,
read every key and value where it is, once, in float32 or bfloat16, with arithmetic in float32.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from typing import Any

import numpy as np
import torch
from llvmlite import ir

# Numba would count the cores that this thread may use. vLLM gives it a core of its own, and the
# other OpenMP threads the others. It counts again whenever it compiles, so what was imported before
# keeps its number in this way too.
os.environ.setdefault(
    "NUMBA_NUM_THREADS",
    str(sys.modules["numba"].config.NUMBA_NUM_THREADS if "numba" in sys.modules else torch.get_num_threads()),
)

import numba
from numba import njit, prange, types
from numba.extending import intrinsic, overload

MAX_TOKENS = 4
"""Query tokens of a sequence or span up to which these kernels are the faster way."""

_DTYPES = (torch.float32, torch.bfloat16)


def suits(num_tokens: int, stored: torch.Tensor) -> bool:
    """Whether spans of ``num_tokens`` that read ``stored`` are best attended here."""
    return num_tokens <= MAX_TOKENS and stored.device.type == "cpu" and stored.dtype in _DTYPES


def attend_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`memlong_vllm.memory_attention.attend_with_lse`.

    Args:
        query: [G, n, H, d].
        keys, values: [G, R, M, d].
        scale, bias: [H] float32.

    Returns:
        [G, n, H, d] in the dtype of ``values``, and [G, n, H] float32.
    """
    _use_threads()
    spans, tokens, heads, size = query.shape
    scaled = (query.float() * scale[:, None]).flatten(0, 1).contiguous()
    output, lse = torch.empty_like(scaled), torch.empty(scaled.shape[:2])
    span_of = np.repeat(np.arange(spans), tokens)
    arrays = scaled.numpy(), _array(keys), _array(values), span_of, bias.float().numpy()
    _attend_rows(*arrays, output.numpy(), lse.numpy())
    return output.view(spans, tokens, heads, size).to(values.dtype), lse.view(spans, tokens, heads)


def attend_windows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_of: np.ndarray,
    positions: np.ndarray,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over a sliding window in blocks.

    Args:
        query: [N, H, d], rotated.
        kv_cache: [num_blocks, R, block_size, 2·d], key then value in each row.
        block_table: [sequences, blocks] int32.
        sequence_of, positions: [N] int64, whose token a row is and where it stands in its sequence.
        window: tokens that a token sees, itself included; 0: all.

    Returns:
        [N, H, d] and its log-sum-exp [N, H], float32.
    """
    _use_threads()
    scaled = (query.float() * scale).contiguous()
    output, lse = torch.empty_like(scaled), torch.empty(scaled.shape[:2])
    first = np.maximum(positions - window + 1, 0) if window > 0 else np.zeros_like(positions)
    table = block_table.numpy()
    _attend_windows(
        scaled.numpy(), _array(kv_cache), table, sequence_of, first, positions + 1, output.numpy(), lse.numpy()
    )
    return output, lse


def _use_threads() -> None:
    """Use as many threads as PyTorch does."""
    _launch_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def _launch_threads() -> None:
    # Launching sets the number of OpenMP threads of the thread that does it, and vLLM's kernels
    # must find that of this one unchanged.
    launching = threading.Thread(target=numba.get_num_threads)
    launching.start()
    launching.join()


def _array(tensor: torch.Tensor) -> np.ndarray:
    """float32 as it is, bfloat16 as its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@intrinsic
def _bits_as_float(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _number(stored):
    """A stored number as float32; only in compiled code."""


# Numba compares the signatures, so there are no types.
@overload(_number)
def _number_of(stored):
    if stored == types.uint16:
        return lambda stored: _bits_as_float(np.uint32(np.uint32(stored) << np.uint32(16)))
    return lambda stored: stored


@njit(fastmath=True, cache=True)
def _score(query: Any, key: Any, size: int) -> Any:
    total = np.float32(0)
    for e in range(size):
        total += query[e] * _number(key[e])
    return total


@njit(fastmath=True, cache=True)
def _normalise(scores: Any) -> Any:
    """Softmax in place. Returns the log-sum-exp."""
    highest = scores[0]
    for p in range(len(scores)):
        highest = max(highest, scores[p])
    total = np.float32(0)
    for p in range(len(scores)):
        scores[p] = math.exp(scores[p] - highest)
        total += scores[p]
    for p in range(len(scores)):
        scores[p] /= total
    return highest + math.log(total)


@njit(parallel=True, fastmath=True, cache=True)
def _attend_rows(query, keys, values, span_of, bias, output, lse):
    num_rows, num_heads, size = query.shape
    num_kv_heads, length = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    for item in prange(num_rows * num_kv_heads):
        row, kv_head = item // num_kv_heads, item % num_kv_heads
        span, first_head = span_of[row], kv_head * group
        scores = np.empty((group, length), np.float32)
        for p in range(length):
            key = keys[span, kv_head, p]
            for j in range(group):
                scores[j, p] = _score(query[row, first_head + j], key, size) + bias[first_head + j]
        for j in range(group):
            lse[row, first_head + j] = _normalise(scores[j])
            output[row, first_head + j] = 0
        for p in range(length):
            value = values[span, kv_head, p]
            for j in range(group):
                for e in range(size):
                    output[row, first_head + j, e] += scores[j, p] * _number(value[e])


@njit(parallel=True, fastmath=True, cache=True)
def _attend_windows(query, kv_cache, block_table, sequence_of, first, end, output, lse):
    num_rows, num_heads, size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[2]
    group = num_heads // num_kv_heads
    for item in prange(num_rows * num_kv_heads):
        row, kv_head = item // num_kv_heads, item % num_kv_heads
        blocks, start, first_head = block_table[sequence_of[row]], first[row], kv_head * group
        length = end[row] - start
        scores = np.empty((group, length), np.float32)
        for p in range(length):
            stored = kv_cache[blocks[(start + p) // block_size], kv_head, (start + p) % block_size]
            for j in range(group):
                scores[j, p] = _score(query[row, first_head + j], stored, size)
        for j in range(group):
            lse[row, first_head + j] = _normalise(scores[j])
            output[row, first_head + j] = 0
        for p in range(length):
            stored = kv_cache[blocks[(start + p) // block_size], kv_head, (start + p) % block_size]
            for j in range(group):
                for e in range(size):
                    output[row, first_head + j, e] += scores[j, p] * _number(stored[size + e])
