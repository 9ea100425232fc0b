"""What retrieval costs while many sequences decode: holds, embedding, search, scheduling.

    python benchmarks/retrieval_step.py --output benchmarks/results/retrieval_step_cpu_135m.json

Every sequence is a stretch of the novel that differs from the others', decoded past one segment
start and so through one retrieval. Cases: ``spread``, the sequences reach it one after another, as
in a server; ``aligned``, all reach it in the same step, the worst there is. Engines: the embedder
takes 1 text at a time, or up to 8. They live in processes of their own and take turns.

The documents are computed once by each engine, which is measured as well ("documents"); later
prompts take them over by prefix caching and add an ending of their own, so that every repetition
decodes, and embeds, other text. A batch's prompts are answered with one token beforehand: then
their embeddings are known, all start in one step, and what is measured is decoding alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_process import (
    EmbedderCall,
    EngineProcess,
    generate,
    is_engine_process,
    observe_embedder,
    scheduler_of,
    serve,
    tokens_of,
    write_result,
)

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo_model import demo_checkpoint

CASES = ("spread", "aligned")
COUNTERS = ("holds", "held_seconds", "searches", "search_seconds")
SUMMARISED = (
    "tokens_per_s",
    "wall_s",
    "holds",
    "held_percent",
    "idle_percent",
    "embed_percent",
    "schedule_percent",
    "embedded_texts",
    "embed_batches",
    "embed_ms_each",
    "searches",
    "search_ms_each",
)


@dataclass
class Step:
    """One call of the scheduler. ``began``: of ``time.perf_counter``; the rest happened in the call."""

    began: float
    seconds: float
    num_tokens: int
    num_searches: int
    num_holds: int


def observe_steps(scheduler: Any) -> list[Step]:
    """The steps from now on, as they come."""
    steps: list[Step] = []
    schedule, counters = scheduler.schedule, scheduler.counters

    def schedule_and_note(*args: Any, **kwargs: Any) -> Any:
        searches, holds, began = counters.searches, counters.holds, time.perf_counter()
        output = schedule(*args, **kwargs)
        seconds, num_tokens = time.perf_counter() - began, output.total_num_scheduled_tokens
        steps.append(Step(began, seconds, num_tokens, counters.searches - searches, counters.holds - holds))
        return output

    scheduler.schedule = schedule_and_note
    return steps


def describe(steps: Sequence[Step], ended: float) -> dict[str, Any]:
    """Time in the scheduler and of whole steps, by what a step did. Steps that only waited for
    embeddings, no sequence having anything to compute, are counted as idle."""
    ends = [*(step.began for step in steps[1:]), ended]
    kinds: dict[str, list[tuple[float, float]]] = {"plain": [], "retrieving": [], "holding": [], "idle": []}
    for step, end in zip(steps, ends, strict=True):
        kind = "retrieving" if step.num_searches else "holding" if step.num_holds else "plain"
        kinds[kind if step.num_tokens else "idle"].append((step.seconds, end - step.began))
    return {
        kind: {
            "steps": len(times),
            "schedule_ms": [1000 * seconds for seconds, _ in times],
            "whole_ms": [1000 * whole for _, whole in times],
        }
        for kind, times in kinds.items()
    }


def prepare(llm: Any) -> Callable[..., dict[str, Any]]:
    novel, scheduler = tokens_of(llm), scheduler_of(llm)
    steps, calls = observe_steps(scheduler), observe_embedder(llm)

    def answer(endings: list[list[int]], document_tokens: int, max_tokens: int) -> dict[str, Any]:
        """Of each prompt, the ending is novel[endings[i][0]:endings[i][1]]; measured is the time
        after the last prompt, or the whole if there is one token to make only."""
        prompts = [
            novel[i * 2000 : i * 2000 + document_tokens] + novel[start:end] for i, (start, end) in enumerate(endings)
        ]
        before: dict[str, float] = {}

        def begin() -> None:
            steps.clear()
            calls.clear()
            before.update(scheduler.memory_stats(), began=time.perf_counter())

        if max_tokens > 1:
            generate(llm, prompts, 1)
        begin()
        result = generate(llm, prompts, max_tokens, after_prompts=begin if max_tokens > 1 else lambda: None)
        ended, after = time.perf_counter(), scheduler.memory_stats()
        wall = ended - before["began"]
        counts = {name: after[name] - before[name] for name in COUNTERS}
        return {
            "wall_s": wall,
            "prompts_s": result.prompts_s,
            "tokens_per_s": result.num_decoded / wall,
            "prefix_hit_tokens": sum(one.num_cached for one in result.answers),
            **counts,
            **embedding(calls),
            "held_percent": 100 * counts["held_seconds"] / (wall * len(prompts)),
            "idle_percent": 100 * sum(step.seconds for step in steps if not step.num_tokens) / wall,
            "embed_percent": 100 * sum(call.seconds for call in calls) / wall,
            "schedule_percent": 100 * sum(step.seconds for step in steps if step.num_tokens) / wall,
            "search_ms_each": 1000 * counts["search_seconds"] / max(1, counts["searches"]),
            "by_kind": describe(steps, ended),
        }

    return answer


def embedding(calls: Sequence[EmbedderCall]) -> dict[str, Any]:
    texts, seconds = sum(len(call.texts) for call in calls), sum(call.seconds for call in calls)
    return {
        "embedded_texts": texts,
        "embed_batches": len(calls),
        "batch_sizes": dict(sorted(Counter(len(call.texts) for call in calls).items())),
        "embed_seconds": seconds,
        "embed_ms_each": 1000 * seconds / max(1, texts),
    }


def middle(values: Sequence[float]) -> dict[str, Any] | None:
    return {"median": statistics.median(values), "range": [min(values), max(values)]} if values else None


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for size, case in dict.fromkeys((row["batch_size"], row["case"]) for row in rows):
        mine = [row for row in rows if (row["batch_size"], row["case"]) == (size, case)]
        entry: dict[str, Any] = {name: middle([row[name] for row in mine]) for name in SUMMARISED}
        for kind in ("plain", "retrieving", "holding", "idle"):
            for time_of in ("schedule_ms", "whole_ms"):
                values = [value for row in mine for value in row["by_kind"][kind][time_of]]
                entry[f"{kind} steps, {time_of}"] = (middle(values) or {}) | {"count": len(values)}
        summary[f"{case}, up to {size} a batch"] = entry
    return summary


def endings(case: str, number: int, repetition: int, room: int, chunk_size: int) -> list[list[int]]:
    """Where in the novel each sequence's ending begins and ends."""
    found = []
    for i in range(number):
        length = room if case == "aligned" else 1 + i * chunk_size // number
        # Behind all documents, and no two alike.
        start = 60_000 + repetition * 10_000 + i * 300 + CASES.index(case) * 150
        found.append([start, start + length])
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--document-chunks", type=int, default=15, help="chunks of each sequence's document")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="retriever_batch_size")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    checkpoint = demo_checkpoint()
    memory = MemLongConfig.from_pretrained(checkpoint).memory
    chunk_size = memory.chunk_size
    document_tokens = arguments.document_chunks * chunk_size
    if document_tokens < memory.local_window + chunk_size:
        raise SystemExit("--document-chunks: too few, nothing leaves the local window")
    common = {"dtype": "float32", "max_model_len": document_tokens + 3 * chunk_size, "enforce_eager": True}
    common |= {"max_num_seqs": arguments.sequences, "kv_cache_memory_bytes": 2 << 30, "max_num_batched_tokens": 2048}
    common |= {"enable_prefix_caching": True}
    settings = {
        size: common | {"additional_config": {"memlong": {"bank_gib": 0.5, "retriever_batch_size": size}}}
        for size in arguments.batch_sizes
    }
    rows = []
    engines = {size: EngineProcess(__file__, checkpoint, settings[size]) for size in arguments.batch_sizes}

    def measure(size: int, case: str, repetition: int, max_tokens: int) -> None:
        places = endings(case, arguments.sequences, repetition, chunk_size // 2, chunk_size)
        found = engines[size].ask(endings=places, document_tokens=document_tokens, max_tokens=max_tokens)
        # One token only: this is the first time that the documents are computed.
        rows.append({"batch_size": size, "case": case if max_tokens > 1 else "documents", **found})
        rows[-1]["repetition"] = repetition
        print({key: value for key, value in rows[-1].items() if key != "by_kind"}, flush=True)

    for size in engines:
        measure(size, "aligned", -1, 1)
    for repetition in range(arguments.repetitions):
        for case in CASES:
            for size in list(engines)[:: 1 if repetition % 2 == 0 else -1]:
                measure(size, case, repetition, chunk_size + 1)
    for engine in engines.values():
        engine.stop()
    write_result(arguments.output, settings, rows, summarise(rows))


if __name__ == "__main__":
    if is_engine_process():
        serve(prepare)
    else:
        main()
