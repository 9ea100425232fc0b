"""The benchmarks: their arithmetic, and going on after a stop."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cells import Cell, parse_size
from command_line import cells_of
from contenders import Contenders, Options
from engine_process import EngineError
from interleaved import InterleavedRun, Turns
from ledger_step import ledger_times
from measurement_file import MeasurementFile
from retrieval import by_kind
from summaries import MEASURES, Measure, loses_to, ratio
from token_times import TokenTimes, percentile

from memlong_vllm.evaluation.scoring import EvaluationError

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
    def step(tokens: int, sequences: int, searches: int = 0, holds: int = 0, **more: Any) -> dict[str, Any]:
        times = {"schedule_ms": 1.0, "stock_ms": 0.5, "update_ms": 0.3, "stock_update_ms": 0.1, "whole_ms": 9.0}
        counts = {"num_tokens": tokens, "num_sequences": sequences, "num_searches": searches, "num_holds": holds}
        return counts | {"num_embedding": 0} | times | more

    steps = [step(8, 2), step(2, 2), step(2, 2, searches=1, schedule_ms=2.0), step(1, 1, holds=1)]
    steps += [step(0, 0, holds=2), step(2, 2, num_embedding=1)]
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


FULL_ONCE = [("full", 64, 0)]
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


def test_ratios_are_of_turns_in_one_run(tmp_path: Path) -> None:
    path, turns = tmp_path / "results.json", Turns(repetitions=2)
    # Stopped before full attention had its turn, which comes first in the second repetition.
    with pytest.raises(KeyboardInterrupt):
        measure_all(path, Recorder(stop_at=1), turns)
    again = Recorder()
    rows = measure_all(path, again, turns).content["rows"]
    backwards = [("full", 64, 1), ("memlong", 64, 1), ("memlong", 128, 1)]
    assert again.calls == [("memlong", 64, 0), ("full", 64, 0), ("memlong", 128, 0), *backwards]
    assert {row["run"] for row in rows if "skipped" not in row} == {2}
    measure = Measure("prefill", "tokens_per_s", "")
    found = ratio(rows, measure, "memlong", "full", (64, 1))
    assert found is not None
    assert found.number == 2
    for row in rows:
        row["run"] += row["engine"] == "full"
    assert ratio(rows, measure, "memlong", "full", (64, 1)) is None


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
    for calls, starts in ((4, 3), (1, 1)):
        recorder, contenders = Recorder(fails=fails), FakeContenders()
        rows = measure_all(tmp_path / "large.json", recorder, turns, contenders).content["rows"]
        assert (len(recorder.calls), contenders.started.count("memlong")) == (calls, starts)
    assert {row["repetition"] for row in rows if row["engine"] == "memlong" and row["length"] == 64} == {0, 1, 2}


def test_others_have_their_turns_again_beside_an_engine_that_had_failed(tmp_path: Path) -> None:
    path, turns, first, again = tmp_path / "results.json", Turns(repetitions=1), Recorder(fails=FULL_ONCE), Recorder()
    measure_all(path, first, turns)
    assert first.calls == [("memlong", 64, 0), ("full", 64, 0), ("memlong", 128, 0)]
    rows = measure_all(path, again, turns).content["rows"]
    assert again.calls == [("full", 64, 0), ("memlong", 64, 0)]
    assert ratio(rows, Measure("prefill", "tokens_per_s", ""), "memlong", "full", (64, 1)) is not None
    last = Recorder()
    measure_all(path, last, turns)
    assert not last.calls


def test_some_of_the_engines_have_their_turns_already(tmp_path: Path) -> None:
    path, turns = tmp_path / "results.json", Turns(repetitions=2)
    before = measure_all(path, Recorder(), turns).content["rows"]
    contenders, again = FakeContenders(), Recorder()
    contenders.names = ("memlong", "fp8")
    after = measure_all(path, again, turns, contenders).content["rows"]
    assert again.calls == []
    assert [row for row in after if "skipped" not in row] == [row for row in before if "skipped" not in row]


def test_rows_of_several_runs_are_all_measured_again(tmp_path: Path) -> None:
    """As a stop between the turns that are taken again and the rest leaves them."""
    path, turns, again = tmp_path / "results.json", Turns(repetitions=1), Recorder()
    file = measure_all(path, Recorder(), turns)
    for row in file.rows:
        row["run"] += row["engine"] == "full"
    path.write_text(json.dumps(file.content))
    rows = measure_all(path, again, turns).content["rows"]
    assert again.calls == [("memlong", 64, 0), ("full", 64, 0)]
    assert ratio(rows, Measure("prefill", "tokens_per_s", ""), "memlong", "full", (64, 1)) is not None


def test_an_engine_that_answers_nothing_is_started_once(tmp_path: Path) -> None:
    class Mute(FakeContenders):
        def warm_up(self, name: str, engine: Any) -> None:
            if name == "memlong":
                raise EngineError("not a token")

    contenders, turns = Mute(), Turns(repetitions=2, fewer={"full": 0, "fp8": 0})
    content = measure_all(tmp_path / "results.json", Recorder(), turns, contenders).content
    assert contenders.started == ["memlong"]
    assert {row["skipped"] for row in content["rows"]} == {"not a token"}


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
    contenders.check_memory(None)
    contenders.check_memory(5 << 30)
    with pytest.raises(SystemExit, match=r"--kv-gib .*: 4 engines take about"):
        contenders.check_memory(2 << 30)
    assert contenders.kv_bytes("fp8") == 40 * 128 * token_bytes
