"""A probe's result as JSON and as Markdown, and the command that uses it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from typing import Any

from memlong_vllm.package_versions import package_versions
from memlong_vllm.probe.experiment import ProbeResult
from memlong_vllm.probe.measures import Estimate, Samples
from memlong_vllm.probe.readers import ReaderMeasures

GUESS = -math.log(10)
HEAD = "| layers reading | log-probability | among all tokens | accuracy |"
PACKAGES = ("memlong-vllm", "torch", "transformers")


def convert_settings(result: ProbeResult) -> dict[str, Any]:
    """Fields of the ``memlong`` block that stand for what was measured. Layers above the memory
    layer read through maps, so they come with adapters; the memory layer alone needs none."""
    proposal, geometry = result.proposal, result.geometry
    settings: dict[str, Any] = {
        "memory_layer": proposal.memory_layer,
        "retrieval_layers": list(proposal.retrieval_layers),
        "fusion": "joint",
    }
    if proposal.retrieval_layers != (proposal.memory_layer,):
        settings |= {"memory_adapter": "linear", "memory_adapter_width": result.settings.adapter_width}
    return settings | {
        "local_window": geometry.window,
        "chunk_size": geometry.chunk_size,
        "top_k": geometry.num_chunks,
        "retrieval_stride": geometry.stride,
    }


def convert_command(result: ProbeResult, base: str) -> str:
    """The ``convert`` line for a base model; a MemLong checkpoint's own base is not known to it."""
    words = ["memlong-vllm", "convert", base, "OUTPUT"]
    for name, value in convert_settings(result).items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += ["--set", f"{name}={text}"]
    return shlex.join(words)


def to_json(result: ProbeResult, model: str, texts: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured, as lists by trial too, so that other statistics can be made of it.

    Args:
        texts: digests of the texts, by name.
    """
    measures = result.layers
    rows = [
        {
            "layer": layer,
            "gain": asdict(measures.gain(layer)),
            "drop": asdict(measures.drop(layer)),
            "worth": asdict(measures.worth(layer)),
            "alone": _samples(measures.alone[layer]),
            "without": _samples(measures.without[layer]),
        }
        for layer in range(len(measures.alone))
    ]
    return {
        "model": model,
        "texts": texts,
        "versions": package_versions(PACKAGES),
        "settings": asdict(result.settings),
        "geometry": asdict(result.geometry) | {"context_tokens": result.geometry.context_tokens},
        "units": {
            "log_probability": f"of the answer's digits among numbers, nats a digit; a guess: {GUESS:.3f}",
            "likelihood": "of the answer's digits among all tokens, nats a digit",
            "accuracy": "share of the answer's tokens that are the most probable numbers",
            "error": "standard error over trials",
        },
        "none": _samples(measures.none),
        "every_layer": _samples(measures.every),
        "in_window": _samples(measures.ceiling),
        "layers": rows,
        "readers": [_readers(readers) for readers in result.readers],
        "proposal": asdict(result.proposal) | {"settings": convert_settings(result)},
    }


def _samples(samples: Samples) -> dict[str, Any]:
    return {
        "log_probability": asdict(Estimate.of(samples.log_probability)),
        "likelihood": asdict(Estimate.of(samples.likelihood)),
        "accuracy": asdict(Estimate.of(samples.accuracy)),
        "log_probability_by_trial": samples.log_probability.tolist(),
    }


def _readers(readers: ReaderMeasures) -> dict[str, Any]:
    return {
        "memory_layer": readers.memory_layer,
        "every_layer": _samples(readers.every),
        "choices": [{"layers": choice.layers, "reached": _samples(choice.reached)} for choice in readers.choices],
        "layers": [
            {
                "layer": layer,
                "key_r_squared": reader.key_r_squared,
                "value_r_squared": reader.value_r_squared,
                "gain": asdict(readers.gain(layer)),
                "drop": asdict(readers.drop(layer)),
                "added": _samples(readers.added[layer]),
                "without": _samples(readers.without[layer]),
            }
            for layer, reader in readers.maps.items()
        ],
    }


def to_markdown(result: ProbeResult, model: str) -> str:
    measures, settings, geometry = result.layers, result.settings, result.geometry
    memory = "all chunks" if settings.facts_distract else "the fact's chunk and those without facts"
    lines = [
        f"# Layers of {model} that copy from memory",
        "",
        f"{settings.trials} passages of {geometry.context_tokens} tokens with {geometry.num_facts(settings.facts)} "
        f"questions each; window {geometry.window}; of {geometry.num_chunks} chunks of {geometry.chunk_size} tokens "
        f"a question reads {memory}. Log-probability: of the answer's digits among numbers, nats a digit, ± standard "
        f"error over passages; a guess has {GUESS:.2f}. Accuracy: the answer's tokens that are the most probable "
        "numbers.",
        "",
        "## Layers reading their own memory",
        "",
        HEAD,
        "| --- | ---: | ---: | ---: |",
        _reading("none", measures.none),
        _reading("every layer", measures.every),
        _reading("none, the fact within the window", measures.ceiling),
        "",
        "| layer | gain alone | drop when left out | worth | accuracy alone | accuracy without |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layer in range(len(measures.alone)):
        cells = [_signed(measures.gain(layer)), _signed(measures.drop(layer)), _signed(measures.worth(layer))]
        cells += [f"{samples.accuracy.mean():.2f}" for samples in (measures.alone[layer], measures.without[layer])]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    for readers in result.readers:
        lines += ["", *_readers_table(readers)]
    lines += ["", f"Proposed: memory_layer {result.proposal.memory_layer}, retrieval_layers "]
    lines[-1] += f"{list(result.proposal.retrieval_layers)}: {result.proposal.reason}."
    return "\n".join(lines) + "\n"


def _readers_table(readers: ReaderMeasures) -> list[str]:
    lines = [
        f"## Layer {readers.memory_layer}'s memory, read by it and through fitted linear maps by layers above",
        "",
        HEAD,
        "| --- | ---: | ---: | ---: |",
        *(_reading(", ".join(map(str, choice.layers)), choice.reached) for choice in readers.choices),
        _reading("all from there up", readers.every),
    ]
    if not readers.maps:
        return lines
    lines += ["", "| layer | R² keys | R² values | gain beside the memory layer | drop when left out of all |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for above, reader in readers.maps.items():
        fit = f"{reader.key_r_squared:.2f} | {reader.value_r_squared:.2f}"
        lines.append(f"| {above} | {fit} | {_signed(readers.gain(above))} | {_signed(readers.drop(above))} |")
    return lines


def _reading(name: str, samples: Samples) -> str:
    estimate = Estimate.of(samples.log_probability)
    means = f"{samples.likelihood.mean():.3f} | {samples.accuracy.mean():.2f}"
    return f"| {name} | {estimate.mean:.3f} ± {estimate.error:.3f} | {means} |"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} ± {estimate.error:.3f}"
