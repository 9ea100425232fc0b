"""The training loop: streams in, an adapter's tensors out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from tqdm import tqdm

from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.training.features import DocumentFeatures
from memlong_vllm.training.run_state import RunFolder, carried_state, restore_rng, restored_carried, rng_state
from memlong_vllm.training.segment_memory import Carried
from memlong_vllm.training.settings import FinetuneSettings
from memlong_vllm.training.streams import SegmentBatch, SegmentReader, Streams
from memlong_vllm.training.upper_half import UpperHalf
from memlong_vllm.training.validation import Validation, validate

# Gates and biases have one number a head, which must travel far: a bias of -1 to 1 at Adam's steps of
# the size of the rate would take thousands of steps. Matrices learn at the rate itself.
_PER_HEAD, _PER_HEAD_FACTOR = (".memory_gate", ".memory_bias"), 10.0


def make_accelerator(settings: FinetuneSettings, cpu: bool) -> Accelerator:
    """Mixed precision, gradient accumulation and, under ``accelerate launch``, several processes."""
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        gradient_accumulation_steps=settings.accumulation,
        # A batch in which nothing was retrieved gives the memory's parameters no gradient.
        # Ranks wait for each other's share of the frozen half's work, which is not equal.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )


def learning_rate_factor(settings: FinetuneSettings, step: int) -> float:
    """What the learning rates are multiplied with in update number ``step``, from 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left)) if settings.schedule == "cosine" else 1.0


@dataclass
class Progress:
    """Of one update: the weighted sum of the losses, the sum of their weights, and tokens."""

    weighted: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0


class DivergedError(RuntimeError):
    """The loss is no number any more; what was validated before is kept."""


class Trainer:
    """Runs ``settings.steps`` updates of the parameters in ``trained``.

    Args:
        model: with LoRA in place; :class:`UpperHalf` is made of it.
        trained: the parameters that learn, by name.
        train, valid: features of the documents.
        folder: where log and state are kept.
    """

    def __init__(
        self,
        model: MemLongForCausalLM,
        trained: dict[str, nn.Parameter],
        train: Sequence[DocumentFeatures],
        valid: Sequence[DocumentFeatures],
        settings: FinetuneSettings,
        accelerator: Accelerator,
        folder: RunFolder,
    ) -> None:
        self.settings, self.accelerator, self.folder = settings, accelerator, folder
        self.config, self.head_dim = model.config.memory, model.config.head_dim
        self.trained, self.valid = trained, valid
        self.reader = SegmentReader(self.config, settings.segment_tokens, self.head_dim, settings.with_memory)
        ranks = accelerator.process_index, accelerator.num_processes
        self.streams = Streams(train, self.reader, settings.rows, settings.seed, *ranks)
        upper = UpperHalf(model, settings.checkpointing)
        self.upper, self.optimizer = accelerator.prepare(upper, self._optimizer())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: learning_rate_factor(settings, step)
        )
        self.carried: Carried | None = None
        self.step = 0

    def _optimizer(self) -> torch.optim.AdamW:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            groups.setdefault(self._learning_rate(name), []).append(parameter)
        made = [{"params": members, "lr": value} for value, members in groups.items()]
        return torch.optim.AdamW(made, weight_decay=self.settings.weight_decay, betas=(0.9, 0.98))

    def _learning_rate(self, name: str) -> float:
        """Of a parameter, after warm-up."""
        settings = self.settings
        memory_rate = settings.memory_learning_rate or settings.learning_rate
        if name.endswith(_PER_HEAD):
            return _PER_HEAD_FACTOR * memory_rate
        if ".memory_" in name:
            return settings.adapter_learning_rate or memory_rate
        return settings.learning_rate

    def run(self, on_validation: Callable[[int, Validation], None] = lambda step, validation: None) -> None:
        """Train to the end, from where the run was.

        Raises:
            DivergedError: at the first step whose loss is not finite.
        """
        settings, main = self.settings, self.accelerator.is_main_process
        self.upper.train()
        with tqdm(total=settings.steps, initial=self.step, unit="step", disable=not main) as bar:
            if self.step == 0:
                self._validate(bar, on_validation)
            while self.step < settings.steps:
                entry = self._update()
                self.step += 1
                if main:
                    self.folder.log(entry)
                    bar.set_postfix_str(_summary(entry))
                    bar.update()
                if self._due(settings.validate_every):
                    self._validate(bar, on_validation)
                if self._due(settings.save_every):
                    self.save()

    def _due(self, every: int) -> bool:
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _update(self) -> dict[str, Any]:
        """One update of the weights. Returns its line of the log."""
        started, progress = time.perf_counter(), Progress()
        batches = [self.streams.next_batch() for _ in range(self.settings.accumulation)]
        # As one batch's: every token by its weight, whichever part of the update it is in.
        # Processes' gradients are averaged, so all divide by what a process has on average.
        own = torch.tensor(sum(float(batch.weights.sum()) for batch in batches), device=self.accelerator.device)
        weight = max(1.0, float(self.accelerator.reduce(own, "mean"))) / self.settings.accumulation
        for batch in batches:
            with self.accelerator.accumulate(self.upper):
                self._forward_backward(batch.to(self.accelerator.device), weight, progress)
                if self.accelerator.sync_gradients:
                    learned = list(self.trained.values())
                    progress.grad_norm = float(self.accelerator.clip_grad_norm_(learned, self.settings.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
        factor = learning_rate_factor(self.settings, self.step)
        self.scheduler.step()
        seconds = time.perf_counter() - started
        loss = progress.weighted / max(progress.weight, 1e-9)
        if not math.isfinite(loss):
            raise DivergedError(f"step {self.step + 1}: the loss is {loss}; lower learning_rate and --restart")
        return {
            "step": self.step + 1,
            "loss": loss,
            "tokens_per_s": progress.tokens * self.accelerator.num_processes / seconds,
            "grad_norm": progress.grad_norm,
            "learning_rate": self.settings.learning_rate * factor,
            "epoch": self.streams.epoch,
            **self._gate_sizes(),
        }

    def _forward_backward(self, batch: SegmentBatch, weight: float, progress: Progress) -> None:
        if self.carried is None:
            self.carried = self.accelerator.unwrap_model(self.upper).stack.empty(len(batch.hidden), batch.hidden)
        loss, self.carried = self.upper(batch, self.carried)
        self.accelerator.backward(loss.weighted / weight)
        progress.weighted += float(loss.weighted.detach())
        progress.weight += float(loss.weight)
        progress.tokens += batch.labels.numel()

    def _gate_sizes(self) -> dict[str, float]:
        """Means over heads of what opens memory: |tanh(gate)| or, with scaled_logits, σ(gate); the bias."""
        opening = torch.sigmoid if self.config.fusion == "scaled_logits" else lambda gate: torch.tanh(gate).abs()
        sizes: dict[str, float] = {}
        for name, value in (("memory_gate", opening), ("memory_bias", torch.clone)):
            found = [p.detach() for key, p in self.trained.items() if key.endswith(name)]
            if found:
                sizes[name] = float(value(torch.cat(found).float()).mean())
        return sizes

    def _validate(self, bar: Any, on_validation: Callable[[int, Validation], None]) -> None:
        """On the main process; its numbers are the run's."""
        if self.valid and self.accelerator.is_main_process:
            result = self.validate()
            self.folder.log({"step": self.step, "validation": result.to_dict()})
            bar.write(f"step {self.step}: {describe(result)}")
            on_validation(self.step, result)
        self.accelerator.wait_for_everyone()

    def validate(self) -> Validation:
        upper: UpperHalf = self.accelerator.unwrap_model(self.upper)
        autocast: Callable[[], AbstractContextManager[object]] = self.accelerator.autocast
        tokens, with_memory = self.settings.segment_tokens, self.settings.with_memory
        return validate(upper, self.valid, self.config, tokens, self.head_dim, with_memory, autocast)

    def save(self) -> None:
        """Keep everything that :meth:`restore` needs."""
        assert self.carried is not None
        shared = {
            "step": self.step,
            "trained": {name: parameter.detach().cpu() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        own: dict[str, Any] = {"streams": self.streams.state(), "carried": carried_state(self.carried)}
        own["rng"] = rng_state(self.accelerator.device)
        self.folder.save(shared, own, self.accelerator.process_index, self.accelerator.wait_for_everyone)

    def restore(self) -> None:
        """Go on from the last :meth:`save`."""
        shared, own = self.folder.load(self.accelerator.process_index)
        for name, parameter in self.trained.items():
            parameter.data.copy_(shared["trained"][name])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.scheduler.load_state_dict(shared["scheduler"])
        self.streams.restore(own["streams"])
        self.carried = restored_carried(own["carried"], self.accelerator.device)
        restore_rng(own["rng"], self.accelerator.device)
        self.step = int(shared["step"])
        if self.accelerator.is_main_process:
            self.folder.cut_log(self.step)


def describe(result: Validation) -> str:
    """A line about a validation."""
    if result.nll_without_memory is None:
        return f"validation perplexity {math.exp(result.nll):.3f}"
    change = 100 * (math.exp(result.nll - result.nll_without_memory) - 1)
    without = math.exp(result.nll_without_memory)
    return f"validation perplexity {math.exp(result.nll):.3f}, without memory {without:.3f} ({change:+.2f} %)"


def _summary(entry: dict[str, Any]) -> str:
    gates = [
        f"{name.removeprefix('memory_')} {entry[name]:.3f}" for name in ("memory_gate", "memory_bias") if name in entry
    ]
    return ", ".join([f"loss {entry['loss']:.4f}", f"{entry['tokens_per_s']:.0f} tokens/s", *gates])
