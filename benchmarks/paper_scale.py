"""MemLong at its paper's scale: what fits on a card, and OpenLLaMA-3B's real shape run here.

    python benchmarks/paper_scale.py --output benchmarks/results/paper_scale.json          # counts only
    python benchmarks/paper_scale.py --run --output benchmarks/results/paper_scale.json    # and runs

The counts are the capacity planner's (``memlong_vllm.capacity``), from vLLM's own cache
specifications and the ledger's slot arithmetic; Llama-3-8B, with grouped queries, an fp8 KV
cache and fp8 weights, is what a user would serve instead. ``--run`` writes about 7 GB of random weights to a temporary
folder, of the same shapes as the real ones, and serves them in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import vllm_engine
from accounting_report import ACCOUNTING, RUN, accounting_tables
from contenders import BLOCK_TOKENS, MEMLONG
from engine_process import EngineError, EngineProcess
from example_text import STRIDE
from measurement_file import MeasurementFile
from random_checkpoint import random_checkpoint
from token_times import TokenTimes

from memlong_vllm.capacity import Setup, plan
from memlong_vllm.cli.plan import SHAPES, load_config
from memlong_vllm.config import GIB, MemLongConfig, max_sequence_slots
from memlong_vllm.demo_model import demo_checkpoint

PAPER, ALTERNATIVE = "openllama-3b", "llama-3-8b"
# (shape, type of the projections); the weights are in 16 bits otherwise.
MODELS = {
    PAPER: (PAPER, None),
    ALTERNATIVE: (ALTERNATIVE, None),
    f"{ALTERNATIVE}, fp8 weights": (ALTERNATIVE, torch.float8_e4m3fn),
}
PRESET = "paper"
STEP_TOKENS = 512


def account(file: MeasurementFile, arguments: argparse.Namespace) -> None:
    """Rows of what fits, for each model; MemLong once for each memory size."""
    for model, (shape, projection_dtype) in MODELS.items():
        setup = Setup(
            context=arguments.context,
            card_bytes=int(arguments.card_gib * GIB),
            host_bytes=int(arguments.host_gib * GIB),
            projection_dtype=projection_dtype,
            embedding_dimension=1024,
        )
        for place, memory_size in enumerate(arguments.memory_sizes):
            config = load_config(shape, PRESET, {"memory_size": memory_size}, arguments.context)
            for capacity in plan(config, config.memory, setup):
                remembers = capacity.name.startswith("MemLong")
                if place and not remembers:  # Does not depend on the memory.
                    continue
                row = {"engine": f"{model}: {capacity.name}, {memory_size if remembers else ''}", "repetition": 0}
                row |= {"workload": ACCOUNTING, "length": arguments.context, "batch": capacity.sequences}
                row |= {"model": model, "variant": capacity.name, "memory_size": memory_size if remembers else None}
                if not file.has(row):
                    file.append([row | {name: value for name, value in asdict(capacity).items() if name != "name"}])


def run(file: MeasurementFile, arguments: argparse.Namespace, donor: Path) -> None:
    """Serve a prompt with the paper's shape, or with that of ``--shape``, and random weights."""
    name = Path(arguments.shape).name
    changes = "".join(f", {key} {value}" for key, value in arguments.set)
    row = {"engine": f"{MEMLONG}, {name}{changes}, {arguments.answer} answered", "workload": RUN}
    row |= {"length": arguments.length, "batch": arguments.batch, "model": name + changes, "repetition": 0}
    skipped = row | {"repetition": None}
    if file.has(row):
        return
    file.discard([skipped])
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        print(f"writing random weights to {scratch}", flush=True)
        config = shaped_config(arguments, donor)
        folder = random_checkpoint(config, donor, Path(scratch) / name)
        settings = engine_settings(config, arguments)
        try:
            engine = EngineProcess(vllm_engine.load, folder, settings)
            try:
                # In the first steps kernels are compiled and weights packed.
                first = min(arguments.length, config.memory.local_window + 3 * config.memory.retrieval_stride)
                engine.ask(prompts=[[(0, first)]], max_tokens=arguments.answer, salts=["warm-up"])
                measures = measure(engine, arguments)
                file.add_engine(row["engine"], settings, engine.facts)
            finally:
                engine.stop()
        except EngineError as error:
            file.append([skipped | {"skipped": str(error)}])
            return
    file.append([row | measures])


def shaped_config(arguments: argparse.Namespace, donor: Path) -> MemLongConfig:
    """The shape with the paper's memory, and the retriever of the donor, which is here."""
    retriever = MemLongConfig.from_pretrained(donor).memory.retriever
    settings = {"retriever.model": retriever.model, "retriever.pooling": retriever.pooling}
    settings |= {"retriever.max_length": retriever.max_length} | dict(arguments.set)
    return load_config(arguments.shape, PRESET, settings, arguments.length + arguments.answer)


def engine_settings(config: MemLongConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    longest, memory = arguments.length + arguments.answer, config.memory
    # Heads of 100 are padded in the KV cache, to 112 on a CPU; an eighth more is enough.
    token_bytes = 2 * config.num_key_value_heads * config.head_dim * 2
    held = min(longest, memory.local_window + STEP_TOKENS) + 3 * BLOCK_TOKENS
    kv_bytes = int(1.25 * (arguments.batch + 1) * held * token_bytes * config.num_hidden_layers)
    slots = arguments.batch * max_sequence_slots(memory, longest, STEP_TOKENS) + 1
    return {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": longest,
        "max_num_seqs": arguments.batch,
        "max_num_batched_tokens": STEP_TOKENS,
        "kv_cache_memory_bytes": kv_bytes,
        "additional_config": {"memlong": {"bank_gib": slots * memory.chunk_size * token_bytes / GIB}},
    }


def measure(engine: EngineProcess, arguments: argparse.Namespace) -> dict[str, Any]:
    prompts = [[(row * STRIDE, arguments.length)] for row in range(arguments.batch)]
    salts = [str(row) for row in range(arguments.batch)]
    result = TokenTimes(**engine.ask(prompts=prompts, max_tokens=arguments.answer, salts=salts))
    return {
        "prefill_tokens_per_s": arguments.batch * arguments.length / result.prompts_s,
        "decode_tokens_per_s": result.decode_tokens_per_s(),
        "total_s": result.total_s,
        "peak_rss_bytes": engine.peak_rss_bytes(),
        "peak_bytes": result.peak_bytes,
        "counters": result.counters,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=80_000, help="tokens a sequence, of the counts")
    parser.add_argument("--card-gib", type=float, default=24)
    parser.add_argument("--host-gib", type=float, default=64, help="for banks and search indexes")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=[32_768, 81_920], help="tokens remembered")
    parser.add_argument("--run", action="store_true", help="also serve the shape here")
    parser.add_argument("--shape", default=PAPER, help=f"{' or '.join(SHAPES)}, or a folder with a config.json")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="as in convert")
    parser.add_argument("--length", type=int, default=3072, help="tokens of the prompts that are run")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--model", type=Path, help="checkpoint with tokenizer and retriever; the demo model by default")
    parser.add_argument("--scratch", type=Path, help="where the weights are written; the system's temporary folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, Any]:
    from memlong_vllm.cli.convert import parse_setting

    return parse_setting(text)


def main() -> None:
    arguments = parse_arguments()
    settings = {"context": arguments.context, "card_gib": arguments.card_gib, "host_gib": arguments.host_gib}
    models = {name: {"title": name, "shape": SHAPES[shape]} for name, (shape, _) in MODELS.items()}
    file = MeasurementFile(arguments.output, "paper_scale", settings, models, arguments.overwrite)
    account(file, arguments)
    if arguments.run:
        run(file, arguments, arguments.model or demo_checkpoint())
    print(accounting_tables(file.content))


if __name__ == "__main__":
    main()
