"""What ``memory_adapter: "linear"`` multiplies: stored tokens, each with those before it in its chunk.

A layer that copies looks for a token by the one before it, and finds that in its keys because a
layer further down has put it there. What a memory layer below that one stores says nothing of a
token's neighbours; ``memory_adapter_width`` lets the adapter see them.
"""

from __future__ import annotations

import torch


def adapter_input(stored: torch.Tensor, width: int, chunk_size: int, first: int = 0) -> torch.Tensor:
    """Each token's [k;v], followed by that of the token before it, up to ``width`` tokens.

    Args:
        stored: [..., T, C], tokens in their order, of whole chunks or of a part of them.
        width: tokens, itself included, that a token is seen with; zeros stand for those of other chunks.
        chunk_size: tokens a chunk.
        first: number of the first token, where number 0 and every ``chunk_size``-th begin a chunk.

    Returns:
        [..., T, width * C]; ``stored`` itself for a width of 1. The first width - 1 tokens lack
        those before them unless a chunk begins there.
    """
    if width == 1:
        return stored
    count = stored.shape[-2]
    place = torch.arange(first, first + count, device=stored.device) % chunk_size
    seen = stored.new_zeros(*stored.shape[:-1], width, stored.shape[-1])
    for distance in range(width):
        before = seen[..., distance, :]
        before[..., distance:, :] = stored[..., : max(0, count - distance), :]
        before.masked_fill_((place < distance)[:, None], 0)
    return seen.flatten(-2)
