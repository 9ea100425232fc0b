"""MemLong in plain transformers: the oracle, the model that is trained, the code in checkpoints.

One sequence at a time and the simplest arithmetic: every attention is written out over a dense
mask of absolute positions, in one pass or continued from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from .configuration_memlong import MemLongConfig
from .retrieval import AttendedSpan, Embed, NamedMemory, SequenceMemory


class MemLongCache:
    """What a sequence carries from one forward pass to the next.

    Attributes:
        windows: per layer, rotated keys and values [heads, tokens, d] of the last tokens.
        stored: un-rotated keys and values [heads, tokens, d] of the memory layer, all tokens.
        num_tokens: tokens seen.
        memory: decides what is retrieved; None means local attention only.
    """

    is_compileable = False

    def __init__(self, num_layers: int, window: int, memory: SequenceMemory | None) -> None:
        self.windows: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self.stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_tokens = 0
        self.window = window
        self.memory = memory

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values with the new ones; keeps what the next token can see."""
        past = self.windows[layer_idx]
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
        self.windows[layer_idx] = keys[:, -self.window + 1 :], values[:, -self.window + 1 :]
        return keys, values

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.stored is not None:
            keys, values = torch.cat([self.stored[0], keys], dim=1), torch.cat([self.stored[1], values], dim=1)
        self.stored = keys, values

    def chunks(self, span: AttendedSpan, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, chunks * chunk_size, d] of what a span attends to."""
        places = [(self.memory.named[m].keys, self.memory.named[m].values, c) for m, c in span.named]
        places += [(*self.stored, c) for c in span.chunk_ids]
        rows = [slice(c * chunk_size, (c + 1) * chunk_size) for _, _, c in places]
        keys = [keys[:, part] for (keys, _, _), part in zip(places, rows, strict=True)]
        values = [values[:, part] for (_, values, _), part in zip(places, rows, strict=True)]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


class MemLongAttention(nn.Module):
    """Local attention of one layer and, in a retrieval layer, memory (section 3.3)."""

    def __init__(self, config: MemLongConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.memory = config, layer_idx, config.memory
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias, q_size, kv_size = config.attention_bias, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias)
        if layer_idx in self.memory.retrieval_layers:
            self.memory_gate = nn.Parameter(torch.zeros(self.num_heads))
            if self.memory.memory_bias:
                self.memory_bias = nn.Parameter(torch.zeros(self.num_heads))
            if self.memory.memory_adapter == "linear":
                identity = torch.eye(2 * kv_size, 2 * kv_size * self.memory.memory_adapter_width)
                self.memory_k_adapter = nn.Parameter(identity[:kv_size].clone())
                self.memory_v_adapter = nn.Parameter(identity[kv_size:].clone())

    def forward(
        self, hidden: torch.Tensor, rotary: LlamaRotaryEmbedding, cache: MemLongCache, spans: list[AttendedSpan]
    ) -> torch.Tensor:
        """Args: hidden: [tokens, hidden_size], the tokens after ``cache.num_tokens``."""
        tokens, first = hidden.shape[0], cache.num_tokens
        query = self.q_proj(hidden).view(tokens, -1, self.head_dim).transpose(0, 1)
        key = self.k_proj(hidden).view(tokens, -1, self.head_dim).transpose(0, 1)
        value = self.v_proj(hidden).view(tokens, -1, self.head_dim).transpose(0, 1)
        if self.layer_idx == self.memory.memory_layer:
            cache.store(key, value)
        positions = torch.arange(first, first + tokens, device=hidden.device)
        rotated, key = self._rotate(rotary, query, key, positions)
        keys, values = cache.append(self.layer_idx, key, value)
        key_positions = torch.arange(first + tokens - keys.shape[1], first + tokens, device=hidden.device)
        distance = positions[:, None] - key_positions
        visible = (distance >= 0) & (distance < self.memory.local_window)
        scores = (rotated @ self._repeat(keys).transpose(1, 2)) * self.head_dim**-0.5
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)  # -inf has no gradient.
        output = scores.softmax(dim=-1) @ self._repeat(values)
        if self.layer_idx in self.memory.retrieval_layers:
            for span in spans:
                rows = slice(span.start - first, span.end - first)
                memory_query, _ = self._rotate(rotary, query[:, rows], key[:, rows], positions[rows] - span.origin)
                memory_keys, memory_values = self._stored(cache, span)
                memory_scores = (memory_query @ memory_keys.transpose(1, 2)) * self.head_dim**-0.5
                fused = self._fuse(scores[:, rows], self._repeat(values), memory_scores, memory_values)
                output = torch.cat([output[:, : rows.start], fused, output[:, rows.stop :]], dim=1)
        return self.o_proj(output.transpose(0, 1).flatten(1))

    @staticmethod
    def _rotate(rotary, query, key, positions):
        cos, sin = rotary(query, positions[None])
        query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
        return query[0], key[0]

    def _repeat(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)

    def _stored(self, cache: MemLongCache, span: AttendedSpan) -> tuple[torch.Tensor, torch.Tensor]:
        """A span's memory, [query heads, tokens, d] each, adapted to this layer."""
        keys, values = cache.chunks(span, self.memory.chunk_size)
        if self.memory.memory_adapter == "linear":
            both = self._with_preceding(torch.cat([t.transpose(0, 1).flatten(1) for t in (keys, values)], dim=-1))
            keys, values = (
                (both @ weight.T).view(-1, self.num_kv_heads, self.head_dim).transpose(0, 1)
                for weight in (self.memory_k_adapter, self.memory_v_adapter)
            )
        return self._repeat(keys), self._repeat(values)

    def _with_preceding(self, stored: torch.Tensor) -> torch.Tensor:
        """[tokens, n] of whole chunks -> [tokens, width * n]: a token, then those before it in its chunk, or zeros."""
        chunks = stored.unflatten(0, (-1, self.memory.chunk_size))
        parts = [chunks.new_zeros(chunks.shape) for _ in range(self.memory.memory_adapter_width)]
        for distance, part in enumerate(parts):
            part[:, distance:] = chunks[:, : self.memory.chunk_size - distance]
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def _fuse(self, local_scores, local_values, memory_scores, memory_values):
        """All [heads, tokens, keys] and [heads, keys, d]; local scores are masked already."""
        gate = self.memory_gate[:, None, None]
        if self.memory.memory_bias:
            memory_scores = memory_scores + self.memory_bias[:, None, None]
        if self.memory.fusion == "gated":
            if self.memory.memory_softmax == "chunk":
                weights = memory_scores.unflatten(-1, (-1, self.memory.chunk_size)).softmax(dim=-1).flatten(-2)
            else:
                weights = memory_scores.softmax(dim=-1)
            return local_scores.softmax(dim=-1) @ local_values + torch.tanh(gate) * (weights @ memory_values)
        if self.memory.fusion == "scaled_logits":
            memory_scores, local_scores = torch.sigmoid(gate) * memory_scores, (1 - torch.sigmoid(gate)) * local_scores
        weights = torch.cat([memory_scores, local_scores], dim=-1).softmax(dim=-1)
        return weights @ torch.cat([memory_values, local_values], dim=1)


class MemLongDecoderLayer(nn.Module):
    def __init__(self, config: MemLongConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MemLongAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden, rotary, cache, spans):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, cache, spans)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class MemLongPreTrainedModel(LlamaPreTrainedModel):
    config_class = MemLongConfig
    _no_split_modules: ClassVar = ["MemLongDecoderLayer"]
    _can_record_outputs: ClassVar = {}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MemLongAttention) and hasattr(module, "memory_gate"):
            nn.init.zeros_(module.memory_gate)


class MemLongModel(MemLongPreTrainedModel):
    def __init__(self, config: MemLongConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MemLongDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, cache: MemLongCache) -> torch.Tensor:
        """Args: input_ids: [tokens]. Returns hidden states [tokens, hidden_size]."""
        spans = cache.memory.extend(input_ids.tolist()) if cache.memory is not None else []
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, self.rotary_emb, cache, spans)
        cache.num_tokens += input_ids.shape[0]
        return self.norm(hidden)


class MemLongForCausalLM(MemLongPreTrainedModel, GenerationMixin):
    """A MemLong language model for sequences one at a time.

    Memory works once a retriever is set (:meth:`set_retriever`); without one, attention is local.
    The first forward pass of a sequence is its prompt.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MemLongConfig) -> None:
        super().__init__(config)
        self.model = MemLongModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.embed: Embed | None = None
        self.post_init()

    def set_retriever(self, embed: Embed) -> None:
        """Set what embeds the text of token spans; see :data:`Embed`."""
        self.embed = embed

    @torch.no_grad()
    def memorize(self, token_ids: list[int]) -> NamedMemory:
        """Keep a text's complete chunks for other sequences to retrieve from (:meth:`new_cache`)."""
        size, cache = self.config.memory.chunk_size, self.new_cache()
        self.model(torch.tensor(token_ids, device=self.device), cache)
        chunks = [token_ids[first : first + size] for first in range(0, len(token_ids) - size + 1, size)]
        keys, values = (kept[:, : len(chunks) * size] for kept in cache.stored)
        return NamedMemory([self.embed(chunk) for chunk in chunks], keys, values)

    def new_cache(self, prompt_len: int | None = None, named: Sequence[NamedMemory] = ()) -> MemLongCache:
        """An empty cache for a sequence whose prompt has ``prompt_len`` tokens (None: no prompt).

        Args:
            named: memories to retrieve from beside the sequence's own.
        """
        memory = None if self.embed is None else SequenceMemory(self.config.memory, self.embed, prompt_len, named)
        return MemLongCache(self.config.num_hidden_layers, self.config.memory.local_window, memory)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: MemLongCache | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Continue the sequence in ``past_key_values``, or start one whose prompt this is.

        Args:
            input_ids: [1, tokens].
            labels: [1, tokens], for the mean loss of predicting each from those before it.
            logits_to_keep: only the last so many logits; 0 for all.

        Raises:
            ValueError: for a batch of several sequences or a padded one.
        """
        if input_ids.shape[0] != 1 or (attention_mask is not None and not attention_mask.all()):
            raise ValueError("the reference model takes one sequence at a time, without padding; serve batches by vLLM")
        cache = past_key_values if isinstance(past_key_values, MemLongCache) else self.new_cache(input_ids.shape[1])
        hidden = self.model(input_ids[0, cache.num_tokens :] if past_key_values is None else input_ids[0], cache)
        logits = self.lm_head(hidden[-logits_to_keep:] if logits_to_keep else hidden)[None]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        cache = past_key_values if isinstance(past_key_values, MemLongCache) else self.new_cache(input_ids.shape[1])
        return {"input_ids": input_ids[:, cache.num_tokens :], "past_key_values": cache, "logits_to_keep": 1}

    def _prepare_cache_for_generation(self, *args, **kwargs):
        """The cache is made by ``prepare_inputs_for_generation``, which knows the prompt."""


def text_embedder(tokenizer, embed_texts, instruction: str | None = None) -> Embed:
    """An :data:`Embed` from the model's tokenizer and a function of texts.

    Args:
        embed_texts: list of texts -> [len, dimension] array, L2-normalised.
        instruction: put before every text (``retriever.query_instruction``).
    """
    known: dict[str, torch.Tensor] = {}

    def embed(token_ids: list[int]) -> torch.Tensor:
        text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text not in known:
            vector = torch.as_tensor(embed_texts([(instruction or "") + (text or " ")])[0])
            known[text] = vector if text else torch.zeros_like(vector)
        return known[text]

    return embed
