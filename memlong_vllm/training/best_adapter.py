"""The adapter that a fine-tuning run leaves: what it had learned where validation was best."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.adapter_file import save_adapter
from memlong_vllm.adapters.base_identity import BaseIdentity
from memlong_vllm.package_versions import package_versions
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.run_state import RunFolder
from memlong_vllm.training.settings import FinetuneSettings
from memlong_vllm.training.trainable import learned_tensors
from memlong_vllm.training.validation import Validation

VERSIONS_OF = ("memlong-vllm", "torch", "transformers", "peft", "accelerate")


class BestAdapter:
    """Writes the adapter whenever validation is better than before.

    Args:
        start: what training went on from; its record becomes part of the adapter's.

    Attributes:
        lowest: negative log-likelihood of the best so far; infinite if there is none.
        at_start: that before the first step, if it was validated.
    """

    def __init__(
        self,
        job: FinetuneJob,
        model: MemLongForCausalLM,
        settings: FinetuneSettings,
        base: BaseIdentity,
        identity: dict[str, Any],
        trained: dict[str, nn.Parameter],
        folder: RunFolder,
        start: Adapter | None = None,
    ) -> None:
        self.job, self.model, self.settings, self.base = job, model, settings, base
        self.identity, self.trained, self.folder = identity, trained, folder
        self.start = start
        self.lowest = float("inf")
        self.at_start: float | None = None

    def offer(self, step: int, validation: Validation) -> None:
        if step == 0:
            self.at_start = validation.nll
        elif validation.nll < self.lowest:
            self.lowest = validation.nll
            self.write(step, validation)

    @property
    def has_learned(self) -> bool:
        """Whether validation was better after some step than before the first; without validation: True."""
        return self.at_start is None or self.lowest < self.at_start

    def finish(self, step: int) -> None:
        """Leave the best adapter at the output, whatever happened to that; without validation, the last."""
        if self.folder.best.exists():
            _copy(self.folder.best, self.job.output)
        else:
            self.write(step, None)

    def write(self, step: int, validation: Validation | None) -> None:
        parts = self.settings.parts
        training = {
            "settings": self.settings.to_dict(),
            "train": self.identity["train"],
            "valid": self.identity["valid"],
            **self._start(),
            "step": step,
            "validation": validation and validation.to_dict(),
            "versions": package_versions(VERSIONS_OF),
            **(self.job.notes or {}),
        }
        tensors = {
            name: tensor.to(torch.bfloat16 if tensor.dim() > 1 else torch.float32)
            for name, tensor in learned_tensors(self.model, self.trained).items()
        }
        lora = LoraSettings(parts.rank, parts.alpha) if parts.rank else None
        adapter = Adapter(tensors, lora, self.model.config.memory.to_dict(), self.base, training)
        self.job.output.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(adapter, self.job.output)
        if validation is not None:
            _copy(self.job.output, self.folder.best)

    def _start(self) -> dict[str, Any]:
        if self.start is None:
            return {}
        return {"start": {"digest": self.start.digest(), "training": self.start.training}}


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
