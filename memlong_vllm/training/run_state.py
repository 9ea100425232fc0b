"""Everything a fine-tuning run needs to go on exactly where it stopped, on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from memlong_vllm.training.segment_memory import Carried


class ResumeError(RuntimeError):
    """A run cannot go on from the state that lies there. The message says why and what to do."""


class RunFolder:
    """The folder of a run beside its output.

    Holds ``run.json`` (what the run is), ``log.jsonl`` (one line a step or validation) and
    ``state/``: the last saved step, replaced as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def best(self) -> Path:
        """The adapter of the best validation so far, as it was written to the output."""
        return self.folder / "best.safetensors"

    @property
    def has_state(self) -> bool:
        """Whether an interrupted or finished run can go on from here."""
        return (self.folder / "state").is_dir()

    def open(self, identity: dict[str, Any], restart: bool) -> None:
        """Begin a run, or find the one that was interrupted (:attr:`has_state`).

        Args:
            identity: settings, model and data: JSON values that must be the same to go on.
            restart: forget what lies there.

        Raises:
            ResumeError: if another run's state lies there, naming what differs.
        """
        description = self.folder / "run.json"
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        if description.exists():
            known = self._known(description)
            differing = sorted(key for key in identity.keys() | known.keys() if identity.get(key) != known.get(key))
            if differing:
                changes = "; ".join(_difference(key, known.get(key), identity.get(key)) for key in differing)
                raise ResumeError(f"{self.folder} holds another run ({changes}): choose another output or --restart")
            self._settle()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(identity, indent=2) + "\n")
        os.replace(partial, description)

    @staticmethod
    def _known(description: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(description.read_text()))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{description} cannot be read ({error}): choose another output or --restart") from error

    def _settle(self) -> None:
        """Undo what an interruption left half done."""
        previous = self.folder / "state.previous"
        if self.has_state:
            shutil.rmtree(previous, ignore_errors=True)
        elif previous.is_dir():
            os.replace(previous, self.folder / "state")
        if not self.has_state:
            self.log_file.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)

    def save(self, shared: dict[str, Any], own: dict[str, Any], rank: int, wait_for_all: Any) -> None:
        """Keep a step: ``shared`` once, ``own`` of each process."""
        partial, state = self.folder / "state.partial", self.folder / "state"
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        wait_for_all()
        torch.save(own, partial / f"rank{rank}.pt")
        wait_for_all()
        if rank == 0:
            torch.save(shared, partial / "shared.pt")
            previous = self.folder / "state.previous"
            if state.exists():
                os.replace(state, previous)
            os.replace(partial, state)
            shutil.rmtree(previous, ignore_errors=True)
        wait_for_all()

    def load(self, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What :meth:`save` kept: shared and own."""
        own = self.folder / "state" / f"rank{rank}.pt"
        if not own.exists():
            raise ResumeError(f"{own} is missing: the run had another number of processes")
        shared = torch.load(self.folder / "state" / "shared.pt", weights_only=True, map_location="cpu")
        return shared, torch.load(own, weights_only=True, map_location="cpu")

    def cut_log(self, step: int) -> None:
        """Drop lines of steps after ``step``, which will be taken again."""
        entries = [entry for entry in self._entries() if entry["step"] <= step]
        self.log_file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def lowest_validation(self) -> float:
        """Negative log-likelihood of the best validation after a step so far, infinite without one."""
        return min((nll for step, nll in self._validations() if step), default=float("inf"))

    def first_validation(self) -> float | None:
        """That before the first step."""
        return next((nll for step, nll in self._validations() if not step), None)

    def _validations(self) -> list[tuple[int, float]]:
        return [(entry["step"], entry["validation"]["nll"]) for entry in self._entries() if "validation" in entry]

    def _entries(self) -> list[dict[str, Any]]:
        """The log's lines, without a last one that was cut short."""
        lines = self.log_file.read_text().split("\n")[:-1] if self.log_file.exists() else []
        return [json.loads(line) for line in lines]

    def log(self, entry: dict[str, Any]) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _difference(key: str, then: Any, now: Any) -> str:
    """What differs, by its innermost name."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", then.get(name), now.get(name)) for name in names)
    if isinstance(then, list) and isinstance(now, list):
        return f"{key}: {len(then)} then, {len(now)} now, {len(set(map(str, then)) & set(map(str, now)))} in both"
    return f"{key}: {then!r} then, {now!r} now"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def restore_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """What :func:`rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def carried_state(carried: Carried) -> dict[str, Any]:
    return {"keys": list(carried.keys), "values": list(carried.values), "num_tokens": carried.num_tokens}


def restored_carried(state: dict[str, Any], device: torch.device) -> Carried:
    keys, values = (tuple(tensor.to(device) for tensor in state[name]) for name in ("keys", "values"))
    return Carried(keys, values, state["num_tokens"].to(device))
