"""What a run's other models may be, and what its tables make of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.evaluation.models import ModelSpec, check_control, is_stripped, training_differences
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


def trained(with_memory: bool, steps: int = 100, **training: Any) -> dict[str, Any]:
    settings = {"with_memory": with_memory, "steps": steps, "save_every": steps}
    settings |= {} if with_memory else {"of_a_later_version": 1}
    return config(None) | {"memlong_adapter": {"training": {"settings": settings, "train": ["a"]} | training}}


@pytest.mark.parametrize(
    ("control", "differences"),
    [
        (trained(False), ()),
        (trained(False, steps=50), ("steps",)),
        (trained(False, steps=50, train=["b"]), ("steps", "texts")),
        (trained(False, settings="as in the paper"), ("not known",)),
        (config(None), ("not known",)),
    ],
)
def test_what_was_trained_otherwise_is_said(control: dict[str, Any], differences: tuple[str, ...]) -> None:
    assert training_differences(control, trained(True)) == differences


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
