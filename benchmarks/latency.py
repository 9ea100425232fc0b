"""Time to the first token and between tokens, for requests that all come at once.

    python benchmarks/latency.py --output benchmarks/results/latency.json

``burst``: prompts of new text, computed in pieces while the first of them decode already, so the
longest gaps between tokens are those that other prompts cause. Requests that come over time, to a
real server, are ``online.py``'s.
"""

from __future__ import annotations

from typing import Any

import command_line
from cells import Cell
from engine_process import EngineProcess
from throughput import salts, starts
from token_times import TokenTimes, percentile

SIZES = [(2048, 1), (2048, 4), (8192, 4)]


def measure(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
    prompts = [[(start, cell.length)] for start in starts(cell, repetition)]
    result = TokenTimes(**engine.ask(prompts=prompts, max_tokens=cell.answer, salts=salts(cell, repetition)))
    first, gaps = result.first_token_s(), result.gaps_ms()
    return {
        "ttft_p50_s": percentile(first, 0.5),
        "ttft_max_s": max(first),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p99_ms": percentile(gaps, 0.99),
        "itl_max_ms": max(gaps),
        "total_s": result.total_s,
        "counters": result.counters,
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    arguments = parser.parse_args()
    if arguments.answer < 2:
        raise SystemExit("--answer: at least 2, between which there is time")
    cells = command_line.cells_of(arguments, {"burst": arguments.answer}, {"burst": SIZES})
    command_line.run("latency", arguments, cells, measure, answer=arguments.answer)


if __name__ == "__main__":
    main()
