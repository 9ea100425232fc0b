"""Starts ``memory_adapter`` maps at the closed-form solution: stored [K;V] -> a layer's own K and V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from memlong_vllm.adapter_input import adapter_input
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.ridge import RidgeAccumulator
from memlong_vllm.training.features import DocumentFeatures
from memlong_vllm.training.layer_stack import LayerStack

RIDGE = 1e-3
_KINDS = ("k_proj", "v_proj")


@torch.no_grad()
def calibrate(
    model: MemLongForCausalLM,
    documents: Sequence[DocumentFeatures],
    num_tokens: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[int, tuple[float, float]]:
    """Fit the adapters of the retrieval layers above the memory layer, in place.

    Args:
        num_tokens: how many tokens to fit on, taken from the documents in turn, behind their first windows.

    Returns:
        By layer, the shares of variance that the maps for keys and for values explain.
    """
    memory, kv_size = model.config.memory, model.config.num_key_value_heads * model.config.head_dim
    layers = [n for n in memory.retrieval_layers if n > memory.memory_layer]
    if not layers:
        return {}
    sums = RidgeAccumulator(memory.memory_adapter_width * 2 * kv_size, 2 * kv_size * len(layers))
    stack = LayerStack(model, range(memory.memory_layer, layers[-1] + 1))
    with _kept_outputs(model, layers) as made:
        for features, piece in _pieces(documents, num_tokens, memory.local_window):
            carried = None
            # The window before goes first: what is remembered had one.
            before = [slice(piece.start - memory.local_window, piece.start)] if piece.start else []
            for part in (*before, piece):
                hidden = features.hidden[part].to(model.device).float()[None]
                with autocast():
                    _, carried = stack(hidden, carried or stack.empty(1, hidden))
            stored = torch.cat([features.keys[piece], features.values[piece]], dim=-1)
            # Windows are whole chunks.
            seen = adapter_input(stored, memory.memory_adapter_width, memory.chunk_size)
            sums.add(seen, torch.cat([made[n, kind][0] for n in layers for kind in _KINDS], dim=-1).cpu())
    maps, explained = sums.fit(RIDGE), {}
    for idx, layer in enumerate(layers):
        keys, values = (slice((2 * idx + i) * kv_size, (2 * idx + i + 1) * kv_size) for i in range(2))
        attention = model.model.layers[layer].self_attn
        attention.memory_k_adapter.data.copy_(maps[keys])
        attention.memory_v_adapter.data.copy_(maps[values])
        explained[layer] = sums.r_squared(maps, keys), sums.r_squared(maps, values)
    return explained


def _pieces(
    documents: Sequence[DocumentFeatures], num_tokens: int, window: int
) -> Iterator[tuple[DocumentFeatures, slice]]:
    """The second window of each document, then the third of each, until there are enough tokens; the first
    if none has two."""
    first = window if any(features.hidden.shape[0] >= 2 * window for features in documents) else 0
    left = num_tokens
    while left > 0:
        long_enough = [features for features in documents if features.hidden.shape[0] >= first + window]
        if not long_enough:
            return
        for features in long_enough[: -(-left // window)]:
            yield features, slice(first, first + window)
            left -= window
        first += window


@contextmanager
def _kept_outputs(model: MemLongForCausalLM, layers: Sequence[int]) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """The last un-rotated keys and values that the layers made."""
    made: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        return lambda module, inputs, output: made.update({key: output})

    hooks = [
        getattr(model.model.layers[n].self_attn, kind).register_forward_hook(keep((n, kind)))
        for n in layers
        for kind in _KINDS
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def is_fresh(model: MemLongForCausalLM) -> bool:
    """Whether the adapters above the memory layer are the identity, as ``convert`` leaves them."""
    memory = model.config.memory
    if memory.memory_adapter is None:
        return False
    for layer in memory.retrieval_layers:
        weights = model.model.layers[layer].self_attn
        both = torch.cat([weights.memory_k_adapter, weights.memory_v_adapter]).float()
        if layer > memory.memory_layer and not torch.equal(both, torch.eye(*both.shape, device=both.device)):
            return False
    return True
