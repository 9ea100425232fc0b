"""From measures to ``memory_layer`` and ``retrieval_layers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memlong_vllm.probe.measures import LayerMeasures
from memlong_vllm.probe.readers import ReaderMeasures, spread_layers


@dataclass(frozen=True)
class Proposal:
    """Attributes:
    reason: one sentence a line of the report.
    """

    memory_layer: int
    retrieval_layers: tuple[int, ...]
    reason: str


def candidate_layers(measures: LayerMeasures, count: int, with_below: bool = False) -> tuple[int, ...]:
    """The layers worth most, ascending.

    Args:
        with_below: and the layer below each. It reads nothing itself, but what it stores is nearest
            to what a layer that copies makes its keys of, if maps see the token before, too.
    """
    ranked = sorted(range(len(measures.alone)), key=lambda layer: (-measures.worth(layer).mean, layer))
    chosen = set(ranked[:count])
    return tuple(sorted(chosen | {layer - 1 for layer in chosen if with_below and layer > 0}))


def propose_by_worth(measures: LayerMeasures) -> Proposal:
    """Without maps: the layer worth most. Within the error of the difference the lower layer wins:
    no retrieval layer may lie below the memory layer, so a lower one leaves more that can read it."""
    best = candidate_layers(measures, 1)[0]

    def ties(layer: int) -> bool:
        behind = measures.worth_over(best, layer)
        return behind.mean <= behind.error

    chosen = next(layer for layer in range(best + 1) if layer == best or ties(layer))
    reason = f"layer {best} is worth most when every layer reads its own memory"
    if chosen != best:
        reason += f"; layer {chosen} is within the error of it and lower"
    layers = spread_layers(len(measures.alone), chosen)
    return Proposal(chosen, layers, f"{reason}; which layers above read it best was not measured: every fourth")


def propose(candidates: Sequence[ReaderMeasures]) -> Proposal:
    """The candidate whose best choice of layers reaches most; the same rule for ties."""
    best = max(candidates, key=lambda c: float(c.best.reached.log_probability.mean()))

    def ties(candidate: ReaderMeasures) -> bool:
        behind = best.best.reached.over(candidate.best.reached)
        return candidate.memory_layer < best.memory_layer and behind.mean <= behind.error

    chosen = next((c for c in sorted(candidates, key=lambda c: c.memory_layer) if ties(c)), best)
    others = ", ".join(str(c.memory_layer) for c in candidates if c is not chosen)
    reached = float(chosen.best.reached.log_probability.mean())
    reason = f"layer {chosen.memory_layer}'s memory, read by these, reaches {reached:.2f} nats a digit"
    reason += f"; tried beside it: {others}" if others else ""
    if chosen is not best:
        reason += f"; layer {best.memory_layer} reaches more, but within the error, and is higher"
    return Proposal(chosen.memory_layer, chosen.best.layers, reason)
