"""Putting what was learned into a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from memlong_vllm.adapters.adapter import Adapter
from memlong_vllm.adapters.base_identity import EMBEDDINGS, OUTPUT, backbone_identity
from memlong_vllm.adapters.errors import AdapterError


def merge_adapter(
    adapter: Adapter, state_dict: Mapping[str, torch.Tensor], config: Any, *, force: bool = False
) -> dict[str, torch.Tensor]:
    """A MemLong model's weights with what the adapter learned.

    ``W + alpha / rank * B @ A`` is computed in float32 and cast back to W's dtype; what was
    trained whole takes the parameter's place, in its dtype. A tied ``lm_head`` follows the embeddings.

    Args:
        state_dict: of the model as converted, ``memory_*`` parameters included. It stays as it is.
        config: the model's configuration.
        force: merge into another base than the adapter's, as long as shapes fit.

    Returns:
        All of ``state_dict``; tensors that the adapter leaves alone are the same objects.

    Raises:
        AdapterError: if the base is another (says how it differs), or a weight is unknown or of
            another shape.
    """
    if adapter.base is not None and not force:
        _require_base(adapter, state_dict, config)
    merged = dict(state_dict)
    for name in adapter.whole_parameters():
        if name == OUTPUT and config.tie_word_embeddings:
            _require_tied(adapter)
            continue
        weight = _weight(merged, name, list(adapter.tensors[name].shape))
        merged[name] = adapter.tensors[name].to(weight.device, weight.dtype)
    for module in adapter.lora_modules():
        half_a, half_b = (adapter.tensors[f"{module}.lora_{half}"].float() for half in "AB")
        weight = _weight(merged, f"{module}.weight", [half_b.shape[0], half_a.shape[1]])
        assert adapter.lora is not None
        learned = adapter.lora.scale * (half_b.to(weight.device) @ half_a.to(weight.device))
        merged[f"{module}.weight"] = (weight.detach().float() + learned).to(weight.dtype)
    if config.tie_word_embeddings and EMBEDDINGS in adapter.tensors and OUTPUT in merged:
        merged[OUTPUT] = merged[EMBEDDINGS]
    return merged


def _require_base(adapter: Adapter, state_dict: Mapping[str, torch.Tensor], config: Any) -> None:
    assert adapter.base is not None
    differences = adapter.base.differences(backbone_identity(state_dict, config))
    if differences:
        raise AdapterError(
            "the adapter was trained on another base model: "
            + "; ".join(differences)
            + " (the adapter's first). Take the base it was trained on; an adapter of other weights of the same "
            "shape can be forced on these, with no promise what comes out"
        )


def _require_tied(adapter: Adapter) -> None:
    embeddings = adapter.tensors.get(EMBEDDINGS)
    if embeddings is None or not torch.equal(embeddings, adapter.tensors[OUTPUT]):
        raise AdapterError(
            f"{OUTPUT} was trained apart from {EMBEDDINGS}, but the model ties them (tie_word_embeddings)"
        )


def _weight(state_dict: Mapping[str, torch.Tensor], name: str, shape: list[int]) -> torch.Tensor:
    if name not in state_dict:
        hint = ": its memlong block must name the adapter's retrieval_layers and extensions"
        raise AdapterError(f"the model has no weight {name}" + (hint if ".memory_" in name else ""))
    weight = state_dict[name]
    if list(weight.shape) != shape:
        raise AdapterError(f"{name} has shape {list(weight.shape)} in the model and {shape} in the adapter")
    return weight
