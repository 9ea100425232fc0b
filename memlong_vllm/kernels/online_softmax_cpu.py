"""The softmax of query heads that attend to a part of their tokens after the other, for the CPU's kernels."""

from __future__ import annotations

import math

import numpy as np

from memlong_vllm.kernels.numba_threads import njit
from memlong_vllm.kernels.vectors_cpu import add_weighted, power_of_two

PART = 128
"""Tokens attended at a time: their keys and values stay in the cache of a core."""


@njit(fastmath=True)
def begin(group, size):
    """Of query heads that have attended to nothing: room for a part's scores, the largest score so
    far, the sum of powers relative to it, and the weighted sum of values."""
    scores = np.empty((group, PART), np.float32)
    peaks = np.full(group, np.float32(-1e30))
    return scores, peaks, np.zeros(group, np.float32), np.zeros((group, size), np.float32)


@njit(fastmath=True)
def absorb(values, value_at, stride, first, count, scale, state, shape, heads):
    """Let query heads attend to tokens [first, count) of a part, whose products with the keys are among
    the scores.

    Args:
        value_at, stride: element at which the part's first value begins, and elements from value to value.
        scale: [group] float32, what the products are multiplied by; positive.
        heads: of :func:`memlong_vllm.kernels.vectors_cpu.heads_at_once`.
    """
    scores, peaks, totals, sums = state
    for j in range(len(peaks)):
        peak = peaks[j]
        for p in range(first, count):
            peak = max(peak, scores[j, p])
        kept = exp((peaks[j] - peak) * scale[j])
        total = totals[j] * kept
        for p in range(first, count):
            power = exp((scores[j, p] - peak) * scale[j])
            scores[j, p] = power
            total += power
        peaks[j], totals[j] = peak, total
        for e in range(sums.shape[1]):
            sums[j, e] *= kept
    at, size = value_at + first * stride, sums.shape[1]
    for j in range(0, len(peaks), len(heads)):
        add_weighted(
            scores, j * PART + first, PART, values, at, stride, count - first, sums, j * size, size, shape, heads
        )


@njit(fastmath=True)
def end(state, scale, output, lse):
    """What the heads have attended to, [group, size] and [group]."""
    _, peaks, totals, sums = state
    for j in range(len(peaks)):
        lse[j] = peaks[j] * scale[j] + math.log(totals[j])
        for e in range(sums.shape[1]):
            output[j, e] = sums[j, e] / totals[j]


@njit(fastmath=True)
def exp(x):
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
