"""The softmax of query heads that attend to one part of their tokens after another, for the CPU's kernels."""

from __future__ import annotations

import numpy as np

from memlong_vllm.kernels.exponentials_cpu import HIDDEN, PART, largest, powers
from memlong_vllm.kernels.numba_threads import njit
from memlong_vllm.kernels.vectors_cpu import add_weighted

_HIDDEN = np.float32(HIDDEN)


@njit(fastmath=True)
def begin(rows, size):
    """Of query heads that have attended to nothing: the largest score so far, the sum of powers relative to
    it, and the weighted sum of values."""
    return np.full(rows, _HIDDEN), np.zeros(rows, np.float32), np.zeros((rows, size), np.float32)


@njit(fastmath=True)
def weigh(scores, j, first, count, scale, state, row):
    """Make weights of a row's scores for tokens [first, count) of a part, and of what the row has attended to so
    far something that is relative to the same score. The others' are next to nothing, and not 0 (see
    :mod:`memlong_vllm.kernels.exponentials_cpu`): until a row has attended to something they may even be 1, and are
    multiplied by 0 once it has.

    Args:
        scores: [some, PART] float32, products of query and keys; ``j``: which are the row's.
        scale: what they are multiplied by; positive.
        state: of :func:`begin`.
    """
    peaks, totals, sums = state
    for p in range(first):
        scores[j, p] = _HIDDEN
    for p in range(count, PART):
        scores[j, p] = _HIDDEN
    peak = largest(scores, j * PART, peaks[row])
    total = powers(scores, j * PART, peak, scale)
    if peak > peaks[row]:
        kept = np.float32(np.exp((peaks[row] - peak) * scale))
        total += totals[row] * kept
        for e in range(sums.shape[1]):
            sums[row, e] *= kept
        peaks[row], totals[row] = peak, total
    else:
        totals[row] += total


@njit(fastmath=True)
def absorb(values, value_at, stride, scores, first, count, scale, state, shape, together):
    """Let query heads attend to tokens [first, count) of a part.

    Args:
        value_at, stride: element at which the part's first value begins, and elements from value to value.
        scores: [heads, PART] float32, products of each head and the keys; overwritten.
        scale: [heads] float32, what they are multiplied by; positive.
        state: of :func:`begin`, a row a head.
        together: of :func:`memlong_vllm.kernels.vectors_cpu.heads_at_once`.
    """
    sums = state[2]
    size = sums.shape[1]
    for j in range(len(sums)):
        weigh(scores, j, first, count, scale[j], state, j)
    at, number = value_at + first * stride, count - first
    for j in range(0, len(sums), len(together)):
        add_weighted(scores, j * PART + first, PART, values, at, stride, number, sums, j * size, size, shape, together)


@njit(fastmath=True)
def end(state, scale, output, lse):
    """What the heads have attended to, [heads, size], and the log-sum-exp of their scores, [heads]."""
    peaks, totals, sums = state
    for j in range(len(peaks)):
        lse[j] = peaks[j] * scale[j] + np.log(totals[j])
        for e in range(sums.shape[1]):
            output[j, e] = sums[j, e] / totals[j]
