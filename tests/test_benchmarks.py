"""The benchmarks: their arithmetic, going on after a stop, reports, and that each of them runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.evaluation.scoring import EvaluationError
from tests.checkpoints import NOVEL

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import paper_scale  # noqa: E402
from accounting_report import ACCOUNTING  # noqa: E402
from cells import Cell, parse_size  # noqa: E402
from command_line import cells_of  # noqa: E402
from contenders import Contenders, Options  # noqa: E402
from engine_process import EngineError  # noqa: E402
from goals import WHOLE_STEP, goals  # noqa: E402
from interleaved import InterleavedRun, Turns  # noqa: E402
from ledger_step import ledger_times  # noqa: E402
from measurement_file import MeasurementFile, read_results  # noqa: E402
from report import write_report  # noqa: E402
from retrieval import by_kind  # noqa: E402
from summaries import MEASURES, loses_to, ratio  # noqa: E402
from token_times import TokenTimes, percentile  # noqa: E402

TINY = ["--dtype", "float32", "--step-tokens", "128", "--repetitions", "1"]


def run(script: str, output: Path, *words: Any) -> dict[str, Any]:
    """Run a benchmark to its end; its results."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words), "--output", str(output)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


def by_cell(content: dict[str, Any]) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    return {(row["engine"], row["workload"], row["length"], row["batch"]): row for row in content["rows"]}


# Arithmetic.


def test_decoding_is_measured_while_all_requests_decode() -> None:
    result = TokenTimes([5, 5], [0, 3], [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]], total_s=5.0)
    assert result.prompts_s == 2.0
    assert result.is_simultaneous
    assert result.decode_tokens_per_s() == 2.0  # Two tokens each in (2, 4].
    assert result.gaps_ms() == [1000.0] * 6
    waves = TokenTimes([5, 5], [0, 0], [[1.0, 2.0], [3.0, 5.0]], total_s=5.0)
    assert not waves.is_simultaneous
    assert waves.decode_tokens_per_s() is None


def test_ratios_are_of_repetitions_that_both_have() -> None:
    row = {"workload": "prefill", "length": 64, "batch": 1}
    rates = {"memlong": [90.0, 50.0, 50.0], "full": [60.0]}
    rows = [row | {"engine": name, "repetition": number, "prefill_tokens_per_s": rate}
            for name, values in rates.items() for number, rate in enumerate(values)]  # fmt: skip
    measure = next(entry for entry in MEASURES["throughput"] if entry.field == "prefill_tokens_per_s")
    found = ratio(rows, measure, "memlong", "full", (64, 1))
    assert found is not None
    assert (found.median, found.number) == (1.5, 1)
    assert loses_to(rows, measure, (64, 1), ["full"]) == []


def test_percentiles_are_nearest_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, share) for share in (0.25, 0.5, 0.75, 0.99)] == [1.0, 2.0, 3.0, 4.0]


def test_small_cells_come_first() -> None:
    asked = argparse.Namespace(cells=None, lengths=[128, 64], batches=[1, 4])
    cells = cells_of(asked, {"prefill": 8, "decode": 16}, {})
    assert len(cells) == 8
    assert [cell.length * cell.batch for cell in cells] == sorted(cell.length * cell.batch for cell in cells)
    asked = argparse.Namespace(cells=[parse_size("32768x4")], lengths=None, batches=None)
    assert cells_of(asked, {"prefill": 8}, {"prefill": [(1, 1)]}) == [Cell("prefill", 32768, 4, 8)]
    with pytest.raises(SystemExit, match="--batches"):
        cells_of(argparse.Namespace(cells=None, lengths=[1], batches=None), {"prefill": 8}, {})


def test_steps_are_told_apart_by_what_they_did() -> None:
    def step(tokens: int, sequences: int, searches: int = 0, holds: int = 0, ms: float = 1.0) -> dict[str, Any]:
        times = {"schedule_ms": ms, "stock_ms": 0.5, "update_ms": 0.3, "stock_update_ms": 0.1, "whole_ms": 9.0}
        return {"num_tokens": tokens, "num_sequences": sequences, "num_searches": searches, "num_holds": holds} | times

    steps = [step(8, 2), step(2, 2), step(2, 2, searches=1, ms=2.0), step(1, 1, holds=1), step(0, 0, holds=2)]
    kinds = by_kind(steps)
    assert {kind: entry["steps"] for kind, entry in kinds.items()} == dict.fromkeys(kinds, 1)
    assert kinds["holding"]["sequences"] == [1]
    assert kinds["plain"]["own_ms"] == [pytest.approx(0.7)]
    assert kinds["retrieving"]["own_ms"] == [pytest.approx(1.7)]


def test_ledger_and_plan_of_a_step_are_timed(checkpoints: Any) -> None:
    from memlong_vllm.config import MemLongConfig

    memory = MemLongConfig.from_pretrained(checkpoints.memlong()).memory
    times = ledger_times(memory, number=4, length=256, num_steps=20)
    # Each of the four reaches a segment start once or twice, at a step of its own.
    assert 4 <= len(times["retrieving_ms"]) <= 8
    assert len(times["retrieving_ms"]) + len(times["plain_ms"]) == 20


# Runs.


class FakeEngine:
    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def peak_rss_bytes(self) -> int:
        return 0

    def stop(self) -> None:
        pass


class FakeContenders:
    names = ("memlong", "full", "fp8")

    def __init__(self) -> None:
        self.started: list[str] = []

    def why_not(self, name: str, cell: Cell) -> str | None:
        return "too long" if name == "full" and cell.length > 100 else None

    def fitting(self, name: str, cell: Cell) -> int:
        return cell.batch

    def settings(self, name: str) -> dict[str, Any]:
        return {}

    def start(self, name: str) -> Any:
        self.started.append(name)
        if name == "fp8":
            raise EngineError("no such cache here")
        return FakeEngine()

    def warm_up(self, name: str, engine: Any) -> None:
        pass


class Recorder:
    """A measure that can stop the run, or an engine fail."""

    def __init__(self, stop_at: int | None = None, fails: Sequence[tuple[str, int, int]] = ()) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self._stop_at, self._fails = stop_at, fails

    def __call__(self, name: str, engine: Any, cell: Cell, repetition: int) -> dict[str, Any]:
        if len(self.calls) == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append((name, cell.length, repetition))
        if self.calls[-1] in self._fails:
            raise EngineError("the engine's process ended")
        return {"tokens_per_s": 1.0}


CELLS = [Cell("prefill", 64, 1, 4), Cell("prefill", 128, 1, 4)]
EXPECTED = [("memlong", 64, 0), ("full", 64, 0), ("memlong", 128, 0), ("memlong", 64, 1), ("memlong", 128, 1)]


def measure_all(
    path: Path, recorder: Recorder, turns: Turns, contenders: FakeContenders | None = None, **settings: Any
) -> MeasurementFile:
    models = {name: {"title": name} for name in FakeContenders.names}
    file = MeasurementFile(path, "throughput", settings, models)
    InterleavedRun(file, contenders or FakeContenders(), recorder, turns).run(CELLS)  # type: ignore[arg-type]
    return file


def test_a_stopped_run_goes_on_and_says_what_was_left_out(tmp_path: Path) -> None:
    path, turns = tmp_path / "results.json", Turns(repetitions=2, fewer={"full": 1})
    stopped, resumed = Recorder(stop_at=2), Recorder()
    with pytest.raises(KeyboardInterrupt):
        measure_all(path, stopped, turns, dtype="float32")
    content = measure_all(path, resumed, turns, dtype="float32").content
    # Which goes first changes, and nothing is measured twice.
    assert stopped.calls + resumed.calls == EXPECTED
    skipped = {(row["engine"], row["length"]): row["skipped"] for row in content["rows"] if "skipped" in row}
    reason = "no such cache here"
    assert skipped == {("fp8", 64): reason, ("fp8", 128): reason, ("full", 128): "too long"}
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    with pytest.raises(EvaluationError, match="dtype was 'float32', now 'bfloat16'"):
        measure_all(path, Recorder(), turns, dtype="bfloat16")
    path.write_text(path.read_text().replace('"usable_cores": ', '"usable_cores": 9'))
    with pytest.raises(EvaluationError, match="usable_cores 9"):
        measure_all(path, Recorder(), turns, dtype="float32")


def test_an_engine_that_fails_is_started_again(tmp_path: Path) -> None:
    """For the next cell; what it did not measure is tried again by the next run."""
    path, turns, contenders = tmp_path / "results.json", Turns(repetitions=1, fewer={"full": 0}), FakeContenders()
    content = measure_all(path, Recorder(fails=[("memlong", 64, 0)]), turns, contenders).content
    assert contenders.started == ["memlong", "fp8", "memlong"]
    rows = [row for row in content["rows"] if row["engine"] == "memlong"]
    assert [(row["length"], row.get("skipped")) for row in rows] == [(64, "the engine's process ended"), (128, None)]
    again = Recorder()
    content = measure_all(path, again, turns).content
    assert again.calls == [("memlong", 64, 0)]
    assert len([row for row in content["rows"] if row["engine"] == "memlong" and "skipped" not in row]) == 2
    # A cell that always fails is tried once a run, and keeps no other from being measured.
    fails, turns = [("memlong", 128, repetition) for repetition in range(3)], Turns(repetitions=3, fewer={"full": 0})
    for calls, starts in ((4, 2), (1, 1)):
        recorder, contenders = Recorder(fails=fails), FakeContenders()
        rows = measure_all(tmp_path / "large.json", recorder, turns, contenders).content["rows"]
        assert (len(recorder.calls), contenders.started.count("memlong")) == (calls, starts)
    assert {row["repetition"] for row in rows if row["engine"] == "memlong" and row["length"] == 64} == {0, 1, 2}


def test_what_would_take_too_long_is_left_out(tmp_path: Path) -> None:
    content = measure_all(tmp_path / "results.json", Recorder(), Turns(repetitions=1, limit_s=0.0)).content
    skipped = [row for row in content["rows"] if "would take" in row.get("skipped", "")]
    assert [(row["engine"], row["length"]) for row in skipped] == [("memlong", 128)]


def test_memory_is_given_by_need_and_refused_beyond_the_limit(model: Path, tmp_path: Path) -> None:
    small, large = Cell("prefill", 1000, 3, 24), Cell("prefill", 5000, 2, 24)
    token_bytes = 5 * 2 * 2 * 32 * 2  # Layers, keys and values, heads, head size, bfloat16.
    options = Options("bfloat16", kv_bytes=40 * 128 * token_bytes, max_num_batched_tokens=128)
    names = ["memlong", "off", "full", "fp8", "authors"]
    contenders = Contenders(model, tmp_path, names, [small, large], options)
    assert contenders.why_not("full", small) is None
    assert "GiB" in (contenders.why_not("full", large) or "")
    assert contenders.why_not("fp8", large) is None
    assert "one sequence" in (contenders.why_not("authors", small) or "")
    # Three windows and a step; the prompts are new, so no prefixes are kept.
    assert contenders.kv_bytes("memlong") == contenders.kv_bytes("off") == (3 * (64 + 256) + 128 + 128) * token_bytes
    known = Contenders(model, tmp_path, ["memlong"], [Cell("decode", 1000, 3, 24)], Options("bfloat16"))
    assert known.kv_bytes("memlong") == (3 * 1024 + 2 * 4 * 128) * token_bytes
    assert contenders.settings("full")["max_model_len"] == 1024
    assert contenders.settings("memlong")["max_model_len"] == 5024
    assert contenders.fitting("full", small) == 3
    # A block of 128 tokens more than 5,024 take, of half the bytes, in 40 blocks of full size.
    assert contenders.fitting("fp8", large) == 1
    assert contenders.kv_bytes("fp8") == 40 * 128 * token_bytes


# Reports.


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
    found = {goal.name: goal for goal in goals([("throughput", rows)])}
    expected = {
        "decode, batch 8, of the window alone": (0.94, False),
        "prefill with embedding, of the window alone": (0.85, True),
        "prefill, embeddings known, of the window alone": (0.85, False),
        "end to end at 32,768 x 4, of full attention": (4.5, True),
        "prefill: cost per token, 8,192 to 65,536": (100 * (90 / 85 - 1), True),
    }
    for name, (value, is_met) in expected.items():
        assert (found[name].value, found[name].is_met) == (pytest.approx(value), is_met), name
    unknown = [goal.name for goal in found.values() if goal.is_met is None]
    assert len(unknown) == 4
    assert len(found) == 9


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
    found = {goal.name: goal for goal in goals([("retrieval", rows)])}
    share = found["the retrieval step, of a step in which some sequence retrieves"]
    assert (share.value, share.is_met) == (pytest.approx(120 / 104), False)
    assert "the whole step +4.00 %" in share.detail
    whole = found[WHOLE_STEP]
    assert (whole.value, whole.is_met) == (pytest.approx(4.0), False)
    ledger = found["ledger and plan of a step, 64 sequences"]
    assert (ledger.value, ledger.is_met) == (pytest.approx(0.1), True)


def test_a_report_says_where_memlong_loses_and_what_is_missing(throughput_results: Path) -> None:
    written = write_report([throughput_results], throughput_results.with_name("report.md"))
    text = written[0].read_text()
    assert "**loses to full**" in text
    assert "[1] fp8: CPU has none" in text
    assert "0.9 (0.9-0.9)" in text
    assert written[1].name == "throughput.png"
    assert written[1].stat().st_size > 10_000


# The scripts.


def test_the_accounting_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "paper_scale.json"
    monkeypatch.setattr("sys.argv", ["paper_scale.py", "--output", str(output)])
    paper_scale.main()
    rows = [row for row in read_results(output)["rows"] if row["workload"] == ACCOUNTING]
    sequences = {(row["model"], row["variant"], row["memory_size"]): row["sequences"] for row in rows}
    assert len(sequences) == 3 * (3 + 2 * 2)
    # As 'memlong-vllm plan' and the README have it.
    assert sequences["openllama-3b", "full attention", None] == 0
    assert sequences["openllama-3b", "MemLong, bank on device", 32768] == 12
    assert sequences["openllama-3b", "MemLong, bank on host", 32768] == 20
    assert "openllama-3b" in write_report([output], tmp_path / "report.md")[0].read_text()


def test_throughput_runs(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, *TINY, "--lengths", 320, "--batches", 2, "--answer", 4, "--decoded", 24]
    engines = ("memlong", "window", "off", "authors")
    content = run("throughput.py", tmp_path / "throughput.json", *words, "--engines", *engines)
    rows = by_cell(content)
    workloads = ("prefill", "decode", "document")
    assert rows.keys() == {(engine, workload, 320, 2) for engine in engines for workload in workloads}
    assert "one sequence" in rows["authors", "prefill", 320, 2]["skipped"]
    assert rows["authors", "document", 320, 2]["skipped"]
    assert rows["off", "prefill", 320, 2]["counters"]["searches"] == 0
    assert rows["off", "prefill", 320, 2]["counters"]["embedded_texts"] == 0
    prefill = rows["memlong", "prefill", 320, 2]
    assert prefill["counters"]["embedded_texts"] > 0
    # The second time everything is computed, but nothing embedded.
    assert prefill["known_counters"] | {"embedded_texts": 0, "prefix_hit_tokens": 0} == prefill["known_counters"]
    assert 0 < prefill["known_counters"]["searches"] <= prefill["counters"]["searches"]
    decode = rows["memlong", "decode", 320, 2]
    assert decode["known_prompt_tokens"] > 0
    assert decode["counters"]["embedded_texts"] > 0
    assert rows["memlong", "document", 320, 2]["known_prompt_percent"] > 50
    assert set(content["engines"]) == {"memlong", "window", "off"}
    assert {row["setup"] for row in rows.values() if "skipped" not in row} == {0}
    assert "MemLong / window" in write_report([tmp_path / "throughput.json"], tmp_path / "report.md")[0].read_text()


@pytest.mark.slow
def test_the_bank_in_either_place_answers_alike(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--length", 400, "--batch", 2, "--max-tokens", 20, "--repetitions", 1]
    summary = run("bank_device.py", tmp_path / "bank_device.json", *words)["summary"]
    assert summary["equal_answers"] == summary["answers"] == 2
    assert summary["prefill_tokens_per_s, cpu"]["median"] > 0
    assert all(number > 0 for number in summary["working_set_gathers"].values())


@pytest.mark.slow
def test_a_shared_prefix_is_compared_with_a_cold_engine(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--length", 640, "--questions", 2, "--max-tokens", 4, "--repetitions", 1]
    summary = run("prefix_sharing.py", tmp_path / "prefix_sharing.json", *words, "--check")["summary"]
    assert summary["check"]["answers"] == 2
    assert summary["check"]["of_hits"] == 1  # The first question computes the document.
    assert summary["check"]["max_difference"] < 1e-3
    assert summary["table"]["shared, later questions"]["most_embedded_document_chunks"] == 0
    assert summary["table"]["full, later questions"]["first_token_s"] > 0


@pytest.mark.slow
def test_queries_of_a_length_are_ranked_among_a_novels_chunks(tmp_path: Path) -> None:
    words = ["--texts", NOVEL, "--lengths", 256, 2048, "--queries", 16, 64, "--trials", 2]
    summary = run("query_length.py", tmp_path / "query_length.json", *words)["summary"]
    assert {(cell["length"], cell["query_tokens"], cell["of"]) for cell in summary} == {
        (length, query, 2) for length in (256, 2048) for query in (16, 64)
    }
    found = {(cell["kind"], cell["length"], cell["query_tokens"]): cell["found"] for cell in summary}
    # Eight are taken, of four chunks and the needle's.
    assert all(share == 1.0 for (_, length, _), share in found.items() if length == 256)


@pytest.mark.slow
def test_an_index_of_clusters_is_measured_against_the_exact_one(tmp_path: Path) -> None:
    words = ["--chunks", 600, "--real", 200, "--queries", 5, "--factories", "Flat", "IVF4,Flat"]
    words += ["--nprobe", 1, 4, "--repetitions", 1]
    flat, clusters = run("corpus_index.py", tmp_path / "corpus_index.json", *words)["indexes"]
    assert flat["is_exact"]
    assert flat["settings"][0]["recall_at_8"] == 1.0
    some, every = (row["recall_at_8"] for row in clusters["settings"])
    assert some <= every == 1.0  # With all clusters searched.


@pytest.mark.slow
def test_every_benchmark_runs_with_every_contender(model: Path, tmp_path: Path) -> None:
    common = ["--model", model, *TINY, "--batches", 1]
    short = ["--lengths", 256, "--answer", 8]
    names = {"throughput": [*short, "--decoded", 24], "latency": short, "memory": short}
    names["online"] = [*short, "--rate", 5, "--engines", "memlong", "window", "full", "authors"]
    names["retrieval"] = ["--lengths", 128, "--ledger-length", 256, "--ledger-steps", 40]
    for name, words in names.items():
        content = run(f"{name}.py", tmp_path / f"{name}.json", *common, *words)
        missing = {row["engine"]: row["skipped"] for row in content["rows"] if "skipped" in row}
        assert missing.keys() <= {"fp8", "int8", "authors"}, missing
    words = ["--run", "--shape", model, "--model", model, "--length", 256, "--answer", 8]
    content = run("paper_scale.py", tmp_path / "paper_scale.json", *words)
    assert "skipped" not in content["rows"][-1]
    paths = [tmp_path / f"{name}.json" for name in (*names, "paper_scale")]
    text = write_report(paths, tmp_path / "report.md")[0].read_text()
    assert all(f"## {path.stem}" in text for path in paths)
