"""Attention of a batch of segments, span by span, with gradients. Section 3.3 for training.

The reference attends over one dense mask, the engine over vLLM's blocks; here every retrieval
span of every row is one item of a batched matrix product: S queries, the W + S local keys that
they can see, and M tokens of memory. Shapes: N spans in all, H query heads, R key-value heads,
g = H / R, S tokens a span, W local window, d head size.

Memory lies at position 0 and its reader at p(t) = t - origin, so a key rotated to ``origin`` gives
the same scores to a query rotated to t as an un-rotated key gives to one rotated to p(t). That
lets one rotated query serve both softmaxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memlong_vllm.adapter_input import adapter_input
from memlong_vllm.config import MemoryConfig
from memlong_vllm.reference.modeling_memlong import MemLongAttention
from memlong_vllm.training.segment_memory import SegmentMemory


def local_mask(num_carried: torch.Tensor, num_spans: int, span: int, window: int, group: int) -> torch.Tensor:
    """What spans may see of their rows: 0 or -inf, [N or 1, 1, g·S, W + S] float32.

    Args:
        num_carried: [B] tokens before the segment that belong to the document.
        group: g.
    """
    device = num_carried.device
    query, key = torch.arange(span, device=device)[:, None], torch.arange(window + span, device=device)
    visible = ((key > query) & (key <= query + window))[None]
    if bool((num_carried < window).any()):
        place = torch.arange(num_spans, device=device)[:, None] * span + key
        belongs = place >= (window - num_carried)[:, None, None]
        visible = visible & belongs.flatten(0, 1)[:, None, :]
    mask = torch.zeros(visible.shape, device=device).masked_fill(~visible, float("-inf"))
    return mask.repeat(1, group, 1)[:, None]


def memory_mask(memory: SegmentMemory, span: int, group: int) -> torch.Tensor:
    """0 where a token reads a memory token, -inf where that is padding or the token reads none: float32,
    [N, 1, 1, M], or [N, 1, g·S, M] if spans differ in themselves."""
    device, length = memory.keys.device, memory.keys.shape[2]
    absent = (torch.arange(length, device=device) >= memory.num_tokens[:, None])[:, None]
    if bool((memory.first > 0).any()):
        absent = absent | (torch.arange(span, device=device) < memory.first[:, None])[:, :, None]
        absent = absent.repeat(1, group, 1)
    return torch.zeros(absent.shape, device=device).masked_fill(absent, float("-inf"))[:, None]


def fold(query: torch.Tensor, num_kv_heads: int, span: int) -> torch.Tensor:
    """[B, H, n·S, d] -> [N, R, g·S, d]: queries that share a key head become rows."""
    rows, heads, tokens, size = query.shape
    spans = query.view(rows, num_kv_heads, heads // num_kv_heads, tokens // span, span, size)
    return spans.permute(0, 3, 1, 2, 4, 5).reshape(rows * (tokens // span), num_kv_heads, -1, size)


def unfold(output: torch.Tensor, num_rows: int, span: int) -> torch.Tensor:
    """[N, R, g·S, d] -> [B, n·S, H·d], the inverse of :func:`fold` with heads joined."""
    kv_heads, size = output.shape[1], output.shape[-1]
    spans = output.view(num_rows, -1, kv_heads, output.shape[2] // span, span, size)
    return spans.permute(0, 1, 4, 2, 3, 5).reshape(num_rows, -1, kv_heads * (output.shape[2] // span) * size)


def visible_windows(tokens: torch.Tensor, span: int, window: int) -> torch.Tensor:
    """[B, R, W + T, d] -> [N, R, W + S, d]: what each span can see of its row."""
    return tokens.unfold(2, window + span, span).permute(0, 2, 1, 4, 3).flatten(0, 1)


def scores(query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * query · key + bias, [N, R, g·S, keys].

    Args:
        query: [N, R, g·S, d].
        keys: [N, R, keys, d].
        bias: broadcasts to the result.
    """
    shape = (*query.shape[:3], keys.shape[2])
    added = bias.to(query.dtype).expand(shape).flatten(0, 1)
    keys = keys.to(query.dtype).flatten(0, 1).transpose(1, 2)
    return torch.baddbmm(added, query.flatten(0, 1), keys, alpha=scale).view(shape)


def attend(scored: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(scored) · values, [N, R, g·S, d]."""
    return scored.softmax(dim=-1).to(values.dtype) @ values


@dataclass(frozen=True)
class Attended:
    """Keys (rotated) and values [N, R, tokens, d] with a mask that broadcasts to [N, R, g·S, tokens]."""

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor

    @property
    def present(self) -> torch.Tensor:
        """Whether there is anything at all, [N, 1, 1 or g·S, 1]; padding is always at the end."""
        return self.mask[..., :1] == 0


class MemoryReader:
    """Joins a span's memory with its window, as the configured fusion says, for one layer.

    Args:
        attention: the retrieval layer's parameters.
        span: S.
    """

    def __init__(self, attention: MemLongAttention, config: MemoryConfig, span: int) -> None:
        self.attention, self.config, self.span = attention, config, span
        self.kv_heads, self.scale = attention.num_kv_heads, attention.head_dim**-0.5

    def adapted(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored keys and values [N, R, M, d] as this layer wants them."""
        if self.config.memory_adapter is None:
            return keys, values
        both = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (keys, values)], dim=-1)
        both = adapter_input(both, self.config.memory_adapter_width, self.config.chunk_size)
        weights = (self.attention.memory_k_adapter, self.attention.memory_v_adapter)
        key, value = (
            torch.nn.functional.linear(both, weight).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for weight in weights
        )
        return key, value

    def _per_head(self, parameter: torch.Tensor) -> torch.Tensor:
        """[H] -> [1, R, g·S, 1], one a folded row."""
        return parameter.view(1, self.kv_heads, -1, 1).repeat_interleave(self.span, dim=2)

    def fuse(self, query: torch.Tensor, local: Attended, memory: Attended) -> torch.Tensor:
        """Attend to both: [N, R, g·S, d].

        Args:
            query: [N, R, g·S, d], rotated to positions t.
        """
        if self.config.fusion == "gated":
            local_scores = scores(query, local.keys, local.mask, self.scale)
            return attend(local_scores, local.values) + self._gated(query, memory)
        local_query = memory_query = query
        bias = self._per_head(self.attention.memory_bias) if self.config.memory_bias else query.new_zeros(1)
        if self.config.fusion == "scaled_logits":
            # Queries are weighed, not scores: a masked score times a gate has no gradient but NaN.
            gate = self._per_head(self.attention.memory_gate).sigmoid().to(query.dtype)
            # A token with nothing retrieved uses plain local attention, whatever the fusion.
            local_query = torch.where(memory.present, query * (1 - gate), query)
            memory_query, bias = query * gate, bias * gate
        local_scores = scores(local_query, local.keys, local.mask, self.scale)
        memory_scores = scores(memory_query, memory.keys, memory.mask + bias, self.scale)
        values = torch.cat([memory.values.to(local.values.dtype), local.values], dim=2)
        return attend(torch.cat([memory_scores, local_scores], dim=-1), values)

    def _gated(self, query: torch.Tensor, memory: Attended) -> torch.Tensor:
        """What memory adds to local attention (Eq. 3-5), [N, R, g·S, d]."""
        # Finite where all is padding, so that the softmax there is a number, to be dropped.
        scored = scores(query, memory.keys, memory.mask.clamp_min(-1e4), self.scale)
        if self.config.memory_softmax == "chunk":
            chunks = (-1, self.config.chunk_size)
            kept = (memory.mask == 0).unflatten(-1, chunks)
            weights = (scored.unflatten(-1, chunks).softmax(dim=-1) * kept).flatten(-2)
        else:
            weights = scored.softmax(dim=-1)
        read = torch.where(memory.present, weights.to(query.dtype) @ memory.values.to(query.dtype), 0)
        return (torch.tanh(self._per_head(self.attention.memory_gate)) * read).to(query.dtype)
