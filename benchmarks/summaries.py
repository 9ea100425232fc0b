"""What rows say together: medians, spreads, ratios, and where MemLong loses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cells import Size

MIB = 1 << 20
Row = dict[str, Any]
Turn = tuple[int, int]
"""Run of the benchmark, and repetition in it. What is compared was measured in the same one."""
# What a user could serve instead; the window alone forgets, so it is a yardstick and no alternative.
ALTERNATIVES = ("full", "fp8", "int8", "authors")


@dataclass(frozen=True)
class Measure:
    """A column of rows.

    Attributes:
        field: its name in rows.
        title: with its unit.
        more_is_better: else less is.
    """

    workload: str
    field: str
    title: str
    more_is_better: bool = True


MEASURES = {
    "throughput": (
        Measure("prefill", "prefill_tokens_per_s", "Prefill of new text, embedding included: tokens/s"),
        Measure("prefill", "known_prefill_tokens_per_s", "Prefill with embeddings known: tokens/s"),
        Measure("prefill", "tokens_per_s", "Long prompts and short answers, end to end: tokens/s"),
        Measure("prefill", "peak_bytes_total", "Held by requests at the peak: bytes", more_is_better=False),
        Measure("prefill", "peak_running", "Sequences under way at once, at the peak"),
        Measure("decode", "decode_tokens_per_s", "Decode: tokens/s of all sequences"),
        Measure("document", "first_question_s", "A document and its first question: s", more_is_better=False),
        Measure("document", "later_questions_per_s", "Later questions about the same document: questions/s"),
    ),
    "latency": (
        Measure("burst", "ttft_p50_s", "Time to first token, median of the requests: s", more_is_better=False),
        Measure("burst", "ttft_max_s", "Time to first token, the last of the requests: s", more_is_better=False),
        Measure("burst", "itl_p50_ms", "Between tokens, p50: ms", more_is_better=False),
        Measure("burst", "itl_p99_ms", "Between tokens, p99: ms", more_is_better=False),
    ),
    "online": (
        Measure("online", "output_tokens_per_s", "Answers over HTTP: tokens/s"),
        Measure("online", "ttft_p50_ms", "Time to first token over HTTP, p50: ms", more_is_better=False),
        Measure("online", "ttft_p99_ms", "Time to first token over HTTP, p99: ms", more_is_better=False),
        Measure("online", "itl_p50_ms", "Between tokens over HTTP, p50: ms", more_is_better=False),
        Measure("online", "itl_p99_ms", "Between tokens over HTTP, p99: ms", more_is_better=False),
    ),
    "memory": (Measure("held", "peak_bytes_total", "Held by requests at the peak: bytes", more_is_better=False),),
    "retrieval": (
        Measure("spread", "decode_tokens_per_s", "Decode, retrievals one after another: tokens/s"),
        Measure("aligned", "decode_tokens_per_s", "Decode, all retrieve in one step: tokens/s"),
    ),
}


@dataclass(frozen=True)
class Spread:
    """Repetitions of one measurement."""

    median: float
    low: float
    high: float
    number: int


def measured(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with measures and these values."""
    return [row for row in rows if "skipped" not in row and all(row.get(key) == wanted[key] for key in wanted)]


def by_turn(rows: Sequence[Row], measure: Measure, engine: str, size: Size) -> dict[Turn, float]:
    mine = measured(rows, workload=measure.workload, engine=engine, length=size[0], batch=size[1])
    return {turn_of(row): row[measure.field] for row in mine if row.get(measure.field) is not None}


def turn_of(row: Row) -> Turn:
    return row.get("run", 0), row["repetition"]


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def of(rows: Sequence[Row], measure: Measure, engine: str, size: Size) -> Spread | None:
    return spread(list(by_turn(rows, measure, engine, size).values()))


def ratio(rows: Sequence[Row], measure: Measure, engine: str, other: str, size: Size) -> Spread | None:
    """Of every turn that both had."""
    mine, theirs = (by_turn(rows, measure, name, size) for name in (engine, other))
    return spread([mine[turn] / theirs[turn] for turn in sorted(mine.keys() & theirs.keys())])


def sizes(rows: Sequence[Row], workload: str) -> list[Size]:
    """All there are rows of, also skipped ones."""
    return sorted({(row["length"], row["batch"]) for row in rows if row["workload"] == workload})


def skip_reason(rows: Sequence[Row], workload: str, engine: str, size: Size) -> str | None:
    for row in rows:
        if (row["workload"], row["engine"], row["length"], row["batch"]) == (workload, engine, *size):
            return row.get("skipped")
    return None


def loses_to(rows: Sequence[Row], measure: Measure, size: Size, engines: Sequence[str]) -> list[str]:
    """Alternatives that are better than MemLong, by the ratio."""
    found = []
    for name in engines:
        value = ratio(rows, measure, "memlong", name, size) if name in ALTERNATIVES else None
        if value is not None and value.median != 1 and (value.median < 1) == measure.more_is_better:
            found.append(name)
    return found
