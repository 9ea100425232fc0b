"""The files under ``benchmarks/results``: rows as they come, and what they were measured with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlong_vllm.evaluation.results import ResultsFile, Row, code_digest, read_results
from memlong_vllm.evaluation.scoring import EvaluationError

# Times of one file are compared with each other.
SAME_MACHINE = ("cpu", "usable_cores", "omp_num_threads")
KEY = ("engine", "workload", "length", "batch", "repetition")
__all__ = ["KEY", "MeasurementFile", "Row", "read_results"]


class MeasurementFile(ResultsFile):
    """A results file with the command lines and the machine. A row is of one engine, workload,
    length, batch and repetition, and has measures; or it has ``skipped``, the reason why there are
    none, and the repetition None.

    Raises:
        memlong_vllm.evaluation.scoring.EvaluationError: if the file is of a run with other settings.
    """

    def __init__(
        self, path: Path, benchmark: str, settings: dict[str, Any], engines: dict[str, Any], overwrite: bool = False
    ) -> None:
        super().__init__(path, benchmark, settings, engines, KEY, overwrite=overwrite)
        self.content.setdefault("engines", {})
        self._load_at_the_start = self.content.get("machine", {}).get("load_at_the_start", os.getloadavg())

    def _resume(self, found: dict[str, Any]) -> None:
        now = self.content["versions"] | machine()
        for name in SAME_MACHINE:
            before = (found["versions"] | found["machine"]).get(name)
            if before != now[name]:
                raise EvaluationError(
                    f"--output {self.path} was measured with {name} {before!r}, now {now[name]!r}: times cannot be "
                    "compared; name another file or add --overwrite"
                )
        super()._resume(found)
        self.content["machine"] = found["machine"]
        # Of older files, whose rows name no start, it is the last.
        self.content["engines"] = {
            name: [setups] if isinstance(setups, dict) else setups for name, setups in found["engines"].items()
        }

    def append(self, rows: list[Row]) -> None:
        """Add rows and save at once: they are few, and took long."""
        super().append(rows)
        self.flush()

    def next_run(self) -> int:
        """The number of a run that begins now. Rows of one run were measured in turns."""
        return 1 + max([row.get("run", 0) for row in self.rows], default=0)

    def discard(self, rows: Sequence[Row]) -> None:
        """Rows that will be measured anew; they stay in the file until others come."""
        keys = {self._key_of(row) for row in rows}
        kept = [row for row in self.rows if self._key_of(row) not in keys]
        self.content["rows"], self._keys = kept, {self._key_of(row) for row in kept}
        self._lines = [json.dumps(row) for row in kept]

    def _write(self) -> None:
        # Rows stay the last field.
        rows = self.content.pop("rows")
        self.content["machine"] = machine() | {"load_at_the_start": self._load_at_the_start}
        self.content["rows"] = rows
        super()._write()

    def _command_line(self) -> str:
        return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])

    def add_engine(self, name: str, settings: dict[str, Any], facts: dict[str, Any]) -> int:
        """Note how an engine was set up, and by which code. Returns the number that rows name it by (``setup``)."""
        setups: list[dict[str, Any]] = self.content["engines"].setdefault(name, [])
        setup = {"code": code_digest(Path(__file__).parent), "settings": settings, "facts": facts}
        if setup not in setups:
            setups.append(setup)
        return setups.index(setup)


def available_bytes() -> int | None:
    """Of the machine's memory; None where that is not known."""
    return _memory("MemAvailable")


def _memory(name: str) -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def machine() -> dict[str, Any]:
    """Cores, memory and load, of which the benchmark's own is most: the model's threads and the embedder's are
    more than two cores by themselves."""
    total = _memory("MemTotal")
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "niceness": os.nice(0),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_gib": round(total / (1 << 30), 1) if total else None,
        "load": os.getloadavg(),
    }
