"""Which layers gain from reading one layer's memory through linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from memlong_vllm.probe.maps import ReaderMap
from memlong_vllm.probe.measures import Estimate, PreparedTrial, Samples
from memlong_vllm.probe.progress import Say
from memlong_vllm.probe.reading import Memory


@dataclass(frozen=True)
class ReaderMeasures:
    """One memory layer's keys and values read by it and, mapped, by layers above it.

    Attributes:
        own: the memory layer alone reads.
        alone, added: by layer above: that one alone, and beside the memory layer.
        every: the memory layer and all above it.
        steps: layers chosen one after another, each the best beside those before it, with what is
            reached; ``(memory_layer, own)`` first.
        spread: every fourth layer down from the last, beside the memory layer.
    """

    memory_layer: int
    maps: Mapping[int, ReaderMap]
    own: Samples
    alone: Mapping[int, Samples]
    added: Mapping[int, Samples]
    every: Samples
    spread: Samples
    steps: tuple[tuple[int, Samples], ...]

    @property
    def retrieval_layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for layer, _ in self.steps))

    @property
    def reached(self) -> Samples:
        return self.steps[-1][1]

    def gain(self, layer: int) -> Estimate:
        """Of adding this layer to the memory layer alone."""
        return self.added[layer].over(self.own)


def spread_layers(num_layers: int, memory_layer: int) -> tuple[int, ...]:
    """The memory layer and every fourth down from the last, as 13, 17, 21, 25 are of 26."""
    return tuple(sorted({memory_layer, *range(num_layers - 1, memory_layer, -4)}))


class MappedTrial:
    """A prepared trial whose layers read what ``memory_layer`` stored, through ``maps``."""

    def __init__(self, trial: PreparedTrial, memory_layer: int, maps: Mapping[int, ReaderMap]) -> None:
        self.trial, self.memory_layer = trial, memory_layer
        stored = trial.own[memory_layer]
        self.memories: dict[int, Memory] = {memory_layer: stored}
        self.memories |= {layer: reader.apply(stored) for layer, reader in maps.items()}

    def read(self, layers: Sequence[int], before: Sequence[Tensor] | None = None, first_layer: int = 0) -> list[Tensor]:
        """States; without ``before``, from the first layer that reads."""
        first = first_layer if before is not None else min(layers)
        return self.trial.reader.read({n: self.memories[n] for n in layers}, before or self.trial.none, first)


def measure_readers(
    trials: Sequence[PreparedTrial],
    memory_layer: int,
    maps: Mapping[int, ReaderMap],
    max_layers: int,
    say: Say,
) -> ReaderMeasures:
    """All of :class:`ReaderMeasures`; ``max_layers``: at most so many retrieval layers are chosen."""
    mapped = [MappedTrial(trial, memory_layer, maps) for trial in trials]
    above = sorted(maps)
    states = [trial.read([memory_layer]) for trial in mapped]

    def measured(layers: Sequence[int], before: Sequence[list[Tensor]] | None = None, first: int = 0) -> Samples:
        given: Sequence[list[Tensor] | None] = before or [None] * len(mapped)
        return Samples.of([t.trial.score(t.read(layers, b, first)) for t, b in zip(mapped, given, strict=True)])

    own = Samples.of([trial.trial.score(s) for trial, s in zip(mapped, states, strict=True)])
    say(f"layer {memory_layer}'s memory: reading it alone")
    alone = {layer: measured([layer]) for layer in above}
    say(f"layer {memory_layer}'s memory: a second layer reading it")
    added = {layer: measured([memory_layer, layer], states, layer) for layer in above}
    steps = [(memory_layer, own)]
    # What does not help beside the memory layer alone is not tried again: it seldom helps later.
    waiting = {layer for layer in above if added[layer].over(own).mean > 0}
    found = dict(added)
    while waiting and len(steps) < max_layers:
        best = max(sorted(waiting), key=lambda layer: float(found[layer].log_probability.mean()))
        improvement = found[best].over(steps[-1][1])
        if improvement.mean <= improvement.error:
            break
        steps.append((best, found[best]))
        waiting.remove(best)
        chosen = [layer for layer, _ in steps]
        say(f"layer {memory_layer}'s memory: reading layers {sorted(chosen)}")
        states = [trial.read(chosen) for trial in mapped]
        if len(steps) < max_layers:
            found = {layer: measured([*chosen, layer], states, layer) for layer in sorted(waiting)}
    spread = spread_layers(trials[0].backbone.num_layers, memory_layer)
    return ReaderMeasures(
        memory_layer, maps, own, alone, added, measured([memory_layer, *above]), measured(spread), tuple(steps)
    )
