"""Fine-tuning runs that are stopped and gone on with, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memlong_vllm.training.run_state import ResumeError, RunFolder
from memlong_vllm.training.trainable import TrainedParts
from memlong_vllm.training.trainer import Trainer
from memlong_vllm.training.validation import Validation
from tests.checkpoints import Checkpoints
from tests.training_run import JOINT, log_of, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def test_an_interrupted_run_goes_on_exactly(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.memlong(**JOINT)
    options = {"parts": TrainedParts(rank=2, alpha=4.0, dropout=0.1), "steps": 6, "schedule": "cosine"}
    whole = train(folder, tmp_path / "whole.safetensors", tokens, cache, **options)

    update = Trainer._update

    def interrupted(trainer: Trainer) -> dict:
        if trainer.step == 5:  # One step after the last save.
            raise KeyboardInterrupt
        return update(trainer)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "parts.safetensors", tokens, cache, **options)
    monkeypatch.undo()
    resumed = train(folder, tmp_path / "parts.safetensors", tokens, cache, **options)
    assert whole.tensors.keys() == resumed.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    logs = [
        [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in log_of(tmp_path / f"{name}.safetensors")]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_another_run_is_not_continued(checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    train(checkpoints.memlong(), output, tokens, cache, steps=2)
    with pytest.raises(ResumeError, match=r"settings\.learning_rate: [\d.e-]+ then, 0\.001 now.*restart"):
        train(checkpoints.memlong(), output, tokens, cache, steps=2, learning_rate=1e-3)
    train(checkpoints.memlong(), output, tokens, cache, steps=2, learning_rate=1e-3, restart=True)


def test_a_run_that_goes_on_keeps_what_was_better(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And writes it again, not the last, if the output was deleted."""
    output = tmp_path / "a.safetensors"
    best = train(checkpoints.memlong(), output, tokens, cache, steps=2)
    monkeypatch.setattr(Trainer, "validate", lambda trainer: Validation(99.0, None, 1))
    for _ in range(2):
        again = train(checkpoints.memlong(), output, tokens, cache, steps=4)
        assert again.digest() == best.digest()
        assert again.training["step"] == 2
        assert len(log_of(output)) == 4 + 3  # The validations after 0, 2 and 4 steps are in it.
        output.unlink()


def test_what_an_interruption_left_half_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open({"a": 1}, restart=False)
    folder.log({"step": 1})
    folder.open({"a": 1}, restart=False)
    assert not folder.log_file.exists()  # No state: the steps of the log will be taken again.
    folder.log({"step": 1, "validation": {"nll": 2.5}})
    (folder.folder / "state.previous").mkdir()
    folder.open({"a": 1}, restart=False)
    assert folder.has_state
    assert folder.lowest_validation() == 2.5
    assert folder.first_validation() is None
    leftover = folder.folder / "state.previous" / "shared.pt"
    leftover.parent.mkdir()
    leftover.touch()
    folder.open({"a": 1}, restart=False)  # It was being removed.
    folder.save({"step": 2}, {}, 0, lambda: None)
    assert folder.load(0) == ({"step": 2}, {})
    assert not leftover.parent.exists()
    (folder.folder / "run.json").write_text('{"a":')
    with pytest.raises(ResumeError, match=r"run\.json cannot be read .* choose another output or --restart"):
        folder.open({"a": 1}, restart=False)


def test_a_run_that_made_things_worse_says_so(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    for rate, is_worse in ((1e-2, False), (100.0, True)):
        said: list[str] = []
        output = tmp_path / f"{rate}.safetensors"
        parts = TrainedParts(rank=2, alpha=4.0, full=("norms",))
        train(checkpoints.memlong(), output, tokens, cache, say=said.append, learning_rate=rate, parts=parts)
        assert any("this run learned nothing of use" in text for text in said) == is_worse


def test_a_line_of_the_log_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "validation": {"nll": 2.0}})
    with folder.log_file.open("a") as file:
        file.write('{"step": 2, "validation": {"n')
    assert folder.lowest_validation() == 2.0
    folder.cut_log(1)
    folder.log({"step": 2})
    assert [json.loads(line)["step"] for line in folder.log_file.read_text().splitlines()] == [1, 2]


def test_more_steps_continue_a_finished_run(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    train(checkpoints.memlong(), output, tokens, cache, steps=2)
    train(checkpoints.memlong(), output, tokens, cache, steps=3)
    assert [entry["step"] for entry in log_of(output) if "loss" in entry] == [1, 2, 3]


def test_steps_may_not_be_added_where_rates_depend_on_them(
    checkpoints: Checkpoints, tokens: list[int], cache: Path, tmp_path: Path
) -> None:
    train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, cache, steps=2, schedule="cosine")
    with pytest.raises(ResumeError, match=r"settings\.steps: 2 then, 3 now"):
        train(checkpoints.memlong(), tmp_path / "a.safetensors", tokens, cache, steps=3, schedule="cosine")
