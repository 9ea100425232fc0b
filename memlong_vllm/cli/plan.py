"""``memlong-vllm plan``: how many sequences of a length fit on a card, with and without MemLong."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from memlong_vllm.capacity import Capacity, CapacityError, Setup, num_parameters, padded_head_dim, plan
from memlong_vllm.cli.convert import parse_setting
from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model
from memlong_vllm.config import GIB, MemLongConfig, MemoryConfigError
from memlong_vllm.conversion import ConversionError, apply_settings, memlong_config, preset

MIB = 1 << 20
# Shapes of backbones that need not be here.
SHAPES: dict[str, dict[str, Any]] = {
    "openllama-3b": {
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
# Of embedders known by name; a local one says so itself.
DIMENSIONS = {"BAAI/bge-m3": 1024, "BAAI/bge-large-en-v1.5": 1024, "BAAI/bge-base-en-v1.5": 768}
LABEL_WIDTH, COLUMN_WIDTH = 18, 15
HEADINGS = {
    "full attention": ("full", "attention"),
    "full attention, fp8 KV": ("full attention", "fp8 KV"),
    "window alone": ("window", "alone"),
    "MemLong, bank on device": ("MemLong", "device bank"),
    "MemLong, bank on host": ("MemLong", "host bank"),
}


class PlanError(ValueError):
    """The model cannot be read, or lacks something. The message is one line for the user."""


def locate(model: str) -> str:
    """A name in SHAPES and a file as they are; else the folder that ``model`` stands for."""
    if model in SHAPES or Path(model).is_file():
        return model
    try:
        return str(resolve_model(model))
    except ModelArgumentError as error:
        raise PlanError(f"{error}; {' and '.join(SHAPES)} are shapes that need no files") from error


def load_config(model: str, preset_name: str, settings: dict[str, Any], context: int) -> MemLongConfig:
    """The configuration to plan for.

    Args:
        model: a name in SHAPES, a folder with a ``config.json``, or that file.
        preset_name: gives the ``memlong`` block where the model has none.
        settings: dotted fields of the block, as ``convert`` takes them.

    Raises:
        PlanError, ConversionError, MemoryConfigError: naming what is wrong.
    """
    base = read_config(model)
    if isinstance(base, MemLongConfig):
        values = base.to_dict()
        values["memlong"] = apply_settings(base.memory.to_dict(), settings)
        config = MemLongConfig(**values)
    else:
        block = preset(preset_name, base.num_hidden_layers, base.max_position_embeddings)
        config = memlong_config(base, apply_settings(block, settings), context)
    assert config.memory
    return config


def read_config(model: str) -> LlamaConfig:
    if model in SHAPES:
        return LlamaConfig(**SHAPES[model], tie_word_embeddings=False)
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{model}: no folder with a config.json, and none of {', '.join(SHAPES)} ({error})") from error
    kinds = {"memlong": MemLongConfig, "llama": LlamaConfig}
    if not isinstance(values, dict) or values.get("model_type") not in kinds:
        raise PlanError(f"{path}: model_type must be one of {', '.join(kinds)}")
    if values["model_type"] == "memlong" and not values.get("memlong"):
        raise PlanError(f"{path} has no 'memlong' block: make the checkpoint with memlong-vllm convert")
    try:
        return kinds[values["model_type"]](**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise PlanError(f"{path}: {' '.join(str(error).split())}") from error


def embedding_dimension(config: MemLongConfig, model: str) -> int:
    """Of the checkpoint's retriever: from its own ``config.json`` if it is here, else by name.

    Raises:
        PlanError: if neither tells.
    """
    name = config.memory.retriever.model
    for folder in (Path(model) / name, Path(name)):
        if (folder / "config.json").is_file():
            return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    if name not in DIMENSIONS:
        raise PlanError(f"the retriever {name!r} is not here: give --embedding-dimension")
    return DIMENSIONS[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help=f"checkpoint folder, config.json, demo, or {' or '.join(SHAPES)}"
    )
    parser.add_argument("--context", type=int, required=True, metavar="N", help="tokens a sequence")
    parser.add_argument("--card-gib", type=float, default=24, help="memory of each card (default: 24)")
    parser.add_argument("--host-gib", type=float, default=64, help="host memory for bank and index (default: 64)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="of all but MemLong")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, metavar="N")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences at once (default: all that fit)")
    parser.add_argument("--block-size", type=int, default=16, metavar="N")
    parser.add_argument("--reserve-gib", type=float, help="for activations and the like (default: an estimate)")
    parser.add_argument("--kv-head-dim", type=int, metavar="N", help="padded heads (default: next multiple of 8)")
    parser.add_argument("--embedding-dimension", type=int, metavar="N", help="of the retriever (default: its own)")
    parser.add_argument(
        "--preset", choices=("paper", "released", "small"), default="paper", help="of memory settings, as in convert"
    )
    parser.add_argument(
        "--set", dest="settings", type=parse_setting, action="append", default=[], metavar="KEY=VALUE",
        help="field of the memlong block, for example memory_size=81920",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def make_setup(arguments: argparse.Namespace, dimension: int) -> Setup:
    reserve = arguments.reserve_gib
    return Setup(
        context=arguments.context,
        card_bytes=int(arguments.card_gib * GIB),
        host_bytes=int(arguments.host_gib * GIB),
        dtype=getattr(torch, arguments.dtype),
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        block_size=arguments.block_size,
        max_num_seqs=arguments.max_num_seqs,
        reserve_bytes=None if reserve is None else int(reserve * GIB),
        kv_head_dim=arguments.kv_head_dim,
        embedding_dimension=dimension,
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        model = locate(arguments.model)
        config = load_config(model, arguments.preset, dict(arguments.settings), arguments.context)
        setup = make_setup(arguments, arguments.embedding_dimension or embedding_dimension(config, model))
        capacities = plan(config, config.memory, setup)
    except (PlanError, ConversionError, MemoryConfigError, CapacityError) as error:
        print(f"memlong-vllm plan: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(config, setup, capacities), indent=2))
    else:
        print_plan(arguments.model, config, setup, capacities)
    return 0


def as_json(config: MemLongConfig, setup: Setup, capacities: list[Capacity]) -> dict[str, Any]:
    return {
        "setup": asdict(setup) | {"dtype": str(setup.dtype).removeprefix("torch.")},
        "model": {
            "parameters": num_parameters(config, None),
            "memory_parameters": num_parameters(config, config.memory) - num_parameters(config, None),
            "head_dim": config.head_dim,
            "kv_head_dim": padded_head_dim(config, setup),
            "memlong": config.memory.to_dict(),
        },
        "variants": [asdict(capacity) for capacity in capacities],
    }


def print_plan(model: str, config: MemLongConfig, setup: Setup, capacities: list[Capacity]) -> None:
    memory, padded = config.memory, padded_head_dim(config, setup)
    print(f"{model}: {num_parameters(config, None) / 1e9:.2f} billion parameters, {setup.dtype}", end="")
    print(
        f"; heads of {config.head_dim}" + (f" padded to {padded} (not in the bank)" if padded > config.head_dim else "")
    )
    print(f"{setup.context:,} tokens a sequence; window {memory.local_window:,}, ", end="")
    print(f"memory {memory.memory_size:,}, top {memory.top_k} chunks of {memory.chunk_size}")
    print(f"{setup.tensor_parallel_size} card(s) of {setup.card_bytes / GIB:g} GiB, of which ", end="")
    print(f"{setup.gpu_memory_utilization:.0%} are used; {setup.host_bytes / GIB:g} GiB of host memory")
    if memory.memory_size < setup.context - memory.local_window:
        print(f"Note: memory_size {memory.memory_size:,} is less than the context, so chunks are forgotten.")
    print("")
    for line in (0, 1):
        print(" " * LABEL_WIDTH + "".join(f"{HEADINGS[c.name][line]:>{COLUMN_WIDTH}}" for c in capacities))
    print_sizes("one sequence", [capacity.sequence for capacity in capacities])
    print_sizes("each card", [capacity.device for capacity in capacities])
    print_sizes("host", [capacity.host for capacity in capacities])
    print_row("sequences at once", [f"{capacity.sequences:,}" for capacity in capacities])
    print_row("  limited by", [capacity.limited_by for capacity in capacities])
    print_row("  vLLM's figure", [f"{capacity.max_concurrency:.2f}x" for capacity in capacities])
    print("\nThe reserve is ", end="")
    print("an estimate" if setup.reserve_bytes is None else "as given", end="; the KV cache is what remains.\n")
    print("vLLM's figure (Maximum concurrency) takes all prompts to be computed at the same time.")
    print("")
    print_settings(setup, capacities)


def print_sizes(title: str, columns: list[dict[str, int]]) -> None:
    print(title)
    for name in dict.fromkeys(name for column in columns for name in column):
        print_row(f"  {name}", [readable(column[name]) if name in column else "-" for column in columns])


def print_row(label: str, cells: list[str]) -> None:
    print(f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells))


def readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / MIB:.2f} MiB"


def print_settings(setup: Setup, capacities: list[Capacity]) -> None:
    """What to start vLLM with for MemLong; sizes rounded up."""
    for capacity in capacities:
        banks = {"device": capacity.device.get("bank", 0)}
        banks["cpu"] = capacity.host.get("bank", 0) // setup.tensor_parallel_size
        for place, size in banks.items():
            if size:
                settings = {"memlong": {"bank_gib": math.ceil(1000 * size / GIB) / 1000, "bank_device": place}}
                options = f"--max-num-seqs {capacity.sequences} --additional-config '{json.dumps(settings)}'"
                print(f"{capacity.name}: {options}")
