"""Readers of one layer's memory: what is computed only from where two readings part."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from memlong_vllm.probe.backbone import Backbone
from memlong_vllm.probe.maps import MapFitter, ReaderMap
from memlong_vllm.probe.measures import PreparedTrial, measure_layers
from memlong_vllm.probe.readers import ReaderSearch
from memlong_vllm.probe.reading import score_answers
from memlong_vllm.probe.trials import Geometry, build_trials
from tests.checkpoints import Checkpoints, novel

GEOMETRY = Geometry(window=192, chunk_size=32, num_chunks=6, stride=64)
MEMORY_LAYER = 1


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def trials(checkpoints: Checkpoints) -> list[PreparedTrial]:
    backbone = Backbone(LlamaForCausalLM.from_pretrained(checkpoints.base(), dtype=torch.float32))
    built = build_trials(checkpoints.tokenizer, [novel()[:60_000]], GEOMETRY, num_trials=2, num_facts=2, seed=0)
    return [PreparedTrial(backbone, trial, GEOMETRY, facts_distract=False) for trial in built]


@pytest.fixture(scope="module")
def maps(trials: list[PreparedTrial], tokens: list[int]) -> dict[int, ReaderMap]:
    fitter = MapFitter(trials[0].backbone, [MEMORY_LAYER], GEOMETRY.window, GEOMETRY.chunk_size, 2)
    fitter.add([tokens[:320]])
    fitter.add([tokens[320:640]], unseen=True)
    return fitter.fit(0.1)[MEMORY_LAYER]


def test_layers_are_measured_as_if_from_the_start(trials: list[PreparedTrial]) -> None:
    measures = measure_layers(trials, silent)
    for layer in range(5):
        for trial, alone, without in zip(
            trials, measures.alone[layer].likelihood, measures.without[layer].likelihood, strict=True
        ):
            others = {other: memory for other, memory in trial.own.items() if other != layer}
            whole = [trial.score(trial.reader.read(read)) for read in ({layer: trial.own[layer]}, others)]
            assert float(alone) == pytest.approx(float(whole[0].likelihood.mean()), abs=1e-6)
            assert float(without) == pytest.approx(float(whole[1].likelihood.mean()), abs=1e-6)


def test_readers_are_measured_as_if_from_the_start(
    trials: list[PreparedTrial], maps: dict[int, ReaderMap]
) -> None:  # fmt: skip
    search = ReaderSearch(trials, MEMORY_LAYER, maps, silent)
    found = search.measure(max_layers=3)

    def whole(*layers: int) -> torch.Tensor:
        states = [m.trial.reader.read({n: m.memories[n] for n in layers}) for m in search.mapped]
        return search.scored(states).log_probability

    assert torch.allclose(found.every.log_probability, whole(1, 2, 3, 4), atol=1e-6)
    for layer in (2, 3, 4):
        assert torch.allclose(found.added[layer].log_probability, whole(1, layer), atol=1e-6)
        others = [other for other in (1, 2, 3, 4) if other != layer]
        assert torch.allclose(found.without[layer].log_probability, whole(*others), atol=1e-6)
    for choice in found.choices:
        assert torch.allclose(choice.reached.log_probability, whole(*choice.layers), atol=1e-6)
    assert found.own is found.choices[0].reached
    assert all(len(choice.layers) <= 3 and choice.layers[0] == 1 for choice in found.choices)
    assert [choice.layers for choice in search.measure(max_layers=1).choices] == [(1,)]
    best = max(float(choice.reached.log_probability.mean()) for choice in found.choices)
    assert float(found.best.reached.log_probability.mean()) == best


def test_the_last_layer_has_no_readers_but_itself(trials: list[PreparedTrial]) -> None:
    found = ReaderSearch(trials, 4, {}, silent).measure(max_layers=3)
    assert found.best.layers == (4,)


def test_who_knows_nothing_guesses(trials: list[PreparedTrial]) -> None:
    """All tokens alike: one of ten for each digit, one of the vocabulary for each token."""
    backbone, questions = trials[0].backbone, trials[0].questions
    output = torch.zeros(len(questions), max(len(q.token_ids) for q in questions), backbone.model.config.hidden_size)
    answers = score_answers(backbone, output, questions)
    for row, question in enumerate(questions):
        guess = -sum(math.log(len(rivals)) for rivals in question.rivals) / len(question.number)
        assert float(answers.log_probability[row]) == pytest.approx(guess, abs=1e-5)
        among_all = -len(question.answer) * math.log(backbone.model.config.vocab_size) / len(question.number)
        assert float(answers.likelihood[row]) == pytest.approx(among_all, abs=1e-5)
