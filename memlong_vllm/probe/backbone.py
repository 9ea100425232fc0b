"""A Llama backbone as its separate steps, and the keys and values of a passage it has read.

Takes ``LlamaForCausalLM`` and the reference MemLong model alike: their modules have the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import rotate_half

from memlong_vllm.config import MemLongConfig

PREFILL_ROWS = 256


@dataclass(frozen=True)
class LayerPassage:
    """Of one layer: keys before and after rotation, and values, [kv_heads, tokens, head_dim] each."""

    raw_keys: Tensor
    keys: Tensor
    values: Tensor


class Backbone:
    """The steps of a Llama model's layers, without any attention of its own.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim: of the model.
        trained_length: tokens the backbone was trained on.
        model: the transformers model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        # A converted checkpoint's max_position_embeddings is how far it reaches with memory.
        is_memlong = isinstance(config, MemLongConfig)
        trained = config.backbone_max_position_embeddings if is_memlong else None
        self.trained_length: int = trained or config.max_position_embeddings
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(token_ids)

    def project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Un-rotated q, k, v [..., heads or kv_heads, tokens, head_dim] of hidden [..., tokens, hidden]."""
        block = self.model.model.layers[layer]
        normed = block.input_layernorm(hidden)
        projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for p in projections)
        return q, k, v

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """RoPE of states [..., tokens, head_dim] at ``positions`` [tokens]."""
        cos, sin = self.model.model.rotary_emb(states, positions[None])
        return states * cos[0] + rotate_half(states) * sin[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from what its heads attended to, [..., heads, tokens, head_dim]."""
        block = self.model.model.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attended.transpose(-3, -2).flatten(-2))
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[..., vocabulary] of the last layer's output [..., hidden]."""
        return self.model.lm_head(self.model.model.norm(hidden)).float().log_softmax(dim=-1)


@torch.inference_mode()
def read_passage(backbone: Backbone, token_ids: Tensor, window: int) -> list[LayerPassage]:
    """Every layer's keys and values of a passage [tokens] read with sliding-window attention."""
    hidden, positions = backbone.embed(token_ids), torch.arange(len(token_ids), device=token_ids.device)
    passage = []
    for layer in range(backbone.num_layers):
        query, raw_keys, values = backbone.project(layer, hidden)
        query, keys = backbone.rotate(query, positions), backbone.rotate(raw_keys, positions)
        passage.append(LayerPassage(raw_keys, keys, values))
        if layer < backbone.num_layers - 1:  # Nothing reads the last layer's output.
            hidden = backbone.finish(layer, hidden, _window_attention(query, keys, values, window))
    return passage


def _window_attention(query: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """In rows of queries, so that scores of what no window reaches are never made."""
    parts = []
    for start in range(0, query.shape[1], PREFILL_ROWS):
        end, first = min(start + PREFILL_ROWS, query.shape[1]), max(0, start - window + 1)
        distance = torch.arange(start, end, device=query.device)[:, None] - torch.arange(first, end).to(query.device)
        visible = (distance >= 0) & (distance < window)
        rows, kept, read = query[None, :, start:end], keys[None, :, first:end], values[None, :, first:end]
        parts.append(scaled_dot_product_attention(rows, kept, read, attn_mask=visible, enable_gqa=True)[0])
    return torch.cat(parts, dim=1)
