"""Gain and drop by layer as a picture. matplotlib is optional and imported here only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from memlong_vllm.probe.experiment import ProbeResult


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(result: ProbeResult, path: Path) -> None:
    """Write a PNG: bars of each layer's gain alone and drop when left out, with standard errors."""
    from matplotlib.figure import Figure  # Not pyplot, which looks for a display.

    layers = range(len(result.layers.alone))
    figure = Figure(figsize=(max(6.0, 0.35 * len(layers)), 4.0), layout="constrained")
    axes = figure.subplots()
    kinds = (("gain alone", result.layers.gain, -0.2), ("drop when left out", result.layers.drop, 0.2))
    for label, of, offset in kinds:
        estimates = [of(layer) for layer in layers]
        places = [layer + offset for layer in layers]
        errors = [estimate.error for estimate in estimates]
        axes.bar(places, [e.mean for e in estimates], 0.4, yerr=errors, label=label, error_kw={"linewidth": 0.8})
    proposal = result.proposal
    axes.axvline(proposal.memory_layer, color="grey", linestyle=":", label=f"memory layer {proposal.memory_layer}")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="layer reading its own memory", ylabel="log-probability, nats a digit", xticks=list(layers))
    axes.tick_params(axis="x", labelsize="small")
    axes.legend()
    figure.savefig(path, dpi=150)
