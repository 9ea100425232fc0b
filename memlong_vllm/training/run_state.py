"""Everything a fine-tuning run needs to go on exactly where it stopped, on disk."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
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

    def open(self, identity: dict[str, Any], restart: bool) -> bool:
        """Begin a run, or find the one that was interrupted. Returns whether there is a state.

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
            known = json.loads(description.read_text())
            differing = sorted(key for key in identity.keys() | known.keys() if identity.get(key) != known.get(key))
            if differing:
                changes = "; ".join(f"{key}: {known.get(key)!r} then, {identity.get(key)!r} now" for key in differing)
                raise ResumeError(f"{self.folder} holds another run ({changes}): choose another output or --restart")
            return (self.folder / "state").is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        description.write_text(json.dumps(identity, indent=2) + "\n")
        return False

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
        if self.log_file.exists():
            lines = [line for line in self.log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
            self.log_file.write_text("".join(line + "\n" for line in lines))

    def log(self, entry: dict[str, Any]) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def carried_state(carried: Carried) -> dict[str, Any]:
    return {"keys": list(carried.keys), "values": list(carried.values), "num_tokens": carried.num_tokens}


def restored_carried(state: dict[str, Any], device: torch.device) -> Carried:
    keys, values = (tuple(tensor.to(device) for tensor in state[name]) for name in ("keys", "values"))
    return replace(Carried(keys, values, state["num_tokens"]), num_tokens=state["num_tokens"].to(device))
