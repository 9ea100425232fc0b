"""From a model's description to the scorer that runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.plain_backbone import plain_backbone
from memlong_vllm.evaluation.scoring import EvaluationError, Scorer, ScorerSettings
from memlong_vllm.evaluation.varied_checkpoint import varied_checkpoint


def open_scorer(spec: ModelSpec, settings: ScorerSettings) -> Scorer:
    """Load a model. Close it (``with``) before the next one is loaded."""
    if settings.engine == "vllm":
        from memlong_vllm.evaluation.vllm_scorer import VllmScorer

        return VllmScorer(_made(spec, settings.scratch, spec.window), settings)
    if spec.kind == "memlong":
        from memlong_vllm.evaluation.reference_scorer import ReferenceScorer

        return ReferenceScorer(_made(spec, settings.scratch, None), settings)
    from memlong_vllm.evaluation.transformers_scorer import TransformersScorer

    # Windows are masks there: transformers' Llama has no sliding window.
    return TransformersScorer(_made(spec, settings.scratch, None), settings)


def check_heads(spec: ModelSpec) -> None:
    """Raises:
    EvaluationError: if stock vLLM has no attention for a baseline's heads on this machine, which it
        would say at the first request, after the other models' hours.
    """
    if spec.kind != "plain":
        return
    from memlong_vllm.evaluation.vllm_scorer import supported_head_sizes

    config, sizes = spec.config, supported_head_sizes()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if sizes is not None and head_dim not in sizes:
        raise EvaluationError(
            f"--baselines {spec.label}: vLLM has no attention for heads of {head_dim} on this machine (it has "
            f"{', '.join(map(str, sizes))}): leave baselines out, or measure them with --engine reference"
        )


def _made(spec: ModelSpec, scratch: Path, window: int | None) -> ModelSpec:
    """The model with a folder to load, which baselines and variants have not yet."""
    if spec.kind == "memlong" and not spec.changes:
        return spec
    folder = scratch / f"{spec.kind}-{spec.label}"
    if not folder.exists():
        if spec.changes:
            varied_checkpoint(spec.source, folder, spec.config)
        else:
            plain_backbone(spec.source, folder, window)
    return replace(spec, path=folder)
