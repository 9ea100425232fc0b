"""Attention of many query tokens on a CPU, with its log-sum-exp, by PyTorch's own flash kernel.

Scores never exist as a whole. The kernel is what ``scaled_dot_product_attention`` runs on CPUs, which
drops the log-sum-exp; it is not public, and torch's version is given by vLLM's.
"""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of G spans. Not differentiable through the log-sum-exp.

    Args:
        query: [G, n, H, d].
        keys, values: [G, R, M, d], in the query's dtype.
        mask: [n, M], added to the scaled scores; in the query's dtype.

    Returns:
        [G, n, H, d], and the scores' log-sum-exp [G, n, H] float32.
    """
    spans, tokens, heads, size = query.shape
    group = heads // keys.shape[1]
    # The kernel's batch is a span's key-value head, its heads are those that share it: it takes
    # shared keys as they are.
    rows = query.view(spans, tokens, -1, group, size).permute(0, 2, 3, 1, 4).flatten(0, 1)
    shared = [stored.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for stored in (keys, values)]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, *shared, attn_mask=mask, scale=scale)
    outputs, lses = (t.unflatten(0, (spans, -1)).movedim(3, 1).flatten(2, 3) for t in (output, lse))
    return outputs, lses


def attend_scaled(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`memlong_vllm.memory_attention.attend_with_lse`, without gradients."""
    largest = scale.max()
    if bool((scale != largest).any()):
        query = (query * (scale / largest)[:, None]).to(keys.dtype)
    # What is added to all of a head's scores changes their log-sum-exp, and not their softmax.
    output, lse = attend(query, keys, values, float(largest))
    return output, lse + bias
