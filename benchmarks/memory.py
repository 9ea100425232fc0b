"""Bytes in use while prompts are computed and answered, by kind, against length and batch.

    python benchmarks/memory.py --output benchmarks/results/memory.json

Counted is what requests hold, from the engine's own pools, at its peak: blocks of the KV cache,
slots of the bank, embeddings that are searched, and MemLong's buffers, which are made for the
largest batch of the run. What an engine reserves is more, and its choice. Of the authors' loop, the
tensors of its cache at the end. Numbers do not depend on time or chance, so one repetition is
enough.
"""

from __future__ import annotations

from typing import Any

import command_line
from cells import Cell
from engine_process import EngineProcess
from throughput import salts, starts
from token_times import TokenTimes

SIZES = [(2048, 1), (8192, 1), (16384, 1), (32768, 1), (8192, 4)]


def measure(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
    prompts = [[(start, cell.length)] for start in starts(cell, repetition)]
    result = TokenTimes(**engine.ask(prompts=prompts, max_tokens=cell.answer, salts=salts(cell, repetition)))
    return {
        "peak_bytes_total": sum(result.peak_bytes.values()),
        "peak_bytes": result.peak_bytes,
        "simultaneous": result.is_simultaneous,
        "total_s": result.total_s,
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--answer", type=int, default=16, help="tokens")
    parser.set_defaults(repetitions=1)
    arguments = parser.parse_args()
    cells = command_line.cells_of(arguments, {"held": arguments.answer}, {"held": SIZES})
    command_line.run("memory", arguments, cells, measure, answer=arguments.answer)


if __name__ == "__main__":
    main()
