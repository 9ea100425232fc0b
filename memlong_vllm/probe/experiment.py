"""The whole probe: settings in, measures and a proposal out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlong_vllm.config import GIB
from memlong_vllm.probe.backbone import Backbone
from memlong_vllm.probe.maps import MapFitter, sums_bytes
from memlong_vllm.probe.measures import LayerMeasures, PreparedTrial, measure_layers
from memlong_vllm.probe.progress import Say, each
from memlong_vllm.probe.proposal import Proposal, candidate_layers, propose, propose_by_worth
from memlong_vllm.probe.readers import ReaderMeasures, ReaderSearch
from memlong_vllm.probe.trials import Geometry, ProbeError, Trial, build_trials

# Of the passages for maps, this share is not fitted but gives R².
UNSEEN_SHARE = 5
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ProbeSettings:
    """Attributes:
    facts: of a passage, each asked for by a question of its own.
    facts_distract: a question also reads the chunks of the other facts; else prose and its own.
    candidates: memory layers whose readers are measured, those worth most, and the layers below
        them if maps see several tokens; 0: none, and no maps.
    memory_layers: these instead.
    adapter_width: tokens that the maps of readers see: one and those before it in its chunk.
    fit_passages: for the maps; a fifth of them for R² only.
    max_layers: retrieval layers proposed at most.
    """

    window: int = 1024
    chunk_size: int = 128
    chunks: int = 8
    trials: int = 8
    facts: int = 4
    facts_distract: bool = False
    candidates: int = 3
    memory_layers: tuple[int, ...] = ()
    adapter_width: int = 2
    fit_passages: int = 10
    ridge: float = 1e-4
    max_layers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"window": 1, "chunk_size": 1, "chunks": 1, "trials": 2, "facts": 1, "max_layers": 1, "candidates": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                option = "--" + name.replace("_", "-")
                raise ProbeError(f"{option} {getattr(self, name)}: must be at least {minimum}")
        if not self.ridge >= 0:
            raise ProbeError(f"--ridge {self.ridge}: must be 0 or more")
        if not 1 <= self.adapter_width <= self.chunk_size:
            raise ProbeError(f"--adapter-width {self.adapter_width}: must be from 1 to --chunk-size {self.chunk_size}")
        if self.reads_maps and self.fit_passages < UNSEEN_SHARE:
            raise ProbeError(f"--fit-passages {self.fit_passages}: must be at least {UNSEEN_SHARE}, or --candidates 0")

    @property
    def reads_maps(self) -> bool:
        return self.candidates > 0 or bool(self.memory_layers)


@dataclass(frozen=True)
class ProbeResult:
    """Attributes:
    layers: every layer reading its own memory. readers: of each candidate, ascending.
    """

    settings: ProbeSettings
    geometry: Geometry
    layers: LayerMeasures
    readers: tuple[ReaderMeasures, ...]
    proposal: Proposal


def geometry_for(settings: ProbeSettings, longest_question: int) -> Geometry:
    """The question segment is the least number of whole chunks that holds every question."""
    stride = -(-longest_question // settings.chunk_size) * settings.chunk_size
    return Geometry(settings.window, settings.chunk_size, settings.chunks, stride)


def prepare_texts(tokenizer: Any, texts: Sequence[str], settings: ProbeSettings) -> tuple[Geometry, list[Trial]]:
    """Trials, and after them the passages for the maps, which are of the same kind but others.

    Raises:
        ProbeError: if the texts are too short or the sizes do not fit each other.
    """
    count = settings.trials + (settings.fit_passages if settings.reads_maps else 0)
    # One chunk is tried first; a tokenizer that spells out names and numbers may need more.
    geometry, longest = geometry_for(settings, 1), 0
    while longest > geometry.stride or not longest:
        geometry = geometry_for(settings, max(1, longest))
        trials = build_trials(tokenizer, texts, geometry, count, settings.facts, settings.seed)
        longest = max(len(question.token_ids) for trial in trials for question in trial.questions)
    random.Random(settings.seed).shuffle(trials)  # Else the maps would be fitted on the last texts only.
    return geometry, trials


def run_probe(model: Any, tokenizer: Any, texts: Sequence[str], settings: ProbeSettings, say: Say) -> ProbeResult:
    """Measure and propose; ``model``: a Llama or reference MemLong model of transformers.

    Raises:
        ProbeError: if texts, sizes and model do not fit each other.
        RidgeError: if the passages for maps are too few.
    """
    backbone = Backbone(model)
    check_backbone(backbone, settings)
    geometry, passages = prepare_texts(tokenizer, texts, settings)
    fitted = passages[settings.trials :]
    kept = 2 * (geometry.memory_tokens + geometry.window) * backbone.num_kv_heads * backbone.head_dim * FLOAT32_BYTES
    num_facts = geometry.num_facts(settings.facts)
    say(
        f"{settings.trials} trials of {geometry.context_tokens} tokens and {num_facts} questions; "
        f"keeping {kept * backbone.num_layers * settings.trials / GIB:.1f} GiB of keys and values"
    )
    trials = [
        PreparedTrial(backbone, trial, geometry, facts_distract=settings.facts_distract)
        for trial in each(passages[: settings.trials], "reading passage", say)
    ]
    layers = measure_layers(trials, say)
    candidates = settings.memory_layers or candidate_layers(layers, settings.candidates, settings.adapter_width > 1)
    say(f"layers worth most: {list(candidate_layers(layers, 5))}; measuring {list(candidates)}")
    readers = measure_candidates(backbone, trials, fitted, candidates, settings, geometry, say)
    proposal = propose(readers) if readers else propose_by_worth(layers)
    return ProbeResult(settings, geometry, layers, readers, proposal)


def check_backbone(backbone: Backbone, settings: ProbeSettings) -> None:
    """Raises:
    ProbeError: if the window exceeds what the backbone was trained on, or a layer does not exist.
    """
    if settings.window > backbone.trained_length:
        raise ProbeError(f"--window {settings.window}: the backbone was trained on {backbone.trained_length} tokens")
    for layer in settings.memory_layers:
        if not 0 <= layer < backbone.num_layers:
            raise ProbeError(f"--memory-layer {layer}: the backbone has layers 0 to {backbone.num_layers - 1}")


def measure_candidates(
    backbone: Backbone,
    trials: Sequence[PreparedTrial],
    fitted: Sequence[Trial],
    candidates: Sequence[int],
    settings: ProbeSettings,
    geometry: Geometry,
    say: Say,
) -> tuple[ReaderMeasures, ...]:
    """The readers of each candidate that has layers above it."""
    if not candidates:
        return ()
    needed, unseen = sums_bytes(backbone, candidates, settings.adapter_width), len(fitted) // UNSEEN_SHARE
    say(f"fitting maps from layers {list(candidates)}: {needed / GIB:.1f} GiB of sums")
    fitter = MapFitter(backbone, candidates, geometry.window, geometry.chunk_size, settings.adapter_width)
    for number, passage in enumerate(each(fitted, "fitting passage", say)):
        fitter.add([passage.context], unseen=number < unseen)
    maps = fitter.fit(settings.ridge)
    return tuple(
        ReaderSearch(trials, layer, maps.get(layer, {}), say).measure(settings.max_layers) for layer in candidates
    )
