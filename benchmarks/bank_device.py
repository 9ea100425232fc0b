"""Speed and bytes with the bank in the device's memory and in the host's.

    python benchmarks/bank_device.py --output benchmarks/results/bank_device_cpu_135m.json

On a CPU both are the host's memory: the numbers then show what the other code path costs of its
own, and nothing of what a GPU pays for reading the host's memory.

Each engine lives in a process of its own; they take turns in every repetition, and which goes
first changes. What the demo model reads from memory it has learned to use, so that a wrong key or
value would show in the greedy answers, which are compared.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from answers import PreparedEngine, generate, scheduler_of, tokens_of
from engine_process import EngineProcess
from example_text import STRIDE
from result_file import write_result

from memlong_vllm.demo_model import demo_checkpoint

PLACES = ("device", "cpu")
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def load(model: Path, settings: dict[str, Any]) -> PreparedEngine:
    return PreparedEngine(prepare, model, settings)


def prepare(llm: Any) -> Callable[..., dict[str, Any]]:
    novel, scheduler = tokens_of(llm), scheduler_of(llm)
    memory = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().step_memory

    def answer(start: int, length: int, batch: int, max_tokens: int) -> dict[str, Any]:
        prompts = [novel[start + i * STRIDE : start + i * STRIDE + length] for i in range(batch)]
        gathers, reuses = memory.working_set.num_gathers, memory.working_set.num_reuses
        stats: dict[str, float] = {}
        result = generate(llm, prompts, max_tokens, after_prompts=lambda: stats.update(scheduler.memory_stats()))
        return {
            "prefill_tokens_per_s": length * batch / result.prompts_s,
            "decode_tokens_per_s": result.num_decoded / (result.total_s - result.prompts_s),
            "working_set_gathers": memory.working_set.num_gathers - gathers,
            "working_set_reuses": memory.working_set.num_reuses - reuses,
            "bytes": {name: size for name, size in stats.items() if name.startswith("bytes_")},
            "token_ids": [one.token_ids for one in result.answers],
        }

    return answer


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges by place; of the host's to the device's, the ratio of each repetition."""
    summary: dict[str, Any] = {}
    by_place = {place: [row for row in rows if row["bank_device"] == place] for place in PLACES}
    for name in RATES:
        for place, mine in by_place.items():
            values = [row[name] for row in mine]
            summary[f"{name}, {place}"] = {"median": statistics.median(values), "range": [min(values), max(values)]}
        ratios = [cpu[name] / device[name] for device, cpu in zip(*by_place.values(), strict=True)]
        summary[f"{name}, cpu over device"] = {
            "median": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    pairs = list(zip(*by_place.values(), strict=True))
    summary["bytes"] = {place: mine[-1]["bytes"] for place, mine in by_place.items()}
    for name in ("working_set_gathers", "working_set_reuses"):
        summary[name] = {place: sum(row[name] for row in mine) for place, mine in by_place.items()}
    summary["equal_answers"] = sum(
        one == other for a, b in pairs for one, other in zip(a["token_ids"], b["token_ids"], strict=True)
    )
    summary["answers"] = sum(len(a["token_ids"]) for a, _ in pairs)
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="MemLong checkpoint; the demo model by default")
    parser.add_argument("--length", type=int, default=2500, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=129)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--bank-gib", type=float, default=0.5)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    common = {"dtype": "float32", "max_model_len": arguments.length + arguments.max_tokens, "enforce_eager": True}
    common |= {"max_num_seqs": arguments.batch, "kv_cache_memory_bytes": 1 << 30, "max_num_batched_tokens": 2048}
    common |= {"enable_prefix_caching": False}
    settings = {
        place: common | {"additional_config": {"memlong": {"bank_gib": arguments.bank_gib, "bank_device": place}}}
        for place in PLACES
    }
    model, rows = arguments.model or demo_checkpoint(), []
    engines = {place: EngineProcess(load, model, settings[place]) for place in PLACES}
    size = {"length": arguments.length, "batch": arguments.batch, "max_tokens": arguments.max_tokens}
    # The first batch of an engine, which nobody measures, warms it up.
    for engine in engines.values():
        engine.ask(start=90_000, **size | {"max_tokens": 4})
    for repetition in range(arguments.repetitions):
        for place in PLACES[:: 1 if repetition % 2 == 0 else -1]:
            measured = engines[place].ask(start=10_000 * repetition, **size)
            rows.append({"bank_device": place, "repetition": repetition, **measured})
            print({key: value for key, value in rows[-1].items() if key != "token_ids"}, flush=True)
    for engine in engines.values():
        engine.stop()
    write_result(arguments.output, settings, rows, summarise(rows))


if __name__ == "__main__":
    main()
