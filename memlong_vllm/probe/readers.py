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
class Choice:
    """Layers that read, ascending, and what they reach."""

    layers: tuple[int, ...]
    reached: Samples


@dataclass(frozen=True)
class ReaderMeasures:
    """One memory layer's keys and values read by it and, mapped, by layers above it.

    Attributes:
        own: the memory layer alone reads.
        added: by layer above: that one beside the memory layer.
        every: the memory layer and all above it.
        without: by layer above: all but that one.
        choices: sets of layers that were tried; the first is the memory layer alone.
    """

    memory_layer: int
    maps: Mapping[int, ReaderMap]
    added: Mapping[int, Samples]
    every: Samples
    without: Mapping[int, Samples]
    choices: tuple[Choice, ...]

    @property
    def own(self) -> Samples:
        return self.choices[0].reached

    @property
    def best(self) -> Choice:
        """The choice that reaches most; of equal ones, that with fewer layers."""
        return max(self.choices, key=lambda c: (float(c.reached.log_probability.mean()), -len(c.layers)))

    def gain(self, layer: int) -> Estimate:
        """Of adding this layer to the memory layer alone."""
        return self.added[layer].over(self.own)

    def drop(self, layer: int) -> Estimate:
        """Of leaving this layer out of all."""
        return self.every.over(self.without[layer])


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
        """States; ``before`` as in :meth:`QuestionReader.read`, by default of reading nothing."""
        first = first_layer if before is not None else min(layers)
        return self.trial.reader.read({n: self.memories[n] for n in layers}, before or self.trial.none, first)


class ReaderSearch:
    """Measures one memory layer's readers in all trials.

    Two ways of choosing layers are tried, as a circuit of several layers may show in one only:
    adding the best layer again and again, and keeping those that all the others miss most.
    """

    def __init__(
        self, trials: Sequence[PreparedTrial], memory_layer: int, maps: Mapping[int, ReaderMap], say: Say
    ) -> None:
        self.mapped = [MappedTrial(trial, memory_layer, maps) for trial in trials]
        self.memory_layer, self.maps, self.above, self.say = memory_layer, maps, sorted(maps), say
        self.num_layers = trials[0].backbone.num_layers

    def states(self, layers: Sequence[int]) -> list[list[Tensor]]:
        return [trial.read(layers) for trial in self.mapped]

    def scored(self, states: Sequence[list[Tensor]]) -> Samples:
        return Samples.of([trial.trial.score(s) for trial, s in zip(self.mapped, states, strict=True)])

    def changed(self, layers: Sequence[int], before: Sequence[list[Tensor]], first: int) -> Samples:
        """Of ``layers`` reading, where ``before`` is the same below layer ``first``."""
        return self.scored([t.read(layers, b, first) for t, b in zip(self.mapped, before, strict=True)])

    def choice(self, layers: Sequence[int]) -> Choice:
        found = Choice(tuple(sorted(layers)), self.scored(self.states(layers)))
        mean = float(found.reached.log_probability.mean())
        self.say(f"layer {self.memory_layer}'s memory, read by {list(found.layers)}: {mean:.3f} nats a digit")
        return found

    def measure(self, max_layers: int) -> ReaderMeasures:
        """``max_layers``: of a choice, at most."""
        everyone = [self.memory_layer, *self.above]
        states = self.states(everyone)
        every = self.scored(states)
        without = {n: self.changed([o for o in everyone if o != n], states, n) for n in self.above}
        states = self.states([self.memory_layer])
        added = {n: self.changed([self.memory_layer, n], states, n) for n in self.above}
        choices = [self.choice([self.memory_layer])]
        missed = sorted(self.above, key=lambda n: (float(without[n].log_probability.mean()), n))
        spread = spread_layers(self.num_layers, self.memory_layer)
        for layers in ([self.memory_layer, *missed[: max_layers - 1]], [*spread[:1], *spread[:0:-1][: max_layers - 1]]):
            if tuple(sorted(layers)) not in [choice.layers for choice in choices]:
                choices.append(self.choice(layers))
        choices += self.grown(choices[0], added, max_layers)
        return ReaderMeasures(self.memory_layer, self.maps, added, every, without, tuple(choices))

    def grown(self, start: Choice, added: Mapping[int, Samples], max_layers: int) -> list[Choice]:
        """The best layer added again and again, while that helps by more than its error.

        What does not help beside the memory layer alone is not tried again: it seldom helps later.
        """
        choices, found = [start], dict(added)
        waiting = {n for n in self.above if added[n].over(start.reached).mean > 0}
        while waiting and len(choices) < max_layers:
            best = max(sorted(waiting), key=lambda n: float(found[n].log_probability.mean()))
            improvement = found[best].over(choices[-1].reached)
            if improvement.mean <= improvement.error:
                break
            waiting.remove(best)
            choices.append(self.choice([*choices[-1].layers, best]))
            layers = choices[-1].layers
            states = self.states(layers)
            found = {n: self.changed([*layers, n], states, n) for n in sorted(waiting)}
        return choices[1:]
