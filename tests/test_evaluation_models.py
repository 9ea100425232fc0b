"""What a run's other models may be, and what its tables make of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms import current_platform

from memlong_vllm.evaluation.models import (
    ModelSpec,
    check_control,
    is_stripped,
    layer_differences,
    training_differences,
)
from memlong_vllm.evaluation.opening import check_heads
from memlong_vllm.evaluation.perplexity_report import summarise
from memlong_vllm.evaluation.runs import json_file
from memlong_vllm.evaluation.scoring import EvaluationError


def config(with_memory: bool | None, window: int = 64) -> dict[str, Any]:
    trained = (
        {} if with_memory is None else {"memlong_adapter": {"training": {"settings": {"with_memory": with_memory}}}}
    )
    return {"memlong": {"local_window": window}} | trained


def spec(label: str, kind: Any, content: dict[str, Any]) -> ModelSpec:
    return ModelSpec(label, Path("model"), Path("model"), kind, 64, config=content)


@pytest.mark.parametrize(
    ("content", "message"),
    [(config(True), "was trained with memory"), (config(False, 128), "has a local window of 128, --model one of 64")],
)
def test_a_control_is_the_same_training_without_memory(content: dict[str, Any], message: str) -> None:
    main = spec("memlong", "memlong", config(True))
    check_control(Path("control"), config(False), main)
    with pytest.raises(EvaluationError, match=message):
        check_control(Path("control"), content, main)


def record(with_memory: bool, steps: int = 100) -> dict[str, Any]:
    settings = {"with_memory": with_memory, "steps": steps, "save_every": steps}
    settings |= {} if with_memory else {"of_a_later_version": 1}
    return {"settings": settings, "train": ["a"]}


def trained(with_memory: bool, steps: int = 100, **training: Any) -> dict[str, Any]:
    return config(None) | {"memlong_adapter": {"training": record(with_memory, steps) | training}}


@pytest.mark.parametrize(
    ("control", "differences"),
    [
        (trained(False), ()),
        (trained(False, steps=50), ("steps",)),
        (trained(False, steps=50, train=["b"]), ("steps", "texts")),
        (trained(False, valid=["c"]), ("validation texts",)),
        (trained(False, settings="as in the paper"), ("not known",)),
        (trained(False, start={"digest": "b", "training": record(False)}), ("what it went on from",)),
        (config(None), ("not known",)),
    ],
)
def test_what_was_trained_otherwise_is_said(control: dict[str, Any], differences: tuple[str, ...]) -> None:
    assert training_differences(control, trained(True)) == differences


@pytest.mark.parametrize(
    ("start", "differences"),
    [
        ({"digest": "b", "training": record(False)}, ()),
        ({"digest": "b", "training": record(False, steps=7)}, ("steps of the training before",)),
        ("b", ()),  # As the first versions wrote it.
        (None, ("what it went on from",)),
    ],
)
def test_trainings_go_on_from_alike_ones(start: Any, differences: tuple[str, ...]) -> None:
    main = trained(True, start={"digest": "a", "training": record(True)})
    assert training_differences(trained(False, start=start), main) == differences


def test_a_control_never_had_memory() -> None:
    """Nor had what it went on from, or what was merged before."""
    main = spec("memlong", "memlong", config(True))
    for with_memory in (False, True):
        start = {"digest": "a", "training": record(with_memory)}
        merged = trained(False)
        merged["memlong_adapter"]["merged_before"] = start
        deeper = {"digest": "b", "training": record(False) | {"start": start}}
        for control in (trained(False, start=start), trained(False, start=deeper), merged):
            control |= {"memlong": {"local_window": 64}}
            if not with_memory:
                check_control(Path("control"), control, main)
                continue
            with pytest.raises(EvaluationError, match="was trained with memory"):
                check_control(Path("control"), control, main)


def test_what_was_merged_before_is_part_of_the_training() -> None:
    main, control = trained(True), trained(False)
    main["memlong_adapter"]["merged_before"] = {"digest": "a", "training": record(True)}
    assert training_differences(control, main) == ("what was merged before",)
    control["memlong_adapter"]["merged_before"] = main["memlong_adapter"]["merged_before"]
    assert training_differences(control, main) == ()


@pytest.mark.parametrize(
    ("block", "differences"),
    [
        ({"memory_layer": 2, "retrieval_layers": [4]}, ()),
        ({"memory_layer": 1, "retrieval_layers": [3]}, ("layers",)),
        ({"memory_layer": 2, "retrieval_layers": [2, 3]}, ("layers",)),
        (None, ()),
    ],
)
def test_a_control_of_other_layers_is_told_apart(block: dict[str, Any] | None, differences: tuple[str, ...]) -> None:
    main = {"memlong": {"memory_layer": 2, "retrieval_layers": [3]}}
    assert layer_differences({} if block is None else {"memlong": block}, main) == differences


@pytest.mark.skipif(not current_platform.is_cpu(), reason="elsewhere vLLM has backends for all sizes")
def test_baselines_that_vllm_has_no_attention_for_are_refused_at_once() -> None:
    check_heads(spec("window", "plain", {"head_dim": 64}))
    check_heads(spec("memlong", "memlong", {"head_dim": 100}))
    for shape in ({"head_dim": 100}, {"hidden_size": 3200, "num_attention_heads": 32}):
        with pytest.raises(EvaluationError, match=r"full: vLLM has no attention for heads of 100 .* 96, 112"):
            check_heads(spec("full", "plain", shape))


def test_models_that_were_never_trained_differ_in_nothing() -> None:
    assert training_differences(config(None), config(None)) == ()


def test_baselines_of_weights_trained_with_memory_are_known() -> None:
    assert is_stripped(spec("window", "plain", config(True)))
    assert not is_stripped(spec("window", "plain", config(False)))
    assert not is_stripped(spec("window", "plain", config(None)))
    assert not is_stripped(spec("memlong", "memlong", config(True)))


def test_results_do_not_take_the_place_of_their_table() -> None:
    assert json_file("a/b.json") == Path("a/b.json")
    with pytest.raises(argparse.ArgumentTypeError, match=r"must end with \.json"):
        json_file("table.md")


def test_differences_of_an_unfinished_run_are_of_the_same_stretches() -> None:
    def row(size: int, window: int, nll: float) -> dict[str, Any]:
        return {"model": "memlong", "text": "a", "window": window, "length": 64, "memory_size": size, "nll": nll}

    rows = [row(0, 0, 2.0), row(0, 1, 3.0), row(512, 0, 2.0)]
    content = json.loads(json.dumps({"models": {"memlong": {}}, "rows": rows}))
    off = next(cell for cell in summarise(content) if cell.line == ("memlong", 0))
    assert (off.nll, off.difference, off.num_paired) == (2.5, 0.0, 1)
