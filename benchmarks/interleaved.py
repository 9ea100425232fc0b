"""Runs every cell with every engine, in turns, several times; what is done already is not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cells import Cell
from contenders import Contenders
from engine_process import EngineError, EngineProcess
from measurement_file import MeasurementFile

MeasureCell = Callable[[str, EngineProcess, Cell, int], dict[str, Any]]
"""(engine's name, engine, cell, repetition) -> the measures of a row."""


@dataclass(frozen=True)
class Turns:
    """How often.

    Attributes:
        repetitions: of every cell; ``fewer``, by engine, those of slow ones.
        limit_s: a measurement that would take longer, judged by smaller cells, is not made.
        retry: try again what was skipped.
    """

    repetitions: int = 3
    fewer: dict[str, int] | None = None
    limit_s: float = 900.0
    retry: bool = False

    def of(self, name: str) -> int:
        return min(self.repetitions, (self.fewer or {}).get(name, self.repetitions))


class InterleavedRun:
    """All engines run at once, each in its process and idle but in its turn; so a busy machine
    slows all of them alike. Which goes first changes from repetition to repetition, each of which
    has all cells, so that lengths can be compared as well as engines. Each repetition starts engines
    anew, as two processes that do the same differ by several per cent for as long as they live. What
    is compared is of one run: where an earlier one was stopped before all engines had their turn, or
    where an engine that failed in it does not now, the others have theirs again."""

    def __init__(self, file: MeasurementFile, contenders: Contenders, measure: MeasureCell, turns: Turns) -> None:
        self._file, self._contenders, self._measure, self._turns = file, contenders, measure, turns
        self._running: dict[str, EngineProcess] = {}
        self._setups: dict[str, int] = {}
        self._failed: set[tuple[str, Cell]] = set()
        self._broken: dict[str, str] = {}
        self._run = 0

    def run(self, cells: Sequence[Cell]) -> None:
        self._run = self._file.next_run()
        try:
            for repetition in range(self._turns.repetitions):
                for cell in cells:
                    self._begin_turns(cell, repetition)
                    self._take_turns(cell, repetition)
                    if self._discard_older(cell, repetition):
                        self._take_turns(cell, repetition)
                self._stop_engines()
        finally:
            self._stop_engines()

    def _stop_engines(self) -> None:
        while self._running:
            self._running.popitem()[1].stop()

    def _begin_turns(self, cell: Cell, repetition: int) -> None:
        """Forget the rows of an earlier run if it did not get to all engines."""
        rows = [row for row in self._file.rows if row.items() >= cell.key.items()]
        left_out = {row["engine"] for row in rows if row["repetition"] is None}
        expected = {name for name in self._contenders.names if repetition < self._turns.of(name)} - left_out
        done = [row for row in rows if row["repetition"] == repetition and row["engine"] in expected]
        if expected - {row["engine"] for row in done}:
            self._file.discard(done)

    def _take_turns(self, cell: Cell, repetition: int) -> None:
        for name in self._contenders.names[:: 1 if repetition % 2 == 0 else -1]:
            if repetition < self._turns.of(name):
                self._turn(name, cell, repetition)

    def _discard_older(self, cell: Cell, repetition: int) -> bool:
        """Forget rows of earlier runs where this run's engines have rows of several."""
        wanted = cell.key | {"repetition": repetition}
        rows = [row for row in self._file.rows if row.items() >= wanted.items()]
        rows = [row for row in rows if row["engine"] in self._contenders.names]
        if len({row["run"] for row in rows}) < 2:
            return False
        self._file.discard([row for row in rows if row["run"] != self._run])
        return True

    def _turn(self, name: str, cell: Cell, repetition: int) -> None:
        key = {"engine": name, **cell.key}
        row = key | {"repetition": repetition}
        skipped = key | {"repetition": None}
        if self._file.has(row) or self._is_left_out(skipped) or (name, cell) in self._failed:
            return
        reason = self._contenders.why_not(name, cell) or self._too_slow(name, cell)
        if reason is None and name in self._broken:
            reason, skipped = self._broken[name], skipped | {"failed": True}
        elif reason is None:
            try:
                engine, began = self._engine(name), time.perf_counter()
                measures = self._measure(name, engine, cell, repetition)
                fits = self._contenders.fitting(name, cell)
                spent = {"elapsed_s": time.perf_counter() - began, "setup": self._setups[name], "fits": fits}
                self._save(row | spent | measures)
                return
            except EngineError as error:
                reason = str(error)
                self._fail(name, cell, reason)
                skipped = skipped | {"failed": True}
        if not self._file.has(skipped):
            self._save(skipped | {"skipped": reason})

    def _is_left_out(self, skipped: dict[str, Any]) -> bool:
        """Whether a cell was skipped for a reason that lasts: not that an engine failed, in this run or one before."""
        rows = [row for row in self._file.rows if row.items() >= skipped.items()]
        return bool(rows) and not self._turns.retry and not all(row.get("failed") for row in rows)

    def _fail(self, name: str, cell: Cell, reason: str) -> None:
        """An engine that fails is started again for the next cell; one that does not start, or does not answer
        the first prompt, stays out of this run."""
        self._failed.add((name, cell))
        if name in self._running:
            self._running.pop(name).stop()
        else:
            self._broken[name] = reason

    def _engine(self, name: str) -> EngineProcess:
        if name not in self._running:
            print(f"starting {name}", flush=True)
            engine = self._contenders.start(name)
            try:
                self._contenders.warm_up(name, engine)
            except BaseException:
                engine.stop()
                raise
            self._running[name] = engine
            settings, facts = self._contenders.settings(name), self._running[name].facts
            self._setups[name] = self._file.add_engine(name, settings, facts)
        return self._running[name]

    def _too_slow(self, name: str, cell: Cell) -> str | None:
        """By the largest of the smaller cells, as if time were linear in tokens, which it is at best."""
        done = [row for row in self._file.rows if "skipped" not in row]
        done = [row for row in done if (row["engine"], row["workload"]) == (name, cell.workload)]
        done = [row for row in done if row["length"] <= cell.length and row["batch"] <= cell.batch]
        if not done:
            return None
        last = max(done, key=lambda row: row["length"] * row["batch"])
        least = last["elapsed_s"] * cell.length / last["length"]
        if cell.workload != "document":  # Whose questions share it, or only one of them is asked.
            least *= cell.batch / last["batch"]
        if least <= self._turns.limit_s:
            return None
        where = f"{last['length']:,} x {last['batch']}"
        return f"would take {least:,.0f} s or more by its time at {where}; the limit is {self._turns.limit_s:,.0f} s"

    def _save(self, row: dict[str, Any]) -> None:
        row |= {"run": self._run}
        self._file.append([row])
        shown = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        print(
            {name: round(value, 3) if isinstance(value, float) else value for name, value in shown.items()}, flush=True
        )
