"""Tokens per second of MemLong and of what a user would pick instead.

    python benchmarks/throughput.py --workloads prefill --output benchmarks/results/prefill.json
    python benchmarks/report.py benchmarks/results/prefill.json

Workloads: ``prefill``, a long new prompt and a short answer, and for MemLong and the window the
same prompt again when its embeddings are known but nothing else; ``decode``, answers of more than a
segment behind prompts that are known; ``document``, many questions about one document. Engines
live in processes of their own and take turns in every repetition.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import command_line
from cells import QUESTION_TOKENS, Cell
from contenders import AUTHORS, FP8, FULL, MEMLONG, OFF, WINDOW
from engine_process import EngineProcess
from example_text import STRIDE
from token_times import TokenTimes

ENGINES = (MEMLONG, WINDOW, OFF, FULL, FP8, AUTHORS)
WORKLOADS = ("prefill", "decode", "document")
SIZES = {
    "prefill": [(2048, 1), (2048, 4), (8192, 1)],
    "decode": [(2048, 1), (2048, 8), (2048, 16)],
    "document": [(8192, 1), (8192, 8)],
}
DECODED = 160  # More than a segment, so that every sequence retrieves at least once.
ANSWER = 32


def salts(cell: Cell, repetition: int) -> list[str]:
    """Of new texts: neither prefixes nor embeddings are shared with any other measurement."""
    return [f"{cell} {repetition} {row}" for row in range(cell.batch)]


def starts(cell: Cell, repetition: int) -> list[int]:
    return [(repetition * cell.batch + row) * STRIDE for row in range(cell.batch)]


def prefill(name: str, engine: EngineProcess, cell: Cell, repetition: int, with_known: bool = True) -> dict[str, Any]:
    prompts = [[(start, cell.length)] for start in starts(cell, repetition)]
    request = {"prompts": prompts, "salts": salts(cell, repetition)}
    result = TokenTimes(**engine.ask(max_tokens=cell.answer, **request))
    num_prompt = cell.batch * cell.length
    measures = {
        "prefill_tokens_per_s": num_prompt / result.prompts_s,
        "tokens_per_s": cell.batch * (cell.length + cell.answer) / result.total_s,
        "prompts_s": result.prompts_s,
        "total_s": result.total_s,
    }
    if with_known and name in (MEMLONG, OFF, WINDOW):
        again = TokenTimes(**engine.ask(max_tokens=1, forget_prefixes=True, **request))
        measures |= {"known_prefill_tokens_per_s": num_prompt / again.prompts_s, "known_counters": again.counters}
    measures |= {"peak_bytes": result.peak_bytes, "peak_bytes_total": sum(result.peak_bytes.values())}
    measures |= {"peak_running": result.peak_running}
    return measures | {"counters": result.counters}


def decode(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
    # A text's end is new in every repetition, the rest is known; ends differ in length, so that
    # sequences retrieve one after another, as in a server.
    end = min(128, cell.length // 4)
    begin = [(cell.length - end, row * STRIDE) for row in range(cell.batch)]
    prompts = []
    for row, (length, start) in enumerate(begin):
        own = 1 + (row * end // cell.batch + repetition * 7) % end
        prompts.append([(start, length), (start + length + (repetition + 1) * 5003, own)])
    own_salts = [f"{cell} {row}" for row in range(cell.batch)]
    if engine.facts["shares_prefixes"]:
        documents = [pieces[:1] for pieces in prompts]
        engine.ask(prompts=documents, max_tokens=1, salts=own_salts)
    result = TokenTimes(**engine.ask(prompts=prompts, max_tokens=cell.answer, salts=own_salts))
    return {
        "decode_tokens_per_s": result.decode_tokens_per_s(),
        "simultaneous": result.is_simultaneous,
        "known_prompt_tokens": sum(result.num_cached),
        "total_s": result.total_s,
        "peak_bytes": result.peak_bytes,
        "counters": result.counters,
    }


def document(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
    """The first question alone, then ``batch`` others at once. An engine that shares nothing is
    asked one, as the others would take as long each."""
    text = (repetition * STRIDE, cell.length)
    salt = f"{cell} {repetition}"
    num_later = cell.batch if engine.facts["shares_prefixes"] else 1
    questions = [
        [text, (cell.length + (repetition + 1) * 5003 + number * STRIDE, QUESTION_TOKENS)]
        for number in range(1 + num_later)
    ]
    first = TokenTimes(**engine.ask(prompts=questions[:1], max_tokens=cell.answer, salts=[salt]))
    later = TokenTimes(**engine.ask(prompts=questions[1:], max_tokens=cell.answer, salts=[salt] * num_later))
    return {
        "first_question_s": first.total_s,
        "later_questions_per_s": num_later / later.total_s,
        "later_asked": num_later,
        "known_prompt_percent": 100 * sum(later.num_cached) / sum(later.prompt_lens),
        "peak_bytes": later.peak_bytes,
        "counters": later.counters,
    }


def main() -> None:
    parser = command_line.parser(__doc__, ENGINES)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens, of prefill and document")
    parser.add_argument("--decoded", type=int, default=DECODED, help="tokens, of decode")
    parser.add_argument("--without-known", action="store_true", help="no second prefill with embeddings known")
    arguments = parser.parse_args()
    answers = {"prefill": arguments.answer, "decode": arguments.decoded, "document": arguments.answer}
    measures = {"decode": decode, "document": document}
    measures["prefill"] = partial(prefill, with_known=not arguments.without_known)

    def measure(name: str, engine: EngineProcess, cell: Cell, repetition: int) -> dict[str, Any]:
        return measures[cell.workload](name, engine, cell, repetition)

    wanted = {workload: answers[workload] for workload in arguments.workloads}
    cells = command_line.cells_of(arguments, wanted, SIZES)
    command_line.run("throughput", arguments, cells, measure, answers=answers, with_known=not arguments.without_known)


if __name__ == "__main__":
    main()
