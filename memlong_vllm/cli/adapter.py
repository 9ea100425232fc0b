"""``memlong-vllm adapter``: look at what was learned, and exchange it with the PEFT library."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from memlong_vllm.adapters import Adapter, AdapterError, save_adapter
from memlong_vllm.adapters.peft_format import read_adapter, read_peft, write_peft

LABEL_WIDTH = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="adapter_command", required=True)
    show = commands.add_parser("show", help="print what an adapter holds and how it was made")
    show.add_argument("file", type=Path, help="adapter file, or a folder of the PEFT library")
    show.add_argument("--json", action="store_true", help="print JSON")
    export = commands.add_parser("export", help="write an adapter as a folder of the PEFT library")
    export.add_argument("file", type=Path, help="adapter file")
    export.add_argument("folder", type=Path, help="folder to write; must not exist or be empty")
    imported = commands.add_parser("import", help="make an adapter file of a folder of the PEFT library")
    imported.add_argument("folder", type=Path, help="folder with adapter_config.json")
    imported.add_argument("file", type=Path, help="adapter file to write; must not exist")


def run(arguments: argparse.Namespace) -> int:
    commands = {"show": run_show, "export": run_export, "import": run_import}
    try:
        commands[arguments.adapter_command](arguments)
    except (AdapterError, OSError) as error:
        print(f"memlong-vllm adapter: {error}", file=sys.stderr)
        return 2
    return 0


def run_show(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.file)
    if arguments.json:
        print(json.dumps(as_json(adapter), indent=1))
    else:
        print_adapter(adapter)


def run_export(arguments: argparse.Namespace) -> None:
    write_peft(read_adapter(arguments.file), arguments.folder)
    print(f"written to {arguments.folder}")


def run_import(arguments: argparse.Namespace) -> None:
    if arguments.file.exists():
        raise AdapterError(f"{arguments.file} exists: choose another name or remove it")
    adapter = read_peft(arguments.folder)
    save_adapter(adapter, arguments.file)
    print_adapter(adapter)
    print(f"\nwritten to {arguments.file}")


def as_json(adapter: Adapter) -> dict[str, Any]:
    tensors = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in sorted(adapter.tensors.items())
    }
    return {"digest": adapter.digest()} | adapter.metadata() | {"tensors": tensors}


def print_adapter(adapter: Adapter) -> None:
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    print_row("digest", adapter.digest())
    print_row("holds", f"{count:,} numbers in {len(adapter.tensors)} tensors")
    if adapter.lora is not None:
        print_row("LoRA", f"rank {adapter.lora.rank}, alpha {adapter.lora.alpha:g}")
        print_row("", by_layer(adapter.lora_modules()))
    if whole := adapter.whole_parameters():
        print_row("whole", by_layer(whole))
    print_row("base", described_base(adapter))
    print_row("memlong", json.dumps(adapter.memlong) if adapter.memlong else "unknown: the preset's or what is set")
    for name, value in adapter.training.items():
        print_row("training", f"{name}: {value if isinstance(value, str) else json.dumps(value)}")


def print_row(label: str, text: str) -> None:
    print(f"{label:<{LABEL_WIDTH}}{text}")


def described_base(adapter: Adapter) -> str:
    base = adapter.base
    if base is None:
        return "unknown"
    return (
        f"{base.num_hidden_layers} layers of {base.hidden_size}, {base.num_attention_heads} heads "
        f"({base.num_key_value_heads} for keys and values), vocabulary of {base.vocab_size}, weights {base.digest[:12]}"
    )


def by_layer(names: list[str]) -> str:
    """``q_proj in layers 13, 17; norm.weight``: what there is, and where."""
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        prefix, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers."):
            layers[rest].append(int(prefix))
        else:
            layers[name] = []
    places = [f" in layers {', '.join(map(str, sorted(found)))}" if found else "" for found in layers.values()]
    return "; ".join(f"{name}{place}" for name, place in zip(layers, places, strict=True))
