"""Some consecutive layers of a MemLong model over batches of segments, with gradients.

The same weights as the reference's, in the arithmetic of :mod:`span_attention`: what the two
compute is equal (a test holds them together), this one just does many rows and spans at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import rotate_half

from memlong_vllm.reference.modeling_memlong import MemLongDecoderLayer, MemLongForCausalLM
from memlong_vllm.training.segment_memory import Carried, SegmentMemory
from memlong_vllm.training.span_attention import (
    Attended,
    MemoryReader,
    attend,
    fold,
    local_mask,
    memory_mask,
    scores,
    unfold,
    visible_windows,
)


class LayerStack(nn.Module):
    """Layers ``layers`` of ``model``.

    Args:
        checkpointing: recompute a layer in the backward pass instead of keeping what it made.
    """

    def __init__(self, model: MemLongForCausalLM, layers: Sequence[int], checkpointing: bool = False) -> None:
        super().__init__()
        self.config = model.config.memory
        self.layer_ids = tuple(layers)
        self.layers = nn.ModuleList([model.model.layers[n] for n in layers])
        self.rotary = model.model.rotary_emb
        self.checkpointing = checkpointing
        self.num_kv_heads, self.head_dim = model.config.num_key_value_heads, model.config.head_dim
        self.group = model.config.num_attention_heads // self.num_kv_heads

    def empty(self, num_rows: int, like: torch.Tensor) -> Carried:
        """What ``num_rows`` rows carry into their first segment."""
        shape = (num_rows, self.num_kv_heads, self.config.local_window, self.head_dim)
        return Carried.empty(len(self.layers), shape, like)

    def forward(
        self, hidden: torch.Tensor, carried: Carried, memory: SegmentMemory | None = None
    ) -> tuple[torch.Tensor, Carried]:
        """Continue each row by a segment.

        Args:
            hidden: [B, T, hidden_size], T a multiple of ``retrieval_stride``.
            memory: what the spans read, or None for local attention only.

        Returns:
            Hidden states after the last of the layers, and what the rows carry on.
        """
        tokens = hidden.shape[1]
        span, window = self.config.retrieval_stride, self.config.local_window
        mask = local_mask(carried.num_tokens, tokens // span, span, window, self.group)
        rotary = self._rotary(hidden, window + tokens)
        keys, values = [], []
        for idx, layer in enumerate(self.layers):
            arguments = (
                layer,
                self.layer_ids[idx],
                hidden,
                carried.keys[idx],
                carried.values[idx],
                mask,
                rotary,
                memory,
            )
            if self.checkpointing and self.training:
                hidden, key, value = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                hidden, key, value = self._layer(*arguments)
            keys.append(key)
            values.append(value)
        num_tokens = (carried.num_tokens + tokens).clamp_max(window)
        return hidden, Carried(tuple(keys), tuple(values), num_tokens)

    def _rotary(self, hidden: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, length, d]. Scores depend on distances only, so positions are counted
        from the oldest token that is carried."""
        return self.rotary(hidden, torch.arange(length, device=hidden.device)[None])

    def _layer(
        self,
        layer: MemLongDecoderLayer,
        layer_id: int,
        hidden: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        memory: SegmentMemory | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, window = layer.self_attn, self.config.local_window
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = torch.cat([past_keys.to(key.dtype), key], 2), torch.cat([past_values.to(value.dtype), value], 2)
        carry = keys[:, :, -window:].detach(), values[:, :, -window:].detach()
        attended = self._attend(layer, layer_id, query, keys, values, mask, rotary, memory)
        hidden = hidden + attention.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), *carry

    def _attend(
        self,
        layer: MemLongDecoderLayer,
        layer_id: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        memory: SegmentMemory | None,
    ) -> torch.Tensor:
        """[B, T, H·d] from query [B, H, T, d] and un-rotated keys and values [B, R, W + T, d]."""
        cos, sin = rotary
        span, window, tokens = self.config.retrieval_stride, self.config.local_window, query.shape[2]
        folded = fold(rotate(query, cos[:, -tokens:], sin[:, -tokens:]), self.num_kv_heads, span)
        keys, values = (visible_windows(x, span, window) for x in (rotate(keys, cos, sin), values))
        local = Attended(keys, values, mask)
        if memory is None or layer_id not in self.config.retrieval_layers:
            output = attend(scores(folded, local.keys, local.mask, self.head_dim**-0.5), local.values)
        else:
            reader = MemoryReader(layer.self_attn, self.config, span)
            output = reader.fuse(folded, local, self._placed(reader, memory, rotary, tokens))
        return unfold(output, query.shape[0], span)

    def _placed(
        self, reader: MemoryReader, memory: SegmentMemory, rotary: tuple[torch.Tensor, torch.Tensor], tokens: int
    ) -> Attended:
        """The memory of each span where its readers find it: at the token before their window.

        The span that starts at s in the segment has its window's first token at s + S, counted as
        :meth:`_rotary` counts, and memory one before it (``AttendedSpan.origin``).
        """
        span = self.config.retrieval_stride
        keys, values = reader.adapted(memory.keys, memory.values)
        origins = torch.arange(0, tokens, span, device=keys.device) + span - 1
        origins = origins.repeat(keys.shape[0] // len(origins))
        # YaRN's attention scaling is in the tables. It applies to queries, not to stored keys.
        cos, sin = (table[0, origins][:, None] / self.rotary.attention_scaling for table in rotary)
        return Attended(rotate(keys, cos, sin), values, memory_mask(memory, span, self.group))


def rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [A, heads, tokens, d] by tables [A or 1, tokens or 1, d], in the tensor's dtype."""
    return (tensor * cos.unsqueeze(1) + rotate_half(tensor) * sin.unsqueeze(1)).to(tensor.dtype)
