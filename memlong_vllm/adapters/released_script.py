"""What the MemLong authors' released training script leaves behind.

It trains with PEFT: LoRA on the attention's projections and, as ``modules_to_save``, what ends in
``norm`` and, where gates are used, in ``ret_gate``. (It also names ``embed``, which PEFT finds no
module for.) Into the adapter's folder it writes the model's ``config.json`` with the fields below.

Its second stage starts from the base with the first stage merged: convert the base with the first
adapter, then that checkpoint with the second. Of its position types this package has ``"Zero"``
(memory at position 0); the first stage trains with ``"Continual"``, their default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memlong_vllm.adapters.errors import AdapterError

GATE = ".self_attn.ret_gate.output_gate"
"""How their gate is called, [1, heads, 1, 1]: the one of the fusion ``"scaled_logits"``."""

# Their name of a field, its value where the file leaves it out, and the names of ours.
_FIELDS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("memory_size", 32768, ("memory_size",)),
    ("mem_group_size", 32, ("chunk_size", "retrieval_stride", "query_tokens")),
    ("ret_group_size", 16, ("top_k",)),
)


def gate_name(name: str) -> str:
    """Our name of a gate of theirs."""
    return name.removesuffix(GATE) + ".self_attn.memory_gate"


def memlong_block(config_file: Path, has_gates: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of the ``memlong`` block, and remarks for the adapter's ``training``.

    Args:
        config_file: may be missing, or of another origin: then only the gates tell.
        has_gates: whether the adapter holds gates of theirs.

    Raises:
        AdapterError: if the file says that there are no gates, but there are, or names no layers.
    """
    block: dict[str, Any] = {"fusion": "scaled_logits"} if has_gates else {}
    config = _read(config_file)
    if "mem_layer" not in config:
        return block, {}
    block["memory_layer"] = config["mem_layer"]
    if layers := config.get("ret_attn_layers"):
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise AdapterError(f"{config_file}: ret_attn_layers = {layers!r}: must be a list of layers")
        block["retrieval_layers"] = sorted(layers)
    for theirs, default, names in _FIELDS:
        block |= dict.fromkeys(names, config.get(theirs, default))
    if has_gates and config.get("use_gate") is False:
        raise AdapterError(f"{config_file.name} says use_gate false, but the adapter has gates ({GATE[1:]})")
    block["fusion"] = "scaled_logits" if has_gates or config.get("use_gate") else "joint"
    return block, {"position_type": config.get("position_type", "Continual")}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
