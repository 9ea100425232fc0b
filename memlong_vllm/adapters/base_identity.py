"""Which base model an adapter belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from memlong_vllm.adapters.errors import AdapterError

NUM_SAMPLES = 64
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class BaseIdentity:
    """What identifies a base model: its shape, for people, and a digest of its weights.

    Attributes:
        digest: 64 hexadecimal digits; see :func:`backbone_identity`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    digest: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> BaseIdentity:
        """Raises AdapterError: naming the field that is missing, unknown or of the wrong type."""
        if not isinstance(values, dict):
            raise AdapterError(f"base = {values!r}: must be an object")
        types = {field.name: field.type for field in fields(cls)}
        for name in sorted(types.keys() ^ values.keys()):
            raise AdapterError(f"base.{name} is {'missing' if name in types else 'unknown'}")
        for name, kind in types.items():
            allowed = {"int": (int,), "float": (int, float), "str": (str,)}[str(kind)]
            if type(values[name]) not in allowed:
                raise AdapterError(f"base.{name} = {values[name]!r}: must be of type {kind}")
        return cls(**values | {"rope_theta": float(values["rope_theta"])})

    def differences(self, other: BaseIdentity) -> list[str]:
        """What tells ``other`` from this, in words; empty if they are the same base."""
        mine, others = self.to_dict(), other.to_dict()
        names = [name for name in mine if mine[name] != others[name]]
        if names == ["digest"]:
            return [f"the same shape but other weights ({self.digest[:12]}… against {other.digest[:12]}…)"]
        return [f"{name} {mine[name]} against {others[name]}" for name in names if name != "digest"]


def backbone_identity(state_dict: Mapping[str, torch.Tensor], config: Any) -> BaseIdentity:
    """Identify the base model that a state dict is of.

    A plain Llama, the same from a GGUF file, a MemLong checkpoint made of it (its ``memory_*``
    parameters do not count) and a bfloat16 copy of it have one identity. So has a model whose
    tied ``lm_head`` is left out. The digest covers names, shapes and 64 evenly spaced values of
    each tensor, rounded to bfloat16: training changes nearly all of a tensor. A float16 copy of a
    float32 model rounds twice and is another base.

    Args:
        state_dict: name -> tensor, of any floating dtype, on any device.
        config: the model's Llama or MemLong configuration.

    Raises:
        AdapterError: if a tensor is on the meta device or there are none.
    """
    names = sorted(name for name in state_dict if ".memory_" not in name and "rotary_emb." not in name)
    if not names:
        raise AdapterError("the base model has no weights: an identity needs its state dict")
    samples = {name: _sample(name, state_dict[name]) for name in names}
    if samples.get(OUTPUT) is not None and samples[OUTPUT] == samples.get(EMBEDDINGS):
        del samples[OUTPUT]  # Tied: some files hold it, others leave it out.
    digest = hashlib.sha256()
    for name, (shape, values) in samples.items():
        digest.update(json.dumps([name, shape]).encode() + values)
    return BaseIdentity(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rope_theta=float((config.rope_parameters or {}).get("rope_theta", 10000.0)),
        digest=digest.hexdigest(),
    )


def _sample(name: str, tensor: torch.Tensor) -> tuple[list[int], bytes]:
    """A tensor's shape and evenly spaced values as bfloat16, the first and the last among them."""
    if tensor.is_meta:
        raise AdapterError(f"{name} has no values (it is on the meta device): load the weights first")
    last = max(0, tensor.numel() - 1)
    places = [last * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)] if tensor.numel() else []
    values = tensor.detach().reshape(-1)[torch.tensor(places, dtype=torch.long, device=tensor.device)]
    return list(tensor.shape), values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
