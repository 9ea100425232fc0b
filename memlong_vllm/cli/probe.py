"""``memlong-vllm probe``: the layers of a Llama backbone that copy, and which to store and to read."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model
from memlong_vllm.config import MemoryConfigError
from memlong_vllm.conversion import ConversionError, is_memlong, load_base, memlong_config
from memlong_vllm.demo.prompts import NOVEL
from memlong_vllm.probe.experiment import ProbeResult, ProbeSettings, run_probe
from memlong_vllm.probe.plot import can_plot, plot
from memlong_vllm.probe.report import convert_command, to_json, to_markdown
from memlong_vllm.probe.trials import ProbeError
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.ridge import RidgeError

DEFAULTS = ProbeSettings()


def load_model(path: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a MemLong checkpoint (as the reference), a Llama folder or a GGUF file.

    Raises:
        ConversionError, MemoryConfigError, ProbeError: if it cannot be read or could not become a
            MemLong checkpoint.
    """
    if is_memlong(path):
        try:
            model = MemLongForCausalLM.from_pretrained(path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path, config=model.config)
        except (OSError, ValueError) as error:
            raise ProbeError(f"{path} cannot be loaded as a MemLong checkpoint: {error}") from error
    else:
        model, tokenizer = load_base(path, dtype)
    memlong_config(model.config, {"memory_layer": 0, "retrieval_layers": [0]}, None)  # Refuses what convert does.
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ProbeError(f"--device {device}: {str(error).splitlines()[0]}") from error


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Raises:
    ProbeError: naming the file that cannot be read.
    """
    if not paths and not NOVEL.is_file():
        raise ProbeError("the novel is in the source checkout only (examples/data): name texts with --texts FILE")
    texts = []
    for path in paths or [NOVEL]:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise ProbeError(f"--texts {path}: {reason}") from error
    return texts


def check_output(path: Path | None) -> None:
    """Before minutes of work: Raises ProbeError if ``path`` cannot be written."""
    if path is None:
        return
    if path.suffix != ".json":
        raise ProbeError(f"--output {path}: must end in .json; table and plot are written beside it")
    if path.is_dir() or not path.parent.is_dir():
        raise ProbeError(f"--output {path}: {path.parent} is no folder to write a file in")


def write_result(result: ProbeResult, path: Path, model: str, texts: dict[str, str], markdown: str) -> None:
    path.write_text(json.dumps(to_json(result, model, texts), indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    written = [path, path.with_suffix(".md")]
    if can_plot():
        plot(result, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    else:
        say("no plot: matplotlib is not installed (pip install 'memlong-vllm[eval]')")
    print(f"written: {', '.join(map(str, written))}")


def say(text: str) -> None:
    print(f"probe: {text}", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Llama folder, a .gguf file, a MemLong checkpoint, or 'demo'")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[], metavar="FILE", help=f"prose (default: {NOVEL.name})"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="write all rows; .md and .png go beside it")
    numbers = (
        ("window", "W", "tokens of the sliding window"),
        ("chunk_size", "N", "tokens of a chunk"),
        ("chunks", "N", "chunks a question reads"),
        ("trials", "N", "passages with questions"),
        ("facts", "N", "facts and questions of a passage, at most"),
        ("candidates", "N", "memory layers whose readers are measured (and those below: --adapter-width > 1); 0: none"),
        ("adapter_width", "N", "tokens that a reader's map sees: one and those before it in its chunk"),
        ("fit_passages", "N", "passages for the readers' linear maps"),
        ("max_layers", "N", "retrieval layers to propose at most"),
        ("seed", "N", "of names, numbers and places"),
    )
    for name, metavar, text in numbers:
        default = getattr(DEFAULTS, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, metavar=metavar, help=f"{text} (default: {default})")
    parser.add_argument(
        "--memory-layer", dest="memory_layers", type=int, nargs="+", default=[], metavar="LAYER",
        help="measure the readers of these layers instead of the candidates",
    )  # fmt: skip
    parser.add_argument(
        "--distractors", choices=("prose", "facts"), default="prose",
        help="what a question reads beside its own chunk: chunks without facts, or those of the other facts too",
    )  # fmt: skip
    parser.add_argument("--ridge", type=float, default=DEFAULTS.ridge, help=f"of the maps (default: {DEFAULTS.ridge})")
    parser.add_argument("--device", default="cpu", help="torch device, for example cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def settings_of(arguments: argparse.Namespace) -> ProbeSettings:
    counts = ("window", "chunk_size", "chunks", "trials", "facts", "candidates", "adapter_width", "fit_passages")
    return ProbeSettings(
        **{name: getattr(arguments, name) for name in (*counts, "max_layers", "ridge", "seed")},
        memory_layers=tuple(sorted(set(arguments.memory_layers))),
        facts_distract=arguments.distractors == "facts",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = settings_of(arguments)
        check_output(arguments.output)
        texts = read_texts(arguments.texts)
        path = Path(arguments.model) if Path(arguments.model).is_file() else resolve_model(arguments.model)
        model, tokenizer = load_model(path, getattr(torch, arguments.dtype), arguments.device)
        result = run_probe(model, tokenizer, texts, settings, say)
    except (ProbeError, RidgeError, ConversionError, MemoryConfigError, ModelArgumentError) as error:
        print(f"memlong-vllm probe: {error}", file=sys.stderr)
        return 2
    markdown = to_markdown(result, arguments.model)
    print(markdown)
    print(convert_command(result, "BASE" if is_memlong(path) else str(path)))
    if arguments.output is not None:
        names = [path.name for path in arguments.texts or [NOVEL]]
        digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        write_result(result, arguments.output, arguments.model, dict(zip(names, digests, strict=True)), markdown)
    return 0
