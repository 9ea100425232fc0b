"""The benchmarks' results: goals, plots and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from goals import RETRIEVAL_STEP, WHOLE_STEP, goals, retrieval_costs
from matplotlib.figure import Figure
from measurement_file import MeasurementFile, read_results
from plots import panel
from report import write_report
from summaries import Measure


def rows_of(rates: dict[str, float], workload: str, length: int, batch: int, *fields: str) -> list[dict[str, Any]]:
    return [
        {"engine": engine, "workload": workload, "length": length, "batch": batch, "repetition": repetition}
        | dict.fromkeys(fields, rate * (1 + repetition / 100))
        for engine, rate in rates.items()
        for repetition in range(2)
    ]


@pytest.fixture
def throughput_results(tmp_path: Path) -> Path:
    """Made up: MemLong loses to full attention at 2,048 and is flat."""
    path = tmp_path / "throughput.json"
    engines = ("memlong", "window", "full", "fp8")
    file = MeasurementFile(path, "throughput", {"dtype": "float32"}, {name: {"title": name} for name in engines})
    fields = ("prefill_tokens_per_s", "known_prefill_tokens_per_s", "tokens_per_s")
    file.append(rows_of({"memlong": 90, "window": 100, "full": 120}, "prefill", 2048, 4, *fields))
    file.append(rows_of({"memlong": 90, "window": 100, "full": 20}, "prefill", 32768, 4, *fields))
    file.append(rows_of({"memlong": 90, "window": 100}, "prefill", 8192, 1, *fields))
    file.append(rows_of({"memlong": 85, "window": 100}, "prefill", 65536, 1, *fields))
    file.append(rows_of({"memlong": 47, "window": 50}, "decode", 8192, 8, "decode_tokens_per_s"))
    cell = {"workload": "prefill", "length": 2048, "batch": 4, "repetition": None}
    file.append([{"engine": "fp8", **cell, "skipped": "CPU has none"}])
    return path


def test_goals_are_computed_from_the_rows(throughput_results: Path) -> None:
    rows = read_results(throughput_results)["rows"]
    found = {goal.name: goal for goal in goals([("file", "throughput", rows)])}
    expected = {
        "decode, batch 8, of the window alone": (0.94, False),
        "prefill with embedding, of the window alone": (0.85, True),
        "prefill, embeddings known, of the window alone": (0.85, False),
        "end to end at 32,768 x 4, of full attention": (4.5, True),
    }
    for name, (value, is_met) in expected.items():
        assert (found[name].value, found[name].is_met) == (pytest.approx(value), is_met), name
    unknown = [goal.name for goal in found.values() if goal.is_met is None]
    assert len(unknown) == 5
    assert len(found) == 9


def test_lengths_are_compared_within_a_run(throughput_results: Path) -> None:
    name = "prefill: cost per token, 8,192 to 65,536"
    rows = read_results(throughput_results)["rows"]
    (flat,) = (goal for goal in goals([("file", "throughput", rows)]) if goal.name == name)
    assert flat.value is None, "others had turns in between"
    rows = [row for row in rows if row["engine"] == "memlong"]
    (flat,) = (goal for goal in goals([("file", "throughput", rows)]) if goal.name == name)
    assert (flat.value, flat.is_met) == (pytest.approx(100 * (90 / 85 - 1)), True)
    assert flat.detail == "file: batch 1, of the cost at 8,192: 65,536: 1.06 (1.06-1.06, n=2)"
    cheaper = [row | {"prefill_tokens_per_s": 170 if row["length"] == 65536 else 90} for row in rows]
    (flat,) = (goal for goal in goals([("file", "throughput", cheaper)]) if goal.name == name)
    assert (flat.value, flat.is_met) == (pytest.approx(100 * (1 - 90 / 170)), False), "a cheaper one is not flat either"
    # The second repetition's rows at 64k are of another run, in which everything was slower.
    for row in rows:
        if (row["length"], row["repetition"]) == (65536, 1):
            row |= {"run": 2, "prefill_tokens_per_s": 1.0}
    (flat,) = (goal for goal in goals([("file", "throughput", rows)]) if goal.name == name)
    assert flat.value == pytest.approx(100 * (90 / 85 - 1))
    apart = [row | {"run": row["length"]} if row["repetition"] is not None else row for row in rows]
    (flat,) = (goal for goal in goals([("file", "throughput", apart)]) if goal.name == name)
    assert (flat.value, flat.detail) == (None, "not measured at both ends with one batch in one run, of MemLong alone")


def test_goals_about_retrieval() -> None:
    kinds = {
        # Of three sequences there is no step without a retrieval.
        "plain": {"sequences": [64, 1], "own_ms": [0.5, 0.1], "whole_ms": [100.0, 2.0]},
        "retrieving": {"sequences": [64, 64, 3], "own_ms": [1.5, 1.7, 0.3], "whole_ms": [104.0, 104.0, 10.0]},
    }
    cell = {"engine": "memlong", "repetition": 0, "batch": 64}
    rows = [{**cell, "workload": "spread", "length": 1536, "by_kind": kinds}]
    rows[0] |= {"total_s": 10.0, "counters": {"held_seconds": 1.0}}
    rows += [{**cell, "workload": "ledger", "length": 8192, "plain_ms": [0.1] * 3, "retrieving_ms": [0.3]}]
    found = {goal.name: goal for goal in goals([("file", "retrieval", rows)])}
    share = found[RETRIEVAL_STEP]
    assert (share.value, share.is_met) == (pytest.approx(1.1), False)  # Of 100 ms, 1.0 and 1.2.
    assert "the whole step +4.00 %" in share.detail
    assert f"adds +{120 / 104:.2f} %" in share.detail
    whole = found[WHOLE_STEP]
    assert (whole.value, whole.is_met) == (pytest.approx(4.0), False)
    # Beside a slower repetition's plain steps they would be compared with other ones.
    slower = {"plain": kinds["plain"] | {"whole_ms": [200.0, 4.0]}, "retrieving": kinds["retrieving"]}
    (cost,) = retrieval_costs([*rows[:1], rows[0] | {"repetition": 1, "by_kind": slower}])
    assert cost["whole_percent"] == pytest.approx((4.0 - 48.0) / 2)
    ledger = found["ledger and plan of a step, 64 sequences"]
    assert (ledger.value, ledger.is_met) == (pytest.approx(0.3), False)  # Of its two kinds of steps the worse.


@pytest.mark.parametrize("is_by_batch", [False, True])
def test_batches_of_one_length_are_drawn_along_the_axis(is_by_batch: bool) -> None:
    axes = Figure().add_subplot()
    cells = [(2048, 1), (2048, 8)] if is_by_batch else [(2048, 1), (8192, 1), (2048, 8)]
    rows = [row for size in cells for row in rows_of({"memlong": 90, "full": 50}, "decode", *size, "tokens")]
    panel({"rows": rows, "models": {"memlong": {}, "full": {}}}, Measure("decode", "tokens", "Tokens"), axes)
    drawn = {bars.get_label(): list(bars.lines[0].get_xdata()) for bars in axes.containers}
    if is_by_batch:
        assert drawn == {"memlong": [1, 8], "full": [1, 8]}
        assert axes.get_xlabel() == "sequences of 2,048 tokens"
    else:
        lengths = {"batch 1": [2048, 8192], "batch 8": [2048]}
        assert drawn == {f"{name}, {batch}": lengths[batch] for name in ("memlong", "full") for batch in lengths}


def test_a_report_says_where_memlong_loses_and_what_is_missing(throughput_results: Path) -> None:
    written = write_report([throughput_results], throughput_results.with_name("report.md"))
    text = written[0].read_text()
    assert "**loses to full**" in text
    assert "[1] fp8: CPU has none" in text
    assert "] full: was not asked for, or has not had its turn" in text
    assert "not compared" not in text
    assert "0.9 (0.9-0.9)" in text
    assert written[1].name == "throughput.png"
    assert written[1].stat().st_size > 10_000
    content = json.loads(throughput_results.read_text())
    for row in content["rows"]:
        row["run"] = 1 + (row["engine"] == "full")
    throughput_results.write_text(json.dumps(content))
    text = write_report([throughput_results], throughput_results.with_name("report.md"))[0].read_text()
    assert "memlong and full were not measured in one run, so they are not compared" in text
    assert "**loses to full**" not in text
