"""The results file: written row by row, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import engine_patches
import memlong_vllm
from memlong_vllm.evaluation.scoring import EvaluationError
from memlong_vllm.package_versions import package_versions

Row = dict[str, Any]
PACKAGES = ("torch", "vllm", "transformers", "memlong-vllm")
# Of the time of a run, how much may go into writing its file again and again, as rows are added.
WRITING_SHARE = 0.02


def versions() -> dict[str, str | None]:
    """What a measurement was made with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name.replace("-", "_"): version for name, version in package_versions(PACKAGES).items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found | {"platform": platform.platform(), "cpu": _cpu_name(), "gpu": gpu}


@functools.cache
def code_digest(*more: Path) -> str:
    """Of the sources of this package, and of what lies in other folders."""
    digest = hashlib.sha256()
    packages = (memlong_vllm, engine_patches)
    for folder in (*(Path(package.__path__[0]) for package in packages), *more):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} threads)" if names else platform.processor()


class ResultsFile:
    """``{"command", "command_lines", "code", "settings", "versions", "model", "models", "rows"}`` as JSON.

    ``model`` describes the main model; ``models``, each one by the label that rows name it by;
    ``code`` are digests of this package's sources, one for every state of them that measured rows:
    reports tell if there are several. A run with the same settings adds the rows that are missing,
    and may add models. The file is first written with the first rows, so that a run that fails
    before leaves what was there; then as often as is cheap, and by :meth:`flush`.

    Args:
        key: fields that tell a row from every other.
        extensible: settings that rows name: more of them may be asked for later, and those of the file
            stay.
        overwrite: what is in the file is not read, and gone with the first rows.

    Raises:
        EvaluationError: if the file is of another run, unless ``overwrite``; saying what differs.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        settings: dict[str, Any],
        models: dict[str, Any],
        key: tuple[str, ...],
        extensible: tuple[str, ...] = (),
        overwrite: bool = False,
    ) -> None:
        self.path, self._key, self._extensible = path, key, extensible
        self._is_written, self._write_again_at = True, 0.0
        # Of what this process has imported, though the files may change while it runs.
        self._code = code_digest()
        # As it will be read again: tuples become lists.
        header = {"command": command, "command_lines": [], "code": [], "settings": settings}
        header |= {"versions": versions(), "models": models}
        self.content: dict[str, Any] = json.loads(json.dumps(header))
        self.content["model"] = next(iter(self.content["models"].values()))
        self.content["rows"] = []
        if path.exists() and not overwrite:
            self._resume(read_results(path))
        self._keys = {self._key_of(row) for row in self.rows}
        # As they stand in the file: there can be tens of thousands, and every batch is saved.
        self._lines = [json.dumps(row) for row in self.rows]

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    def has(self, row: Row) -> bool:
        """Whether there is a row with this one's key."""
        return self._key_of(row) in self._keys

    def append(self, rows: list[Row]) -> None:
        """Add rows. A reader, or a run after a crash, sees all of them or none."""
        self.rows.extend(rows)
        self._keys |= {self._key_of(row) for row in rows}
        self._lines += [json.dumps(row) for row in rows]
        self._is_written = False
        if time.monotonic() >= self._write_again_at:
            self.flush()

    def flush(self) -> None:
        """Write what was added and is not in the file yet."""
        if self._is_written:
            return
        began = time.monotonic()
        self._write()
        ended = time.monotonic()
        self._is_written, self._write_again_at = True, ended + (ended - began) / WRITING_SHARE

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def _resume(self, found: dict[str, Any]) -> None:
        differences = _differences(found, self.content, self._extensible)
        if differences:
            raise EvaluationError(
                f"--output {self.path} is of a run with other settings; name another file or add --overwrite. "
                f"Different: {'; '.join(differences)}"
            )
        for name in self._extensible:
            self.content["settings"][name] = _joined(found["settings"].get(name), self.content["settings"][name])
        self.content["models"] = found["models"] | self.content["models"]
        self.content["model"] = next(iter(self.content["models"].values()))
        self.content["command_lines"] = found.get("command_lines", [])
        self.content["code"] = found.get("code", ["not noted"])
        self.content["rows"] = found["rows"]

    def _command_line(self) -> str:
        """That of this process, as a person would type it."""
        return shlex.join(["memlong-vllm", *sys.argv[1:]])

    def _write(self) -> None:
        if (line := self._command_line()) not in self.content["command_lines"]:
            self.content["command_lines"].append(line)
        if self._code not in self.content["code"]:
            self.content["code"].append(self._code)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shell = json.dumps(self.content | {"rows": []}, indent=2)
        lines = ",\n    ".join(self._lines)
        text = shell.removesuffix('"rows": []\n}') + f'"rows": [\n    {lines}\n  ]\n}}\n'
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def read_results(path: Path) -> dict[str, Any]:
    """Raises:
    EvaluationError: if the file is not a results file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as results: {error}") from error
    needed = {"command", "settings", "versions", "model", "models", "rows"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise EvaluationError(f"{path} is no results file of memlong-vllm evaluate")
    return content


def _joined(old: Any, new: Any) -> Any:
    """An extensible setting of two runs: all values of a list, all entries of an object, the higher number."""
    if isinstance(new, list):
        return sorted({*(old or []), *new})
    if isinstance(new, dict):
        return (old or {}) | new
    return max(old or 0, new)


def _differences(old: dict[str, Any], new: dict[str, Any], extensible: tuple[str, ...]) -> list[str]:
    pairs = [("command", old["command"], new["command"])]
    names = sorted((old["settings"].keys() | new["settings"].keys()) - set(extensible))
    pairs += [(name, old["settings"].get(name), new["settings"].get(name)) for name in names]
    # Other machines may go on with a run; other packages may not.
    names = [package.replace("-", "_") for package in PACKAGES]
    pairs += [(name, old["versions"].get(name), new["versions"].get(name)) for name in names]
    for label in sorted(old["models"].keys() & new["models"].keys()):
        before, after = old["models"][label], new["models"][label]
        # Its digest is what a model is; a folder may be called otherwise later, as the demo's is.
        names = sorted((before.keys() | after.keys()) - {"name"})
        pairs += [(f"{label}.{name}", before.get(name), after.get(name)) for name in names]
    return [f"{name} was {before!r}, now {after!r}" for name, before, after in pairs if before != after]
