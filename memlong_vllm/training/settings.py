"""What a fine-tuning run does, apart from the model and the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.trainable import SettingsError, TrainedParts


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a run; they decide, with the model and the data, every weight that results.

    Attributes:
        parts: what learns.
        with_memory: False trains the control: the same run, nothing retrieved.
        steps: updates of the weights.
        rows: streams that are read side by side, per process; a batch has one segment of each.
        accumulation: batches an update is made of.
        segment_tokens: tokens of a stream a batch takes (section 4.1: 1024).
        learning_rate: of LoRA and of what is trained whole, after ``warmup_steps`` of linear rise.
        memory_learning_rate: a tenth of that of gates and biases; None: ``learning_rate``.
        adapter_learning_rate: of adapters of memory; None: ``memory_learning_rate``. Maps that were fitted
            (``calibrate_tokens``) have many small entries, and do not outlive a rate that is good for LoRA.
        schedule: what the rates do after warm-up.
        bias_start: ``memory_bias`` of a model that has one, before the first step, if it is 0.
        calibrate_tokens: tokens that fresh (identity) ``memory_adapter`` maps are fitted on; 0: not.
        precision: of matrix products; weights that learn are float32 always.
        keep_features: what the frozen layers make of the texts is computed before training and kept on disk,
            so that a second epoch costs the upper layers only; False: it is computed as texts are read.
        validate_every, save_every: in steps; 0: at the end only.
    """

    parts: TrainedParts = field(default_factory=TrainedParts)
    with_memory: bool = True
    steps: int = 1000
    rows: int = 4
    accumulation: int = 1
    segment_tokens: int = 1024
    learning_rate: float = 5e-5
    memory_learning_rate: float | None = None
    adapter_learning_rate: float | None = None
    warmup_steps: int = 50
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bias_start: float = 0.0
    calibrate_tokens: int = 32768
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = False
    keep_features: bool = True
    validate_every: int = 0
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulation", "segment_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("warmup_steps", "validate_every", "save_every", "calibrate_tokens"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        rule = f"must not exceed steps ({self.steps}), or the learning rate is never reached"
        _require(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, rule)
        for name in ("learning_rate", "max_grad_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("memory_learning_rate", "adapter_learning_rate"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, name, rate, "must be positive")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        _require(self.schedule in ("constant", "linear", "cosine"), "schedule", self.schedule, "is unknown")
        _require(self.precision in ("bf16", "fp32"), "precision", self.precision, "must be bf16 or fp32")

    def check_model(self, memory: MemoryConfig) -> None:
        """Raises SettingsError if a model with this memory cannot be trained so."""
        stride = memory.retrieval_stride
        rule = f"must be a multiple of the model's retrieval_stride ({stride})"
        _require(self.segment_tokens % stride == 0, "segment_tokens", self.segment_tokens, rule)
        learns = self.parts.rank > 0 or bool(self.parts.full) or self.with_memory
        _require(learns, "lora_rank", self.parts.rank, "leaves nothing that learns")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        values = asdict(self)
        values["parts"] = {name: list(v) if isinstance(v, tuple) else v for name, v in values["parts"].items()}
        return values


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise SettingsError(f"{name} = {value!r}: {rule}")


def with_overrides(settings: FinetuneSettings, values: dict[str, Any]) -> FinetuneSettings:
    """``settings`` with the values that are not None; those of ``parts`` by their own names."""
    given = {name: value for name, value in values.items() if value is not None}
    of_parts = {f.name for f in fields(TrainedParts)}
    parts = replace(settings.parts, **{name: given.pop(name) for name in list(given) if name in of_parts})
    return replace(settings, parts=parts, **given)


PRESETS: dict[str, FinetuneSettings] = {
    # For OpenLLaMA-3B on eight 24 GB cards: segments of 1024 tokens, rate, warm-up and 0.5 B tokens
    # of section 4.1; rank, alpha, dropout, decay and what is trained beside LoRA as in the authors'
    # released script, since the paper does not say. The checkpoint brings chunks, memory and layers
    # (``convert --preset paper`` or ``released``).
    "paper": FinetuneSettings(
        parts=TrainedParts(rank=64, alpha=8.0, dropout=0.05, full=("norms", "embeddings")),
        steps=61_000,
        rows=1,
        learning_rate=5e-5,
        memory_learning_rate=5e-6,  # Of which gates, a number a head, get ten times.
        warmup_steps=1000,
        weight_decay=1e-4,
        schedule="cosine",
        checkpointing=True,
        keep_features=False,  # Of texts that are read once; 19 kB a token.
        validate_every=1000,
        save_every=1000,
    ),
}
