"""The arithmetic of attending to retrieved chunks (section 3.3). Plain PyTorch, any device.

Shapes: G spans, n tokens a span, H query heads, R key-value heads, M memory tokens, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fold_heads(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[G, n, H, d] -> [G, R, (H/R)·n, d]: query heads that share a key head become rows, which
    is all that grouped-query attention needs where no mask is involved."""
    spans, tokens, heads, size = query.shape
    query = query.view(spans, tokens, num_kv_heads, heads // num_kv_heads, size)
    return query.permute(0, 2, 3, 1, 4).reshape(spans, num_kv_heads, -1, size)


def unfold_heads(folded: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[G, R, (H/R)·n, ...] -> [G, n, H, ...], the inverse of :func:`fold_heads`."""
    spans, kv_heads = folded.shape[:2]
    unfolded = folded.view(spans, kv_heads, -1, num_tokens, *folded.shape[3:])
    return unfolded.movedim(3, 1).flatten(2, 3)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One softmax over all memory tokens.

    Args:
        query: [G, n, H, d], rotated to local positions.
        keys, values: [G, R, M, d], un-rotated (position 0).

    Returns:
        [G, n, H, d].
    """
    folded = fold_heads(query, keys.shape[1])
    return unfold_heads(F.scaled_dot_product_attention(folded, keys, values, scale=scale), query.shape[1])


def attend_chunks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, chunk_size: int
) -> torch.Tensor:
    """One softmax per chunk, summed over chunks: Eq. 3 to the letter. Shapes as in :func:`attend`."""
    folded = fold_heads(query, keys.shape[1])
    scores = (folded @ keys.transpose(-1, -2)).float() * scale
    weights = scores.unflatten(-1, (-1, chunk_size)).softmax(dim=-1).flatten(-2)
    return unfold_heads(weights.to(values.dtype) @ values, query.shape[1])


def attend_with_lse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`attend`, also returning how much there was to attend to.

    Args:
        scale, bias: [H] float32; a head's scores are ``scale * (query · key) + bias``.

    Returns:
        Output [G, n, H, d] and the scores' log-sum-exp [G, n, H], float32.
    """
    num_tokens, num_kv_heads = query.shape[1], keys.shape[1]

    def rows(per_head: torch.Tensor) -> torch.Tensor:
        return fold_heads(per_head.view(1, 1, -1, 1).expand(1, num_tokens, -1, 1), num_kv_heads)

    folded = fold_heads(query, num_kv_heads)
    scores = (folded @ keys.transpose(-1, -2)).float() * rows(scale) + rows(bias)
    output = scores.softmax(dim=-1).to(values.dtype) @ values
    return unfold_heads(output, num_tokens), unfold_heads(scores.logsumexp(dim=-1), num_tokens)


def merge(local: torch.Tensor, local_lse: torch.Tensor, memory: torch.Tensor, memory_lse: torch.Tensor) -> torch.Tensor:
    """Join two softmaxes over disjoint keys into the one over their union.

    Args:
        local, memory: [..., d] outputs.
        local_lse, memory_lse: [...] float32 log-sum-exp of their scores.
    """
    weight = torch.sigmoid(memory_lse - local_lse).unsqueeze(-1)
    return torch.lerp(local.float(), memory.float(), weight).to(local.dtype)
