"""What retrieval costs while sequences decode: time in the scheduler, whole steps, holds, embedding.

    python benchmarks/retrieval.py --output benchmarks/results/retrieval.json

Sequences decode past one or two segment starts behind documents that are known. ``spread``: they
reach them one after another, as in a server; ``aligned``: all in the same step, the worst there is.
The window alone does the same without retrieving. ``ledger`` is the ledger and the plan of a step
alone, without an engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import command_line
from cells import Cell
from contenders import MEMLONG, WINDOW
from engine_process import EngineError, EngineProcess
from example_text import STRIDE
from ledger_step import ledger_times
from measurement_file import MeasurementFile
from token_times import TokenTimes

from memlong_vllm.config import MemLongConfig, MemoryConfig
from memlong_vllm.demo_model import demo_checkpoint
from memlong_vllm.evaluation.results import code_digest

WORKLOADS = ("spread", "aligned")
# Endings of all sequences fit one step, and documents the default cache. Of the second, sets are chosen among many.
SIZES = [(1536, 16), (8192, 4), (1536, 32)]
KINDS = ("plain", "embedding", "retrieving", "holding", "idle")
LEDGER_LENGTH = 8192
# Of what comes before the last segments of a prompt some is always computed.
LEAST_KNOWN_PERCENT = 60


def by_kind(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Steps that decode, by what they did. ``sequences``: that took part, the others waited or had
    ended. ``embedding``: beside the step a text was embedded for a retrieval to come, which ``plain``
    steps are free of. Times in ms: ``own_ms``, of the scheduler beyond stock vLLM's; ``whole_ms``, until the next
    step begins. Steps with prompts are left out; in idle steps every sequence waits for an embedding."""
    kinds: dict[str, dict[str, Any]] = {
        kind: {"steps": 0, "sequences": [], "own_ms": [], "whole_ms": []} for kind in KINDS
    }
    for step in steps:
        if (kind := _kind(step)) is None:
            continue
        own = step["schedule_ms"] - step["stock_ms"] + step.get("update_ms", 0.0) - step.get("stock_update_ms", 0.0)
        kinds[kind]["steps"] += 1
        kinds[kind]["sequences"].append(step["num_sequences"])
        kinds[kind]["own_ms"].append(round(own, 5))
        kinds[kind]["whole_ms"].append(round(step["whole_ms"], 4))
    return kinds


def _kind(step: dict[str, Any]) -> str | None:
    if not step["num_tokens"]:
        return "idle"
    if step["num_tokens"] > step["num_sequences"]:
        return None
    if step["num_searches"]:
        return "retrieving"
    if step["num_holds"]:
        return "holding"
    return "embedding" if step["num_embedding"] else "plain"


def measurement(memory: MemoryConfig) -> Callable[[str, EngineProcess, Cell, int], dict[str, Any]]:
    """How a cell of a model with this memory is measured."""

    def measure(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
        stride, batch = memory.retrieval_stride, cell.batch
        document_len = (cell.length // stride - 1) * stride
        salts = [f"{cell.length} x {batch} {row}" for row in range(batch)]
        documents = [[(row * STRIDE, document_len)] for row in range(batch)]
        engine.ask(prompts=documents, max_tokens=1, salts=salts)
        endings = [stride // 2 if cell.workload == "aligned" else 1 + row * stride // batch for row in range(batch)]
        shift = (repetition * len(WORKLOADS) + WORKLOADS.index(cell.workload) + 1) * 5003
        prompts = [
            [*pieces, (pieces[0][0] + document_len + shift, ending)]
            for pieces, ending in zip(documents, endings, strict=True)
        ]
        # With their embeddings known, all sequences start in one step. The second token is decoded, and touches
        # memory that the system gives a process when it is written to first.
        engine.ask(prompts=prompts, max_tokens=2, salts=salts)
        result = TokenTimes(**engine.ask(prompts=prompts, max_tokens=cell.answer, salts=salts, with_steps=True))
        known = 100 * sum(result.num_cached) / (batch * document_len)
        if known < LEAST_KNOWN_PERCENT:
            raise EngineError(
                f"{known:.0f} % of the documents were still known: raise --kv-gib or have fewer sequences"
            )
        return {
            "known_percent": known,
            "decode_tokens_per_s": result.decode_tokens_per_s(),
            "simultaneous": result.is_simultaneous,
            "total_s": result.total_s,
            "counters": result.counters,
            "by_kind": by_kind(result.steps),
        }

    return measure


def add_ledger_rows(file: MeasurementFile, memory: MemoryConfig, arguments: argparse.Namespace) -> None:
    for repetition in range(arguments.repetitions):
        cell = {"workload": "ledger", "length": arguments.ledger_length, "batch": arguments.ledger_sequences}
        row = {"engine": MEMLONG, **cell, "repetition": repetition}
        if not file.has(row):
            times = ledger_times(memory, cell["batch"], cell["length"], arguments.ledger_steps)
            file.append([row | {"code": code_digest(Path(__file__).parent)} | times])


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__, engines=(MEMLONG, WINDOW))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--decoded", type=int, help="tokens of each answer; a segment and a quarter by default")
    parser.add_argument("--ledger-sequences", type=int, default=64)
    parser.add_argument("--ledger-length", type=int, default=LEDGER_LENGTH, help="tokens of each")
    parser.add_argument("--ledger-steps", type=int, default=1000)
    parser.set_defaults(repetitions=2)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    checkpoint = arguments.model = arguments.model or demo_checkpoint()
    memory = MemLongConfig.from_pretrained(checkpoint).memory
    decoded = arguments.decoded or memory.retrieval_stride + memory.retrieval_stride // 4
    cells = command_line.cells_of(
        arguments, dict.fromkeys(arguments.workloads, decoded), dict.fromkeys(WORKLOADS, SIZES)
    )
    if min(cell.length for cell in cells) < memory.local_window + 2 * memory.retrieval_stride:
        raise SystemExit("--lengths: too short, nothing leaves the local window")
    file = command_line.run("retrieval", arguments, cells, measurement(memory), decoded=decoded)
    add_ledger_rows(file, memory, arguments)


if __name__ == "__main__":
    main()
