"""Tokens per second of MemLong, its backbone with full attention, and with the window only.

    python benchmarks/throughput.py --lengths 2048 8192 --batch 2 --output benchmarks/results/throughput.json

Each engine lives in a process of its own; the three take turns in every repetition, so that a
busy machine slows all of them alike. Reported are medians and the ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backbones import plain_backbone

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo_model import demo_checkpoint

DOCUMENT = Path(__file__).parent.parent / "examples" / "data" / "doyle_lost_world.txt"


class EngineProcess:
    """One engine; measures on request."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--serve-measurements", str(model), json.dumps(settings)]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, length: int, batch: int, max_tokens: int, offset: int) -> dict[str, float]:
        request = {"length": length, "batch": batch, "max_tokens": max_tokens, "offset": offset}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the engine's process ended; its messages are above")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_measurements(model: str, settings: dict[str, Any]) -> None:
    """Run an engine; answer each line of standard input with one measurement."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **settings)
    tokens = llm.get_tokenizer()(DOCUMENT.read_text(encoding="utf-8"))["input_ids"]
    for line in sys.stdin:
        request = json.loads(line)
        timings = {}
        # Each measurement reads other stretches of the text, so no embedding is known beforehand.
        for name, max_tokens, shift in (("prefill_s", 1, 0), ("total_s", request["max_tokens"], 5000)):
            starts = [request["offset"] + shift + i * 997 for i in range(request["batch"])]
            prompts = [{"prompt_token_ids": tokens[start : start + request["length"]]} for start in starts]
            parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            began = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            timings[name] = time.perf_counter() - began
        print(json.dumps(timings), flush=True)


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
        engines = {name: EngineProcess(model, settings) for name, model in models.items()}
        for length in arguments.lengths:
            for repetition in range(arguments.repetitions):
                for name, engine in engines.items():
                    timings = engine.measure(length, arguments.batch, arguments.max_tokens, 10_000 * repetition)
                    rows.append({"engine": name, "length": length, "batch": arguments.batch, **timings})
                    print(rows[-1], flush=True)
        for engine in engines.values():
            engine.stop()
    result = {
        "command": " ".join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("memlong-vllm", "vllm", "torch", "transformers")},
        "machine": {"cores": os.cpu_count()},
        "settings": settings,
        "rows": rows,
        "summary": summarise(rows),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-measurements"]:
        serve_measurements(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
