"""Variants of a model, to see what a choice is worth: another setting, or another checkpoint."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memlong_vllm.config import MemoryConfig, MemoryConfigError
from memlong_vllm.conversion import TRAINED_WITH
from memlong_vllm.evaluation.models import ModelSpec, check_same_tokens, read_config, training_differences
from memlong_vllm.evaluation.scoring import EvaluationError
from memlong_vllm.evaluation.varied_checkpoint import layers_with_trained_gates

CHECKPOINT = "checkpoint"
LAYERS = "retrieval_layers"
QUERIES = ("query_tokens", "prompt_query_tokens")
NUMBERS = ("top_k", "chunk_size", "local_window", "retrieval_stride", *QUERIES, "memory_layer")
CHOICES = ("query_scope", "fusion", "memory_softmax")
KEYS = (*NUMBERS, *CHOICES, LAYERS)
# What gates that were never trained do, by fusion. The joint softmax has none.
ZERO_GATES = {
    "gated": "let no memory through",
    "scaled_logits": "halve all scores, the local window's as well",
}
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Variation:
    """Values of one field of the ``memlong`` block, one of which at a time is set."""

    key: str
    values: tuple[str, ...]


def variation(text: str) -> Variation:
    """An argument such as ``top_k=1,2,4`` or ``retrieval_layers=13+17,13-25``."""
    key, separator, values = text.partition("=")
    parts = tuple(part.strip() for part in values.split(","))
    if not separator or not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE,… with different values, such as top_k=1,2,4")
    if key not in KEYS:
        more = {"memory_size": "; use --memory-sizes"}.get(key, "; name another checkpoint with --variant")
        raise argparse.ArgumentTypeError(f"{text!r}: {key} is none of {', '.join(KEYS)}{more}")
    return Variation(key, parts)


def named_checkpoint(text: str) -> tuple[str, str]:
    """An argument such as ``joint=/path/to/checkpoint``."""
    label, separator, path = text.partition("=")
    if not separator or not path or not LABEL.fullmatch(label):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=DIR, with a label of letters, digits and _ . + -")
    return label, path


def add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("variants", "each is measured with the largest of --memory-sizes")
    group.add_argument(
        "--vary", type=variation, action="append", default=[], metavar="KEY=V,…",
        help=f"the model with another value of {', '.join(KEYS)}; layers as 13+17+21 or 13-25. May be repeated",
    )  # fmt: skip
    group.add_argument(
        "--variant", type=named_checkpoint, action="append", default=[], metavar="LABEL=MODEL",
        help="another checkpoint, for example one trained with another fusion. May be repeated",
    )  # fmt: skip


def variant_specs(
    main: ModelSpec, variations: Sequence[Variation], checkpoints: Sequence[tuple[str, Path]], taken: Sequence[str]
) -> list[ModelSpec]:
    """The variants that options name; values that are the checkpoint's own are left out.

    Args:
        taken: labels that other models have.

    Raises:
        EvaluationError: naming the option.
    """
    specs = []
    for varied in variations:
        for value in varied.values:
            spec = _with_setting(main, varied.key, value)
            specs += [spec] if spec is not None else []
    for label, path in checkpoints:
        config = read_config(path, f"--variant {label}")
        if "memlong" not in config:
            raise EvaluationError(f"--variant {label}: {path} is no MemLong checkpoint; plain ones are baselines")
        window = config["memlong"]["local_window"]
        differs = training_differences(config, main.config)
        spec = ModelSpec(label, path, path, "memlong", window, config=config, group=CHECKPOINT, differs=differs)
        check_same_tokens(main, spec)
        specs.append(spec)
    labels = [*taken, *(spec.label for spec in specs)]
    for label in labels:
        if labels.count(label) > 1:
            raise EvaluationError(f"two models are called '{label}': give --variant and --vary others")
    return specs


def _with_setting(main: ModelSpec, key: str, text: str) -> ModelSpec | None:
    """The model with one setting changed; None if that is its setting already."""
    own, value = memory_config(main).to_dict(), _value(key, text)
    if own[key] == value:
        return None
    changes = {key: value}
    if key == "chunk_size":
        # Of the paper's design: a retrieval for each chunk, queried with a chunk. Kept where it is so.
        changes |= {name: value for name in ("retrieval_stride", "query_tokens") if own[name] == own[key]}
    config = main.config | {"memlong": own | changes}
    spec = replace(main, label=f"{key}={text}", config=config, group=key, changes=changes)
    try:
        memory = memory_config(spec)
    except MemoryConfigError as error:
        raise EvaluationError(f"--vary {spec.label}: {error}") from error
    _check_gates(spec, memory, set(own[LAYERS]))
    return replace(spec, window=memory.local_window)


def _check_gates(spec: ModelSpec, memory: MemoryConfig, own_layers: set[int]) -> None:
    """A variant without trained gates says nothing about its setting: gated, it is a model without memory.

    Raises:
        EvaluationError: if ``spec`` needs gates that the checkpoint has not trained: in layers that
            do not retrieve there, or in all because it was trained with a fusion that has none.
    """
    if memory.fusion not in ZERO_GATES:
        return
    untrained = set(memory.retrieval_layers) - own_layers
    if spec.group == "fusion" and not layers_with_trained_gates(spec.source):
        untrained = set(memory.retrieval_layers)
    if untrained:
        raise EvaluationError(
            f"--vary {spec.label}: the checkpoint has no trained gates in layers {sorted(untrained)}, and zero ones "
            f"{ZERO_GATES[memory.fusion]}: train a checkpoint with this setting and name it with --variant"
        )


def _value(key: str, text: str) -> Any:
    if key in CHOICES:
        return text
    try:
        return _layers(text) if key == LAYERS else int(text)
    except ValueError:
        kind = "layers such as 13+17+21 or 13-25" if key == LAYERS else "a number"
        raise EvaluationError(f"--vary {key}={text}: not {kind}") from None


def _layers(text: str) -> list[int]:
    layers = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        layers += list(range(int(first), int(last or first) + 1))
    return layers


def memory_config(spec: ModelSpec) -> MemoryConfig:
    """Raises:
    MemoryConfigError: if the ``memlong`` block is not valid.
    """
    return MemoryConfig.from_dict(spec.config["memlong"], spec.config["num_hidden_layers"])


def check_memory_size(specs: Sequence[ModelSpec], size: int) -> None:
    """Raises:
    EvaluationError: if a variant cannot have a memory of this size.
    """
    for spec in specs:
        chunk_size = spec.config["memlong"]["chunk_size"] if spec.group is not None else 1
        if size % chunk_size:
            raise EvaluationError(
                f"'{spec.label}' has chunks of {chunk_size} tokens: the largest of --memory-sizes ({size}) must be a "
                "multiple of that"
            )


def untrained_for(changes: dict[str, Any] | None) -> list[str]:
    """The changed settings that give trained parameters another meaning."""
    return sorted(set(changes or ()) & set(TRAINED_WITH))
