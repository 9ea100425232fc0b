"""From a model's description to the scorer that runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.plain_backbone import plain_backbone
from memlong_vllm.evaluation.scoring import Scorer, ScorerSettings


def open_scorer(spec: ModelSpec, settings: ScorerSettings) -> Scorer:
    """Load a model. Close it (``with``) before the next one is loaded."""
    if settings.engine == "vllm":
        from memlong_vllm.evaluation.vllm_scorer import VllmScorer

        return VllmScorer(_with_backbone_made(spec, settings.scratch, spec.window), settings)
    if spec.kind == "memlong":
        from memlong_vllm.evaluation.reference_scorer import ReferenceScorer

        return ReferenceScorer(spec, settings)
    from memlong_vllm.evaluation.transformers_scorer import TransformersScorer

    # Windows are masks there: transformers' Llama has no sliding window.
    return TransformersScorer(_with_backbone_made(spec, settings.scratch, None), settings)


def _with_backbone_made(spec: ModelSpec, scratch: Path, window: int | None) -> ModelSpec:
    if spec.kind == "memlong":
        return spec
    folder = scratch / f"backbone-{spec.label}"
    if not folder.exists():
        plain_backbone(spec.source, folder, window)
    return replace(spec, path=folder)
