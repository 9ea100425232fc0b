"""The engine and plain transformers give one answer to everything that a measurement asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlong_vllm.evaluation.models import ModelSpec, model_specs
from memlong_vllm.evaluation.opening import open_scorer
from memlong_vllm.evaluation.scoring import (
    RANDOM_EMBEDDER,
    EvaluationError,
    MemoryUse,
    Prompt,
    Scorer,
    ScorerSettings,
)

TOLERANCE = 1e-4
LENGTH = 700

Specs = dict[str, ModelSpec]


@pytest.fixture(scope="module")
def specs(model: Path) -> Specs:
    return {spec.label: spec for spec in model_specs(model, baselines=("full", "window"), random_retrieval=True)}


@pytest.fixture(scope="module")
def opened(specs: Specs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Scorer]]:
    """Scorers by label, engine and settings. One engine at a time; references are kept."""
    running: dict[tuple[str, str, str], Scorer] = {}

    def scorer(label: str, engine: str, memlong: dict[str, Any] | None = None) -> Scorer:
        key = label, engine, repr(memlong)
        if key not in running:
            for other in [key for key in running if key[1] == engine == "vllm"]:
                running.pop(other).close()
            scratch = tmp_path_factory.mktemp(f"{label}-{engine}")
            common: dict[str, Any] = {"memory_size": 512, "piece": 96, "batch": 2, "memlong": memlong or {}}
            settings = ScorerSettings(engine, "float32", LENGTH + 40, scratch, **common)
            running[key] = open_scorer(specs[label], settings)
        return running[key]

    yield scorer
    for held in running.values():
        held.close()


def both(opened: Callable[..., Scorer], label: str) -> tuple[Scorer, Scorer]:
    return opened(label, "vllm"), opened(label, "reference")


def prompts(tokens: list[int], *uses: MemoryUse) -> list[Prompt]:
    return [Prompt(tokens[900 * i : 900 * i + LENGTH], use) for i, use in enumerate(uses)]


USES = (MemoryUse(0), MemoryUse(128), MemoryUse(512), MemoryUse(512, top_k=1))


def test_log_probabilities(opened: Any, tokens: list[int]) -> None:
    engine, reference = both(opened, "memlong")
    same_text = [Prompt(tokens[:LENGTH], use) for use in USES]
    measured, expected = engine.logprobs(same_text), reference.logprobs(same_text)
    for ours, theirs in zip(measured, expected, strict=True):
        assert ours.shape == (LENGTH - 1,)
        assert np.abs(ours - theirs).max() <= TOLERANCE
    means = {round(float(values.mean()), 4) for values in measured}
    assert len(means) == len(USES), "memory makes a difference"


def test_continuations(opened: Any, tokens: list[int]) -> None:
    engine, reference = both(opened, "memlong")
    asked = prompts(tokens, *USES)
    assert engine.continuations(asked, 12) == reference.continuations(asked, 12)
    found = engine.continuations(asked, 1)
    assert [len(answer.retrieved or ()) for answer in found] == [0, 2, 2, 1]


def test_candidates(opened: Any, tokens: list[int]) -> None:
    engine, reference = both(opened, "memlong")
    asked, labels = prompts(tokens, *USES[:2]), [[5, 17, 300], [9, 4]]
    measured = engine.candidates(asked, labels)
    for ours, theirs, ids in zip(measured, reference.candidates(asked, labels), labels, strict=True):
        assert ours.shape == (len(ids),)
        assert np.abs(ours - theirs).max() <= TOLERANCE


def test_named_memories(opened: Any, tokens: list[int]) -> None:
    asked = [Prompt(tokens[:100], MemoryUse(0, read=("book",))), Prompt(tokens[:100], MemoryUse(0))]
    answers = []
    for scorer in both(opened, "memlong"):
        assert scorer.memorize("book", [tokens[2000:2335], tokens[3000:3050]]) == 20 + 3
        answers.append((scorer.candidates(asked, [[5, 6, 7]] * 2), scorer.continuations(asked, 4)))
        assert [answer.num_named for answer in answers[-1][1]] == [2, 0]
        scorer.forget("book")
    assert answers[0][1] == answers[1][1]
    assert np.abs(np.array(answers[0][0]) - np.array(answers[1][0])).max() <= TOLERANCE
    assert np.abs(answers[0][0][0] - answers[0][0][1]).max() > 0.01


def test_random_retrieval(opened: Any, tokens: list[int]) -> None:
    """As many chunks, others; and the same in the engine and the reference."""
    engine, reference = both(opened, "random")
    asked = prompts(tokens, *USES[2:])
    measured = engine.continuations(asked, 4)
    assert measured == reference.continuations(asked, 4)
    by_text = opened("memlong", "vllm").continuations(asked, 4)
    assert [len(answer.retrieved or ()) for answer in measured] == [len(answer.retrieved or ()) for answer in by_text]
    assert [answer.retrieved for answer in measured] != [answer.retrieved for answer in by_text]


def test_settings_of_a_deployment(opened: Any, tokens: list[int]) -> None:
    """Engine and reference take the same ones in place of the checkpoint's."""
    served = {"top_k": 1, "local_window": 96, "retriever_path": RANDOM_EMBEDDER}
    asked = prompts(tokens, MemoryUse(512), MemoryUse(512))
    (plain,) = opened("memlong", "reference").logprobs(asked[:1])
    engine, reference = (opened("memlong", name, served) for name in ("vllm", "reference"))
    answers = reference.continuations(asked, 4)
    assert engine.continuations(asked, 4) == answers
    assert [len(answer.retrieved or ()) for answer in answers] == [1, 1]
    (measured,), (expected,) = engine.logprobs(asked[:1]), reference.logprobs(asked[:1])
    assert np.abs(measured - expected).max() <= TOLERANCE
    assert np.abs(expected - plain).max() > 0.01


@pytest.mark.parametrize("label", ["full", "window"])
def test_baselines(opened: Any, tokens: list[int], label: str) -> None:
    """Stock vLLM and transformers' Llama; with the window alone, the model with its memory off."""
    engine, reference = both(opened, label)
    plain = [Prompt(tokens[:LENGTH])]
    (measured,), (expected,) = engine.logprobs(plain), reference.logprobs(plain)
    assert np.abs(measured - expected).max() <= TOLERANCE
    (without,) = opened("memlong", "reference").logprobs([Prompt(tokens[:LENGTH], MemoryUse(0))])
    difference = np.abs(measured - without)
    assert difference[:60].max() <= TOLERANCE
    assert (difference.max() <= TOLERANCE) == (label == "window")
    assert engine.continuations(plain, 5) == reference.continuations(plain, 5)


def test_models_without_memory_say_so(opened: Any, tokens: list[int]) -> None:
    for scorer in both(opened, "window"):
        with pytest.raises(EvaluationError, match="'window' has no memory"):
            scorer.memorize("book", [tokens[:300]])
        with pytest.raises(EvaluationError, match="'window' has no memory"):
            scorer.logprobs([Prompt(tokens[:50], MemoryUse(128))])
