"""``memlong-vllm convert``: a MemLong checkpoint from any local Llama-architecture model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memlong_vllm.adapters import Adapter, AdapterError
from memlong_vllm.adapters.peft_format import read_adapter
from memlong_vllm.cli.model_argument import DEMO, DEMO_BASE, ModelArgumentError, resolve_model
from memlong_vllm.config import MemLongConfig, MemoryConfigError
from memlong_vllm.conversion import ConversionError, convert, is_control


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value``; the value as JSON if it is, else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        help="folder with a Llama model (safetensors), or a .gguf file; for an adapter also a MemLong checkpoint or "
        "'demo' or 'demo-base'",
    )
    parser.add_argument("output", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--adapter", type=Path, metavar="FILE", help="merge this adapter: a file, or a folder of the PEFT library"
    )
    parser.add_argument(
        "--force", action="store_true", help="merge the adapter into another base of the same shape as its own"
    )
    parser.add_argument(
        "--preset", choices=("paper", "released", "small"), default="paper",
        help="memory settings, where the adapter does not bring them (default: paper)",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="settings", type=parse_setting, action="append", default=[], metavar="KEY=VALUE",
        help="field of the memlong block, for example top_k=4 or retriever.model=/path",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, help="tokens a sequence may reach (max_position_embeddings)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def run(arguments: argparse.Namespace) -> int:
    try:
        adapter = None if arguments.adapter is None else read_adapter(arguments.adapter)
        base = arguments.base
        config = convert(
            resolve_model(base) if base in (DEMO, DEMO_BASE) else Path(base),
            arguments.output,
            arguments.preset,
            dict(arguments.settings),
            arguments.max_length,
            arguments.dtype,
            adapter,
            arguments.force,
        )
    except (ConversionError, ModelArgumentError, MemoryConfigError, AdapterError, OSError) as error:
        print(f"memlong-vllm convert: {error}", file=sys.stderr)
        return 2
    print(json.dumps(config.memlong, indent=2))
    print(f"\nwritten to {arguments.output}; {trained_state(config, adapter)}")
    print(f"serve it: vllm serve {arguments.output} --trust-remote-code")
    return 0


def trained_state(config: MemLongConfig, adapter: Adapter | None) -> str:
    """What has been trained in the checkpoint and what follows, in words."""
    words = []
    if adapter is not None:
        pairs, whole = len(adapter.lora_modules()), len(adapter.whole_parameters())
        words.append(f"adapter {adapter.digest()[:12]} is merged ({pairs} LoRA pairs, {whole} whole parameters)")
        if adapter.base is None:
            words.append("it does not say which base model it was trained on: make sure it was this one")
        if adapter.training.get("position_type") == "Continual":
            words.append(
                "it was trained with memory before the window's positions, not at 0 as here: expect less of it"
            )
        if is_control(adapter):
            words.append("it was trained without memory, which is off (memory_size 0)")
            return "; ".join(words)
    gates = [] if adapter is None else [t for name, t in adapter.tensors.items() if name.endswith(".memory_gate")]
    if config.memory.fusion == "gated" and not any(bool(gate.any()) for gate in gates):
        words.append("gates are zero, so memory has no effect until they are trained")
    elif adapter is None:
        words.append("nothing is trained yet: the model has not learned to use what it retrieves")
    return "; ".join(words)
