"""Tokens per second of MemLong, its backbone with full attention, and with the window only.

    python benchmarks/throughput.py --lengths 2048 8192 --batch 2 --output benchmarks/results/throughput.json

Each engine lives in a process of its own; the three take turns in every repetition, so that a
busy machine slows all of them alike. Reported are medians and the ratios of one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_process import EngineProcess, is_engine_process, serve, tokens_of, write_result

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo_model import demo_checkpoint
from memlong_vllm.evaluation.plain_backbone import plain_backbone


def prepare(llm: Any) -> Callable[..., dict[str, float]]:
    from vllm import SamplingParams

    tokens = tokens_of(llm)

    def answer(length: int, batch: int, max_tokens: int, offset: int) -> dict[str, float]:
        timings = {}
        # Each measurement reads other stretches of the text, so no embedding is known beforehand.
        for name, num_tokens, shift in (("prefill_s", 1, 0), ("total_s", max_tokens, 5000)):
            starts = [offset + shift + i * 997 for i in range(batch)]
            prompts = [{"prompt_token_ids": tokens[start : start + length]} for start in starts]
            parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            began = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            timings[name] = time.perf_counter() - began
        return timings

    return answer


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by length and engine, and MemLong's ratio to each."""
    table = []
    for length in sorted({row["length"] for row in rows}):
        medians = {}
        for engine in ("memlong", "full", "window"):
            mine = [row for row in rows if (row["length"], row["engine"]) == (length, engine)]
            prefill = statistics.median(row["length"] * row["batch"] / row["prefill_s"] for row in mine)
            total = statistics.median(row["total_s"] for row in mine)
            spread = [min(row["total_s"] for row in mine), max(row["total_s"] for row in mine)]
            medians[engine] = {"prefill_tokens_per_s": prefill, "total_s": total, "total_s_range": spread}
        speedup = {name: medians[name]["total_s"] / medians["memlong"]["total_s"] for name in ("full", "window")}
        table.append({"length": length, "engines": medians, "memlong_speedup_over": speedup})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="MemLong checkpoint; the demo model by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = arguments.model or demo_checkpoint()
    window = MemLongConfig.from_pretrained(checkpoint).memory.local_window
    longest = max(arguments.lengths) + arguments.max_tokens
    settings = {"dtype": arguments.dtype, "max_model_len": longest, "max_num_seqs": arguments.batch}
    settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 3 << 30, "max_num_batched_tokens": 2048}
    settings |= {"enable_prefix_caching": False}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "memlong": checkpoint,
            "full": plain_backbone(checkpoint, Path(folder) / "full"),
            "window": plain_backbone(checkpoint, Path(folder) / "window", window),
        }
        engines = {name: EngineProcess(__file__, model, settings) for name, model in models.items()}
        for length in arguments.lengths:
            for repetition in range(arguments.repetitions):
                for name, engine in engines.items():
                    timings = engine.ask(
                        length=length,
                        batch=arguments.batch,
                        max_tokens=arguments.max_tokens,
                        offset=10_000 * repetition,
                    )
                    rows.append({"engine": name, "length": length, "batch": arguments.batch, **timings})
                    print(rows[-1], flush=True)
        for engine in engines.values():
            engine.stop()
    write_result(arguments.output, settings, rows, summarise(rows))


if __name__ == "__main__":
    if is_engine_process():
        serve(prepare)
    else:
        main()
