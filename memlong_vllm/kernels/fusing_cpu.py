"""What a retrieval layer does around its attention, for the CPU's kernels: rotating queries, joining outputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memlong_vllm.kernels.head_shape import FUSIONS
from memlong_vllm.kernels.numba_threads import njit
from memlong_vllm.kernels.vectors_cpu import get, put

# With it scores are all but equal, and what is hidden stays so.
_LEAST_WEIGHT = np.float32(1e-20)
_GATED, _SCALED_LOGITS = FUSIONS.index("gated"), FUSIONS.index("scaled_logits")


class RetrievalSizes(NamedTuple):
    """What a kernel of a retrieval layer is told, beside tensors.

    Attributes:
        group: query heads that share a key-value head, of which there are ``num_kv_heads``.
        padded_dim: elements of a head in queries and outputs; ``head_dim``: in keys and values.
        rotary_dim: of these the first that are rotated, in halves.
        chunk_size: tokens.
        fusion: number of one of :data:`memlong_vllm.kernels.head_shape.FUSIONS`.
        scale: float32, what products of queries and keys are multiplied by; positive.
    """

    group: int
    num_kv_heads: int
    padded_dim: int
    head_dim: int
    rotary_dim: int
    chunk_size: int
    fusion: int
    scale: np.float32


@njit(fastmath=True)
def rotate(query, at, padded, cos_sin, cos_sin_at, rotary_dim, rotated):
    """RoPE on the first elements of each head: from heads of ``query``, ``padded`` elements apart, to ``rotated``."""
    half = rotary_dim // 2
    for j in range(rotated.shape[0]):
        for e in range(half):
            low, high = get(query, at + j * padded + e), get(query, at + j * padded + half + e)
            cos, sin = get(cos_sin, cos_sin_at + e), get(cos_sin, cos_sin_at + half + e)
            rotated[j, e], rotated[j, half + e] = low * cos - high * sin, high * cos + low * sin
        for e in range(rotary_dim, rotated.shape[1]):
            rotated[j, e] = get(query, at + j * padded + e)


@njit(fastmath=True)
def weights_of_scores(gate, first_head, group, fusion):
    """[group] float32, what a fusion multiplies the scores and biases of heads by."""
    weights = np.ones(group, np.float32)
    if fusion == _SCALED_LOGITS:
        for j in range(group):
            weights[j] = max(_sigmoid(get(gate, first_head + j)), _LEAST_WEIGHT)
    return weights


@njit(fastmath=True)
def fuse(output, at, memory, total, lse, local_lse, token, head, weight_of_scores, bias, gate, fusion):
    """Join a head's memory attention, ``memory`` / ``total``, into its output of local attention at ``at``.

    Args:
        lse: of the memory's scores without bias.
        local_lse: [num_tokens, H] float32, of the local ones; not for ``gated``.
        weight_of_scores: the head's, of :func:`weights_of_scores`.
        bias, gate: of all heads.
    """
    if fusion == _GATED:
        kept, weight = np.float32(1), np.float32(np.tanh(get(gate, head)))
    else:
        weight = _sigmoid(lse + get(bias, head) * weight_of_scores - local_lse[token, head])
        kept = np.float32(1) - weight
    factor = weight / total
    for e in range(len(memory)):
        put(output, at + e, kept * get(output, at + e) + factor * memory[e])


@njit(fastmath=True)
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + np.float32(np.exp(-x)))
