"""What each layer's reading is worth: trials prepared once, then read under many settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlong_vllm.probe.backbone import Backbone, read_passage
from memlong_vllm.probe.progress import Say, each
from memlong_vllm.probe.reading import Answers, QuestionReader, own_memory, score_answers, window_context
from memlong_vllm.probe.trials import Geometry, Trial


@dataclass(frozen=True)
class Estimate:
    """A mean over trials and its standard error; questions of one trial share their prose, so the
    trial is the unit. The error of a single trial is not known: infinite."""

    mean: float
    error: float

    @classmethod
    def of(cls, by_trial: Tensor) -> Estimate:
        count = len(by_trial)
        return cls(float(by_trial.mean()), float(by_trial.std()) / count**0.5 if count > 1 else float("inf"))


@dataclass(frozen=True)
class Samples:
    """Means over the questions of each trial, [trials] each; see :class:`Answers`."""

    log_probability: Tensor
    likelihood: Tensor
    accuracy: Tensor

    @classmethod
    def of(cls, answers: Sequence[Answers]) -> Samples:
        kinds = zip(*((a.log_probability.mean(), a.likelihood.mean(), a.accuracy.mean()) for a in answers), strict=True)
        return cls(*map(torch.stack, map(list, kinds)))

    def over(self, other: Samples) -> Estimate:
        """How much more log-probability than ``other``'s, paired by trial."""
        return Estimate.of(self.log_probability - other.log_probability)


class PreparedTrial:
    """A trial whose passage has been read. Keeps, of every layer, the memory and the question's window.

    Attributes:
        own: by layer, its own keys and values of the memory chunks.
        none, every: states of reading nothing, and of every layer reading its own memory.
        ceiling: answers where the memory is the window: the questions follow it directly.
    """

    def __init__(self, backbone: Backbone, trial: Trial, geometry: Geometry, *, facts_distract: bool) -> None:
        self.backbone, self.questions = backbone, trial.questions
        context = torch.tensor(trial.context, device=backbone.device)
        passage = read_passage(backbone, context, geometry.window)
        token_ids = [question.token_ids for question in trial.questions]
        near = window_context(passage, geometry.memory_tokens, geometry.window)
        self.ceiling = self.score(QuestionReader(backbone, near, token_ids, geometry.window, 0).read({}))
        far = window_context(passage, geometry.context_tokens, geometry.window)
        unread = None if facts_distract else self._other_facts(geometry)
        origin = geometry.memory_tokens - 1  # max(0, b + S - W) - 1
        self.reader = QuestionReader(backbone, far, token_ids, geometry.window, origin, unread)
        chunks = range(geometry.num_chunks)
        self.own = {layer: own_memory(kept, chunks, geometry.chunk_size) for layer, kept in enumerate(passage)}
        self.none, self.every = self.reader.read({}), self.reader.read(self.own)

    def _other_facts(self, geometry: Geometry) -> Tensor:
        """[questions, memory tokens]: chunks with another question's fact."""
        unread = torch.zeros(len(self.questions), geometry.num_chunks, dtype=torch.bool)
        for row, question in enumerate(self.questions):
            unread[row, [other.chunk for other in self.questions if other.chunk != question.chunk]] = True
        return unread.repeat_interleave(geometry.chunk_size, dim=1).to(self.backbone.device)

    def score(self, states: Sequence[Tensor]) -> Answers:
        return score_answers(self.backbone, states[-1], self.questions)

    def alone(self, layer: int) -> Answers:
        return self.score(self.reader.read({layer: self.own[layer]}, self.none, layer))

    def without(self, layer: int) -> Answers:
        others = {other: memory for other, memory in self.own.items() if other != layer}
        return self.score(self.reader.read(others, self.every, layer))


@dataclass(frozen=True)
class LayerMeasures:
    """Every layer reading its own memory.

    Attributes:
        none, every, ceiling: no layer, every layer, and the fact within the window.
        alone, without: by layer: that one only, and all but that one.
    """

    none: Samples
    every: Samples
    ceiling: Samples
    alone: tuple[Samples, ...]
    without: tuple[Samples, ...]

    def gain(self, layer: int) -> Estimate:
        return self.alone[layer].over(self.none)

    def drop(self, layer: int) -> Estimate:
        return self.every.over(self.without[layer])

    def worth(self, layer: int) -> Estimate:
        """The mean of gain and drop: what the layer adds to no other and to all others, the two
        ends of its Shapley value."""
        return Estimate.of(self._worth(layer))

    def worth_over(self, layer: int, other: int) -> Estimate:
        """How much more ``layer`` is worth than ``other``, paired by trial."""
        return Estimate.of(self._worth(layer) - self._worth(other))

    def _worth(self, layer: int) -> Tensor:
        gain = self.alone[layer].log_probability - self.none.log_probability
        drop = self.every.log_probability - self.without[layer].log_probability
        return (gain + drop) / 2


def measure_layers(trials: Sequence[PreparedTrial], say: Say) -> LayerMeasures:
    """All of :class:`LayerMeasures`: two readings a layer and trial, each from that layer up."""
    layers = range(trials[0].backbone.num_layers)
    alone: list[list[Answers]] = [[] for _ in layers]
    without: list[list[Answers]] = [[] for _ in layers]
    for trial in each(trials, "layers, trial", say):
        for layer in layers:
            alone[layer].append(trial.alone(layer))
            without[layer].append(trial.without(layer))
    return LayerMeasures(
        Samples.of([trial.score(trial.none) for trial in trials]),
        Samples.of([trial.score(trial.every) for trial in trials]),
        Samples.of([trial.ceiling for trial in trials]),
        tuple(map(Samples.of, alone)),
        tuple(map(Samples.of, without)),
    )
