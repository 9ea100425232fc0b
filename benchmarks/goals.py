"""The goals of MemLong's speed, computed from rows: what was asked, what was measured, met or not."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cells import Size
from summaries import MEASURES, Measure, Row, Spread, Turn, by_turn, measured, ratio, sizes, spread

MEMLONG, WINDOW, FULL, OFF = "memlong", "window", "full", "off"
FIELDS = {(measure.workload, measure.field): measure for measures in MEASURES.values() for measure in measures}
DECODE_BATCH = 8
END_TO_END = (32768, 4)
FLAT = (8192, 65536)
LEDGER_SEQUENCES = 64
# Of the step without it, which is shorter where texts are embedded beside the one with it: the stricter reading.
RETRIEVAL_STEP = "what the retrieval step adds in the scheduler, of a step of as many sequences without it"
WHOLE_STEP = "the retrieval step and what the workers do with what it found, of such a step"


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        bound: ``value`` must be at least this, or at most if not ``is_least``.
        value: None if it was not measured.
        detail: of what, or what is missing.
    """

    name: str
    bound: float
    is_least: bool
    unit: str
    value: float | None
    detail: str

    @property
    def is_met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.is_least else self.value <= self.bound


def goals(files: Sequence[tuple[str, str, Sequence[Row]]]) -> list[Goal]:
    """Every goal; of several files the worst counts. Nothing is compared across files.

    Args:
        files: (name, benchmark, rows) of each results file.
    """
    by_name: dict[str, list[Goal]] = {}
    for file, benchmark, rows in [*files, ("", "", [])]:
        is_throughput, is_retrieval = benchmark == "throughput", benchmark == "retrieval"
        for goal in _goals_of_run(rows if is_throughput else [], rows if is_retrieval else []):
            found = goal if goal.value is None else replace(goal, detail=f"{file}: {goal.detail}")
            by_name.setdefault(goal.name, []).append(found)
    return [_worst(found) for found in by_name.values()]


def _worst(found: Sequence[Goal]) -> Goal:
    known = [goal for goal in found if goal.value is not None]
    if not known:
        return found[0]
    worst = (min if known[0].is_least else max)(known, key=lambda goal: goal.value)
    return replace(worst, detail="; ".join(goal.detail for goal in known))


def _goals_of_run(throughput: Sequence[Row], retrieval: Sequence[Row]) -> list[Goal]:
    prefill, known = (FIELDS["prefill", f"{name}prefill_tokens_per_s"] for name in ("", "known_"))
    return [
        _least_ratio(f"decode, batch {DECODE_BATCH}, of the window alone", 0.95, throughput, _decode(), DECODE_BATCH),
        _least_ratio("prefill with embedding, of the window alone", 0.80, throughput, prefill),
        _least_ratio("prefill, embeddings known, of the window alone", 0.97, throughput, known),
        _end_to_end(throughput),
        _flatness("prefill", throughput, prefill),
        _flatness("decode", throughput, _decode()),
        _retrieval_share(retrieval, "share_of_plain_percent", RETRIEVAL_STEP),
        _retrieval_share(retrieval, "whole_percent", WHOLE_STEP),
        _ledger(retrieval),
    ]


def _decode() -> Measure:
    return FIELDS["decode", "decode_tokens_per_s"]


def _least_ratio(name: str, bound: float, rows: Sequence[Row], measure: Measure, batch: int | None = None) -> Goal:
    """The worst size counts. Beside it, in the detail: of MemLong that remembers nothing, which attends with the same
    code, so that this is what memory costs."""
    found = {other: _ratios(rows, measure, other, batch) for other in (WINDOW, OFF)}
    if not found[WINDOW]:
        return Goal(name, bound, True, "x", None, "no size with both")
    detail = _listed(found[WINDOW])
    runs = sorted({row["run"] for row in rows if "run" in row})
    if batch is not None and len(runs) > 1:  # Of the size that was measured again, perhaps beside fewer engines.
        by_run = {run: _ratios([row for row in rows if row.get("run") == run], measure, WINDOW, batch) for run in runs}
        detail += "".join(f"; in run {run}: {_listed(values)}" for run, values in by_run.items() if values)
    if found[OFF]:
        detail += f"; of MemLong without memory: {_listed(found[OFF])}"
    return Goal(name, bound, True, "x", min(value.median for value in found[WINDOW].values()), detail)


def _ratios(rows: Sequence[Row], measure: Measure, other: str, batch: int | None) -> dict[Size, Spread]:
    found = {}
    for size in sizes(rows, measure.workload):
        value = ratio(rows, measure, MEMLONG, other, size)
        if value is not None and batch in (None, size[1]):
            found[size] = value
    return found


def _end_to_end(rows: Sequence[Row]) -> Goal:
    length, batch = END_TO_END
    name = f"end to end at {length:,} x {batch}, of full attention"
    value = ratio(rows, FIELDS["prefill", "tokens_per_s"], MEMLONG, FULL, END_TO_END)
    if value is None:
        return Goal(name, 4.0, True, "x", None, "not both of them at this size")
    return Goal(name, 4.0, True, "x", value.median, _listed({END_TO_END: value}))


def _flatness(name: str, rows: Sequence[Row], measure: Measure) -> Goal:
    """What a token costs at the length that differs most from the shortest, against its cost there, the batch being
    equal. Where other engines had turns in between, lengths are tens of minutes apart, and a machine is not the same
    for so long."""
    title = f"{name}: cost per token, {FLAT[0]:,} to {FLAT[1]:,}"
    worst, details = None, []
    if {row["engine"] for row in rows} == {MEMLONG}:
        for batch in sorted({batch for _, batch in sizes(rows, measure.workload)}):
            if ratios := _cost_ratios(_costs_by_turn(rows, measure, batch)):
                listed = "; ".join(f"{length:,}: {_shown(value)}" for length, value in ratios.items())
                details.append(f"batch {batch}, of the cost at {FLAT[0]:,}: {listed}")
                worst = max(worst or 0.0, *(100 * abs(value.median - 1) for value in ratios.values()))
    missing = "not measured at both ends with one batch in one run, of MemLong alone"
    return Goal(title, 10.0, False, "% apart", worst, "; ".join(details) or missing)


def _cost_ratios(turns: Sequence[Mapping[int, float]]) -> dict[int, Spread]:
    """By length, a token's cost of its cost at the shortest, turn by turn."""
    lengths = sorted(set().union(*turns) - {FLAT[0]})
    both = {length: [costs for costs in turns if length in costs] for length in lengths}
    found = {length: spread([costs[length] / costs[FLAT[0]] for costs in mine]) for length, mine in both.items()}
    return {length: value for length, value in found.items() if value is not None}


def _costs_by_turn(rows: Sequence[Row], measure: Measure, batch: int) -> list[dict[int, float]]:
    """MemLong's ms a token, by length, of each turn that has both ends."""
    found: dict[Turn, dict[int, float]] = {}
    for length, other in sizes(rows, measure.workload):
        if other == batch and FLAT[0] <= length <= FLAT[1]:
            for turn, value in by_turn(rows, measure, MEMLONG, (length, batch)).items():
                found.setdefault(turn, {})[length] = 1000 / value
    return [costs for costs in found.values() if costs.keys() >= set(FLAT)]


def retrieval_costs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What retrieval costs, of MemLong's rows of each cell: medians over the steps of all repetitions in which
    some sequence retrieves, in ms.

    ``own_ms`` is the scheduler's own time in such a step, ``whole_ms`` the whole step. Each is compared
    with the median step of the same repetition that decodes as many sequences without a retrieval,
    ``plain_…``; there are ``matched`` steps that can be. ``share_percent``: what retrieval adds in the
    scheduler, of the step's time; where nothing compares, all of the scheduler's own time counts.
    ``share_of_plain_percent``: the same, of the time of the step that it is compared with.
    ``whole_percent``: how much longer the step is in all. ``held_percent``: of the sequences' time, in
    which they wait for an embedding.
    """
    costs = []
    for workload in ("spread", "aligned"):
        for length, batch in sizes(rows, workload):
            mine = measured(rows, workload=workload, engine=MEMLONG, length=length, batch=batch)
            if pairs := [pair for row in mine for pair in _pairs(row)]:
                held = [100 * row["counters"]["held_seconds"] / (row["total_s"] * batch) for row in mine]
                cost = {"workload": workload, "length": length, "batch": batch}
                cost |= {"held_percent": statistics.median(held)}
                costs.append(cost | _compared(pairs))
    return costs


@dataclass(frozen=True)
class Step:
    """A step that decodes; see :mod:`retrieval`."""

    sequences: int
    own_ms: float
    whole_ms: float


def _steps(row: Row, kind: str) -> list[Step]:
    columns = (row["by_kind"][kind][name] for name in ("sequences", "own_ms", "whole_ms"))
    return [Step(*values) for values in zip(*columns, strict=True)]


def _pairs(row: Row) -> list[tuple[Step, Step | None]]:
    """Steps in which a sequence retrieves, each with the plain one that it is compared with."""
    plain = _plain_steps(row)
    return [(step, plain.get(step.sequences)) for step in _steps(row, "retrieving")]


def _plain_steps(row: Row) -> dict[int, Step]:
    """The median step without a retrieval, by its number of sequences."""
    found: dict[int, list[Step]] = {}
    for step in _steps(row, "plain"):
        found.setdefault(step.sequences, []).append(step)
    return {
        number: Step(
            number, *(statistics.median(getattr(step, name) for step in steps) for name in ("own_ms", "whole_ms"))
        )
        for number, steps in found.items()
    }


def _compared(all_pairs: Sequence[tuple[Step, Step | None]]) -> dict[str, Any]:
    retrieving = [step for step, _ in all_pairs]
    pairs = [(step, other) for step, other in all_pairs if other is not None]
    shares = [100 * (step.own_ms - (other.own_ms if other else 0.0)) / step.whole_ms for step, other in all_pairs]
    return {
        "steps": len(retrieving),
        "matched": len(pairs),
        "own_ms": _median(step.own_ms for step in retrieving),
        "whole_ms": _median(step.whole_ms for step in retrieving),
        "plain_own_ms": _median(other.own_ms for _, other in pairs),
        "plain_whole_ms": _median(other.whole_ms for _, other in pairs),
        "share_percent": _median(shares),
        "share_of_plain_percent": _median(100 * (step.own_ms - other.own_ms) / other.whole_ms for step, other in pairs),
        "whole_percent": _median(100 * (step.whole_ms / other.whole_ms - 1) for step, other in pairs),
    }


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def _retrieval_share(rows: Sequence[Row], field: str, name: str) -> Goal:
    costs = [cost for cost in retrieval_costs(rows) if cost[field] is not None]
    if not costs:
        return Goal(name, 1.0, False, "%", None, "no steps with and without a retrieval")
    listed = "; ".join(
        f"{cost['workload']} {cost['length']:,} x {cost['batch']}: {cost['whole_ms']:.4g} ms, of which the scheduler "
        f"adds {_percent(cost['share_percent'])}; of the step that it is compared with, "
        f"{_percent(cost['share_of_plain_percent'])}, the whole step {_percent(cost['whole_percent'])}"
        for cost in costs
    )
    return Goal(name, 1.0, False, "%", max(cost[field] for cost in costs), listed)


def _percent(value: float | None) -> str:
    return "not compared" if value is None else f"{value:+.2f} %"


def _ledger(rows: Sequence[Row]) -> Goal:
    name = f"ledger and plan of a step, {LEDGER_SEQUENCES} sequences"
    mine = measured(rows, workload="ledger", engine=MEMLONG, batch=LEDGER_SEQUENCES)
    times = [time for row in mine for time in row["plain_ms"] + row["retrieving_ms"]]
    if not times:
        return Goal(name, 0.2, False, "ms", None, "not measured")
    parts, medians = [], []
    for field in ("plain_ms", "retrieving_ms"):
        values = [time for row in mine for time in row[field]]
        if values:
            medians.append(statistics.median(values))
            most = statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]
            kind = field.removesuffix("_ms")
            parts.append(f"{kind} steps {medians[-1]:.3f}, p99 {most:.3f} (n={len(values)})")
    return Goal(name, 0.2, False, "ms", max(medians), f"the worse median; {', '.join(parts)}")


def _listed(found: Mapping[Size, Spread]) -> str:
    return "; ".join(f"{length:,} x {batch}: {_shown(value)}" for (length, batch), value in found.items())


def _shown(value: Spread) -> str:
    if value.number == 1:
        return f"{value.median:.2f} (n=1)"
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f}, n={value.number})"
